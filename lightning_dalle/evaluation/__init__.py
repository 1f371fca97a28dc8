"""Numbers that measure a model."""
