"""xformers' inputs, and what its operators refuse.

Source: `xformers/ops/fmha/common.py`, `dispatch.py`, `flash.py` and `cutlass.py` of xformers 0.0.35.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from doubles.kernels.xformers.masks import (
    BlockDiagonalCausalFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionMask,
    BlockDiagonalCausalMask,
    BlockDiagonalMask,
    LocalAttentionFromBottomRightMask,
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
)


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


def dispatch(name: str, operators: Sequence[type[_Operator]], inp: Inputs) -> type[_Operator]:
    """Pick the first operator that takes the inputs.

    Raises:
        NotImplementedError: If none does.
    """
    message = f"No operator found for `{name}` with inputs:"
    for operator in operators:
        reasons = operator.not_supported_reasons(inp)
        if not reasons:
            return operator
        message += f"\n`{operator.NAME}` is not supported because:\n    " + "\n    ".join(reasons)
    raise NotImplementedError(message)
