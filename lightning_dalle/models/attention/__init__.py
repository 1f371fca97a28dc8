"""Attention: the paper's patterns, the kernels that compute them, and the choice of a kernel."""
