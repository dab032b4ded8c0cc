"""Masks of Transformers as objects of anyattn, and what a layer adds to them: biases, chosen keys, sinks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyattn.errors import InvalidCallError
from anyattn.lowering.dense import key_mask, pattern_mask
from anyattn.masks.block_masks import written_out
from anyattn.masks.functions import MaskFunction, joined, same_document
from anyattn.masks.objects import Block, Causal, Mask
from anyattn.types.spec import PatternSpec

_CAUSAL = Causal("lower_right")


def pattern_of(q_length: int, kv_length: int, causal: bool, window: int | None) -> Mask | None:
    """Return what a missing mask means: lower-right causal or all keys, with the layer's window."""
    left = -1 if window is None or window < 1 or kv_length <= window else window - 1
    if q_length == 1 and causal:
        return None if left < 0 else Mask(pattern=(left, 0, "lower_right"))
    if not causal:
        return None if left < 0 else Mask(pattern=(left, left, "lower_right"))
    if left < 0:
        return Mask(pattern=(-1, 0, "lower_right")) if torch.compiler.is_compiling() else _CAUSAL
    return Mask(pattern=(left, 0, "lower_right"))


def dense_of(attention_mask: Tensor, query: Tensor) -> Mask:
    """Return a mask tensor as an object: boolean means True = attend, floating is added.

    Raises:
        InvalidCallError: For an integer tensor, and for two dimensions, which might be padding or `(S_q, S_kv)`.
    """
    if attention_mask.dim() not in (3, 4):
        raise InvalidCallError(
            f"attention_mask reached the attention layer with shape {tuple(attention_mask.shape)}. A mask of two "
            "dimensions might be padding or (S_q, S_kv): give mask[:, None, None, :] or mask[None, None]."
        )
    if attention_mask.dim() == 3:
        attention_mask = attention_mask[None]
    if attention_mask.dtype == torch.bool:
        row = attention_mask.shape[2] == 1 and attention_mask.shape[1] == 1 and attention_mask.shape[3] != 1
        return Mask(key=attention_mask) if row else Mask(dense=attention_mask)
    if not attention_mask.is_floating_point():
        raise InvalidCallError(
            f"attention_mask is {attention_mask.dtype}, where 0 and 1 could mean either. Give mask.bool(), True = "
            "attend."
        )
    return Mask(dense=_fitting(attention_mask, query))


def as_object(attention_mask: Any) -> Mask:
    """Return a mask that isn't a tensor as an object.

    Raises:
        InvalidCallError: If it is neither an object of anyattn nor a BlockMask.
    """
    return attention_mask if isinstance(attention_mask, Mask) else Block(attention_mask)


def with_dense(mask: Mask | None, allowed: Tensor) -> Mask:
    """Join a boolean mask with four dimensions to a mask."""
    if mask is None:
        return Mask(dense=allowed)
    dense = mask.dense
    if dense is None:
        dense = allowed
    elif dense.dtype == torch.bool:
        dense = dense & allowed
    else:
        dense = dense.masked_fill(~allowed, float("-inf"))
    return Mask(pattern=mask.pattern, key=mask.key, dense=dense, block=mask.block)


def with_documents(mask: Mask | None, documents: Tensor) -> Mask:
    """Join packed sequences, `(B, S)`, to a pattern."""
    function = same_document(documents)
    block = mask.block if mask is not None else None
    if isinstance(block, MaskFunction):
        function = joined(block, function)
    return Mask(pattern=None if mask is None else mask.pattern, block=function)


def with_indices(mask: Mask | None, indices: Tensor, query: Tensor, key: Tensor) -> Mask:
    """Allow each row only the keys that were chosen for it: `(B, S_q, n)`.

    Raises:
        InvalidCallError: If the shape is another.
    """
    if indices.dim() != 3 or indices.shape[:2] != (query.shape[0], query.shape[2]):
        raise InvalidCallError(
            f"indices must be (B, S_q, n) = ({query.shape[0]}, {query.shape[2]}, n), the keys each row may see; "
            f"{tuple(indices.shape)} was passed."
        )
    chosen = indices.new_zeros((query.shape[0], query.shape[2], key.shape[2]), dtype=torch.bool)
    return with_dense(mask, chosen.scatter(-1, indices.long(), True)[:, None])


def with_bias(mask: Mask | None, bias: Tensor, query: Tensor) -> Mask:
    """Join a bias, which is added to the scaled scores, to a mask."""
    bias = _fitting(bias, query)
    if mask is None:
        return Mask(dense=bias)
    dense = mask.dense
    if dense is None:
        dense = bias
    elif dense.dtype == torch.bool:
        dense = bias.masked_fill(~dense, float("-inf"))
    else:
        dense = bias + dense
    return Mask(pattern=mask.pattern, key=mask.key, dense=dense, block=mask.block)


def with_extra_key(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, sinks: Tensor
) -> tuple[Tensor, Tensor, Mask]:
    """Write sinks as one more key of zeros, whose bias is the sink: exact, and with gradients for the sinks.

    Args:
        query: `(B, H, S_q, D)`.
        key: `(B, H_kv, S_kv, D)`.
        value: `(B, H_kv, S_kv, D_v)`.
        mask: The mask over the given keys.
        sinks: `(B or 1, H, S_q or 1, 1)`.
    """
    batch, heads, q_length = query.shape[:3]
    bias = _all_as_bias(mask, query, key)
    wide = bias.expand(batch, heads, q_length, key.shape[2])
    column = sinks.to(wide.dtype).expand(batch, heads, q_length, 1)
    key = torch.nn.functional.pad(key, (0, 0, 0, 1))
    value = torch.nn.functional.pad(value, (0, 0, 0, 1))
    return key, value, Mask(dense=torch.cat((wide, column), -1))


def _all_as_bias(mask: Mask | None, query: Tensor, key: Tensor) -> Tensor:
    """Write every part of a mask into one bias with four dimensions.

    Raises:
        InvalidCallError: For a BlockMask.
    """
    q_length, kv_length = query.shape[2], key.shape[2]
    dtype = torch.float32 if query.dtype in (torch.float16, torch.bfloat16) else query.dtype
    nothing = torch.zeros((1, 1, 1, 1), dtype=dtype, device=query.device)
    if mask is None:
        return nothing
    if mask.pattern is not None:
        spec = PatternSpec(*mask.pattern)
        mask = with_dense(mask, pattern_mask(spec, q_length, kv_length, query.device)[None, None])
    if mask.key is not None:
        mask = with_dense(mask, key_mask(mask.key, kv_length))
    if isinstance(mask.block, MaskFunction):
        made = written_out(mask.block, query.shape[0], query.shape[1], q_length, kv_length, query.device)
        mask = with_dense(mask, made)
    elif mask.block is not None:
        raise InvalidCallError(
            "Sinks that need gradients, or are different for each row, can't be joined with a BlockMask. Give the mask "
            "as a boolean tensor."
        )
    dense = mask.dense
    if dense is None:
        return nothing
    return nothing.masked_fill(~dense, float("-inf")) if dense.dtype == torch.bool else dense.to(dtype)


def _fitting(bias: Tensor, query: Tensor) -> Tensor:
    """Cast a bias of another dtype to one that a call may have: float32, or query's."""
    if bias.dtype in (torch.float32, query.dtype):
        return bias
    return bias.to(query.dtype if bias.dtype == torch.float64 else torch.float32)
