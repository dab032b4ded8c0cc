"""Packed sequences of Transformers: `position_ids` that restart, and cumulative lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from anyattn.errors import InvalidCallError

_KEY = "_anyattn_documents"

Starts = tuple[Tensor, int]
"""Where each sequence begins, int32 from 0 with the end, and the length of the longest."""


def starts_of(documents: Tensor) -> Starts:
    """Return where each of the sequences in `(1, S)` begins; it waits for the device once."""
    lengths = torch.unique_consecutive(documents[0], return_counts=True)[1]
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32), int(lengths.max())


def documents_of(position_ids: Tensor) -> Tensor | None:
    """Return which sequence each token belongs to, `(B, S)`, if positions start again somewhere; else None.

    A sequence starts where a position isn't the one before plus 1; it counts as packed only if each sequence starts at
    the position of the first. The answer is cached on the tensor, so that the layers of a model wait for the device
    once.
    """
    if position_ids.is_inference():
        return _documents_of(position_ids)
    known = position_ids.__dict__.get(_KEY)
    if known is None or known[0] != position_ids._version:
        known = position_ids.__dict__[_KEY] = (position_ids._version, _documents_of(position_ids))
    found: Tensor | None = known[1]
    return found


def _documents_of(position_ids: Tensor) -> Tensor | None:
    first = position_ids[:, :1]
    restarts = torch.diff(position_ids, prepend=first - 1, dim=-1) != 1
    packed = restarts.any() & (position_ids == first).logical_or(~restarts).all()
    return restarts.cumsum(-1) if bool(packed) else None


def starts_given(cu_seq_lens: Tensor, longest: int | Tensor | None) -> Starts:
    """Return cumulative lengths as Transformers passes them, checked, with the longest computed if it is missing.

    Raises:
        InvalidCallError: If they aren't cumulative lengths.
    """
    if not isinstance(cu_seq_lens, Tensor) or cu_seq_lens.dim() != 1 or cu_seq_lens.is_floating_point():
        raise InvalidCallError("cu_seq_lens_q and cu_seq_lens_k must be integer tensors (sequences + 1,) from 0.")
    if longest is None:
        longest = int((cu_seq_lens[1:] - cu_seq_lens[:-1]).max())
    return cu_seq_lens.to(torch.int32), int(longest)


def documents_between(starts: Tensor, length: int) -> Tensor:
    """Return which sequence each token belongs to, `(1, S)`."""
    return torch.bucketize(torch.arange(length, device=starts.device), starts[1:], right=True)[None]


def same_chunk(documents: Tensor, chunk: int) -> Tensor:
    """Make the boolean `(B, 1, S, S)` that is causal in chunks, which are counted from each sequence's start."""
    places = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.diff(documents, prepend=documents[:, :1] - 1, dim=-1) != 0
    chunks = (places - torch.where(begins, places, 0).cummax(-1)[0]) // chunk
    same = (documents[:, :, None] == documents[:, None]) & (chunks[:, :, None] == chunks[:, None])
    return (same & (places[:, None] >= places))[:, None]


def same_sequence(starts_q: Tensor, starts_k: Tensor, q_length: int, kv_length: int) -> Tensor:
    """Make the boolean `(1, 1, S_q, S_kv)` that allows keys of the row's own sequence."""
    rows, columns = documents_between(starts_q, q_length), documents_between(starts_k, kv_length)
    return (rows[:, :, None] == columns[:, None])[:, None]
