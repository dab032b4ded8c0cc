"""What these tests share: inputs, the truth in float64 written out by hand, and the way through Diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import anyattn

BACKENDS = ("native", "native_flash", "native_math", "flex")
"""Every exact backend that runs on a CPU; a test compares this with the declarations."""

Attend = Callable[..., Any]

IN_KWARGS = ("return_lse", "softcap", "window", "window_size")
"""Arguments that reach Diffusers' dispatcher through its `attention_kwargs`."""


def through_diffusers(backend: str, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **options: Any) -> Any:
    from diffusers.models import attention_dispatch

    given = {name: options.pop(name) for name in IN_KWARGS if name in options}
    options.setdefault("attention_kwargs", given or None)
    with anyattn.attention_backend(backend):
        return attention_dispatch.dispatch_attention_fn(query, key, value, mask, backend="anyattn", **options)


def tensors(
    batch: int = 2, seqlen_q: int = 6, seqlen_kv: int = 9, heads: int = 4, dim: int = 16, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = (seqlen_q, seqlen_kv, seqlen_kv)
    query, key, value = (torch.randn(batch, length, heads, dim, **options) for length in lengths)
    return query, key, value


def triangle(rows: int, columns: int, shift: int = 0) -> Tensor:
    """Causal, `(rows, columns)`: True where column <= row + shift."""
    return torch.arange(columns) <= torch.arange(rows)[:, None] + shift


def padding(batch: int, seqlen_kv: int, where: str) -> Tensor:
    """`(B, S_kv)`, True = attend; every entry but the first lacks three keys or more, on the side named."""
    keep = torch.ones(batch, seqlen_kv, dtype=torch.bool)
    for entry in range(1, batch):
        gone = 2 + entry
        first = {"right": seqlen_kv - gone, "left": 0, "hole": 2}[where]
        keep[entry, first : first + gone] = False
    return keep


def truth(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention in float64; `allowed` and `bias` broadcast to `(B, H, S_q, S_kv)`; rows without a key give zeros."""
    query, key, value = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.double()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return (torch.nan_to_num(scores.softmax(-1)) @ value).transpose(1, 2)


def assert_right(out: Tensor, wanted: Tensor, tol: float = 1e-5) -> None:
    assert out.shape == wanted.shape
    assert (out.double() - wanted).abs().max().item() < tol


def differ(first: Tensor, second: Tensor) -> bool:
    """Whether two truths are so far apart that a test can tell them."""
    return first.shape != second.shape or (first - second).abs().max().item() > 0.05
