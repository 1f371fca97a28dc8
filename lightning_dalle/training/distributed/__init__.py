"""Sharding and gradient compression."""
