"""Calls that differ from decided ones in their lengths alone, as in decoding: one decision serves a range of lengths.

A range holds the lengths of one power of two, and of one residue where a backend's rules go by residues. One decision
serves it if the calls at its ends are decided alike: rules are thresholds in a length or in products of lengths, so the
calls between are decided alike too. Only calls without a mask's tensor are served, by runners that don't depend on
lengths. `Backend.length_period` says which backends take part.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from anyattn.call.arguments import _autocast_on, _deterministic, _grad_enabled, autocast_dtype
from anyattn.call.facts import Options
from anyattn.call.storage import starts_on_16, storage_facts
from anyattn.environment import detect
from anyattn.errors import AnyattnError
from anyattn.run.table import Entry, shorten
from anyattn.scopes import defaults
from anyattn.selection.choice import Known, choice_of
from anyattn.selection.decide import decide
from anyattn.types.decision import Decision
from anyattn.types.names import AUTO
from anyattn.types.spec import AttentionSpec

Lengths = tuple[int, int]

_TRIED_AFTER = 2
"""After how many lengths of a range the next one is taken to be one of many."""


class Range:
    """What is known of the calls of one range.

    Attributes:
        seen: The lengths that were decided each by itself; nothing is tried before there are three.
        period: What residues are taken by; 0 if every length is to be decided.
        entries: By residues, the decided call that serves them, or None if their ends differ.
    """

    __slots__ = ("entries", "period", "seen")

    def __init__(self) -> None:
        self.seen: set[Lengths] = set()
        self.period = 1
        self.entries: dict[Lengths, Entry | None] = {}


def range_key(query: Tensor, key: Tensor, value: Tensor, options: Options) -> tuple[Any, ...] | None:
    """Return everything that the decision of a call without mask and sinks depends on, with ranges for lengths.

    None if query, key and value aren't plain tensors of four dimensions, or key and value differ in length.
    """
    if not type(query) is type(key) is type(value) is Tensor or not query.dim() == key.dim() == value.dim() == 4:
        return None
    axis = _axis(options)
    rest = axis + 1
    seqlen_q, seqlen_kv = query.shape[axis], key.shape[axis]
    if seqlen_kv != value.shape[axis]:
        return None
    return (
        "lengths",
        query.shape[:axis] + query.shape[rest:],
        key.shape[:axis] + key.shape[rest:],
        value.shape[:axis] + value.shape[rest:],
        seqlen_q.bit_length(),
        seqlen_kv.bit_length(),
        (seqlen_q > seqlen_kv) - (seqlen_q < seqlen_kv),
        query.dtype,
        key.dtype,
        value.dtype,
        query.device,
        key.device,
        value.device,
        storage_facts(query, key, value, 3 - axis, None, starts_on_16),
        _grad_enabled() and (query.requires_grad, key.requires_grad, value.requires_grad),
        options,
        _autocast_on() and autocast_dtype(query.device.type),
        _deterministic(),
    )


def find(
    scope: defaults.Scope, key: tuple[Any, ...] | None, query: Tensor, keys: Tensor, value: Tensor, options: Options
) -> Entry | None:
    """Return the decided call that serves a call, if there is one, and put it into the short table.

    Args:
        scope: The scope in force.
        key: From `range_key`.
        query: As for `attention`.
        keys: The call's key.
        value: As for `attention`.
        options: The call's other arguments.
    """
    found: Range | None = None if key is None else scope.table.get(key)
    if found is None or not found.period:
        return None
    axis, period = _axis(options), found.period
    entry = found.entries.get((query.shape[axis] % period, keys.shape[axis] % period))
    if entry is not None:
        # The table itself holds decisions, and this one names other lengths.
        shorten(scope, entry, query, keys, value, None, options)
    return entry


def _axis(options: Options) -> int:
    return 1 if options.layout == "BSHD" else 2


def learn(scope: defaults.Scope, key: tuple[Any, ...] | None, entry: Entry) -> None:
    """Note a call that was decided for its own lengths, and try whether its decision serves the range."""
    if key is None:
        return
    spec = entry.decision.spec
    found: Range | None = scope.table.get(key)
    if found is None:
        found = Range()
        scope.remember(key, found)
    if not found.period:
        return
    if len(found.seen) < _TRIED_AFTER:
        found.seen.add((spec.seqlen_q, spec.seqlen_kv))
        return
    period = _period(entry)
    if period != found.period:
        found.period, found.entries = period, {}
    if not period:
        return
    residues = (spec.seqlen_q % period, spec.seqlen_kv % period)
    if residues not in found.entries:
        found.entries[residues] = entry if _serves(scope, entry, period) else None


def _period(entry: Entry) -> int:
    """Return the common period of the backends that were judged; 0 if one has none, or the runner isn't bound."""
    choice = choice_of(entry.decision)
    names = [candidate.name for candidate in choice.refused]
    names += [choice.instead_of] if choice.instead_of else []
    known = Known(names, third_parties=False)
    if entry.short is None or not entry.in_graphs or entry.decision.spec.is_empty:
        return 0
    judged = [known[name] for name in names]
    periods = [backend.length_period(entry.decision.spec) for backend in (choice.backend, *judged)]
    return 0 if 0 in periods else math.lcm(*periods)


