"""Callbacks that the configs name."""
