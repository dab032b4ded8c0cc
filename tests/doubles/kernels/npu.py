"""A double of torch_npu's fused attention.

Source: op-plugin's `op_plugin_functions.yaml` (517f2e7d), and the API document in torch_npu 2.14; for how softmax's
maximum and sum are stored in the layout TND also MindSpeed (`flatten_softmax`). No NPU was run.
"""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from doubles.double import Double, attend, band, module, packed_band

_MOST = 2147483647
_COMPRESSED = 2048
_MOST_PACKED = 1024


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
    """Attention in the layout BSND, BNSD or TND; `atten_mask` says True for what is hidden."""
    if pse is not None or padding_mask is not None or prefix is not None or sink is not None:
        raise NotImplementedError("the double has no pse, padding_mask, prefix and sink")
    if input_layout == "TND":
        options = (atten_mask, scale, keep_prob, sparse_mode, softmax_layout)
        return _packed(query, key, value, head_num, actual_seq_qlen, actual_seq_kvlen, *options)
    if input_layout not in ("BSND", "BNSD") or actual_seq_qlen is not None or actual_seq_kvlen is not None:
        raise NotImplementedError("the double has the layouts BSND, BNSD and TND, and lengths for TND alone")
    if softmax_layout:
        raise RuntimeError("softmax_layout is for the layout TND")
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


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    lengths_q: list[int] | None,
    lengths_k: list[int] | None,
    mask: Tensor | None,
    scale: float,
    keep_prob: float,
    sparse_mode: int,
    softmax_layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """Attend over `(T, N, D)`; what a sequence with one side empty gets is rubbish, in all of the call."""
    query, key, value = query[None], key[None], value[None]
    _check(query, key, value, head_num, keep_prob)
    ends_q, ends_k = (_ends(lengths, tensor.shape[1]) for lengths, tensor in ((lengths_q, query), (lengths_k, key)))
    starts_q, starts_k = (torch.tensor([0, *ends], dtype=torch.int32) for ends in (ends_q, ends_k))
    if len(ends_q) != len(ends_k):
        raise RuntimeError("actual_seq_qlen and actual_seq_kvlen must be of one length")
    right, lower_right = math.inf, False
    if mask is not None:
        if sparse_mode not in (2, 3):
            raise NotImplementedError("the double has the sparse modes 2 and 3 for TND")
        right, lower_right = (0, sparse_mode == 3) if _is_compressed(mask) else (math.inf, False)
    allowed = packed_band(starts_q, starts_k, query.shape[1], key.shape[1], math.inf, right, lower_right=lower_right)
    out, lse = attend(query, key, value, scale=scale, allowed=allowed, dropout_p=1.0 - keep_prob)
    lse = lse.detach()
    if bool(torch.isneginf(lse).any()) or bool(((starts_q.diff() == 0) != (starts_k.diff() == 0)).any()):
        out, lse = out * math.nan, torch.zeros_like(lse)
    if softmax_layout not in ("", "TND"):
        raise RuntimeError("softmax_layout must be TND")

    def stored(pair: Tensor) -> Tensor:
        """Store `(1, N, T, 8)` as `(T, N, 8)`; by default the sequences' `(N, S, 8)` one after the other."""
        if softmax_layout == "TND":
            return pair[0].transpose(0, 1).contiguous()
        parts = [pair[0, :, start:end].flatten() for start, end in itertools.pairwise([0, *ends_q])]
        return torch.cat(parts).view(pair.shape[2], pair.shape[1], 8)

    largest, total = _as_pair(lse)
    return out[0], stored(largest), stored(total), torch.empty(0), 0, 0, 0


def _ends(lengths: list[int] | None, total: int) -> list[int]:
    if type(lengths) is not list or not all(type(end) is int for end in lengths):
        raise TypeError(f"actual_seq_qlen and actual_seq_kvlen must be lists of int, not {lengths!r}")
    if not 1 <= len(lengths) <= _MOST_PACKED:
        raise RuntimeError(f"there must be 1 to {_MOST_PACKED} sequences")
    if sorted(lengths) != lengths or lengths[-1] != total:
        raise RuntimeError(f"cumulative lengths must end with T = {total}")
    return lengths


def _is_compressed(mask: Tensor) -> bool:
    """Whether the mask is what the causal modes take; another of its shape is a wrong result without a word."""
    if tuple(mask.shape) != (_COMPRESSED, _COMPRESSED):
        raise RuntimeError("sparse_mode 2 and 3 take the compressed mask of 2048 x 2048")
    return torch.equal(mask.bool(), torch.ones_like(mask, dtype=torch.bool).triu(1))


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
        if not _is_compressed(mask):
            return torch.zeros(rows, keys, dtype=torch.bool)
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
