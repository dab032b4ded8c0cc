"""From a call of torch's function to a call of anyattn: any number of dimensions, and batches and heads of 1."""

from __future__ import annotations

import torch
from torch import Tensor

from anyattn import api
from anyattn.errors import InvalidCallError


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Make a call with the arguments of torch's function, `(..., S_q, D)` and `(..., S_kv, D)`.

    Raises:
        AnyattnError: As for `anyattn.scaled_dot_product_attention`.
    """
    options = (dropout_p, is_causal, scale, enable_gqa)
    if query.dim() == key.dim() == value.dim() == 4:
        if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
            query, key, value = _broadcast(query, key, value, heads=not enable_gqa)
        return api.scaled_dot_product_attention(query, key, value, attn_mask, *options)
    if min(query.dim(), key.dim(), value.dim()) < 2:
        raise InvalidCallError(
            "query, key and value need two dimensions at least, (..., sequence, head_dim); their shapes are "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    query, key, value = _broadcast(query, key, value, heads=not enable_gqa)
    lead = query.shape[:-2]
    if len(lead) < 2:
        mask = attn_mask[:, None] if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
        four = [tensor.reshape(*(lead or (1,)), 1, *tensor.shape[-2:]) for tensor in (query, key, value)]
    else:
        mask = attn_mask
        if mask is not None and mask.dim() > 2:
            mask = mask.expand(*lead, *mask.shape[-2:]).flatten(0, -4)
        four = [tensor.flatten(0, -4) for tensor in (query, key, value)]
    out = api.scaled_dot_product_attention(four[0], four[1], four[2], mask, *options)
    return out.reshape(*lead, *out.shape[-2:])


def _broadcast(query: Tensor, key: Tensor, value: Tensor, *, heads: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Expand leading dimensions of 1, which torch's function does and anyattn's doesn't; `heads`: that of heads too."""
    last = 2 if heads else 3
    given = (query, key, value)
    try:
        lead = torch.broadcast_shapes(*(tensor.shape[:-last] for tensor in given))  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise InvalidCallError(
            "query, key and value need leading dimensions that are equal or 1; their shapes are "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}. "
            "If several query heads share a key's, say so with enable_gqa=True."
        ) from None
    query, key, value = (tensor.expand(*lead, *tensor.shape[-last:]) for tensor in given)
    return query, key, value
