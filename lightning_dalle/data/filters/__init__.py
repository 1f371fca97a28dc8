"""Filters: which records are used for training, and why the others are rejected."""
