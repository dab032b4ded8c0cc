"""A double of ffpa-attn's Triton operator.

Source: `ffpa_attn/triton/__init__.py` and `_ffpa_fwd.py` of ffpa-attn 0.2.4.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping

import torch
from torch import Tensor

from doubles.double import Double, attend, band, module

_SCHEMA = (
    "_fwd_triton(Tensor q, Tensor k, Tensor v, Tensor? attn_bias, float softmax_scale, int causal, int autotune, "
    "int autotune_mode_is_max, float dropout_p, int philox_seed, int philox_offset, int enable_tma, int enable_ws) "
    "-> (Tensor o, Tensor softmax_lse)"
)
_LIBRARY = torch.library.Library("ffpa_attn", "FRAGMENT")
if not hasattr(torch.ops.ffpa_attn, "_fwd_triton"):
    _LIBRARY.define(_SCHEMA)


def fwd_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_bias: Tensor | None,
    softmax_scale: float,
    causal: int,
    autotune: int,
    autotune_mode_is_max: int,
    dropout_p: float,
    philox_seed: int,
    philox_offset: int,
    enable_tma: int,
    enable_ws: int,
) -> tuple[Tensor, Tensor]:
    """Attend over `(B, H, S, D)`; causal is aligned to the lower right, lse is padded to a multiple of 128 queries."""
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise AssertionError("q, k and v must all be fp16 or all bf16")
    if q.shape[-1] > 1024:
        raise ValueError("Triton forward supports headdim <= 1024")
    if attn_bias is not None or dropout_p:
        raise NotImplementedError("the double has no bias and no dropout")
    scale = softmax_scale or 1 / math.sqrt(q.shape[-1])
    lengths = q.shape[2], k.shape[2]
    allowed = band(*lengths, math.inf, 0, lower_right=True) if causal else None
    query, key, value = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out, lse = attend(query, key, value, scale=scale, allowed=allowed)
    if causal and lengths[1] < lengths[0]:
        out = out.fill_(torch.nan)  # the package refuses it before the operator
    padded = torch.full((*q.shape[:2], -(-lengths[0] // 128) * 128), torch.nan)
    padded[..., : lengths[0]] = lse.float()
    found = torch.empty_like(q)
    found.copy_(out.transpose(1, 2))
    return found, padded


_LIBRARY.impl("_fwd_triton", fwd_triton, "CPU")


@torch.library.register_fake("ffpa_attn::_fwd_triton", lib=_LIBRARY, allow_override=True)
def _(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((*q.shape[:2], -(-q.shape[2] // 128) * 128), dtype=torch.float32)


def _modules() -> Mapping[str, types.ModuleType]:
    return {"ffpa_attn": module("ffpa_attn"), "ffpa_attn.triton": module("ffpa_attn.triton")}


DOUBLE = Double("ffpa", {"ffpa-attn": "0.2.4"}, _modules, frozenset(("ffpa_attn",)))
