"""Exact tensor conversions that adapters share."""
