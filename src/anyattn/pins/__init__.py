"""Backends of single modules, in force while their attention layers run."""
