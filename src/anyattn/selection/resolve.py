"""From a call, a machine and a wish to a decision: pure, so that every machine can be tried on a laptop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from anyattn.backend.capabilities import as_run
from anyattn.backend.protocol import Backend, Lowering, Plan
from anyattn.environment import Environment
from anyattn.lowering.dense import ALIGNED, is_copied_for
from anyattn.selection.choice import Choice
from anyattn.types.decision import Candidate, Decision, Preference, carry
from anyattn.types.names import AUTO
from anyattn.types.reasons import Conversion, Reason
from anyattn.types.spec import AttentionSpec

_LONG = 1 << 35
_VERY_LONG = 1 << 40
_MANY_KEYS = 1024
"""From these on flash kernels come before torch's own pick, by the times of 20 calls of real models on one H100 (torch
2.11, fa3-fwd 0.0.3, flash-attn-4 4.0.0b36): batch * heads * S_q * S_kv * head_dim of 3.4e10 without a mask, from 1e12
on quantised kernels too where they are allowed, and 1024 keys under a mask that SDPA would be given as a dense one."""


def rule(spec: AttentionSpec) -> tuple[str, ...]:
    """Give what `auto` tries before its fixed order for a call on CUDA, by the call's size and mask."""
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
    quantised = ("flash3_fp8", "sage") if work >= _VERY_LONG else ()
    return (*quantised, "flash3", "flash4") if work >= _LONG else ()


_LOOSER = {"exact": (), "int8": ("int8",), "fp8": ("int8", "fp8"), "fp4": ("int8", "fp8", "fp4")}

NO_FAULTS: Mapping[str, Reason] = {}


def order(
    device_type: str, available: Sequence[Backend], spec: AttentionSpec | None = None
) -> tuple[tuple[str, ...], str]:
    """Return the names that `auto` tries, in order, and what the order rests on.

    Where no rule applies that is the order of their `auto_rank`. torch's own pick is first: on an H100 it is the
    fastest for short calls, which are bound by the Python in front of a kernel.
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
) -> Decision:
    """Choose a backend for a call.

    Backends are judged in the order in which they are wanted, up to the one that admits the call. All others are judged
    when the decision's candidates are looked at, with the same arguments.

    Args:
        spec: The call.
        env: The machine.
        preference: What was asked for, with canonical names.
        known: Every known backend by name.
        overruled: What to report as overruled.
        faults: Backends that failed before, with the reason: for this call, which lists and `auto` go past and a name
            that is required doesn't, or when they were loaded, which nothing gets past.

    Returns:
        A decision that carries what runs the call, and that lists every candidate that was considered, with all the
        reasons against it. Where nothing admits the call, `chosen` is None.
    """
    wanted, basis = _wanted(spec, preference, known)
    limits = preference if preference.mode == "prefer" else None
    holding = faults
    if faults and limits is None:
        holding = {name: reason for name, reason in faults.items() if reason.code == "broken_import"}
    refused: list[Candidate] = []
    choice: Choice | None = None
    for name in wanted:
        candidate = _judge(name, known[name], spec, env, limits, holding)
        if candidate.admits:
            choice = _choice(name, known[name], spec, env, tuple(refused))
            break
        refused.append(candidate)

    def judge() -> tuple[Candidate, ...]:
        judged = refused.copy()
        if choice is not None:
            judged.append(Candidate(choice.plan.backend))
        left = [name for name in wanted if name not in {candidate.name for candidate in judged}]
        judged += (_judge(name, known[name], spec, env, limits, holding) for name in left)
        others = [name for name in known if name not in set(wanted)]
        judged += (_judge(name, known[name], spec, env, None, faults) for name in others)
        return tuple(judged)

    chosen = kernel = origin = ""
    conversions: tuple[Conversion, ...] = ()
    if choice is not None:
        chosen, kernel = choice.plan.backend, choice.plan.lowering.entry
        if spec.is_empty:
            kernel = "none: there is nothing to attend to"
        else:
            conversions, origin = _conversions(choice, spec), choice.backend.origin(env)
    decision = Decision(spec, chosen or None, kernel, conversions, preference, basis, (), overruled, origin)
    return carry(decision, choice, judge)


def _choice(
    name: str, backend: Backend | None, spec: AttentionSpec, env: Environment, refused: tuple[Candidate, ...]
) -> Choice:
    """Lower the call for the backend that admits it: what is shown, and what runs."""
    assert backend is not None
    caps = backend.capabilities(spec, env)
    if spec.is_empty:
        return Choice(backend, caps, Plan(name, spec, Lowering("empty")), refused)
    run_as = as_run(caps, spec)
    if run_as is not spec:
        caps = backend.capabilities(run_as, env)
    rescale = spec.sinks and caps is not None and not caps.sinks
    return Choice(backend, caps, Plan(name, run_as, backend.lower(run_as, env), rescale), refused)


def _conversions(choice: Choice, spec: AttentionSpec) -> tuple[Conversion, ...]:
    """List what is done to the call, what is done outside of its backend included."""
    plan = choice.plan
    conversions = plan.lowering.conversions
    if choice.caps is not None and is_copied_for(choice.caps, plan.spec, plan.lowering):
        conversions = (*conversions, ALIGNED)
    if plan.spec is not spec:
        text = "packed sequences padded to the longest, with key lengths for a mask, and packed again"
        conversions = (Conversion("unpacked", text), *conversions)
    return conversions


def _wanted(spec: AttentionSpec, preference: Preference, known: Mapping[str, Backend]) -> tuple[tuple[str, ...], str]:
    if preference.mode == "require":
        return preference.names, "required"
    names: list[str] = []
    basis = "preferred"
    for name in preference.names:
        if name == AUTO:
            # What would be downloaded is taken where its own name was given, and never by `auto`.
            at_hand = [backend for backend in known.values() if not backend.downloads]
            automatic, basis = order(spec.device_type, at_hand, spec)
            names.extend(automatic)
        else:
            names.append(name)
    return tuple(dict.fromkeys(names)), basis


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
