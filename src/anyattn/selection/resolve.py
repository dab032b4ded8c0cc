"""From a call, a machine and a preference to a decision; pure, so any machine's choices can be computed on a laptop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from anyattn.backend.capabilities import as_run
from anyattn.backend.protocol import Backend, Lowering, Plan
from anyattn.environment import Environment
from anyattn.lowering.dense import ALIGNED, is_copied_for
from anyattn.selection.choice import Choice
from anyattn.types.decision import Candidate, Decision, Preference, carry
from anyattn.types.names import AUTO
from anyattn.types.reasons import Conversion, Reason
from anyattn.types.spec import AttentionSpec
from anyattn.types.timings import Timings

_LONG = 1 << 35
_VERY_LONG = 1 << 40
_MANY_KEYS = 1024
"""From these sizes `auto` tries flash kernels before torch's own pick, by the times of 20 calls of real models on one
H100 (torch 2.11, fa3-fwd 0.0.3, flash-attn-4 4.0.0b36). No mask: batch * heads * S_q * S_kv * head_dim of 3.4e10,
and from 1e12 also quantised kernels if they are allowed. With a mask that SDPA takes as a dense one: 1024 keys."""

_FEW_QUERIES = 16
"""Up to this many queries on more keys, as in decoding, `auto` tries kernels that need no preparation. torch's own pick
on an H200 is cuDNN, which spends 35 ms or more on each new length. After that it is 1.0 to 1.5 times as fast as
FlashAttention-3 for one query of head_dim 128, 1.6 to 2.6 times with head_dim 64, and 0.1 to 1.0 times for 16 queries
(torch 2.11, fa3-fwd 0.0.3, 512 to 32768 keys; `benchmarks/decoding.py`)."""


_PREPARED = frozenset(("native", "native_cudnn"))
"""The backends that may run cuDNN, which prepares itself for each new length."""


def few_queries(spec: AttentionSpec) -> bool:
    """Whether a call looks like a step of decoding, whose lengths grow from call to call."""
    return spec.device_type == "cuda" and spec.seqlen_q <= min(_FEW_QUERIES, spec.seqlen_kv - 1)


def rule(spec: AttentionSpec) -> tuple[str, ...]:
    """Return the backends that `auto` tries before its fixed order on CUDA, by the call's size and mask."""
    if spec.device_type != "cuda":
        return ()
    mask = spec.mask
    work = spec.batch * spec.num_heads * spec.seqlen_q * spec.seqlen_kv * spec.head_dim
    pattern = mask.pattern
    dense = mask.key is not None or (
        pattern is not None and not (pattern.is_causal and (spec.same_lengths or pattern.align == "upper_left"))
    )
    if dense:
        return ("flash4", "flash3", "flash2") if spec.seqlen_kv >= _MANY_KEYS else ()
    if few_queries(spec):
        return ("flash3", "flash2", "native_flash")
    quantised = ("flash3_fp8", "sage") if work >= _VERY_LONG else ()
    return (*quantised, "flash3", "flash4") if work >= _LONG else ()


_LOOSER = {"exact": (), "int8": ("int8",), "fp8": ("int8", "fp8"), "fp4": ("int8", "fp8", "fp4")}

NO_FAULTS: Mapping[str, Reason] = {}


def order(
    device_type: str, available: Sequence[Backend], spec: AttentionSpec | None = None
) -> tuple[tuple[str, ...], str]:
    """Return the names that `auto` tries, in order, and the basis of that order.

    If no rule applies it is the order of `auto_rank`. torch's own pick is first: on an H100 it is the fastest for short
    calls, whose time is mostly Python's.
    """
    serving = [backend for backend in available if device_type in backend.declarations] or available
    ranked = [backend.name for backend in sorted(serving, key=lambda backend: backend.auto_rank)]
    at_hand = [backend.name for backend in available]
    first = () if spec is None else tuple(name for name in rule(spec) if name in at_hand)
    return tuple(dict.fromkeys((*first, *ranked))), "rule by size and mask" if first else "fixed order"


