"""Numbers and flags as users pass them: from Python or NumPy, a tracer's symbols, or tensors without dimensions."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from anyattn.errors import InvalidCallError
from anyattn.process import tracing

TENSOR = "a tensor"
"""The placeholder of a tensor among the constants of a call that torch.compile traces."""


def flag(name: str, given: Any) -> Any:
    """Convert a flag to True or False; anything else is returned unchanged, for the checks to refuse.

    Raises:
        InvalidCallError: For a tensor whose value can't be read.
    """
    if type(given) is bool:
        return given
    if isinstance(given, torch.SymBool) or (type(given).__name__ in ("bool_", "bool") and _is_numpy(given)):
        return bool(given)
    # While torch.jit.trace runs, a comparison of sizes is such a tensor; otherwise a tensor is no flag.
    if isinstance(given, Tensor) and torch._C._get_tracing_state() is not None and given.dim() == 0:
        return bool(_read(name, given))
    return given


def number(name: str, given: Any) -> Any:
    """Convert a number to an int or a float; anything else is returned unchanged, for the checks to refuse.

    Raises:
        InvalidCallError: For a tensor whose value can't be read.
    """
    kind = type(given)
    if kind is float or kind is int or given is None or kind is bool:
        return given
    if isinstance(given, Tensor) and given.dim() == 0 and given.dtype != torch.bool and not given.is_complex():
        given = _read(name, given)
    if isinstance(given, numbers.Integral | torch.SymInt):
        return int(given)
    return float(given) if isinstance(given, numbers.Real | torch.SymFloat) else given


def index(name: str, given: Any) -> Any:
    """Convert a whole number to an int; anything else is returned unchanged.

    Raises:
        InvalidCallError: For a tensor whose value can't be read.
    """
    if type(given) is int or isinstance(given, bool):
        return given
    if isinstance(given, Tensor) and (given.is_floating_point() or given.is_complex()):
        return given
    return number(name, given)


def window(given: Any) -> Any:
    """Convert both sides of a window to plain numbers; anything but a pair is returned unchanged."""
    if not isinstance(given, tuple | list) or len(given) != 2:
        return given
    left, right = given
    if type(given) is tuple and type(left) is int and type(right) is int:
        return given
    return (index("window's left side", left), index("window's right side", right))


def _is_numpy(given: Any) -> bool:
    return type(given).__module__ == "numpy"


def _read(name: str, tensor: Tensor) -> Any:
    """Read a tensor without dimensions.

    Raises:
        InvalidCallError: If it has a derivative, if reading it would wait for a device, or if its value isn't known.
    """
    if tracing.needs_gradient(tensor) or tracing.has_tangent(tensor):
        raise InvalidCallError(
            f"{name} is a tensor with a derivative, which attention doesn't compute. Multiply query by the tensor and "
            f"pass {name} as a number, or pass {name}.detach()."
        )
    if tensor.device.type not in ("cpu", "meta"):
        raise InvalidCallError(
            f"{name} is a tensor on {tensor.device}; reading it would wait for the device. Pass a number."
        )
    if not tracing.is_constant(tensor):
        raise InvalidCallError(
            f"{name} is a tensor whose value isn't known while it is traced or transformed. Pass a number, or "
            "multiply query by the tensor."
        )
    if not tracing.is_plain():
        with _disable_current_modes():
            return tensor.item()
    return tensor.item()
