"""What a layer's mask says, and which packed sequences its tokens belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing

from anyattn.errors import InvalidCallError
from anyattn.integrations.transformers.calls import joining, notes, packed
from anyattn.masks.objects import Mask

Both = tuple[packed.Starts, packed.Starts]
"""Where packed sequences begin: of queries, and of keys."""


@dataclass(frozen=True, slots=True)
class Given:
    """What a layer was given to mask with.

    Attributes:
        mask: The mask, as an object.
        starts: Where the packed sequences begin that are part of the mask, if that is known.
        is_pattern: Whether the mask is causal or a window, in chunks or not, and no more than that.
        chunk: The length of the chunks, 0 for none.
        keys: How many of the keys any row may see; those after them can be left out.
    """

    mask: Mask | None
    starts: packed.Starts | None
    is_pattern: bool
    chunk: int
    keys: int


def read(attention_mask: Any, query: Tensor, key: Tensor, causal: bool, window: int | None) -> Given:
    """Return what a mask says, or what a missing one means for the layer."""
    q_length, keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        return Given(joining.pattern_of(q_length, keys, causal, window), None, True, 0, keys)
    if not isinstance(attention_mask, Tensor):
        return Given(joining.as_object(attention_mask), None, False, 0, keys)
    note = notes.read(attention_mask)
    if note is None or attention_mask.shape[2:] != (q_length, keys):
        return Given(joining.dense_of(attention_mask, query), None, False, 0, keys)
    mask = note.mask
    if mask is None:
        return Given(joining.dense_of(attention_mask, query), None, True, note.chunk, keys)
    pattern = mask.pattern
    if note.is_pattern and pattern is not None and pattern[1:] == (0, "upper_left") and q_length < keys:
        keys = q_length  # an empty static cache: later places hold nothing yet
    return Given(mask, note.packed, note.is_pattern, 0, keys)


def packed_in(
    given: Given, query: Tensor, key: Tensor, lengths: tuple[Any, Any, Any, Any], position_ids: Tensor | None
) -> tuple[Mask | None, Both | None]:
    """Return the mask, and where packed sequences begin if they are to be computed one by one.

    Args:
        given: What the mask says.
        query: `(B, H, S_q, D)`.
        key: `(B, H_kv, S_kv, D)`.
        lengths: `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`, or None for each.
        position_ids: `(B, S_q)`, or None if they say nothing about the layer.

    Raises:
        InvalidCallError: If one of the lengths is missing, or they can't be joined with the mask.
    """
    if lengths[0] is not None or lengths[1] is not None:
        return _with_lengths(given, _lengths(*lengths), query, key)
    if given.starts is not None:
        return given.mask, (given.starts, given.starts)
    if position_ids is None or not given.is_pattern:
        return given.mask, None
    return _by_positions(given, position_ids, query, key)


def written_out(starts: Both, query: Tensor, key: Tensor) -> Tensor:
    """Make the boolean `(1, 1, S_q, S_kv)` that allows keys of the row's own sequence."""
    return packed.same_sequence(starts[0][0], starts[1][0], query.shape[2], key.shape[2])


def _by_positions(given: Given, position_ids: Tensor, query: Tensor, key: Tensor) -> tuple[Mask | None, Both | None]:
    """Find packed sequences by positions that start again; in compiled code values can't be read."""
    length = query.shape[2]
    if length == 1 or length != key.shape[2] or position_ids.dim() != 2 or position_ids.shape[1] != length:
        return given.mask, None
    if is_tracing(position_ids):
        return given.mask, None
    documents = packed.documents_of(position_ids)
    if documents is None:
        return given.mask, None
    if given.chunk:
        return Mask(dense=packed.same_chunk(documents, given.chunk)), None
    if query.shape[0] == 1:
        starts = packed.starts_of(documents)
        return given.mask, (starts, starts)
    return joining.with_documents(given.mask, documents.expand(query.shape[0], -1)), None


def _lengths(cu_q: Tensor | None, cu_k: Tensor | None, max_q: Any, max_k: Any) -> Both:
    """Read cumulative lengths; one tensor for both stays one, so that both alignments are the same."""
    if cu_q is None or cu_k is None:
        raise InvalidCallError("cu_seq_lens_q and cu_seq_lens_k belong together, and only one of them was passed.")
    first = packed.starts_given(cu_q, max_q)
    return (first, first) if cu_k is cu_q and max_k == max_q else (first, packed.starts_given(cu_k, max_k))


def _with_lengths(given: Given, lengths: Both, query: Tensor, key: Tensor) -> tuple[Mask | None, Both | None]:
    """Join cumulative lengths to a mask; beside one that is more than a pattern they become a dense mask."""
    mask, starts = given.mask, given.starts
    if given.is_pattern and not given.chunk:
        return mask, lengths
    if starts is not None and all(torch.equal(one[0], starts[0]) for one in lengths):
        return mask, (starts, starts)
    if query.shape[0] != 1:
        raise InvalidCallError(
            "cu_seq_lens are for one row of packed sequences; beside an attention_mask the batch must be one. Leave "
            "out the mask, or cu_seq_lens."
        )
    if given.chunk and query.shape[2] == key.shape[2]:
        return Mask(dense=packed.same_chunk(packed.documents_between(lengths[0][0], query.shape[2]), given.chunk)), None
    return joining.with_dense(mask, written_out(lengths, query, key)), None
