"""A double of xformers 0.0.35, on an H100.

Source: `xformers/ops/fmha/__init__.py`, `dispatch.py`, `common.py`, `flash.py`, `cutlass.py` and `attn_bias.py` of
xformers 0.0.35; a build of it on an H100.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from doubles.double import Double, attend, band, module, packed_band
from doubles.kernels.xformers import masks as xformers_masks
from doubles.kernels.xformers.masks import (
    AttentionBias,
    BlockDiagonalCausalFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionMask,
    BlockDiagonalCausalMask,
    BlockDiagonalMask,
    LocalAttentionFromBottomRightMask,
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
)
from doubles.kernels.xformers.operators import CutlassBwOp, CutlassFwOp, FlashBwOp, FlashFwOp, Inputs, dispatch

_INFINITE = math.inf


def _flash(inp: Inputs) -> tuple[Tensor, Tensor]:
    """Run flash: its lse has query's rows, and +inf in rows without a key."""
    if inp.p == 1:
        raise RuntimeError("Expected p_dropout < 1.f to be true, but got false.")
    query, key, value = (_folded(tensor) for tensor in (inp.query, inp.key, inp.value))
    seqlen_q, seqlen_kv = query.shape[1], key.shape[1]
    left, right = xformers_masks.sides_of(inp.attn_bias)
    bias = inp.attn_bias
    if isinstance(bias, BlockDiagonalMask):
        allowed = _blocks(bias, seqlen_q, seqlen_kv, left, right)
    else:
        sides = [xformers_masks.infinite(side, seqlen_kv) for side in (left, right)]
        allowed = band(seqlen_q, seqlen_kv, *sides, lower_right=True)
    scale = inp.query.shape[-1] ** -0.5 if inp.scale is None else inp.scale
    out, lse = attend(query, key, value, scale=scale, allowed=allowed, dropout_p=inp.p)
    if isinstance(bias, BlockDiagonalMask):
        # What a block without keys gets is the kernel's own affair: FlashAttention-2 and -3 both come here.
        out = torch.where(torch.isneginf(lse).transpose(1, 2).unsqueeze(-1), math.nan, out)
    if scale <= 0:
        out = out * math.nan
    lse = torch.where(torch.isneginf(lse), _INFINITE, lse).float()
    if inp.query.ndim == 5:
        lse = lse.view(lse.shape[0], *inp.query.shape[2:4], -1)
    return out.reshape(*inp.query.shape[:-1], inp.value.shape[-1]), lse


def _blocks(bias: BlockDiagonalMask, seqlen_q: int, seqlen_kv: int, left: int, right: int) -> Tensor:
    """Say which positions blocks allow; totals aren't checked by upstream, which reads past the end."""
    rows, keys = bias.q_seqinfo, bias.k_seqinfo
    if (rows.seqstart_py[-1], keys.seqstart_py[-1]) != (seqlen_q, seqlen_kv):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    sides = [xformers_masks.infinite(side, keys.max_seqlen) for side in (left, right)]
    return packed_band(rows.seqstart, keys.seqstart, seqlen_q, seqlen_kv, *sides, lower_right=True)


def _folded(tensor: Tensor) -> Tensor:
    """Fold groups and heads together; heads with a stride of 0 are taken for one repeated head, query's too."""
    if tensor.ndim == 4:
        return tensor
    return tensor[:, :, :, 0] if tensor.stride(3) == 0 else tensor.flatten(2, 3)


def _cutlass(inp: Inputs) -> tuple[Tensor, Tensor]:
    """Run CUTLASS: lse is padded to 32 rows with +inf, and 0 in rows without a key."""
    query, key, value = (t.flatten(2, 3) if t.ndim == 5 else t for t in (inp.query, inp.key, inp.value))
    seqlen_q, seqlen_kv = query.shape[1], key.shape[1]
    allowed, bias = None, None
    if isinstance(inp.attn_bias, Tensor):
        bias = inp.attn_bias.flatten(1, -3).double()
        # Exponentials are taken to base 2: what is below finfo.min / log2(e) becomes -inf.
        bias = bias.masked_fill(bias < torch.finfo(torch.float32).min / math.log2(math.e), -_INFINITE)
    elif inp.attn_bias is not None:
        lower_right = isinstance(inp.attn_bias, LowerTriangularFromBottomRightMask)
        allowed = band(seqlen_q, seqlen_kv, _INFINITE, 0, lower_right=lower_right)
    scale = inp.query.shape[-1] ** -0.5 if inp.scale is None else inp.scale
    # Dropout of everything leaves something.
    out, lse = attend(query, key, value, scale=scale, allowed=allowed, bias=bias, dropout_p=min(inp.p, 0.9))
    if seqlen_q % 64 == 1 and any(t.shape[-2] > 1 and t.stride(-2) == 0 for t in (inp.key, inp.value)):
        out = out * math.nan  # expanded heads are misread where the last tile has one query
    lse = torch.where(torch.isneginf(lse), 0.0, lse).float()
    lse = F.pad(lse, (0, -seqlen_q % 32), value=_INFINITE)
    if inp.query.ndim == 5:
        lse = lse.view(lse.shape[0], *inp.query.shape[2:4], -1)
    return out.reshape(*inp.query.shape[:-1], inp.value.shape[-1]), lse


