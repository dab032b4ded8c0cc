"""The shipped conformance suite: the laws of a backend, run against any backend on any machine."""
