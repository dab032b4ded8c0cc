"""From a decision to something that can be called, and what becomes of a kernel's errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from anyattn import policy, registry
from anyattn.alignment import realigned
from anyattn.backend import Backend, Lowering, MaskedRunner, Output, Parts, Plan, Run, Runner
from anyattn.capabilities import as_run
from anyattn.checks import can_check, check_inputs, check_output
from anyattn.decision import Decision
from anyattn.environment import detect
from anyattn.errors import AnyattnError, BackendUnavailableError, KernelError
from anyattn.faults import broken_import, is_out_of_memory, loses_device
from anyattn.lowering import apply_sinks, empty_attention, is_copied_for
from anyattn.prepare import as_mask, autocast_mask, parts_of
from anyattn.reasons import Reason
from anyattn.refusals import listed
from anyattn.spec import AttentionSpec
from anyattn.tracing import is_plain


class Entry:
    """A decided call.

    Attributes:
        call: `call(query, key, value)` for a call without mask and sinks.
        call_masked: `call_masked(query, key, value, attn_mask, sinks)`.
        decision: What was chosen and why.
        short: Whether `call` itself refuses mismatched dtypes and devices, follows autocast and gives gradients, so
            that a table key needn't hold those.
        short_masked: The same with a mask object: `short_masked(query, key, value, attn_mask)`.
        in_graphs: Whether the call may be captured in a CUDA graph too; otherwise it is decided anew there.
    """

    __slots__ = ("call", "call_masked", "decision", "in_graphs", "short", "short_masked")

    def __init__(
        self,
        call: Callable[[Tensor, Tensor, Tensor], Output],
        call_masked: Callable[[Tensor, Tensor, Tensor, Any, Tensor | None], Output],
        decision: Decision,
        short: bool,
        short_masked: MaskedRunner | None = None,
        in_graphs: bool = True,
    ) -> None:
        self.call = call
        self.call_masked = call_masked
        self.decision = decision
        self.short = short
        self.short_masked = short_masked
        self.in_graphs = in_graphs

    @property
    def gives_gradients(self) -> bool:
        """Whether the backend chosen has a backward on the call's device."""
        backend = registry.get(self.decision.chosen or "")
        caps = None if backend is None else backend.capabilities(self.decision.spec, detect())
        return caps is not None and caps.backward


_loaded: set[Backend] = set()


def load(backend: Backend) -> None:
    """Import a backend's kernel, once; one that can't be imported is noted until `anyattn.reset`.

    Raises:
        BackendUnavailableError: If it raises anything.
    """
    if backend in _loaded:
        return
    try:
        backend.load()
    except BackendUnavailableError as error:
        # The backend knows better what is amiss, and what would cure it.
        known = (reason for reason in error.reasons if reason.code == "broken_import")
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        _note(backend.name, next(known, None) or broken_import(backend.name, error), cause)
        raise
    except Exception as error:
        reason = broken_import(backend.name, error)
        _note(backend.name, reason, error)
        text = listed(f"The attention backend {backend.name} is installed but can't be imported:", [reason])
        raise BackendUnavailableError(text, backend=backend.name, reasons=(reason,)) from error
    _loaded.add(backend)


def _note(name: str, reason: Reason, error: Exception) -> None:
    """Note that a kernel can't be imported, unless that may be due to a tracer or transform."""
    if is_plain():
        policy.add_fault(name, None, reason, error)


def make_plan(decision: Decision) -> tuple[Plan, Run]:
    """Turn a decision into what runs it; loads the kernel."""
    assert decision.chosen is not None
    backend = registry.get(decision.chosen)
    assert backend is not None
    if decision.spec.is_empty:
        return Plan(backend.name, decision.spec, Lowering("empty")), run_empty
    load(backend)
    caps = backend.capabilities(decision.spec, detect())
    spec = as_run(caps, decision.spec)
    lowering = backend.lower(spec, detect())
    rescale = decision.spec.sinks and caps is not None and not caps.sinks
    run: Run = backend.run
    if caps is not None and caps.device_guard and spec.device_type == "cuda":
        run = _on_its_device(run)
    if caps is not None and is_copied_for(caps, spec, lowering):
        run = _with_aligned(run)
    if caps is not None and caps.unit_stride and spec.device_type == "cpu":
        # Strides aren't part of what a CPU call is decided by, so that they are seen to at each call.
        run = _with_unit_stride(run)
    return Plan(backend.name, spec, lowering, rescale), run


