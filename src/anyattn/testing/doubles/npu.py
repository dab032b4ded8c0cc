"""A double of torch_npu's fused attention.

Source: op-plugin's `op_plugin_functions.yaml` (517f2e7d), and the API document in torch_npu 2.14. No NPU was run.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anyattn.testing.doubles.double import Double, attend, band, module

_MOST = 2147483647
_COMPRESSED = 2048


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = _MOST,
    next_tockens: int = _MOST,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """Attention in the layout BSND or BNSD; `atten_mask` says True for what is hidden."""
    if input_layout not in ("BSND", "BNSD") or actual_seq_qlen is not None or actual_seq_kvlen is not None:
        raise NotImplementedError("the double has the layouts BSND and BNSD alone")
    if pse is not None or padding_mask is not None or prefix is not None or sink is not None:
        raise NotImplementedError("the double has no pse, padding_mask, prefix and sink")
    if input_layout == "BNSD":
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    _check(query, key, value, head_num, keep_prob)
    hidden = _hidden(query, key, atten_mask, sparse_mode, pre_tockens, next_tockens)
    dead = None if hidden is None else hidden.expand(*_sizes(query, key)).all(-1)
    allowed = None if hidden is None else ~hidden
    out, lse = attend(query, key, value, scale=scale, allowed=allowed, dropout_p=1.0 - keep_prob)
    lse = lse.detach()
    if dead is not None and bool(dead.any()):
        # Nobody has said what is there; without `inner_precise=2` other rows lose precision too.
        poison = math.nan if inner_precise != 2 else 7.0
        out = torch.where(dead.transpose(1, 2).unsqueeze(-1), out * math.nan + poison, out)
        out = out if inner_precise == 2 else out * math.nan
        lse = lse.masked_fill(dead, 3.0)
    largest, total = _as_pair(lse)
    out = out if input_layout == "BSND" else out.transpose(1, 2)
    return out, largest, total, torch.empty(0), 0, 0, 0


def _sizes(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
    return query.shape[0], query.shape[2], query.shape[1], key.shape[1]


def _as_pair(lse: Tensor) -> tuple[Tensor, Tensor]:
    """Split lse into the two float32 tensors (B, N, S_q, 8) whose `max + ln(sum)` it is."""
    base = lse.floor().float()
    total = (lse - base.double()).exp().float()
    wide = (*lse.shape, 8)
    return base.unsqueeze(-1).expand(wide).contiguous(), total.unsqueeze(-1).expand(wide).contiguous()


def _check(query: Tensor, key: Tensor, value: Tensor, head_num: int, keep_prob: float) -> None:
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32) or not query.dtype == key.dtype == value.dtype:
        raise RuntimeError("query, key and value must be float16, bfloat16 or float32, and alike")
    if query.shape[2] != head_num:
        raise RuntimeError("head_num must be query's")
    if not 1 <= head_num <= 256 or head_num % key.shape[2]:
        raise RuntimeError("N must be in [1, 256], and a multiple of key's")
    if not 1 <= query.shape[-1] <= 768 or key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        raise RuntimeError("D must be in [1, 768], and key and value of one shape")
    if not 0 < keep_prob <= 1:
        raise RuntimeError("keep_prob must be in (0, 1]")


def _hidden(
    query: Tensor, key: Tensor, mask: Tensor | None, sparse_mode: int, pre_tockens: int, next_tockens: int
) -> Tensor | None:
    if mask is None:
        return None  # sparse_mode, pre_tockens and next_tockens are then ignored
    if mask.dtype not in (torch.bool, torch.uint8):
        raise RuntimeError("atten_mask must be bool or uint8")
    batch, heads, rows, keys = _sizes(query, key)
    if sparse_mode in (2, 3):
        if tuple(mask.shape) != (_COMPRESSED, _COMPRESSED):
            raise RuntimeError("sparse_mode 2 and 3 take the compressed mask of 2048 x 2048")
        if not torch.equal(mask.bool(), torch.ones_like(mask, dtype=torch.bool).triu(1)):
            return torch.zeros(rows, keys, dtype=torch.bool)  # a wrong mask gives a wrong result, without a word
        return ~band(rows, keys, math.inf, 0, lower_right=sparse_mode == 3)
    if sparse_mode not in (0, 1):
        raise NotImplementedError("the double has the sparse modes 0 to 3")
    shapes = ((batch, heads, rows, keys), (batch, 1, rows, keys), (1, 1, rows, keys), (rows, keys))
    if tuple(mask.shape) not in shapes:
        raise RuntimeError(f"atten_mask must have one of the shapes {shapes}, not {tuple(mask.shape)}")
    hidden = mask.bool()
    if sparse_mode == 0:
        # What lies outside pre_tockens and next_tockens isn't computed, whatever the mask says.
        hidden = hidden | ~band(rows, keys, pre_tockens, next_tockens, lower_right=False)
    return hidden


def _modules() -> Mapping[str, types.ModuleType]:
    functions: dict[str, Any] = {"npu_fusion_attention": npu_fusion_attention}
    return {"torch_npu": module("torch_npu", __version__="2.9.0", **functions)}


DOUBLE = Double("npu", {"torch-npu": "2.9.0"}, _modules, device_type="npu")
