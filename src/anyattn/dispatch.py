"""From a call to its kernel: the table of decided calls, and what happens when a call isn't in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from anyattn import policy, registry, tracing
from anyattn.decision import Decision, Precision, Preference
from anyattn.describe import Facts, MaskFacts, Options, build_spec, check_tensors, facts_of
from anyattn.environment import Environment, detect
from anyattn.errors import AnyattnWarning, BackendUnavailableError, InvalidCallError
from anyattn.faults import outside, passes_over, say_passed_over, spec_of_fault
from anyattn.masks import Mask
from anyattn.names import AUTO, BY_NAME
from anyattn.prepare import NOTHING, as_mask, known_of, mask_facts, short_name
from anyattn.refusals import refusal
from anyattn.running import Entry, make_entry, raise_kernel_error
from anyattn.selection import NO_FAULTS, Timings, resolve
from anyattn.spec import UNKNOWN, AttentionSpec, Layout, Storage

Backends = str | list[str] | tuple[str, ...]
"""A name, an alias, `"auto"`, or a list in order of preference."""

timings_for: Callable[[AttentionSpec, Environment], Timings | None] = lambda spec, env: None  # noqa: E731
"""Where measured times for a call come from; the tuner sets it."""


def entry_for(
    scope: policy.Scope,
    table_key: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    sinks: Tensor | None,
    options: Options,
) -> Entry:
    """Decide a call that isn't in the scope's table, and put it there."""
    base = scope if scope.recorder is None else policy.scope_for(scope.settings)
    entry: Entry | None = None
    if scope.recorder is not None and table_key is not None:
        entry = base.table.get(table_key)
    if entry is None or (not entry.in_graphs and tracing.is_captured(query)):
        generation = policy.generation()
        spec = describe(query, key, value, attn_mask, sinks, options)
        if tracing.is_captured(query):
            spec = spec.replace(captured=True)
        cast = autocast_dtype(query.device.type)
        entry = make_first(spec, base, lambda decision: make_entry(decision, cast))
        # What a graph may hold isn't what runs outside of it.
        if table_key is not None and not spec.captured and generation == policy.generation():
            base.remember(table_key, entry)
            if entry.short and sinks is None and options.layout == "BSHD" and type(query) is Tensor:
                _shorten(base, entry, query, key, value, attn_mask, options)
    return entry


Made = TypeVar("Made")


def make_first(spec: AttentionSpec, scope: policy.Scope, make: Callable[[Decision], Made]) -> Made:
    """Decide a call and load its kernel; where a list or `auto` allows it, go on to the next if it can't be loaded.

    Raises:
        AnyattnError: As `decide` and `make`.
    """
    while True:
        decision = decide(spec, scope)
        try:
            made = make(decision)
        except BackendUnavailableError:
            # Loading notes what it couldn't load, and the next decision goes past it.
            if decision.preference.mode == "require" or decision.chosen not in policy.broken_loads():
                raise
        else:
            say_passed_over(decision)
            return made


def _shorten(
    scope: policy.Scope, entry: Entry, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, options: Options
) -> None:
    """Put a decided call into the short table as well, where its mask isn't one that must be looked at each time."""
    name: Any = None
    if attn_mask is not None:
        name = short_name(attn_mask, entry.decision.spec.mask)
        if name is None:
            return
    place = query.is_cpu or place_key(query, key, value)
    short_key = (name, query.shape, key.shape, value.shape, query.dtype, place, *options[:7])
    scope.short[short_key] = entry.call if attn_mask is None else entry.short_masked


def place_key(query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, ...]:
    """Give what a decision depends on besides shapes for tensors that aren't on a CPU.

    Where kernels differ by alignment, strides, gradients and the like, all of that is part of the key; on a CPU none of
    it matters to a call without a mask.
    """
    try:
        start = (query.data_ptr() | key.data_ptr() | value.data_ptr()) & 15
    except RuntimeError:  # traced or transformed tensors have no storage of their own
        start = -1
    return (
        query.device,
        query.stride(),
        key.stride(),
        value.stride(),
        start,
        torch.is_grad_enabled() and (query.requires_grad, key.requires_grad, value.requires_grad),
        torch._C._is_any_autocast_enabled() and autocast_dtype(query.device.type),
        torch.are_deterministic_algorithms_enabled(),
    )


