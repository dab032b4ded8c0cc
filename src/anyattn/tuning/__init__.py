"""Measuring kernels on this machine: their times, and whether their results are right."""
