"""What attention is, in plain torch and float64, and how near to it a result has to be."""

from anyattn.reference.definition import allowed_positions, attention

__all__ = [
    "allowed_positions",
    "attention",
]
