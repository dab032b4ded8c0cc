"""The error allowed of a quantised kernel: a fixed relative error, for values that its number format can hold.

A kernel that declares `quantised` is judged by the 2-norm per batch entry and head (`tolerance.QUANTISED`), and not by
a plain computation's error, which it exceeds by design. In int8 large scores lose all their digits with any kernel. So
a law applies only if a plain computation with inputs rounded in the same way stays within a share of the budget.
Contract doubles compute exactly, and are judged exactly, unless the adapter itself quantises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyattn.reference import tolerance
from anyattn.selection import registry
from anyattn.testing.cases.case import Inputs
from anyattn.testing.laws.measure import ORDERS, OVER, Bound, bounds, truths

INT8_MAX = 127.0
FP8_MAX = 448.0
"""The largest number of float8_e4m3fn."""

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The numbers of float4_e2m1; blocks of 16 share a step."""

SHARES = {"int8": 0.75, "fp8": 0.6, "fp4": 0.6}
"""The share of the budget that rounding the inputs may take, by number format. The rest is for the weights, which a
kernel rounds too: to fp16 or fp8 beside int8 scores, otherwise as coarsely as the inputs."""


def format_of(backend: str) -> str:
    """Return the number format that a backend's kernel quantises to, such as `"int8"`; empty if it doesn't."""
    found = registry.get(backend)
    if found is None or (found.is_double and not found.quantises):
        return ""
    loose = {caps.quantised for caps in found.declarations.values() if not caps.exact and caps.quantised}
    return next((kind for kind in ("fp4", "fp8") if kind in loose), next(iter(loose), ""))


@dataclass(frozen=True)
class NormBound(Bound):
    """A true value in float64, and what the 2-norm of a quantised result's error may be.

    Attributes:
        over: The dimensions that the norm is taken over.
    """

    over: tuple[int, ...] = ()

    def excess(self, result: Tensor, slack: float = 1.0) -> float:
        """Compute the worst norm of a result's error in multiples of what is allowed."""
        return tolerance.norm_excess(result.detach(), self.truth, self.allowed * slack, over=self.over)

    def apart(self, one: Tensor, other: Tensor) -> float:
        """Compute how far apart two results are that should be equal; each may be one budget off the truth."""
        return tolerance.norm_excess(one.detach(), other.detach(), self.allowed * 2, over=self.over)


def bounds_for(backend: str, inputs: Inputs, *, gradients: bool = False, orders: int = ORDERS) -> dict[str, Bound]:
    """Compute the bounds of a backend's results: those of a plain computation, or of its number format."""
    if not format_of(backend):
        return bounds(inputs, gradients=gradients, orders=orders)
    return norm_bounds(inputs, gradients=gradients)


def norm_bounds(inputs: Inputs, *, gradients: bool = False) -> dict[str, Bound]:
    """Compute the truth and the budget of a quantised kernel's results."""
    found: dict[str, Bound] = {}
    for name, truth in truths(inputs, gradients).items():
        over = OVER[name]
        found[name] = NormBound(truth, tolerance.quantised_budget(truth, over=over, is_lse=name == "lse"), over)
    return found


def holds(inputs: Inputs, kind: str) -> bool:
    """Whether a number format can hold a case's values: rounding them stays within its share of the budget."""
    out, lse = plain(inputs, kind)
    known = norm_bounds(inputs)
    return all(known[name].excess(found, slack=SHARES[kind]) <= 1 for name, found in (("out", out), ("lse", lse)))


def plain(inputs: Inputs, kind: str) -> tuple[Tensor, Tensor]:
    """Compute in float64 with inputs rounded in the coarsest way for the kind.

    For `"fp8"` and `"fp4"` query, key and value are rounded to that. For `"int8"` query and key are, with one step for
    each batch entry and head. The keys' mean is subtracted first, which shifts all scores of a row equally
    (SageAttention, Zhang et al., arXiv:2410.02367).
    """
    case = inputs.case
    query, key, value = (inputs.bshd(t).detach().double() for t in (inputs.query, inputs.key, inputs.value))
    mine = inputs.detached().replace(case=case.replace(layout="BSHD"))
    near, moved = rounded(query, key, value, kind, centred=case.softcap is None)
    out, lse = mine.replace(query=near[0], key=near[1], value=near[2]).refer()
    return out, lse + case.factor * moved


def rounded(
    query: Tensor, key: Tensor, value: Tensor, kind: str, *, centred: bool = True
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Round a call's inputs `(B, S, H, D)` to a number format, as `plain` documents.

    Args:
        query: In float64, as key and value.
        key: At least one.
        value: Of the same length.
        kind: `"int8"`, `"fp8"` or `"fp4"`.
        centred: Whether int8 takes the mean off the keys.

    Returns:
        The three, and what every score of a row `(B, H, S_q)` has lost by it, before the scale.
    """
    lost = query.new_zeros(query.shape[0], query.shape[2], query.shape[1])
    if kind in ("fp8", "fp4"):
        as_kind = as_fp8 if kind == "fp8" else as_fp4
        return (as_kind(query), as_kind(key), as_kind(value)), lost
    mean = key.mean(1, keepdim=True) if centred else torch.zeros_like(key[:, :1])
    moved = mean.repeat_interleave(query.shape[2] // key.shape[2], 2)
    return (as_int8(query), as_int8(key - mean), value), lost + (query * moved).sum(-1).transpose(1, 2)


def as_int8(tensor: Tensor) -> Tensor:
    """Round (B, S, H, D) to 255 steps, for each batch entry and head."""
    step = (tensor.abs().amax((1, 3), keepdim=True) / INT8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (tensor / step).round() * step


def as_fp8(tensor: Tensor) -> Tensor:
    """Round (B, S, H, D) to float8_e4m3fn, scaled for each batch entry and head."""
    step = (tensor.abs().amax((1, 3), keepdim=True) / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return (tensor / step).to(torch.float8_e4m3fn).to(tensor.dtype) * step


def as_fp4(tensor: Tensor) -> Tensor:
    """Round (B, S, H, D), D a multiple of 16, to float4_e2m1, scaled for each 16 numbers along D."""
    blocks = tensor.unflatten(-1, (-1, 16))  # type: ignore[no-untyped-call]
    step = (blocks.abs().amax(-1, keepdim=True) / FP4[-1]).clamp_min(torch.finfo(torch.float32).tiny)
    grid = torch.tensor(FP4, dtype=tensor.dtype, device=tensor.device)
    nearest = ((blocks / step).abs().unsqueeze(-1) - grid).abs().argmin(-1)
    rounded: Tensor = (grid[nearest] * blocks.sign() * step).flatten(-2)
    return rounded
