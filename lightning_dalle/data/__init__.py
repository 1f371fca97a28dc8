"""Captioned images: sources, filters, decoding, loading with exact resume, and the one datamodule of all models."""
