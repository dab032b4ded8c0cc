"""The attention function that layers of Transformers call under the name anyattn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyattn import api, varlen
from anyattn.errors import InvalidCallError
from anyattn.integrations.transformers.calls import arguments, joining, sequences
from anyattn.masks.objects import Mask


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    indices: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: Any = None,
    max_length_k: Any = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one layer through anyattn; the settings of anyattn choose the backend.

    Args:
        module: The layer; `is_causal` is read from it if it isn't passed.
        query: `(B, H, S_q, D)`, or with B = 1 for every batch entry of the keys.
        key: `(B, H_kv, S_kv, D)`, with the cache.
        value: `(B, H_kv, S_kv, D_v)`.
        attention_mask: What anyattn's mask function made, or a mask of the user's: a tensor or a BlockMask, which holds
            everything (then neither `is_causal` nor `sliding_window` counts); None is lower-right causal if the layer
            is causal, else all keys.
        dropout: The probability to apply.
        scaling: What scores are multiplied by; None is `D ** -0.5`.
        is_causal: Whether a missing mask means causal; None asks the layer, and False is the default.
        sliding_window: How many keys a row sees to its left, itself included, and as many to its right if the layer
            isn't causal.
        softcap: As for `anyattn.attention`.
        s_aux: `(H,)`, logits in the softmax's denominator.
        sinks: `(B or 1, H, S_q or 1, 1)`, the same for each row.
        position_bias: `(B or 1, H, S_q, S_kv)`, added to the scaled scores.
        position_ids: `(B, S_q)`; positions that start again are packed sequences, if the layer is causal and its mask
            says no more than that.
        indices: `(B, S_q, n)`, the keys that a row may see, beside the mask.
        cu_seq_lens_q: int32, where the packed sequences' queries begin, with their end.
        cu_seq_lens_k: The same of keys.
        max_length_q: The longest sequence's queries.
        max_length_k: The same of keys.
        rest: Keywords without a meaning for attention; others are refused.

    Returns:
        `(B, S_q, H, D_v)`, contiguous, in query's dtype, and None instead of weights.

    Raises:
        AnyattnError: As for `anyattn.attention`; and if a keyword isn't honoured.
    """
    arguments.check(module, rest)
    query, key, value = _same_batch(query, key, value)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", False)
    given = sequences.read(attention_mask, query, key, is_causal, sliding_window)
    if given.keys < key.shape[2]:
        key, value = key[:, :, : given.keys], value[:, :, : given.keys]
    lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    mask, starts = sequences.packed_in(given, query, key, lengths, position_ids if is_causal else None)
    extra_key = _extra_key(s_aux, sinks)
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "softcap": softcap}
    options["enable_gqa"] = query.shape[1] != key.shape[1]
    options["sinks"] = s_aux if extra_key is None else None
    if starts is not None:
        if position_bias is None and indices is None and extra_key is None:
            return _attend_packed(query, key, value, starts, mask, options), None
        if mask is None or mask.block is None:
            mask = joining.with_dense(mask, sequences.written_out(starts, query, key))
    if indices is not None:
        mask = joining.with_indices(mask, indices, query, key)
    if position_bias is not None:
        mask = joining.with_bias(mask, position_bias, query)
    if extra_key is not None:
        key, value, mask = joining.with_extra_key(query, key, value, mask, extra_key)
    out = api.scaled_dot_product_attention(query, key, value, mask, **options)
    return out.transpose(1, 2).contiguous(), None


def _same_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Expand a batch of one, as SDPA does: some models attend with learned queries that all entries share."""
    if query.shape[0] == key.shape[0]:
        return query, key, value
    if query.shape[0] == 1:
        return query.expand(key.shape[0], -1, -1, -1), key, value
    batch = query.shape[0]
    return query, key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)


def _extra_key(s_aux: Tensor | None, sinks: Tensor | None) -> Tensor | None:
    """Return sinks that no kernel takes, as `(B or 1, H, S_q or 1, 1)`: those with gradients, and those of single rows.

    Raises:
        InvalidCallError: If both kinds are there, or the shape isn't a sink's.
    """
    if sinks is not None:
        if s_aux is not None or sinks.dim() != 4 or sinks.shape[-1] != 1:
            raise InvalidCallError("sinks must be (B or 1, H, S_q or 1, 1), and not beside s_aux.")
        return sinks
    if s_aux is None or not (s_aux.requires_grad and torch.is_grad_enabled()):
        return None
    return s_aux.view(1, -1, 1, 1)


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, starts: sequences.Both, mask: Mask | None, options: dict[str, Any]
) -> Tensor:
    """Make a packed call; the batch, mostly of one, is laid out in one row."""
    batch, heads, length, _ = query.shape
    rows = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    pattern = None if mask is None or mask.pattern is None else Mask(pattern=mask.pattern)
    (cu_q, max_q), (cu_k, max_k) = starts
    out: Tensor = varlen.attention_varlen(rows[0], rows[1], rows[2], cu_q, cu_k, max_q, max_k, pattern, **options)
    return out.view(batch, length, heads, -1)
