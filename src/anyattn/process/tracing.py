"""Whether a tracer or a transform runs; then the values and sizes seen now may not be those computed with later.

This covers torch.jit.trace and the ONNX exporters, make_fx and torch.export, fake and meta tensors, torch.func's
transforms, forward-mode AD, and CUDA graph capture. Code must ask here before it reads a mask's values, relies on two
lengths being equal, or stores a tensor for later calls. Code that torch.compile traces must call
`torch.compiler.is_compiling()` first, since dynamo can't trace the functions of this module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.autograd.forward_ad as _forward_ad
from torch import Tensor
from torch.nn import Parameter

_modes = torch._C._len_torch_dispatch_stack
_functions = torch._C._len_torch_function_stack
_level = torch._C._functorch.maybe_current_level
_tracer = torch._C._get_tracing_state
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_unwrapped = torch._C._functorch.get_unwrapped
_level_of = torch._C._functorch.maybe_get_level
# make_fx(pre_dispatch=True) has its mode on this stack, and a function mode too, which costs less to count.
_before_dispatch: Callable[[], int] = getattr(torch._ops, "_len_torch_dispatch_stack_pre_dispatch", lambda: 0)
_set_tracer: Callable[[Any], None] = torch._C._set_tracing_state  # type: ignore[attr-defined]


def is_plain() -> bool:
    """Whether operations only run: no tracer, no transform of torch.func, no dispatch mode, no forward-mode AD."""
    return not (
        _modes()
        or _level() is not None
        or _tracer() is not None
        or _forward_ad._current_level >= 0
        or (_functions() and _before_dispatch())
    )


def records() -> bool:
    """Whether a graph is recorded; it may run with other values and sizes later."""
    if _tracer() is not None or torch.compiler.is_compiling():
        return True
    if not (_modes() or _functions()):
        return False
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return proxies is not None and proxies.get_proxy_mode() is not None


def exports_onnx() -> bool:
    """Whether one of the ONNX exporters records a graph."""
    return torch.onnx.is_in_onnx_export()


def has_values(*tensors: Tensor | None) -> bool:
    """Whether the values of tensors may be read, and results computed from them be used by later calls.

    It doesn't matter here whether reading waits for a device, except during the capture of a CUDA graph.
    """
    return is_plain() and all(tensor is None or _is_real(tensor) for tensor in tensors)


def _is_real(tensor: Tensor) -> bool:
    if type(tensor) is not Tensor and type(tensor) is not Parameter:
        return False  # a subclass may have no values, as fake tensors do
    if tensor.is_meta or _is_wrapped(tensor):
        return False
    # A CUDA graph must replay the work: the tensor may hold other values then.
    return not is_captured(tensor)


def is_captured(tensor: Tensor) -> bool:
    """Whether operations on a tensor are captured in a CUDA graph now."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def is_fake(tensor: object) -> bool:
    """Whether a tensor has a shape and no values: a fake tensor, or one of the meta device."""
    if type(tensor) is Tensor or type(tensor) is Parameter or not isinstance(tensor, Tensor):
        return False
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    if fakes is None:
        return False
    if isinstance(tensor, fakes.FakeTensor):
        return True
    functional = sys.modules.get("torch._subclasses.functional_tensor")
    return functional is not None and isinstance(tensor, functional.FunctionalTensor)


def is_usual(*inputs: Any) -> bool:
    """Whether a call is a plain one: nothing traces, and no input is of a tensor subclass.

    Args:
        inputs: Tensors, masks of `anyattn.masks`, or None.
    """
    if not is_plain():
        return False
    parts = [part for given in inputs for part in _tensors_of(given)]
    return all(type(part) is Tensor or type(part) is Parameter for part in parts)


def _tensors_of(given: Any) -> list[Tensor]:
    parts = (given,) if isinstance(given, Tensor) else (getattr(given, "key", None), getattr(given, "dense", None))
    return [part for part in parts if isinstance(part, Tensor)]


def mode_left(tensor: Tensor) -> Any:
    """Return the mode of a fake tensor that is used outside it, else None; new tensors would be real there."""
    return getattr(tensor, "fake_mode", None) if is_fake(tensor) and is_plain() else None


def layers(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor and the tensors that torch.func wrapped in it, level by level."""
    yield tensor
    while _is_wrapped(tensor):
        tensor = _unwrapped(tensor)
        yield tensor


def needs_gradient(tensor: Tensor) -> bool:
    """Whether a tensor requires a gradient at any level; inside vmap, `requires_grad` hides an outer grad(...)."""
    return tensor.requires_grad or (_level() is not None and any(layer.requires_grad for layer in layers(tensor)))


def is_batched(*tensors: Tensor | None) -> bool:
    """Whether torch.vmap hides a dimension of one of the tensors, at any level."""
    if _level() is None:
        return False
    found = (layer for tensor in tensors if tensor is not None for layer in layers(tensor))
    return any(torch._C._functorch.is_batchedtensor(layer) for layer in found)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors carries a derivative of forward mode, at any level."""
    if _forward_ad._current_level < 0:
        return False
    levels = _levels_of_jvp()
    found = (layer for tensor in tensors if tensor is not None for layer in layers(tensor))
    return any(_is_dual(layer) or _level_of(layer) in levels for layer in found)


def _levels_of_jvp() -> frozenset[int]:
    """Return the running levels of torch.func.jvp; a tensor of such a level has a tangent that inner levels hide."""
    if _level() is None:
        return frozenset()
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return frozenset(level.level() for level in stack if level.key().name == "Jvp")


def _is_dual(tensor: Tensor) -> bool:
    if torch._C._functorch.is_batchedtensor(tensor):
        return False  # the tensor that it wraps is checked next
    return _forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def transforms() -> frozenset[str]:
    """Return the transforms of torch.func that run: `"Vmap"`, `"Grad"`, `"Jvp"`, `"Functionalize"`."""
    if _level() is None:
        return frozenset()
    return frozenset(level.key().name for level in torch._C._functorch.get_interpreter_stack() or ())


def static_shape(tensor: Tensor) -> tuple[Any, ...]:
    """Return a tensor's sizes as plain numbers; while torch.jit.trace runs, `tensor.shape` holds tensors."""
    state = _tracer()
    if state is None:
        return tuple(tensor.shape)
    _set_tracer(None)
    try:
        return tuple(tensor.shape)
    finally:
        _set_tracer(state)


def is_constant(tensor: Tensor) -> bool:
    """Whether a tensor's value is known now, although a tracer or transform may run.

    While torch.jit.trace runs, every size is such a tensor; torch warns if one is converted to a number.
    """
    if not _is_real(tensor):
        return False
    return _tracer() is not None or not records()
