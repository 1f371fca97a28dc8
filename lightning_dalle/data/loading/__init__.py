"""Loading of records for training: their order, their batches, and exact resume in the middle of an epoch."""
