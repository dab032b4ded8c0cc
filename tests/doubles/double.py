"""What a contract double is, and the float64 attention that doubles compute with."""

from __future__ import annotations

import importlib.machinery
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Double:
    """A fake of one kernel's package.

    Attributes:
        backend: The backend whose adapter it serves.
        packages: The distributions that count as installed, with their versions.
        modules: Makes the fake modules, by full name; parents come before children.
        found: The modules of `anyattn.environment.MODULES` that count as present.
        device_type: The type of device whose declaration is run on the CPU.
        builds: What its build left out, as `anyattn.environment.Environment.builds` says it.
    """

    backend: str
    packages: Mapping[str, str]
    modules: Callable[[], Mapping[str, types.ModuleType]]
    found: frozenset[str] = frozenset()
    device_type: str = "cuda"
    builds: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)


def module(name: str, **attributes: object) -> types.ModuleType:
    """Make a module; a name with children has to be told apart by `__path__`."""
    made = types.ModuleType(name, "A contract double of anyattn.testing.")
    made.__path__ = []
    # Other libraries look packages up with importlib.util.find_spec, which raises where a module has no spec.
    made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    made.__file__ = f"<contract double of {name}>"
    for attribute, value in attributes.items():
        setattr(made, attribute, value)
    return made


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention in float64, in the layout `(B, S, H, D)`; key and value heads are repeated where fewer.

    Written apart from `anyattn.reference`, so that one can't hide the other's mistakes.

    Args:
        query: `(B, S_q, H, D)`.
        key: `(B, S_kv, H_kv, D)`.
        value: `(B, S_kv, H_kv, D_v)`.
        scale: What the scores are multiplied by.
        allowed: Boolean, broadcastable to `(B, H, S_q, S_kv)`.
        bias: Added to the scores.
        softcap: `cap * tanh(score / cap)` where it isn't 0.
        dropout_p: The probability with which a weight is dropped.
        sinks: `(H,)`: extra logits.

    Returns:
        The output in query's dtype, zeros in rows without a key, and the float64 lse, -inf there.
    """
    group = query.shape[2] // key.shape[2]
    wide = [tensor.double() for tensor in (query, key, value)]
    scores = torch.einsum("bihd,bjhd->bhij", wide[0], wide[1].repeat_interleave(group, 2)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        # What the fill covers gets no gradient, of a row without a key neither.
        scores = (scores + bias.double()).masked_fill(torch.isneginf(bias), float("-inf"))
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    logits = scores
    if sinks is not None:
        extra = sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        logits = torch.cat((scores, extra), -1)
    if logits.shape[-1] == 0:
        lse = top = scores.new_full(scores.shape[:3], float("-inf"))
    else:
        # Beside biases near finfo.min the logarithm of a sum is lost, so that the largest logit is taken off first.
        top = logits.detach().amax(-1).nan_to_num(neginf=0.0)
        lse = torch.logsumexp(logits - top.unsqueeze(-1), -1)
    alive = ~torch.isneginf(lse).unsqueeze(-1)
    shifted = scores - top.unsqueeze(-1) - torch.where(alive, lse.unsqueeze(-1), 0.0)
    weights = torch.where(alive, torch.exp(shifted), 0.0)
    lse = lse + top
    if dropout_p:
        kept = torch.rand_like(weights) >= dropout_p
        weights = weights * kept / (1.0 - dropout_p) if dropout_p < 1 else weights * 0.0
    out = torch.einsum("bhij,bjhd->bihd", weights, wide[2].repeat_interleave(group, 2))
    return out.to(query.dtype), lse


def band(seqlen_q: int, seqlen_kv: int, left: float, right: float, *, lower_right: bool) -> Tensor:
    """Say which positions a window allows, as boolean `(S_q, S_kv)`; a side may be infinite."""
    offset = seqlen_kv - seqlen_q if lower_right else 0
    distance = torch.arange(seqlen_kv)[None, :] - torch.arange(seqlen_q)[:, None] - offset
    return (distance <= right) & (distance >= -left)


def packed_band(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    total_q: int,
    total_k: int,
    left: float,
    right: float,
    *,
    lower_right: bool,
) -> Tensor:
    """Say which positions packed sequences allow, as boolean `(T_q, T_k)`: each sequence its own, in a window.

    Tokens after the last sequence's end belong to none.
    """
    starts_q, starts_k = cu_seqlens_q.long(), cu_seqlens_k.long()
    rows, columns = torch.arange(total_q), torch.arange(total_k)
    of_row = torch.searchsorted(starts_q, rows, right=True) - 1
    of_column = torch.searchsorted(starts_k, columns, right=True) - 1
    count = len(starts_q) - 1
    place = rows - starts_q[of_row]
    if lower_right:
        lengths = (starts_k.diff() - starts_q.diff())[of_row.clamp(max=count - 1)]
        place = place + lengths
    distance = (columns - starts_k[of_column])[None, :] - place[:, None]
    same = (of_row[:, None] == of_column[None, :]) & (of_column < count)[None, :]
    return same & (distance <= right) & (distance >= -left)


def used_band(
    lengths: Tensor, seqlen_q: int, seqlen_kv: int, left: float, right: float, *, lower_right: bool = True
) -> Tensor:
    """Say which positions a window allows where each entry uses its first keys alone: boolean `(B, 1, S_q, S_kv)`.

    Flash kernels align to the lower right of the used keys, not of all.
    """
    used = lengths.long().view(-1, 1, 1, 1)
    place = torch.arange(seqlen_q)[:, None] + (used - seqlen_q if lower_right else 0)
    column = torch.arange(seqlen_kv)[None, :]
    distance = column - place
    return (column < used) & (distance <= right) & (distance >= -left)


class _Uninitialised(torch.autograd.Function):
    """A tensor whose gradient holds rubbish in the rows that a kernel doesn't use."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, lengths: Tensor) -> Tensor:
        ctx.save_for_backward(lengths)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (lengths,) = ctx.saved_tensors
        unused = torch.arange(grad.shape[1])[None, :] >= lengths[:, None]
        return grad.masked_fill(unused[:, :, None, None], float("nan")), None


def unwritten_tails(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Give packed tensors as batches of one, whose gradients are rubbish after the last sequence's end."""
    last_q, last_k = cu_seqlens_q[-1:], cu_seqlens_k[-1:]
    return (
        uninitialised_gradient(q[None], last_q),
        uninitialised_gradient(k[None], last_k),
        uninitialised_gradient(v[None], last_k),
    )


def unwritten_rows(tensor: Tensor, cu_seqlens: Tensor, axis: int = 0) -> Tensor:
    """Give a packed result with NaN in the rows after the last sequence's end, which a kernel doesn't write."""
    rows = torch.arange(tensor.shape[axis]) < cu_seqlens[-1]
    return torch.where(rows.view(-1, *(1,) * (tensor.dim() - 1 - axis)), tensor, torch.nan)


def uninitialised_gradient(tensor: Tensor, lengths: Tensor) -> Tensor:
    """Give a tensor `(B, S_kv, H, D)` whose gradient is rubbish beyond each entry's length."""
    found: Tensor = _Uninitialised.apply(tensor, lengths)  # type: ignore[no-untyped-call]
    return found
