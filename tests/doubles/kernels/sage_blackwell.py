"""A double of SageAttention 3's function from the Hub, with what it drops without a word.

Source: the kernel's `sageattn3_blackwell` and Diffusers 0.42.1, by reading; nobody ran it for this. What is quantised
there is not here: a double proves the adapter, and so computes exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from doubles.double import attend, band


def sageattn3_blackwell(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    per_block_mean: bool = True,
    **kwargs: Any,
) -> Tensor:
    """Attend over `(B, H, S, D)`: no mask, no scale but D**-0.5, whatever is passed; `k` is written to.

    Causal attention with lengths that differ is NaN here: what the real one makes of it isn't known.
    """
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise RuntimeError("q, k and v must all be fp16 or all bf16")
    if q.shape[-1] not in (64, 128) or v.shape[-1] != q.shape[-1]:
        raise RuntimeError("the head dimension must be 64 or 128")
    if q.shape[1] != k.shape[1]:
        raise RuntimeError("as many key heads as query heads are needed")
    if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()):
        raise RuntimeError("q, k and v must be contiguous")
    with torch.no_grad():
        query, key, value = (tensor.detach().transpose(1, 2) for tensor in (q, k.clone(), v))
        k -= k.mean(2, keepdim=True)
        lengths = query.shape[1], key.shape[1]
        allowed = band(*lengths, float("inf"), 0, lower_right=False) if is_causal else None
        out, _ = attend(query, key, value, scale=q.shape[-1] ** -0.5, allowed=allowed)
        if is_causal and lengths[0] != lengths[1]:
            out.fill_(torch.nan)
    return out.transpose(1, 2)
