"""LightningModules: which model, which loss, when, and logged as what."""