def _on_its_device(run: Run) -> Run:
    """Make the tensors' device the current one for the call, and put back what was current whatever the kernel does."""

    def guarded(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        if torch.compiler.is_compiling():
            return run(plan, query, key, value, parts)  # compiled code sets the device itself
        with torch.cuda.device(query.device):
            return run(plan, query, key, value, parts)

    return guarded


def _with_aligned(run: Run) -> Run:
    def copied(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        return run(plan, realigned(query), realigned(key), realigned(value), parts)

    return copied


def _with_unit_stride(run: Run) -> Run:
    def strided(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
        return run(plan, query, key, value, parts)

    return strided


def run_empty(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
    """Answer a call without anything to attend to, whatever the backend."""
    return empty_attention(plan.spec, query, key, value, parts)


def execute(run: Run, plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
    """Run a plan, and add the sinks where its kernel has none."""
    result = run(plan, query, key, value, parts)
    if not plan.rescale or parts.sinks is None:
        return result
    if not isinstance(result, tuple):
        raise TypeError(
            f"The backend {plan.backend} gave a tensor for a call with sinks; one that declares lse and not sinks has "
            "to give (out, lse) there, as it does for return_lse."
        )
    out, lse = result
    if plan.spec.packed:
        out, lse = apply_sinks(out[None], lse[None], parts.sinks, "BSHD")
        out, lse = out[0], lse[0]
    else:
        out, lse = apply_sinks(out, lse, parts.sinks, plan.spec.layout)
    return (out, lse) if plan.spec.return_lse else out


def make_entry(decision: Decision, cast: torch.dtype | None = None) -> Entry:
    """Turn a decision into something that can be called."""
    plan, run = make_plan(decision)

    def call_masked(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, sinks: Tensor | None) -> Output:
        return execute(run, plan, query, key, value, _kept(plan.spec, parts_of(as_mask(attn_mask), sinks)))

    bound, bound_masked = _shortcuts(plan)
    nothing = Parts()
    call = bound if bound is not None else lambda query, key, value: run(plan, query, key, value, nothing)
    masked = call_masked
    if bound_masked is not None:
        bound_to = bound_masked

        def masked(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, sinks: Tensor | None) -> Output:
            return bound_to(query, key, value, attn_mask)

    in_graphs = _goes_into_graphs(plan)
    # The short table doesn't ask whether a graph is being captured.
    short = in_graphs and (bound is not None or bound_masked is not None)
    if cast is not None:
        call, masked = _autocast(call, masked, cast, plan.spec.device_type)
        short = False
    if policy.checks_enabled():
        call, masked = _checked(masked, plan)
        short = False
    return Entry(call, masked, decision, short, bound_masked, in_graphs)


def _goes_into_graphs(plan: Plan) -> bool:
    """Whether a plan may be captured in a CUDA graph."""
    if plan.lowering.entry == "empty":
        return True
    backend = registry.get(plan.backend)
    caps = None if backend is None else backend.capabilities(plan.spec, detect())
    return caps is not None and caps.cuda_graph


def _shortcuts(plan: Plan) -> tuple[Runner | None, MaskedRunner | None]:
    """Ask the backend for shorter ways, where they are its own: a subclass with another `run` doesn't inherit them."""
    backend = registry.get(plan.backend)
    if backend is None or plan.lowering.entry == "empty":
        return None, None
    caps = backend.capabilities(plan.spec, detect())
    if caps is not None and is_copied_for(caps, plan.spec, plan.lowering):
        return None, None
    kind = type(backend)

    def owner(name: str) -> type:
        return next(base for base in kind.__mro__ if name in vars(base))

    bound = backend.bind(plan) if issubclass(owner("bind"), owner("run")) else None
    masked = backend.bind_masked(plan) if issubclass(owner("bind_masked"), owner("run")) else None
    return bound, masked


def _kept(spec: AttentionSpec, parts: Parts) -> Parts:
    """Leave out the parts of a mask that the spec left out, known as they are to allow everything."""
    mask = spec.mask
    if mask.key is None and mask.dense is None and (parts.key is not None or parts.dense is not None):
        return parts._replace(key=None, dense=None)
    return parts


def _autocast(call: Any, call_masked: Any, dtype: torch.dtype, device_type: str) -> tuple[Any, Any]:
    """Cast as autocast does for SDPA, once, and run with it off, so that a mask keeps its precision."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    def cast_call(query: Tensor, key: Tensor, value: Tensor) -> Output:
        with torch.autocast(device_type, enabled=False):
            return call(cast(query), cast(key), cast(value))  # type: ignore[no-any-return]

    def cast_call_masked(query: Tensor, key: Tensor, value: Tensor, mask: Any, sinks: Tensor | None) -> Output:
        with torch.autocast(device_type, enabled=False):
            mask = autocast_mask(as_mask(mask), dtype)
            return call_masked(cast(query), cast(key), cast(value), mask, sinks)  # type: ignore[no-any-return]

    return cast_call, cast_call_masked


def _checked(call_masked: Any, plan: Plan) -> tuple[Any, Any]:
    """Add the value checks: inputs at every call, the output against the reference at the first."""
    first = [True]
    backend = registry.get(plan.backend)
    caps = None if backend is None else backend.capabilities(plan.spec, detect())
    value_max = None if caps is None else caps.value_max
    quantised = caps is not None and not caps.exact and bool(caps.quantised)

    def checked(query: Tensor, key: Tensor, value: Tensor, mask: Any = None, sinks: Tensor | None = None) -> Output:
        parts = _kept(plan.spec, parts_of(as_mask(mask), sinks))
        if not can_check(query, key, value, parts.key, parts.dense, sinks):
            return call_masked(query, key, value, mask, sinks)  # type: ignore[no-any-return]
        check_inputs(plan.spec, query, key, value, parts, value_max)
        result: Output = call_masked(query, key, value, mask, sinks)
        if first[0]:
            check_output(plan, query, key, value, parts, result, quantised=quantised)
            first[0] = False
        return result

    return checked, checked


def raise_kernel_error(error: Exception, decision: Decision) -> NoReturn:
    """Wrap what a kernel raised; out-of-memory and our own errors pass through."""
    if isinstance(error, AnyattnError) or is_out_of_memory(error):
        raise error
    name = decision.chosen or ""
    cure = "Choose another backend, and run `anyattn doctor` to look into this one."
    if policy.follow(detect().overrides):
        cure = "torch's kernels were replaced or put back after this was decided; calls are decided anew. " + cure
    if loses_device(error):
        cure = "The device's context may be lost: start the process anew. " + cure
    raise KernelError(
        f"The attention backend {name} ({decision.kernel}) raised {type(error).__name__}: {error}\n"
        f"The call was {decision.spec}. {cure}",
        backend=name,
    ) from error
