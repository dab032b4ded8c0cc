"""Huge biases in inductor's kernels for CUDA, which lose rows with only huge biases.

The kernels multiply scores by log2(e), and subtract the row's largest product, rounded. The GPU does both in one fused
step, which doesn't round the product: every weight of the row gets the factor `2 ** (product - rounded product)`. It
cancels out unless it overflows. From biases of about 1e9 on it does: the row becomes zeros or NaN, with float16 weights
sooner.
Source: torch 2.11 to 2.13, `torch/_inductor/kernel/flex/templates/common.py.jinja`; seen on an H200.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FROM = float(1 << 27)
"""Biases of at least this magnitude are compressed. Products are then below 2^28, whose rounding error is at most 8:
the factor is between 2^-8 and 2^8, which float16 can represent."""

_STEP = 32.0
"""The least distance between two different compressed biases: the lesser one's weight is below 1e-13."""

_STEPS = 0.3 * FROM / _STEP / (128 - math.log2(FROM))
"""Steps per power of 2, about 12,000: different biases of bfloat16 stay different, and those of float32 if they differ
by more than a ten-thousandth. With 0.3, products are below 2^28."""


def compressed(bias: Tensor) -> Tensor:
    """Compress huge biases `(...)` towards FROM, in the same order; infinities stay."""
    size = bias.abs()
    # Whole steps are exact in float32, with or without fused operations.
    steps = torch.floor((torch.log2(torch.clamp(size, min=FROM)) - math.log2(FROM)) * _STEPS)
    near = torch.where(size == float("inf"), size, FROM + _STEP * steps)
    return torch.where(size < FROM, bias, torch.where(bias < 0, -near, near))


def with_bias(score: Tensor, bias: Tensor) -> Tensor:
    """Add a bias to a float32 score, so that the kernel doesn't lose rows with only huge biases.

    Beside a huge bias the score is rounded as in plain addition: a row filled with finfo.min attends uniformly.
    Gradients of the score pass unchanged.
    """
    bias = bias.to(torch.float32)
    most = torch.finfo(torch.float32).max
    finite = torch.clamp(bias, -most, most)
    beside = (score + finite) - finite
    return torch.where(bias.abs() < FROM, score + bias, beside + compressed(bias))


def lse_with_bias(lse: Tensor, mask: Tensor) -> Tensor:
    """Correct the lse of rows whose largest bias was compressed.

    Args:
        lse: float32 or float64 `(B, H, S_q)`, as the kernel returned it.
        mask: The whole additive mask, four dimensions that broadcast to `(B, H, S_q, S_kv)`.
    """
    largest = mask.detach().amax(-1).to(torch.float32).expand_as(lse)
    huge = (largest.abs() >= FROM) & torch.isfinite(largest)
    return torch.where(huge, ((lse - compressed(largest)) + largest).to(lse.dtype), lse)
