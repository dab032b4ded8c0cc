"""Huge biases in inductor's kernels for CUDA, which lose rows that have no other.

The kernels multiply scores by log2(e) and subtract the largest product of the row, rounded, from the product. The GPU
does both in one fused step, so that the product isn't rounded there: every weight of the row gets the factor
`2 ** (product - rounded product)`. It cancels out while it can be held. From biases of some 1e9 on it can't: the row
becomes zeros or NaN, with float16 weights sooner.
Source: torch 2.11 to 2.13, `torch/_inductor/kernel/flex/templates/common.py.jinja`; seen on an H200.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FROM = float(1 << 27)
"""From this magnitude on biases are drawn together. Products are below 2^28 then, whose rounding error is at most 8:
the factor is between 2^-8 and 2^8, which float16 holds."""

_STEP = 32.0
"""The distance between two biases that differ once they are drawn together: the lesser one's weight is below 1e-13."""

_STEPS = 0.3 * FROM / _STEP / (128 - math.log2(FROM))
"""Steps per power of 2, some 12,000: biases of bfloat16 all stay apart, and those of float32 that differ by more than a
ten-thousandth. 0.3 keeps products below 2^28."""


def drawn_together(bias: Tensor) -> Tensor:
    """Bring huge biases `(...)` near FROM, in the order that they have; infinities stay."""
    size = bias.abs()
    # Whole steps are exact in float32, whatever is computed in one step with whatever else.
    steps = torch.floor((torch.log2(torch.clamp(size, min=FROM)) - math.log2(FROM)) * _STEPS)
    near = torch.where(size == float("inf"), size, FROM + _STEP * steps)
    return torch.where(size < FROM, bias, torch.where(bias < 0, -near, near))


def with_bias(score: Tensor, bias: Tensor) -> Tensor:
    """Add a bias to a float32 score, so that the kernel keeps rows whose every bias is huge.

    What is lost of a score beside a huge bias is lost here as well: a row of nothing but finfo.min attends evenly.
    Gradients of the score pass unchanged.
    """
    bias = bias.to(torch.float32)
    most = torch.finfo(torch.float32).max
    finite = torch.clamp(bias, -most, most)
    beside = (score + finite) - finite
    return torch.where(bias.abs() < FROM, score + bias, beside + drawn_together(bias))


def lse_with_bias(lse: Tensor, mask: Tensor) -> Tensor:
    """Give rows whose largest bias was drawn together the lse that they have with it as it was.

    Args:
        lse: float32 or float64 `(B, H, S_q)`, as the kernel gave it.
        mask: The whole additive mask, four dimensions that broadcast to `(B, H, S_q, S_kv)`.
    """
    largest = mask.detach().amax(-1).to(torch.float32).expand_as(lse)
    huge = (largest.abs() >= FROM) & torch.isfinite(largest)
    return torch.where(huge, ((lse - drawn_together(largest)) + largest).to(lse.dtype), lse)
