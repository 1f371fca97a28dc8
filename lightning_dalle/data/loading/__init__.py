"""Loading: which record is used when, resumable to the record, and how records become batches."""
