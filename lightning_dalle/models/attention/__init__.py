"""Attention: the paper's patterns, and the kernels that compute them."""
