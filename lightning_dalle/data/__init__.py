"""Captioned pictures: sources, and the one datamodule that every model trains on."""