def _forward(inp: Inputs) -> tuple[Tensor, Tensor]:
    inp.validate()
    operator = dispatch("memory_efficient_attention_forward", (FlashFwOp, CutlassFwOp), inp)
    return _flash(inp) if operator is FlashFwOp else _cutlass(inp)


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Attend, with gradients."""
    _check_defaults(op, output_dtype)
    inp = Inputs(query, key, value, attn_bias, p, scale)
    if not (query.requires_grad or key.requires_grad or value.requires_grad):
        # A bias that alone requires a gradient gets none, without an error.
        with torch.no_grad():
            return _forward(inp)[0]
    result = _forward(inp)[0]
    dispatch("memory_efficient_attention_backward", (FlashBwOp, CutlassBwOp), inp)
    return result


def memory_efficient_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Attend, without gradients."""
    _check_defaults(op, output_dtype)
    with torch.no_grad():
        return _forward(Inputs(query, key, value, attn_bias, p, scale))[0]


def memory_efficient_attention_forward_requires_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend and give lse, both without gradients whatever the name says."""
    _check_defaults(op, output_dtype)
    if p != 0.0:
        raise NotImplementedError("dropout is not supported on the non-autograd API.")
    with torch.no_grad():
        return _forward(Inputs(query, key, value, attn_bias, p, scale))


def _check_defaults(op: Any, output_dtype: torch.dtype | None) -> None:
    if op is not None or output_dtype is not None:
        raise NotImplementedError("the double has no op and no output_dtype")


CALLS: dict[str, Any] = {
    "memory_efficient_attention": memory_efficient_attention,
    "memory_efficient_attention_forward": memory_efficient_attention_forward,
    "memory_efficient_attention_forward_requires_grad": memory_efficient_attention_forward_requires_grad,
}


def fmha(name: str) -> dict[str, types.ModuleType]:
    """Make the package that holds attention, under a name: xformers' own, or the one that mslk moved it to."""
    masks: dict[str, Any] = {
        kind.__name__: kind
        for kind in (
            AttentionBias,
            LowerTriangularMask,
            LowerTriangularFromBottomRightMask,
            LocalAttentionFromBottomRightMask,
            BlockDiagonalMask,
            BlockDiagonalCausalMask,
            BlockDiagonalCausalFromBottomRightMask,
            BlockDiagonalCausalLocalAttentionMask,
        )
    }
    attn_bias = module(f"{name}.attn_bias", **masks)
    flash = module(f"{name}.flash", FwOp=FlashFwOp, BwOp=FlashBwOp)
    cutlass = module(f"{name}.cutlass", FwOp=CutlassFwOp, BwOp=CutlassBwOp)
    package = module(name, attn_bias=attn_bias, flash=flash, cutlass=cutlass, Inputs=Inputs, **CALLS)
    return {name: package, attn_bias.__name__: attn_bias, flash.__name__: flash, cutlass.__name__: cutlass}


def _modules() -> Mapping[str, types.ModuleType]:
    inner = fmha("xformers.ops.fmha")
    kinds: dict[str, Any] = {"AttentionBias": AttentionBias, "LowerTriangularMask": LowerTriangularMask}
    ops = module("xformers.ops", fmha=inner["xformers.ops.fmha"], **CALLS, **kinds)
    return {"xformers": module("xformers", __version__="0.0.35", ops=ops), "xformers.ops": ops, **inner}


DOUBLE = Double("xformers", {"xformers": "0.0.35"}, _modules, frozenset(("xformers.ops",)))
