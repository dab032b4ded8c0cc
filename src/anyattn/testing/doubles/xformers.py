"""A double of xformers 0.0.35, on an H100.

Source: `xformers/ops/fmha/__init__.py`, `dispatch.py`, `common.py`, `flash.py`, `cutlass.py` and `attn_bias.py` of
xformers 0.0.35; a build of it on an H100.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattn.testing.doubles import xformers_masks
from anyattn.testing.doubles.double import Double, attend, band, module, packed_band
from anyattn.testing.doubles.xformers_masks import (
    AttentionBias,
    BlockDiagonalCausalFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionMask,
    BlockDiagonalCausalMask,
    BlockDiagonalMask,
    LocalAttentionFromBottomRightMask,
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
)

_INFINITE = math.inf


@dataclass
class Inputs:
    """What an operator is asked about."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_bias: Any
    p: float
    scale: float | None

    def validate(self) -> None:
        """Refuse shapes, dtypes and biases that fit no operator."""
        query, key, value = self.query, self.key, self.value
        if query.ndim not in (3, 4, 5) or key.ndim != query.ndim or value.ndim != query.ndim:
            raise ValueError("Query/Key/Value should all have BMGHK, BMHK or BMK shape.")
        if query.ndim == 3:
            raise NotImplementedError("the double has no BMK shape")
        if not query.dtype == key.dtype == value.dtype:
            raise ValueError("Query/Key/Value should either all have the same dtype")
        if isinstance(self.attn_bias, BlockDiagonalMask):
            if self.attn_bias.q_seqinfo.seqstart.device != query.device:
                raise ValueError("Attention bias and Query/Key/Value should be on the same device")
            if query.shape[0] != 1:
                raise ValueError("Expected batch_size=1 when using block-diagonal bias")
        if not 0.0 <= self.p <= 1.0:
            raise ValueError(f"Invalid dropout probability: p={self.p}")
        if query.ndim == 4 and isinstance(self.attn_bias, Tensor):
            expected = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
            if self.attn_bias.shape != expected:
                raise ValueError(f"Invalid shape for attention bias: {self.attn_bias.shape} (expected {expected})")
        alike = key.shape[:-1] == value.shape[:-1] and key.shape[-1] == query.shape[-1]
        if not alike or (query.shape[0], *query.shape[2:-1]) != (key.shape[0], *key.shape[2:-1]):
            raise ValueError("Incompatible shapes for attention inputs: we don't support broadcasting, use `expand`")


class _Operator:
    """What the operators of one kernel take, by upstream's fields."""

    NAME = ""
    DTYPES: frozenset[torch.dtype] = frozenset()
    MAX_K = 0
    BIASES: tuple[type, ...] = ()
    DIFFERENT_VALUE_EMBED = False
    IS_DETERMINISTIC = True
    BMGHK = True
    BIAS_GRAD = True

    @classmethod
    def is_available(cls) -> bool:
        """Whether it was built."""
        return True

    @classmethod
    def not_supported_reasons(cls, inp: Inputs) -> list[str]:
        """Give every reason against a call."""
        dim, dim_v = inp.query.shape[-1], inp.value.shape[-1]
        bias = inp.attn_bias
        alignment = 8 if inp.query.dtype.itemsize == 2 else 4
        found = {
            f"dtype={inp.query.dtype}": inp.query.dtype not in cls.DTYPES,
            f"max(query.shape[-1], value.shape[-1]) > {cls.MAX_K}": max(dim, dim_v) > cls.MAX_K,
            "query.shape[-1] != value.shape[-1]": dim != dim_v and not cls.DIFFERENT_VALUE_EMBED,
            f"attn_bias type is {type(bias)}": type(bias) not in cls.BIASES,
            "operator is non-deterministic": not cls.IS_DETERMINISTIC and torch.are_deterministic_algorithms_enabled(),
            "operator does not support BMGHK format": inp.query.ndim == 5 and not cls.BMGHK,
            f"query.shape[-1] % {alignment} != 0": dim % alignment != 0 or dim_v % alignment != 0,
            "Computing the bias gradient is not supported": isinstance(bias, Tensor)
            and bias.requires_grad
            and not cls.BIAS_GRAD,
        }
        return [reason for reason, holds in found.items() if holds]


class FlashFwOp(_Operator):
    """Flash's forward."""

    NAME = "fa2F"
    DTYPES = frozenset((torch.float16, torch.bfloat16))
    MAX_K = 256
    BIASES = (
        type(None),
        LowerTriangularMask,
        LowerTriangularFromBottomRightMask,
        LocalAttentionFromBottomRightMask,
        BlockDiagonalMask,
        BlockDiagonalCausalMask,
        BlockDiagonalCausalFromBottomRightMask,
        BlockDiagonalCausalLocalAttentionMask,
    )

    @classmethod
    def not_supported_reasons(cls, inp: Inputs) -> list[str]:
        """Give every reason against a call."""
        found = super().not_supported_reasons(inp)
        bias = inp.attn_bias
        if isinstance(bias, BlockDiagonalCausalMask) and bias.k_seqinfo.seqstart_py != bias.q_seqinfo.seqstart_py:
            found.append("Only support BlockDiagonalCausalMask if equal numbers of keys and queries")
        if isinstance(inp.attn_bias, LowerTriangularMask) and inp.query.shape[1] != inp.key.shape[1]:
            found.append("Only support LowerTriangularMask if equal number of keys and queries")
        return found


class FlashBwOp(FlashFwOp):
    """Flash's backward."""

    NAME = "fa2B"
    IS_DETERMINISTIC = False
    BMGHK = False
    BIAS_GRAD = False


class CutlassFwOp(_Operator):
    """CUTLASS's forward."""

    NAME = "cutlassF-pt"
    DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32))
    MAX_K = 65536
    # Upstream's takes blocks too, with another lse, which the adapter doesn't ask it for.
    BIASES = (type(None), Tensor, LowerTriangularMask, LowerTriangularFromBottomRightMask)
    DIFFERENT_VALUE_EMBED = True

    @classmethod
    def not_supported_reasons(cls, inp: Inputs) -> list[str]:
        """Give every reason against a call."""
        found = super().not_supported_reasons(inp)
        if isinstance(inp.attn_bias, Tensor):
            alignment = 128 // torch.finfo(inp.attn_bias.dtype).bits
            found += [
                f"attn_bias.stride(-2) % {alignment} != 0 (attn_bias.stride() = {inp.attn_bias.stride()})"
                for stride in inp.attn_bias.stride()[:-1]
                if stride % alignment
            ]
            if inp.attn_bias.stride(-1) > 1:
                found.append("attn_bias.stride(-1) > 1 - you should call `.contiguous()` on the bias")
        return found


class CutlassBwOp(CutlassFwOp):
    """CUTLASS's backward."""

    NAME = "cutlassB-pt"
    BMGHK = False


def _dispatch(name: str, operators: Sequence[type[_Operator]], inp: Inputs) -> type[_Operator]:
    message = f"No operator found for `{name}` with inputs:"
    for operator in operators:
        reasons = operator.not_supported_reasons(inp)
        if not reasons:
            return operator
        message += f"\n`{operator.NAME}` is not supported because:\n    " + "\n    ".join(reasons)
    raise NotImplementedError(message)


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
    operator = _dispatch("memory_efficient_attention_forward", (FlashFwOp, CutlassFwOp), inp)
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
    _dispatch("memory_efficient_attention_backward", (FlashBwOp, CutlassBwOp), inp)
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
