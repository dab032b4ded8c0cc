"""What is made of a kernel's error: whose it is, whether the next backend may try, and how that is said."""

from __future__ import annotations

import re
import sys
import warnings
from dataclasses import replace
from typing import Any

import torch

from anyattn.errors import AnyattnError, AnyattnWarning, KernelError
from anyattn.process.bounded import Bounded
from anyattn.scopes.defaults import _lock, forget
from anyattn.selection import registry
from anyattn.selection.choice import choice_of
from anyattn.types.decision import Decision
from anyattn.types.reasons import Reason
from anyattn.types.spec import AttentionSpec

_PLAIN_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Triton's compiler, CUTLASS's DSL (flash4), and the compilers that both start raise plain Exceptions of their own.
_KERNEL_PACKAGES = frozenset(("triton", "cutlass", "subprocess", "torch_xla"))
# After these nothing works on the device any more: the errors that the CUDA runtime calls sticky. A kernel that was
# built for other GPUs leaves the context as it was, so that another may try.
_DEVICE_LOST = re.compile(
    r"\b(CUDA|HIP|NPU) error\b|CUDA_ERROR_|cudaError|illegal memory access|illegal instruction|misaligned address"
    r"|device-side assert|unspecified launch failure|AcceleratorError",
    re.IGNORECASE,
)
_DEVICE_KEPT = re.compile(r"no kernel image|invalid device function|NO_BINARY_FOR_GPU", re.IGNORECASE)
_NO_MEMORY = re.compile(r"out of memory|OUT_OF_MEMORY|RESOURCE_EXHAUSTED")


def is_kernels(error: Exception) -> bool:
    """Whether an error is one that kernels raise.

    Not every Exception is: gradient checkpointing stops a forward by raising one through it.
    """
    return isinstance(error, _PLAIN_ERRORS) or type(error).__module__.partition(".")[0] in _KERNEL_PACKAGES


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device had no memory left, which is no fault of the kernel's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    )


def loses_device(error: BaseException) -> bool:
    """Whether the device's context is lost, so that no other kernel can run in this process."""
    said = f"{type(error).__name__}: {error}"
    return _DEVICE_LOST.search(said) is not None and _DEVICE_KEPT.search(said) is None


def told(error: BaseException) -> str:
    """Say an error in one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def broken_import(name: str, error: BaseException | str, install: str | None = None) -> Reason:
    """Say that a backend's kernel is installed but can't be imported, and what cures it.

    Args:
        name: The backend.
        error: What was raised, or how the process ended.
        install: The command that installs it; None asks its class, which is imported for that.
    """
    install = registry.get(name).install if install is None else install
    cure = "mend or uninstall the package that brings it"
    if install:
        cure = f"it was likely built for another torch or Python than these: uninstall it and get it anew ({install})"
    got = error if isinstance(error, str) else told(error)
    return Reason("broken_import", f"an importable kernel for {name}", got, cure)


def passes_over(error: Exception, decision: Decision) -> bool:
    """Whether a call whose kernel failed is to be tried with the next backend; notes the fault if so."""
    if not may_go_on(error, decision):
        return False
    assert decision.chosen is not None
    hint = "`anyattn doctor` looks into it, and anyattn.reset() has it tried again"
    reason = Reason("fault", "a kernel that runs the call", told(error), hint)
    add_fault(decision.chosen, spec_of_fault(decision.spec), reason)
    return True


def may_go_on(error: Exception, decision: Decision) -> bool:
    """Whether a call whose kernel failed may be tried with the next backend.

    Only where a list or `auto` chose: an explicit name fails. Out-of-memory is no fault of the kernel's, and a lost
    device leaves nothing to go on with.
    """
    if decision.preference.mode == "require" or decision.chosen is None or decision.spec.is_empty:
        return False
    ours = isinstance(error, AnyattnError) and not isinstance(error, KernelError)
    return not (ours or is_out_of_memory(error) or loses_device(error))


def spec_of_fault(spec: AttentionSpec) -> AttentionSpec:
    """Give what a fault is noted for: a kernel that failed in eager code is gone past in compiled code too."""
    return replace(spec, compiled=False, captured=False) if spec.compiled or spec.captured else spec


def say_passed_over(decision: Decision) -> None:
    """Say once of each backend that a list or `auto` would have chosen, and that failed, that it isn't used."""
    if decision.preference.mode == "require":
        return
    for candidate in choice_of(decision).refused:
        for reason in candidate.reasons:
            if reason.code in ("fault", "broken_import"):
                spec = spec_of_fault(decision.spec) if reason.code == "fault" else None
                _say(candidate.name, spec, reason, decision)
                break


def _say(name: str, spec: AttentionSpec | None, reason: Reason, decision: Decision) -> None:
    if not reported_first_now(name, spec):
        return
    what = "can't be imported" if spec is None else f"failed for {spec}"
    text = f"The attention backend {name} {what} and is passed over until anyattn.reset(): {reason.got}"
    hint = f" ({reason.hint})" if reason.hint else ""
    warnings.warn(f"{text}{hint}. {decision.chosen} runs instead.", AnyattnWarning, stacklevel=outside())


def outside() -> int:
    """Give the stack level at which a warning of the caller's points out of anyattn."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "anyattn":
        frame, level = frame.f_back, level + 1
    return level


_faults: Bounded[tuple[str, Any], Any] = Bounded(1024)


_load_errors: dict[str, Exception] = {}


_said_faults: Bounded[tuple[str, Any], None] = Bounded(1024)


def add_fault(backend: str, spec: Any, reason: Any, error: Exception | None = None) -> None:
    """Note that a backend failed for a spec (None: that it can't be loaded, with why); decisions are forgotten."""
    with _lock:
        if (backend, spec) in _faults:
            return
        _faults[backend, spec] = reason
        if error is not None:
            _load_errors[backend] = error
    forget()


def faults(spec: Any) -> dict[str, Any]:
    """Give the reason against each backend that failed for a spec, or couldn't be loaded at all."""
    if not _faults:
        return {}
    with _lock:
        return {name: reason for (name, at), reason in _faults.items() if at is None or at == spec}


def broken_loads() -> dict[str, Any]:
    """Give the reason against each backend that couldn't be loaded."""
    with _lock:
        return {name: reason for (name, at), reason in _faults.items() if at is None}


def load_error(backend: str) -> Exception | None:
    """Give what a backend's kernel raised when it was imported; importing it again may raise something else."""
    return _load_errors.get(backend)


def reported_first_now(backend: str, spec: Any) -> bool:
    """Return whether the user hasn't been warned of a fault yet, and remember that they are now."""
    return _said_faults.once((backend, spec))


def forget_faults() -> None:
    """Let every backend that failed be tried again."""
    with _lock:
        _faults.clear()
        _load_errors.clear()
        _said_faults.clear()