def _serves(scope: defaults.Scope, entry: Entry, period: int) -> bool:
    """Whether the calls at the ends of the range are decided as this one is."""
    spec = entry.decision.spec
    wanted = _what_runs(entry.decision)
    for lengths in _ends(spec, period, _by_time(entry.decision)):
        other = spec.replace(seqlen_q=lengths[0], seqlen_kv=lengths[1])
        try:
            decision = decide(other, scope)
        except AnyattnError:
            return False
        if _what_runs(decision) != wanted:
            return False
    return True


def _what_runs(decision: Decision) -> tuple[Any, ...]:
    choice = choice_of(decision)
    return (choice.backend, choice.plan.lowering, choice.plan.rescale, choice.plan.spec is decision.spec)


def _by_time(decision: Decision) -> bool:
    """Whether times may decide some call of the range: they are known by buckets of lengths, finer than a range."""
    if AUTO not in decision.preference.names:
        return False
    from anyattn.timings.known import knows

    return knows(detect(), decision.spec.device_type, decision.spec.device_index)


def _ends(spec: AttentionSpec, period: int, by_time: bool = False) -> list[Lengths]:
    """Return the corners of a call's range that have its residues, and its order of the two lengths.

    With `by_time` they are the corners of each bucket of lengths in the range.
    """
    rows, keys = (dict.fromkeys(_ends_of(length, period, by_time)) for length in (spec.seqlen_q, spec.seqlen_kv))
    if spec.seqlen_q == spec.seqlen_kv:
        return list(zip(rows, keys, strict=True))
    order = spec.seqlen_q < spec.seqlen_kv
    # A corner on the other side of the diagonal isn't in the range; the nearest one that is stands for it.
    return [(q, k) for q in rows for k in keys if q != k and (q < k) == order] or [(spec.seqlen_q, spec.seqlen_kv)]


def _ends_of(length: int, period: int, by_time: bool = False) -> tuple[int, ...]:
    low, residue = 1 << (length.bit_length() - 1), length % period
    ends = (low + (residue - low) % period, (2 * low - 1) - (2 * low - 1 - residue) % period)
    if not by_time:
        return ends
    from anyattn.timings.keys import bucket_ends

    # The lengths of this residue next to the ends of each bucket.
    after = (end + (residue - end) % period for end in bucket_ends(length))
    before = (end - (end - residue) % period for end in bucket_ends(length))
    return tuple(sorted({*ends, *(end for end in (*after, *before) if low <= end < 2 * low)}))
