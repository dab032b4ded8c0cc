"""Kernels known to be wrong, by backend, version and call."""
