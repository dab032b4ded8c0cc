"""The definition of attention in plain torch and float64, and the error that a result may have."""

from anyattn.reference.definition import allowed_positions, attention

__all__ = [
    "allowed_positions",
    "attention",
]
