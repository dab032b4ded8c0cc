"""From a decision to a function that can be called, and to errors with what to do about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from anyattn.backend.capabilities import Capabilities
from anyattn.backend.protocol import Backend, Output, Parts, Plan, Run
from anyattn.environment import detect
from anyattn.errors import AnyattnError, BackendUnavailableError, KernelError
from anyattn.lowering.dense import is_copied_for
from anyattn.lowering.lse import apply_sinks, empty_attention
from anyattn.lowering.storage import realigned
from anyattn.process.streams import raw_stream
from anyattn.process.tracing import is_plain
from anyattn.scopes import defaults
from anyattn.selection import faults
from anyattn.selection.choice import choice_of
from anyattn.selection.faults import broken_import, is_out_of_memory, loses_device
from anyattn.selection.refusals import listed
from anyattn.types.decision import Decision
from anyattn.types.reasons import Reason

_loaded: set[Backend] = set()


def load(backend: Backend) -> None:
    """Import a backend's kernel, once; a failure is recorded until `anyattn.reset`.

    Raises:
        BackendUnavailableError: If the import fails.
    """
    if backend in _loaded:
        return
    try:
        backend.load()
    except BackendUnavailableError as error:
        # The backend's own reason says best what is wrong and how to fix it.
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
    """Record that a kernel can't be imported, unless a tracer or transform may be the cause."""
    if is_plain():
        faults.add_fault(name, None, reason, error)


def make_plan(decision: Decision) -> tuple[Plan, Run]:
    """Load the kernel, and return the plan that a decision carries and the function that runs it."""
    choice = choice_of(decision)
    plan, caps = choice.plan, choice.caps
    if decision.spec.is_empty:
        return plan, run_empty
    load(choice.backend)
    run: Run = where_it_belongs(choice.backend.run, caps, plan.spec.device_type, at=1)
    if caps is None:
        return plan, run
    if is_copied_for(caps, plan.spec, plan.lowering):
        run = _with_aligned(run)
    if caps.unit_stride and plan.spec.device_type == "cpu":
        # A CPU call's decision doesn't depend on strides, so they are checked at each call.
        run = _with_unit_stride(run)
    return plan, run


_Function = TypeVar("_Function", bound=Callable[..., Any])


def where_it_belongs(run: _Function, caps: Capabilities | None, device_type: str, *, at: int) -> _Function:
    """Make a function run on its tensors' device and on the stream that its kernel uses, if the kernel needs that.

    Args:
        run: The function.
        caps: The declaration of its backend.
        device_type: The type of device of the call.
        at: Which of its arguments is query.
    """
    if caps is None or device_type != "cuda":
        return run
    if caps.device_guard:
        run = _on_its_device(run, at)
    if caps.default_stream:
        run = _on_default_stream(run, at)
    return run


def _on_its_device(run: _Function, at: int = 1) -> _Function:

    def guarded(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return run(*arguments)  # compiled code sets the device itself
        index = arguments[at].get_device()
        if index == torch.cuda.current_device():
            return run(*arguments)
        with torch.cuda.device(index):
            return run(*arguments)

    return guarded  # type: ignore[return-value]


def _on_default_stream(run: _Function, at: int = 1) -> _Function:
    """Run the call on the default stream; it and the current stream wait for each other."""

    def ordered(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return run(*arguments)
        index = arguments[at].get_device()
        if raw_stream(index) == 0:
            return run(*arguments)
        current, default = torch.cuda.current_stream(index), torch.cuda.default_stream(index)
        default.wait_stream(current)
        with torch.cuda.stream(default):
            result = run(*arguments)
        current.wait_stream(default)
        for tensor in result if isinstance(result, tuple) else (result,):
            # The default stream owns the memory, and must not reuse it while the current one reads it.
            tensor.record_stream(current)
        return result

    return ordered  # type: ignore[return-value]


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
    """Compute an empty call, for every backend."""
    return empty_attention(plan.spec, query, key, value, parts)


def execute(run: Run, plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
    """Run a plan, and add the sinks if its kernel has none."""
    result = run(plan, query, key, value, parts)
    if not plan.rescale or parts.sinks is None:
        return result
    if not isinstance(result, tuple):
        raise TypeError(
            f"The backend {plan.backend} returned a tensor for a call with sinks. A backend that declares lse and not "
            "sinks must return (out, lse) there, as it does for return_lse."
        )
    out, lse = result
    if plan.spec.packed:
        out, lse = apply_sinks(out[None], lse[None], parts.sinks, "BSHD")
        out, lse = out[0], lse[0]
    else:
        out, lse = apply_sinks(out, lse, parts.sinks, plan.spec.layout)
    return (out, lse) if plan.spec.return_lse else out


def raise_kernel_error(error: Exception, decision: Decision) -> NoReturn:
    """Raise KernelError from a kernel's error; out-of-memory and anyattn's own errors are raised as they are."""
    if isinstance(error, AnyattnError) or is_out_of_memory(error):
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame, and so to it and the call's tensors
    name = decision.chosen or ""
    advice = "Choose another backend, and run `anyattn doctor` to check this one."
    if defaults.follow(detect().overrides):
        advice = "torch's kernels were replaced or restored after this was decided; calls are decided again. " + advice
    if loses_device(error):
        advice = "The device's context may be lost: restart the process. " + advice
    raise KernelError(
        f"The attention backend {name} ({decision.kernel}) raised {type(error).__name__}: {error}\n"
        f"The call was {decision.spec}. {advice}",
        backend=name,
    ) from error