def describe(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, sinks: Tensor | None, options: Options
) -> AttentionSpec:
    """Check a call and describe it.

    Raises:
        InvalidCallError: If it is wrong for any backend.
    """
    check_tensors(query, key, value)
    if sinks is not None and not isinstance(sinks, Tensor):
        raise InvalidCallError(f"sinks must be a tensor (num_heads,); {type(sinks).__name__} was given.")
    mask = as_mask(attn_mask)
    known = NOTHING
    if mask is not None and (mask.key is not None or mask.dense is not None):
        known = known_of(mask, _kv_length(key, options.layout))
    cast = autocast_dtype(query.device.type)
    facts = tuple(_facts(tensor, cast, options.layout) for tensor in (query, key, value))
    symbolic = any(UNKNOWN in fact.shape for fact in facts)
    sink_facts = None if sinks is None else facts_of(sinks)
    storage = _storage(query, key, value, options.layout, mask)

    def build(seen: MaskFacts) -> AttentionSpec:
        return build_spec(
            facts[0],
            facts[1],
            facts[2],
            seen,
            options,
            sink_facts,
            grad=torch.is_grad_enabled(),
            storage=storage,
            same_lengths=_same_lengths(query, key, options.layout) if symbolic else None,
            compiled=symbolic,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    if known.all_true:
        build(mask_facts(mask, NOTHING))  # a mask of the wrong shape is wrong even where it allows everything
    return build(mask_facts(mask, known))


def _facts(tensor: Tensor, cast: torch.dtype | None, layout: Layout) -> Facts:
    """Read a tensor's facts as autocast will have it; where sizes are symbols, heads and head_dim are made static."""
    facts = facts_of(tensor)
    if any(type(size) is not int for size in facts.shape):
        free = (0, 1) if layout == "BSHD" else (0, 2)
        shape = tuple(UNKNOWN if axis in free and type(n) is not int else int(n) for axis, n in enumerate(facts.shape))
        facts = facts._replace(shape=shape)
    if cast is None or not facts.dtype.is_floating_point or facts.dtype == torch.float64:
        return facts
    return facts._replace(dtype=cast)


def _same_lengths(query: Tensor, key: Tensor, layout: Layout) -> bool:
    axis = 1 if layout == "BSHD" else 2
    return query.dim() == key.dim() == 4 and bool(query.shape[axis] == key.shape[axis])


def _kv_length(key: Tensor, layout: Layout) -> int:
    if key.dim() != 4:
        return UNKNOWN
    return key.shape[1 if layout == "BSHD" else 2]


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """Give the dtype that autocast asks for on a type of device, or None."""
    if not torch._C._is_any_autocast_enabled() or not torch.amp.is_autocast_available(device_type):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _storage(query: Tensor, key: Tensor, value: Tensor, layout: Layout, mask: Mask | None) -> Storage:
    # On a CPU nothing depends on it, and leaving it out keeps the hot path short.
    if query.is_cpu:
        return Storage()
    tensors = (query, key, value)
    heads = 2 if layout == "BSHD" else 1
    seen = [tensor.transpose(1, 2) if layout == "BSHD" else tensor for tensor in tensors if tensor.dim() == 4]
    return Storage(
        aligned=all(is_aligned(tensor, padded=True) for tensor in tensors if tensor.dim()),
        unit_stride=all(tensor.stride(-1) == 1 or tensor.shape[-1] == 1 for tensor in tensors if tensor.dim()),
        expanded_kv=any(t.dim() == 4 and t.shape[heads] > 1 and t.stride(heads) == 0 for t in (key, value)),
        bhsd_contiguous=all(tensor.is_contiguous() for tensor in seen),
        mask_aligned=mask is None or mask.dense is None or bias_is_aligned(mask.dense),
    )


def bias_is_aligned(dense: Tensor) -> bool:
    """Whether a dense mask is boolean (and will be copied), or its rows lie where kernels may read them."""
    return dense.dtype == torch.bool or (dense.stride(-1) == 1 and is_aligned(dense))


def is_aligned(tensor: Tensor, *, padded: bool = False) -> bool:
    """Whether a tensor, and each of its rows, starts at a multiple of 16 bytes."""
    size = tensor.element_size()
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # traced or transformed tensors have no storage of their own
        start = int(tensor.storage_offset()) * size
    rows: list[Any] = [
        stride for stride, length in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if length > 1
    ]
    if padded and tensor.shape[-1] * size % 16:
        rows = []  # the kernel's wrapper pads head_dim, which copies
    return start % 16 == 0 and all(stride * size % 16 == 0 for stride in rows)


_preferences: dict[Any, Preference] = {}


def scope_of_call(scope: policy.Scope, backend: Any) -> policy.Scope:
    """Give the scope in which a call with `backend=` runs: the call's wish beats blocks and pins.

    Raises:
        UnknownBackendError: If a name is unknown.
        TypeError: If it is neither a name nor a list of names.
    """
    if isinstance(backend, list):
        backend = tuple(backend)
    calls = scope.base.calls
    found: policy.Scope | None = calls.get(backend)
    if found is None or scope.recorder is not None:
        wish = make_preference(backend, "backend=", scope.settings.precision)
        found = policy.changed(scope, context=wish, override=True)
        # Names of third parties can go again; those of the plan stay.
        if scope.recorder is None and all(name in BY_NAME or name == AUTO for name in wish.names):
            if len(calls) > 1024:
                calls.clear()
            calls[backend] = found
    return found


def make_preference(backend: Any, source: str, precision: Precision = "exact") -> Preference:
    """Turn a name or a list of names into a preference with canonical names.

    Raises:
        UnknownBackendError: If a name is unknown.
        TypeError: If it is neither a name nor a list of names.
        InvalidCallError: If the list is empty, or the precision isn't one.
    """
    if type(backend) is str:
        known = _preferences.get((backend, source, precision))
        if known is not None:
            return known
    if precision not in ("exact", "int8", "fp8", "fp4"):
        raise InvalidCallError(f"precision must be 'exact', 'int8', 'fp8' or 'fp4'; {precision!r} was given.")
    if not isinstance(backend, str | list | tuple):
        raise TypeError(f"A backend is a name or a list of names, not {type(backend).__name__}.")
    key = (tuple(backend) if isinstance(backend, list) else backend, source, precision)
    found = _preferences.get(key)
    if found is None:
        is_list = isinstance(backend, list | tuple)
        names = tuple(backend) if is_list else (backend,)
        if not names:
            raise InvalidCallError("A list of attention backends must name at least one.")
        resolved = tuple(registry.resolve_name(name) for name in names)
        found = policy.preference(resolved, is_list=is_list, source=source, precision=precision)
        if len(_preferences) < 1024 and all(name in BY_NAME or name == AUTO for name in resolved):
            _preferences[key] = found
    return found


def decide(spec: AttentionSpec, scope: policy.Scope) -> Decision:
    """Choose a backend for a described call under a scope.

    Raises:
        UnknownBackendError: If a name in force is unknown.
        BackendUnavailableError: If the one backend required can't be used here.
        UnsupportedCallError: If nothing that was allowed admits the call.
    """
    env = detect()
    policy.follow(env.overrides)
    decision = decision_for(spec, scope, env)
    if decision.chosen is None:
        wish = decision.preference
        raise refusal(decision) from policy.load_error(wish.names[0]) if wish.mode == "require" else None
    return decision


def decision_for(spec: AttentionSpec, scope: policy.Scope, env: Environment) -> Decision:
    """Choose as `decide` does, on any machine, and give the decision even where nothing was chosen."""
    wish = registry.resolve_preference(scope.preference())
    overruled = scope.overruled()
    if overruled and not scope.settings.override:
        _say_once(f"Overruled: {overruled}. Write override=True to have the block beat pins, or change the pin.")
    times = timings_for(spec, env) if AUTO in wish.names else None
    # A third party's package is imported where it is asked for, by name or by auto, and nowhere else.
    known = registry.names() if AUTO in wish.names else registry.built_in_names()
    names = dict.fromkeys((*known, *wish.names))
    known_ones = registry.known(n for n in names if n != AUTO)
    # What failed here says nothing of a machine that is supposed.
    faults = policy.faults(spec_of_fault(spec)) if env is detect() else NO_FAULTS
    return resolve(spec, env, wish, times, known_ones, overruled=overruled, faults=faults)


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        warnings.warn(text, AnyattnWarning, stacklevel=outside())


def explain_failure(
    error: Exception, scope: policy.Scope, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, options: Options
) -> None:
    """Say why a call from the short table failed: it was wrong, or the kernel raised. Returns if the next may try.

    Raises:
        AnyattnError: Unless a list or `auto` chose the backend, which then is passed over.
    """
    spec = describe(query, key, value, attn_mask, None, options)
    decision = decide(spec, scope)
    if not passes_over(error, decision):
        raise_kernel_error(error, decision)
