"""The attention function that layers of Transformers call under the name anyattn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

from anyattn import api, varlen
from anyattn.errors import InvalidCallError
from anyattn.integrations.transformers.calls import arguments, joining, notes, packed
from anyattn.masks.objects import Mask

_Both = tuple[packed.Starts, packed.Starts]
"""Where packed sequences begin: of queries, and of keys."""


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
    """Compute the attention of one layer through `anyattn.attention`; the settings of anyattn choose the backend.

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
        position_ids: `(B, S_q)`; positions that start again are packed sequences, if the layer is causal and there is
            no mask.
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
    if rest:
        arguments.check(module, rest)
    query, key, value = _same_batch(query, key, value)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", False)
    if attention_mask is None:
        mask = joining.pattern_of(query.shape[2], key.shape[2], is_causal, sliding_window)
        starts: _Both | None = None
    else:
        mask, starts = _given(attention_mask, query, key)
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        both = _lengths_given(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        mask, starts = _with_lengths(mask, starts, both, query, key)
    elif attention_mask is None and is_causal and position_ids is not None:
        mask, starts = _packed_by_positions(mask, position_ids, query, key)
    extra_key = _extra_key(s_aux, sinks)
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "softcap": softcap}
    options["enable_gqa"] = query.shape[1] != key.shape[1]
    options["sinks"] = s_aux if extra_key is None else None
    if starts is not None:
        if position_bias is None and indices is None and extra_key is None:
            return _attend_packed(query, key, value, starts, mask, options), None
        if mask is None or mask.block is None:
            mask = joining.with_dense(mask, _same_sequence(starts, query, key))
    if indices is not None:
        mask = joining.with_indices(mask, indices, query, key)
    if position_bias is not None:
        mask = joining.with_bias(mask, position_bias, query)
    if extra_key is not None:
        key, value, mask = joining.with_extra_key(query, key, value, mask, extra_key)
    out = api.attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, **options)
    return out.contiguous(), None


def _same_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Expand a batch of one, as SDPA does: some models attend with learned queries that all entries share."""
    if query.shape[0] == key.shape[0]:
        return query, key, value
    if query.shape[0] == 1:
        return query.expand(key.shape[0], -1, -1, -1), key, value
    batch = query.shape[0]
    return query, key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)


def _given(attention_mask: Any, query: Tensor, key: Tensor) -> tuple[Mask, _Both | None]:
    """Return what a mask says as an object, and where its packed sequences begin if that is known."""
    if not isinstance(attention_mask, Tensor):
        return joining.as_object(attention_mask), None
    note = notes.read(attention_mask)
    if note is not None and attention_mask.shape[2:] == (query.shape[2], key.shape[2]):
        return note.mask, None if note.packed is None else (note.packed, note.packed)
    return joining.dense_of(attention_mask, query), None


def _packed_by_positions(
    mask: Mask | None, position_ids: Tensor, query: Tensor, key: Tensor
) -> tuple[Mask | None, _Both | None]:
    """Find packed sequences by positions that start again; in compiled code values can't be read."""
    length = query.shape[2]
    if length == 1 or length != key.shape[2] or position_ids.dim() != 2 or position_ids.shape[1] != length:
        return mask, None
    if is_tracing(position_ids):
        return mask, None
    documents = packed.documents_of(position_ids)
    if documents is None:
        return mask, None
    if query.shape[0] == 1:
        starts = packed.starts_of(documents)
        return mask, (starts, starts)
    return joining.with_documents(mask, documents.expand(query.shape[0], -1)), None


def _lengths_given(cu_q: Tensor | None, cu_k: Tensor | None, max_q: Any, max_k: Any) -> _Both:
    """Read cumulative lengths; one tensor for both stays one, so that both alignments are the same.

    Raises:
        InvalidCallError: If only one of them is there.
    """
    if cu_q is None or cu_k is None:
        raise InvalidCallError("cu_seq_lens_q and cu_seq_lens_k belong together, and only one of them was passed.")
    first = packed.starts_given(cu_q, max_q)
    return (first, first) if cu_k is cu_q and max_k is max_q else (first, packed.starts_given(cu_k, max_k))


def _with_lengths(
    mask: Mask | None, starts: _Both | None, given: _Both, query: Tensor, key: Tensor
) -> tuple[Mask | None, _Both | None]:
    """Join cumulative lengths to a mask; beside one that is more than a pattern they become a dense mask.

    Raises:
        InvalidCallError: If the batch isn't one, and there is such a mask.
    """
    if mask is None or (mask.key is None and mask.dense is None and mask.block is None):
        return mask, given
    if starts is not None and all(torch.equal(one[0], other[0]) for one, other in zip(starts, given, strict=True)):
        return mask, starts
    if query.shape[0] != 1:
        raise InvalidCallError(
            "cu_seq_lens are for one row of packed sequences; beside an attention_mask the batch must be one. Leave out "
            "the mask, or cu_seq_lens."
        )
    return joining.with_dense(mask, _same_sequence(given, query, key)), None


def _same_sequence(starts: _Both, query: Tensor, key: Tensor) -> Tensor:
    return packed.same_sequence(starts[0][0], starts[1][0], query.shape[2], key.shape[2])


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
    query: Tensor, key: Tensor, value: Tensor, starts: _Both, mask: Mask | None, options: dict[str, Any]
) -> Tensor:
    """Make a packed call; the batch, mostly of one, is laid out in one row."""
    batch, heads, length, _ = query.shape
    rows = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]
    pattern = None if mask is None or mask.pattern is None else Mask(pattern=mask.pattern)
    (cu_q, max_q), (cu_k, max_k) = starts
    out = varlen.attention_varlen(rows[0], rows[1], rows[2], cu_q, cu_k, max_q, max_k, pattern, **options)
    return out.view(batch, length, heads, -1)
