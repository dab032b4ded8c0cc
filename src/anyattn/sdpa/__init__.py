"""Torch's own attention function, replaced while a block or a pin asks for it."""
