"""Filters: which records are kept, and why the others are rejected."""
