"""The state of this process: which distributions are installed, and whether a tracer or transform runs."""
