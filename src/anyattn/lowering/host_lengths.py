"""Packed sequences for kernels whose interface takes lengths as integers.

Cumulative lengths are read on the host once per tensor. Since they are integers then, they are also checked, and the
kernel gets only the sequences that have both queries and keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anyattn.backend.protocol import Parts
from anyattn.errors import InvalidCallError
from anyattn.lowering.cache import cached
from anyattn.lowering.lse import empty_attention
from anyattn.types.reasons import Conversion
from anyattn.types.spec import AttentionSpec

READ = Conversion(
    "host_lengths", "cumulative lengths read on the host, once per tensor: the kernel's interface takes integers"
)


class Sequences(NamedTuple):
    """The sequences that a kernel gets; each has queries and keys.

    Attributes:
        lengths_q: The number of queries of each.
        lengths_k: The number of keys of each.
        whole: Whether they hold every token of the call; then each follows from its own cumulative lengths.
    """

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    whole: bool


Kernel = Callable[[Tensor, Tensor, Tensor, Sequences], tuple[Tensor, Tensor | None]]
"""Returns the output `(T_q, H, D_v)` and the natural lse `(H, T_q)`, or None if no lse is wanted."""


class _Lengths(NamedTuple):
    each: tuple[int, ...]
    present: tuple[int, ...]
    absent: bytes
    rest: int


def check_starts(name: str, starts: Sequence[int], most: int, total: int) -> None:
    """Check the cumulative lengths of queries (`"q"`) or keys (`"k"`); tokens may follow the last sequence.

    Raises:
        InvalidCallError: If they don't split the first of `total` tokens into sequences of at most `most` tokens.
    """
    found = list(starts)
    if found[0] != 0 or found[-1] > total or sorted(found) != found:
        raise InvalidCallError(
            f"cu_seqlens_{name} must begin with 0, never decrease, and end with the number of tokens, {total}, or "
            f"before; {found[:8]}{'...' if len(found) > 8 else ''} ending with {found[-1]} was given."
        )
    longest = max((end - start for start, end in itertools.pairwise(found)), default=0)
    if longest > most:
        raise InvalidCallError(f"max_seqlen_{name} is {most}, but a sequence has {longest} tokens.")


def on_host(starts: Tensor) -> tuple[int, ...]:
    """Read cumulative lengths, once per tensor; a tensor made in inference mode is read at each call."""
    return cached(starts, ("host",), lambda: tuple(starts.tolist()))


def attend(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    kernel: Kernel,
    *,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Run a kernel on the sequences that have queries and keys.

    Args:
        spec: The call.
        query: `(T_q, H, D)`.
        key: `(T_k, H_kv, D)`.
        value: `(T_k, H_kv, D_v)`.
        starts_q: int32 `(B + 1,)`.
        starts_k: int32 `(B + 1,)`.
        kernel: Called at most once.
        with_lse: Whether to return lse.

    Returns:
        The output and lse of every row: 0 and -inf, and no gradients, for tokens of a sequence without keys and for
        tokens of no sequence.

    Raises:
        InvalidCallError: If the cumulative lengths are wrong.
    """
    found_k = found_q = _lengths("q", starts_q, spec.seqlen_q, query.shape[0])
    if starts_k is not starts_q or (spec.seqlen_kv, key.shape[0]) != (spec.seqlen_q, query.shape[0]):
        found_k = _lengths("k", starts_k, spec.seqlen_kv, key.shape[0])
    if found_q.absent == found_k.absent and not (found_q.rest or found_k.rest) and found_q.present:
        return kernel(query, key, value, Sequences(found_q.present, found_k.present, whole=True))
    pairs = list(zip(found_q.each, found_k.each, strict=True))
    both = Sequences(tuple(q for q, k in pairs if q and k), tuple(k for q, k in pairs if q and k), whole=False)
    if not both.lengths_q:
        return _zeros(spec, query, key, value, with_lse=with_lse)
    rows = _tokens(found_q.each, found_k.each, query.device)
    keys = _tokens(found_k.each, found_q.each, query.device)
    query_part, key_part, value_part = (
        tensor.index_select(0, places) for tensor, places in ((query, rows), (key, keys), (value, keys))
    )
    part, part_lse = kernel(query_part, key_part, value_part, both)
    out = part.new_zeros((query.shape[0], *part.shape[1:])).index_copy(0, rows, part)
    if part_lse is None:
        return out, None
    lse = part_lse.new_full((part_lse.shape[0], query.shape[0]), float("-inf"))
    return out, lse.index_copy(1, rows, part_lse)


def _lengths(name: str, starts: Tensor, most: int, total: int) -> _Lengths:
    def make() -> _Lengths:
        found = on_host(starts)
        check_starts(name, found, most, total)
        each = tuple(end - start for start, end in itertools.pairwise(found))
        present = tuple(length for length in each if length)
        return _Lengths(each, present, bytes(length == 0 for length in each), total - found[-1])

    return cached(starts, ("lengths", most, total), make)


def _tokens(own: tuple[int, ...], other: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the indices of the tokens whose sequence has both queries and keys."""
    ends = itertools.accumulate(own)
    parts = [
        torch.arange(end - length, end) for end, length, there in zip(ends, own, other, strict=True) if length and there
    ]
    return torch.cat(parts).to(device)


def _zeros(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, *, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute a call in which no sequence has both queries and keys; the result is part of the autograd graph."""
    result = empty_attention(spec, query[None], key[None, :0], value[None, :0], Parts())
    out = result[0] if isinstance(result, tuple) else result
    if not with_lse:
        return out[0], None
    return out[0], query.new_full((query.shape[1], query.shape[0]), float("-inf"), dtype=torch.float32)
