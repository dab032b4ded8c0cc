"""Convert a mask passed to Diffusers' dispatcher to the mask of anyattn with the same meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from anyattn.errors import InvalidCallError
from anyattn.masks.objects import Block, KeyPadding, Mask

if TYPE_CHECKING:
    from torch import Tensor


def translate(mask: Any, query: Tensor, key: Tensor) -> Tensor | Mask | None:
    """Convert a mask with Diffusers' meaning to one with anyattn's.

    Diffusers reads two dimensions as `(B, S_kv)`, or as `(S_q, S_kv)` if the first isn't B, and documents three as
    `(B, S_q, S_kv)`. A mask with two possible meanings, and different results, is refused.

    Args:
        mask: None, a `BlockMask`, a mask object of anyattn, or a boolean (True = attend) or floating (added)
            tensor of one to four dimensions.
        query: `(B, S_q, H, D)`.
        key: `(B, S_kv, H_kv, D)`.

    Raises:
        InvalidCallError: If it is an integer mask, has two possible meanings, or has none.
    """
    if mask is None or isinstance(mask, Mask):
        return mask
    if not isinstance(mask, torch.Tensor):
        return Block(mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InvalidCallError(
            "A mask must be boolean (True = attend) or floating (added to the scores); "
            f"{mask.dtype} of shape {tuple(mask.shape)} was given; Diffusers' native backend refuses it too. "
            "If it holds 0 and 1, pass mask.bool()."
        )
    dimensions = mask.dim()
    if dimensions == 1:
        return mask[None, None, None, :]
    if dimensions == 2:
        return _two(mask, query, key)
    if dimensions == 3:
        return _three(mask, query, key)
    return mask


def _two(mask: Tensor, query: Tensor, key: Tensor) -> Tensor | Mask:
    batch, seqlen_q, seqlen_kv = query.shape[0], query.shape[1], key.shape[1]
    rows, columns = mask.shape
    if columns != seqlen_kv:
        raise _no_reading(mask, query, key)
    if rows == 1:
        return mask[None, None]
    if rows == batch and rows == seqlen_q:
        raise InvalidCallError(
            f"A mask of shape {tuple(mask.shape)} is ambiguous here: the batch size and the query length are "
            f"both {rows}, so it could mean (batch, seqlen_kv) or (seqlen_q, seqlen_kv). "
            "Pass mask[:, None, None, :] for key padding, or mask[None, None] for one mask per query row."
        )
    if rows == batch:
        return KeyPadding(mask) if mask.dtype == torch.bool else mask[:, None, None, :]
    if rows == seqlen_q:
        return mask[None, None]
    raise _no_reading(mask, query, key)


def _three(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    batch, seqlen_q, heads = query.shape[:3]
    first, rows, columns = mask.shape
    if columns != key.shape[1] or rows not in (1, seqlen_q) or first not in (1, batch):
        raise _no_reading(mask, query, key)
    if first == batch and first == heads and first != 1:
        raise InvalidCallError(
            f"A mask of shape {tuple(mask.shape)} is ambiguous here: the batch size and the number of heads "
            f"are both {first}; Diffusers documents (batch, seqlen_q, seqlen_kv), and torch would take it as "
            "(num_heads, seqlen_q, seqlen_kv). Pass mask[:, None] for one mask per batch entry, or "
            "mask[None] for one per head."
        )
    return mask[:, None]


def _no_reading(mask: Tensor, query: Tensor, key: Tensor) -> InvalidCallError:
    batch, seqlen_q, heads = query.shape[:3]
    return InvalidCallError(
        f"A mask of shape {tuple(mask.shape)} fits no reading that Diffusers documents; needed is (B, S_kv), "
        f"(S_q, S_kv), (B, S_q, S_kv) or (B, H, S_q, S_kv) with B = {batch}, H = {heads}, S_q = {seqlen_q}, "
        f"S_kv = {key.shape[1]}. A mask per head is (1, H, S_q, S_kv)."
    )
