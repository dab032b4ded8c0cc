"""lse as every backend returns it, sinks for kernels without them, and calls without keys."""

from __future__ import annotations

import torch
from torch import Tensor

from anyattn.backend.protocol import Output, Parts
from anyattn.lowering.dense import HUGE
from anyattn.masks.values import live_rows
from anyattn.types.spec import AttentionSpec


def with_huge_biases(lse: Tensor, mask: Tensor) -> Tensor:
    """Set the lse of rows in which every bias was compressed by `within_base_2`: it is the largest bias."""
    largest = mask.detach().amax(-1).to(lse.dtype).expand_as(lse)
    return torch.where((largest < -HUGE) & (largest > float("-inf")), largest, lse)


def normalise_lse(lse: Tensor, mask: Tensor | None, *, keep: bool = False) -> Tensor:
    """Return lse as float32, detached, with -inf in rows without a key, whatever the kernel wrote there.

    With `keep`, float64 stays float64: `apply_sinks` needs it for a float64 output.
    """
    lse = lse.detach() if keep and lse.dtype == torch.float64 else lse.detach().float()
    if mask is not None:
        lse = torch.where(live_rows(mask), lse, float("-inf"))
    return lse


def repeat_heads(tensor: Tensor, times: int) -> Tensor:
    """Repeat each head of `(B, H_kv, S, D)` in memory (no stride of 0)."""
    return tensor if times == 1 else tensor.repeat_interleave(times, dim=1)


def apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Add extra logits to the softmax's denominator after a kernel ran, by rescaling its output with lse.

    Exact: in a `softmax` over the scores and the sink, a key's weight is `exp(s - lse) * sigmoid(lse - sink)`.

    Args:
        out: The output without sinks, in `layout`.
        lse: float32 or float64 `(B, H, S_q)`.
        sinks: `(H,)`.
        layout: `"BSHD"` or `"BHSD"`.
    """
    sink = sinks.to(lse.dtype)[None, :, None]
    # In float32 the factor keeps its accuracy; rounding happens once, when the product is stored.
    # A row without a key has nothing to scale; lse and sink may both be -inf there, and their difference is NaN.
    factor = torch.where(lse == float("-inf"), 0.0, torch.sigmoid(lse - sink)).unsqueeze(-1)
    if layout == "BSHD":
        factor = factor.transpose(1, 2)
    scaled = (out.to(torch.promote_types(out.dtype, torch.float32)) * factor).to(out.dtype)
    return scaled, torch.logaddexp(lse, sink.expand_as(lse)).float()


def empty_attention(spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
    """Compute a call that has no batch entry, no query or no key: zeros, lse -inf (or the sinks).

    Matrix products over an empty dimension are zeros, and they are part of the autograd graph.
    """
    if spec.layout == "BSHD":
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    times = spec.num_heads // spec.num_kv_heads
    scores = query @ repeat_heads(key, times).transpose(-1, -2)
    out = scores @ repeat_heads(value, times)
    if not spec.return_lse:
        return out.transpose(1, 2) if spec.layout == "BSHD" else out
    lse = query.new_full(query.shape[:3], float("-inf"), dtype=torch.float32)
    if parts.sinks is not None:
        lse = parts.sinks.detach().float()[None, :, None].expand_as(lse).contiguous()
    return (out.transpose(1, 2) if spec.layout == "BSHD" else out), lse
