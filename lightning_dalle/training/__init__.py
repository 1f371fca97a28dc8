"""LightningModules, callbacks and plugins for training."""
