"""How large an error may be: derived from a plain computation in the same dtype, never from a table.

The budget of a result is twice the error that a plain implementation (`anyattn.reference` computing in the call's
own dtype) makes against float64, plus a rounding band of two units in the last place of the largest true value. Both
are computed per (batch, head), so one large head doesn't excuse the others. FlashAttention's own tests compare with a
same-precision PyTorch run by this rule (Dao et al., arXiv:2205.14135, test suite).
"""

from __future__ import annotations

import torch
from torch import Tensor

SLACK = 2.0
"""How many times the plain implementation's error is allowed."""

BAND = 2.0
"""How many units in the last place of the largest true value are allowed besides."""


def plain_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the plain computation: the call's; float32 for float64, since the truth is float64."""
    return torch.float32 if dtype == torch.float64 else dtype


def refined(truth: Tensor, plain: Tensor, dtype: torch.dtype) -> Tensor:
    """Estimate the plain float64 result from the float32 one: errors scale with the unit roundoff.

    They are doubled, since the truth is a float64 computation too. For other dtypes `plain` is returned unchanged.
    """
    if dtype != torch.float64:
        return plain
    finer = 2 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return torch.where(torch.isfinite(truth), truth + (plain.double() - truth) * finer, truth)


def budget(truth: Tensor, plain: Tensor, dtype: torch.dtype, *, over: tuple[int, ...]) -> Tensor:
    """Compute the largest error allowed.

    Args:
        truth: The result in float64.
        plain: The plain implementation's result in `dtype`.
        dtype: The dtype of the call.
        over: The dimensions that share one budget; the others each have their own.

    Returns:
        float64, broadcastable to `truth`.
    """
    finite = torch.isfinite(truth)
    error = torch.where(finite, (plain.double() - truth).abs(), 0.0)
    error = torch.nan_to_num(error, nan=0.0, posinf=0.0)
    size = torch.where(finite, truth.abs(), 0.0)
    if truth.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=truth.device)
    eps = torch.finfo(dtype).eps
    return SLACK * error.amax(over, keepdim=True) + BAND * eps * size.amax(over, keepdim=True)


def lse_budget(truth: Tensor, plain: Tensor, dtype: torch.dtype, *, over: tuple[int, ...]) -> Tensor:
    """Compute the largest error allowed of a log-sum-exp.

    It is stored as float32 whatever the call's dtype. It is the logarithm of a sum: a relative error of the sum is an
    absolute one of its logarithm, so the band doesn't vanish for an lse near zero.

    Args:
        truth: As for `budget`.
        plain: As for `budget`.
        dtype: As for `budget`.
        over: As for `budget`.
    """
    stored = torch.float32 if dtype == torch.float64 else dtype
    return budget(truth, plain, stored, over=over) + BAND * torch.finfo(stored).eps


def excess(result: Tensor, truth: Tensor, allowed: Tensor) -> float:
    """Compute the worst error as a multiple of its budget; above 1 is wrong, and a NaN counts as inf.

    Infinities must be equal, as in the lse of a row without a key.
    """
    if result.shape != truth.shape:
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    result = result.double()
    same_infinity = torch.isinf(truth) & (result == truth)
    error = torch.where(same_infinity, 0.0, (result - truth).abs())
    tiny = torch.finfo(torch.float64).tiny
    ratio = torch.where(error == 0, 0.0, error / allowed.clamp_min(tiny))
    return float(torch.nan_to_num(ratio.detach(), nan=float("inf"), posinf=float("inf")).amax())


QUANTISED = 0.1
"""The relative error, in the 2-norm, from which a kernel that computes in int8 or fp8 counts as wrong.

SageAttention 2 (int8 scores, fp8 weights) has 0.03 for normally distributed inputs, on an H100. For a log-sum-exp it is
an absolute error, as in `lse_budget`.
"""


def quantised_budget(truth: Tensor, *, over: tuple[int, ...], is_lse: bool = False) -> Tensor:
    """Compute the largest 2-norm, over some dimensions, that a quantised kernel's error may have."""
    finite = torch.where(torch.isfinite(truth), truth.double(), 0.0)
    if is_lse:
        finite = torch.ones_like(finite)
    norm: Tensor = torch.linalg.vector_norm(finite, dim=over, keepdim=True)
    return QUANTISED * norm


def norm_excess(result: Tensor, truth: Tensor, allowed: Tensor, *, over: tuple[int, ...]) -> float:
    """Compute the worst 2-norm of an error as a multiple of its budget; infinities must be equal, as in `excess`."""
    if result.shape != truth.shape:
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    same_infinity = torch.isinf(truth) & (result == truth)
    error = torch.where(same_infinity, 0.0, result.double() - truth.double())
    size = torch.linalg.vector_norm(error, dim=over, keepdim=True)
    ratio = torch.where(size == 0, 0.0, size / allowed.clamp_min(torch.finfo(torch.float64).tiny))
    return float(torch.nan_to_num(ratio.detach(), nan=float("inf"), posinf=float("inf")).amax())