def resolve(
    spec: AttentionSpec,
    env: Environment,
    preference: Preference,
    known: Mapping[str, Backend],
    *,
    overruled: str = "",
    faults: Mapping[str, Reason] = NO_FAULTS,
    timings: Timings | None = None,
) -> Decision:
    """Choose a backend for a call.

    Backends are judged in order of preference, up to the first that admits the call. Where `auto` found it, another one
    of `auto`'s that admits the call runs instead if it is faster by `timings`, and by enough. The others are judged
    when the decision's candidates are read.

    Args:
        spec: The call.
        env: The machine.
        preference: What was requested, with canonical names.
        known: Every known backend by name.
        overruled: What to report as overruled.
        faults: Backends that failed before, with the reason. A failed load always counts; a failed call counts for
            lists and `auto`, not for a required backend.
        timings: What is known of the call's times. Backends whose results were wrong are left out by `auto`, unless no
            other admits the call.

    Returns:
        A decision that carries what runs the call and every candidate's reasons; `chosen` is None if no requested
        backend admits the call.
    """
    wanted, automatic, basis = _wanted(spec, preference, known)
    limits = preference if preference.mode == "prefer" else None
    holding = faults
    if faults and limits is None:
        holding = {name: reason for name, reason in faults.items() if reason.code == "broken_import"}
    if timings is not None and timings.refused:
        wrong = {name: reason for name, reason in timings.refused.items() if name in automatic}
        holding = {**wrong, **holding}

    def judged_here(name: str) -> Candidate:
        return _judge(name, known[name], spec, env, limits, holding)

    first, refused = _first(wanted, judged_here)
    if first is None and timings is not None and timings.refused:
        return resolve(spec, env, preference, known, overruled=overruled, faults=faults)
    name, timed = first, None
    if first is not None and timings is not None and first in automatic and timings.of(first) is not None:
        # Times are those of calls that were prepared.
        slow_once = _PREPARED if few_queries(spec) else frozenset()
        faster = [name for name in timings.faster_than(first) if name in automatic and name not in slow_once]
        fastest, slower = _first([name for name in faster if name not in refused], judged_here)
        name, timed, basis = fastest or first, timings, timings.words
        refused |= slower
    choice: Choice | None = None
    if name is not None:
        tried = tuple(refused.values())
        choice = _choice(name, known[name], spec, env, tried, "" if name == first else str(first))

    def judge() -> tuple[Candidate, ...]:
        judged = list(refused.values())
        if choice is not None:
            judged.append(Candidate(choice.plan.backend))
        left = [name for name in wanted if name not in {candidate.name for candidate in judged}]
        judged += map(judged_here, left)
        others = [name for name in known if name not in set(wanted)]
        judged += (_judge(name, known[name], spec, env, None, faults) for name in others)
        return tuple(judged)

    chosen = kernel = origin = ""
    conversions: tuple[Conversion, ...] = ()
    if choice is not None:
        chosen, kernel = choice.plan.backend, choice.plan.lowering.entry
        if spec.is_empty:
            kernel = "none: the call is empty"
        else:
            conversions, origin = _conversions(choice, spec), choice.backend.origin(env)
    decision = Decision(spec, chosen or None, kernel, conversions, preference, basis, (), overruled, origin, timed)
    return carry(decision, choice, judge)


def _first(names: Iterable[str], judge: Callable[[str], Candidate]) -> tuple[str | None, dict[str, Candidate]]:
    """Return the first backend that admits the call, and those that were refused before it."""
    refused: dict[str, Candidate] = {}
    for name in names:
        candidate = judge(name)
        if candidate.admits:
            return name, refused
        refused[name] = candidate
    return None, refused


def _choice(
    name: str,
    backend: Backend,
    spec: AttentionSpec,
    env: Environment,
    refused: tuple[Candidate, ...],
    instead_of: str = "",
) -> Choice:
    """Lower the call for the backend that admits it."""
    caps = backend.capabilities(spec, env)
    if spec.is_empty:
        return Choice(backend, caps, Plan(name, spec, Lowering("empty")), refused)
    run_as = as_run(caps, spec)
    if run_as is not spec:
        caps = backend.capabilities(run_as, env)
    rescale = spec.sinks and caps is not None and not caps.sinks
    return Choice(backend, caps, Plan(name, run_as, backend.lower(run_as, env), rescale), refused, instead_of)


def _conversions(choice: Choice, spec: AttentionSpec) -> tuple[Conversion, ...]:
    plan = choice.plan
    conversions = plan.lowering.conversions
    if choice.caps is not None and is_copied_for(choice.caps, plan.spec, plan.lowering):
        conversions = (*conversions, ALIGNED)
    if plan.spec is not spec:
        text = "packed sequences padded to the longest, masked by key lengths, and packed again"
        conversions = (Conversion("unpacked", text), *conversions)
    return conversions


def _wanted(
    spec: AttentionSpec, preference: Preference, known: Mapping[str, Backend]
) -> tuple[tuple[str, ...], frozenset[str], str]:
    """Return the backends to try in order, those of them that only `auto` names, and the basis of the order."""
    if preference.mode == "require":
        return preference.names, frozenset(), "required"
    names: list[str] = []
    basis = "preferred"
    automatic: tuple[str, ...] = ()
    for name in preference.names:
        if name == AUTO:
            # `auto` never takes a backend that would be downloaded; such a one is requested by name.
            at_hand = [backend for backend in known.values() if not backend.downloads]
            automatic, basis = order(spec.device_type, at_hand, spec)
            names.extend(automatic)
        else:
            names.append(name)
    return tuple(dict.fromkeys(names)), frozenset(automatic).difference(preference.names), basis


def _judge(
    name: str,
    backend: Backend,
    spec: AttentionSpec,
    env: Environment,
    limits: Preference | None,
    faults: Mapping[str, Reason],
) -> Candidate:
    caps = backend.capabilities(spec, env) if spec.packed or limits is not None else None
    reasons = backend.reasons(as_run(caps, spec), env)
    if limits is not None and caps is not None and not caps.exact and caps.quantised not in _LOOSER[limits.precision]:
        hint = f"allow it with precision={caps.quantised or 'int8'!r}, or require it by name"
        reasons = (*reasons, Reason("precision", "an exact kernel", f"one quantised to {caps.quantised}", hint))
    if name in faults:
        reasons = (*reasons, faults[name])
    return Candidate(name, reasons)
