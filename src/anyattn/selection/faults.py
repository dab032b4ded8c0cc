"""Kernels' errors: which errors are a kernel's, when to fall back to the next backend, and what to report."""

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
# After these errors, which the CUDA runtime calls sticky, nothing works on the device any more. A kernel that was built
# for other GPUs doesn't harm the context, so another may be tried.
_DEVICE_LOST = re.compile(
    r"\b(CUDA|HIP|NPU) error\b|CUDA_ERROR_|cudaError|illegal memory access|illegal instruction|misaligned address"
    r"|device-side assert|unspecified launch failure|AcceleratorError",
    re.IGNORECASE,
)
_DEVICE_INTACT = re.compile(r"no kernel image|invalid device function|NO_BINARY_FOR_GPU", re.IGNORECASE)
_NO_MEMORY = re.compile(r"out of memory|OUT_OF_MEMORY|RESOURCE_EXHAUSTED")


def is_kernels(error: Exception) -> bool:
    """Whether an error is one that kernels raise.

    Not every Exception is: gradient checkpointing stops a forward by raising one.
    """
    return isinstance(error, _PLAIN_ERRORS) or type(error).__module__.partition(".")[0] in _KERNEL_PACKAGES


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device had no memory left, which isn't the kernel's fault."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    )


def loses_device(error: BaseException) -> bool:
    """Whether the device's context is lost; then no other kernel can run in this process."""
    text = f"{type(error).__name__}: {error}"
    return _DEVICE_LOST.search(text) is not None and _DEVICE_INTACT.search(text) is None


def one_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def broken_import(name: str, error: BaseException | str, install: str | None = None) -> Reason:
    """Return the reason that a backend's kernel is installed but can't be imported, and how to fix it.

    Args:
        name: The backend.
        error: What was raised, or how the process ended.
        install: The command that installs it; None reads it from the backend's class, which is imported.
    """
    install = registry.get(name).install if install is None else install
    fix = "reinstall or uninstall its package"
    if install:
        fix = f"it was probably built for another torch or Python: uninstall it and install it again ({install})"
    got = error if isinstance(error, str) else one_line(error)
    return Reason("broken_import", f"an importable kernel for {name}", got, fix)


def passes_over(error: Exception, decision: Decision) -> bool:
    """Return whether to try the next backend after a kernel failed; if so, record the fault."""
    if not may_go_on(error, decision):
        return False
    assert decision.chosen is not None
    hint = "run `anyattn doctor` to find out why; anyattn.reset() lets it be tried again"
    reason = Reason("fault", "a kernel that runs the call", one_line(error), hint)
    add_fault(decision.chosen, spec_of_fault(decision.spec), reason)
    return True


def may_go_on(error: Exception, decision: Decision) -> bool:
    """Whether the next backend may be tried after a kernel failed.

    Only if a list or `auto` chose: a backend required by name fails. Running out of memory isn't the kernel's fault,
    and on a lost device no other kernel can run.
    """
    if decision.preference.mode == "require" or decision.chosen is None or decision.spec.is_empty:
        return False
    ours = isinstance(error, AnyattnError) and not isinstance(error, KernelError)
    return not (ours or is_out_of_memory(error) or loses_device(error))


def spec_of_fault(spec: AttentionSpec) -> AttentionSpec:
    """Return the spec that a fault is recorded for: what failed in eager code is passed over in compiled code too."""
    return replace(spec, compiled=False, captured=False) if spec.compiled or spec.captured else spec


def say_passed_over(decision: Decision) -> None:
    """Warn once of each backend that is passed over because it failed or can't be imported."""
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
    """Return the `stacklevel` with which a warning names the user's code."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "anyattn":
        frame, level = frame.f_back, level + 1
    return level


_faults: Bounded[tuple[str, Any], Any] = Bounded(1024)


_load_errors: dict[str, Exception] = {}


_said_faults: Bounded[tuple[str, Any], None] = Bounded(1024)


def add_fault(backend: str, spec: Any, reason: Any, error: Exception | None = None) -> None:
    """Record that a backend failed for a spec (None: it can't be loaded), and forget decisions."""
    with _lock:
        if (backend, spec) in _faults:
            return
        _faults[backend, spec] = reason
        if error is not None:
            _load_errors[backend] = error
    forget()


def faults(spec: Any) -> dict[str, Any]:
    """Return the reason against each backend that failed for a spec or couldn't be loaded."""
    if not _faults:
        return {}
    with _lock:
        return {name: reason for (name, at), reason in _faults.items() if at is None or at == spec}


def broken_loads() -> dict[str, Any]:
    """Return the reason against each backend that couldn't be loaded."""
    with _lock:
        return {name: reason for (name, at), reason in _faults.items() if at is None}


def load_error(backend: str) -> Exception | None:
    """Return what a backend's kernel raised at its first import; a second import may raise something else."""
    return _load_errors.get(backend)


def reported_first_now(backend: str, spec: Any) -> bool:
    """Return whether the user hasn't been warned of a fault yet, and store that they are now."""
    return _said_faults.once((backend, spec))


def forget_faults() -> None:
    """Forget every fault, so that backends that failed are tried again."""
    with _lock:
        _faults.clear()
        _load_errors.clear()
        _said_faults.clear()
