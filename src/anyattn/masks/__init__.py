"""Mask objects, what they are made of, and what is known of their values."""

from anyattn.masks.objects import (
    Align,
    Bias,
    Block,
    Boolean,
    Causal,
    KeyLengths,
    KeyPadding,
    Mask,
    Pattern,
    SlidingWindow,
    document,
    frame_causal,
    from_function,
    join_patterns,
    prefix_lm,
)

__all__ = [
    "Align",
    "Bias",
    "Block",
    "Boolean",
    "Causal",
    "KeyLengths",
    "KeyPadding",
    "Mask",
    "Pattern",
    "SlidingWindow",
    "document",
    "frame_causal",
    "from_function",
    "join_patterns",
    "prefix_lm",
]
