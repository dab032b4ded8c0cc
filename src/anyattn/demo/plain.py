"""Textbook arithmetic for whole models: the truth (float64) and the yardstick (the model's own dtype)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["PlainArithmetic", "plain_attention"]


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute softmax(Q K^T scale + mask) V in three lines and in the dtype of the inputs.

    Args:
        query: `(..., S_q, D)`.
        key: `(..., S_kv, D)`.
        value: `(..., S_kv, D_v)`.
        attn_mask: Boolean (True = attend) or floating (added); None masks nothing.
        dropout_p: Must be 0.
        is_causal: Must be False.
        scale: What the scores are multiplied by; None is `1/sqrt(D)`.
        enable_gqa: Must be False.

    Raises:
        ValueError: For dropout, a causal flag or grouped heads, which no model of the demo asks of SDPA.
    """
    if dropout_p or is_causal or enable_gqa:
        raise ValueError(
            "plain_attention needs dropout_p=0, is_causal=False and enable_gqa=False; got "
            f"dropout_p={dropout_p}, is_causal={is_causal}, enable_gqa={enable_gqa}."
        )
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    return scores.softmax(-1) @ value


class PlainArithmetic(TorchFunctionMode):
    """Run a model with `plain_attention` for SDPA and, if asked to, without rounding float64 down on the way.

    Models ask for float32 in places (rotary embeddings, norms, schedulers), because they expect half
    precision. In a float64 model that would round to float32, so with `keep_float64` a float64 tensor stays
    float64. Tables that are *created* in float32 keep their values: they are part of what the model computes.

    Args:
        keep_float64: Whether casts from float64 to float32 do nothing; for models that are float64
            throughout.

    Attributes:
        calls: How many attention calls the model made inside the mode.
    """

    def __init__(self, *, keep_float64: bool) -> None:
        super().__init__()
        self.keep_float64 = keep_float64
        self.calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace SDPA and down-casts; pass everything else on."""
        kwargs = kwargs or {}
        if func is torch._C._nn.scaled_dot_product_attention:  # whatever stands in its place in torch.nn.functional
            self.calls += 1
            return plain_attention(*args, **kwargs)
        if self.keep_float64 and func in _CASTS and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(_widen(arg) for arg in args)
            kwargs = {name: _widen(arg) for name, arg in kwargs.items()}
        return func(*args, **kwargs)


_CASTS = (torch.Tensor.float, torch.Tensor.to, torch.Tensor.type)


def _widen(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument
