"""Policies: which backend and precision each attention layer gets, by its role, name, index and denoising step."""
