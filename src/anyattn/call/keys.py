"""The keys under which decided calls are cached: everything that a spec depends on, read without building it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from anyattn.call.arguments import _autocast_on, _deterministic, _grad_enabled, autocast_dtype, bias_is_aligned
from anyattn.masks.objects import Mask
from anyattn.masks.values import _not_all_true, _prepared_values, known_of, known_of_tensor
from anyattn.process.bounded import Bounded
from anyattn.types.spec import MaskSpec

_names: Bounded[Any, int] = Bounded(4096)
_numbers = itertools.count()


def tensor_name(tensor: Tensor) -> Any:
    """Return a mask tensor's key in the short table.

    On a CPU it is the shape of a boolean mask known to forbid something. Elsewhere it is all that a decision depends
    on, for a tensor whose values aren't known by `prepare_mask`.

    Raises:
        KeyError: If it has none. An exception is the fastest way out of the look-up.
        RuntimeError: If the tensor has no memory of its own.
    """
    if tensor.is_cpu:
        if tensor.dtype is not torch.bool:
            raise KeyError
        seen = _not_all_true[id(tensor)]
        if seen() is not tensor:
            raise KeyError
        return tensor.shape
    if id(tensor) in _prepared_values:
        raise KeyError
    strides = tensor.is_contiguous() or tensor.stride()
    return (tensor.shape, tensor.dtype, tensor.device, strides, tensor.data_ptr() & 15, tensor.requires_grad)


def short_name(attn_mask: Any, spec: MaskSpec) -> Any:
    """Return a mask's key in the short table, or None; a mask object's key is a number that it remembers.

    Masks without tensors have one, boolean CPU masks known to forbid something, and masks on other devices whose values
    aren't known: the decision stays right if their values change. Every other mask is looked up in full at each call.
    """
    if type(attn_mask) is Tensor:
        try:
            name = tensor_name(attn_mask)
        except KeyError:
            return None
        return None if spec.dense is None and spec.key is None else name
    if not isinstance(attn_mask, Mask) or attn_mask.block is not None:
        return None
    tensors = [tensor for tensor in (attn_mask.key, attn_mask.dense) if tensor is not None]
    if not all(_stays_decided(tensor, dense=tensor is attn_mask.dense) for tensor in tensors):
        return None
    if len(tensors) != (spec.key is not None) + (spec.dense is not None):
        return None
    number = _names.get(attn_mask.signature)
    if number is None:
        number = _names[attn_mask.signature] = next(_numbers)
    attn_mask.short = number
    return number


def _stays_decided(tensor: Tensor, *, dense: bool) -> bool:
    """Whether a call with this part of a mask object stays decided as it is, until the object is another one."""
    if tensor.is_cpu:
        return tensor.dtype == torch.bool and id(tensor) in _not_all_true
    # A dense mask may come to need a gradient; a key mask can't.
    return not dense and type(tensor) is Tensor and id(tensor) not in _prepared_values


def place_key(query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, ...]:
    """Return what a decision depends on besides shapes, for tensors that aren't on a CPU.

    On a CPU none of it matters to a call without a mask.
    """
    try:
        start = (query.data_ptr() | key.data_ptr() | value.data_ptr()) & 15
    except RuntimeError:  # traced or transformed tensors have no storage of their own
        start = -1
    return (
        query.get_device() if query.is_cuda else query.device,
        query.is_contiguous() or query.stride(),
        key.is_contiguous() or key.stride(),
        value.is_contiguous() or value.stride(),
        start,
        _grad_enabled() and (query.requires_grad, key.requires_grad, value.requires_grad),
        _autocast_on() and autocast_dtype(query.device.type),
        _deterministic(),
    )


def table_key(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, sinks: Tensor | None, plain: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Return everything that the decision of a call depends on."""
    grads: Any = None
    if _grad_enabled():
        grads = (query.requires_grad, key.requires_grad, value.requires_grad)
    return (
        query.shape,
        key.shape,
        value.shape,
        query.dtype,
        key.dtype,
        value.dtype,
        query.device,
        key.device,
        value.device,
        grads,
        plain,
        None if attn_mask is None else _mask_key(attn_mask, key, plain, grads is not None),
        None if sinks is None else (sinks.shape, sinks.dtype, sinks.device, grads is not None and sinks.requires_grad),
        query.is_cpu or place_key(query, key, value),
        autocast_dtype(query.device.type) if _autocast_on() else None,
        None if type(query) is Tensor else (type(query), type(key), type(value)),
    )


def _mask_key(attn_mask: Any, key: Tensor, plain: tuple[Any, ...], grad: bool) -> Any:
    if type(attn_mask) is Tensor or type(attn_mask) is Parameter:
        known = known_of_tensor(attn_mask)
        aligned = attn_mask.is_cpu or bias_is_aligned(attn_mask)
        return (attn_mask.shape, attn_mask.dtype, attn_mask.device, grad and attn_mask.requires_grad, known, aligned)
    if isinstance(attn_mask, Mask):
        dense = attn_mask.dense
        if dense is None and attn_mask.key is None:
            return attn_mask.signature
        known = known_of(attn_mask, key.shape[1 if plain[7] == "BSHD" else 2])
        if dense is None:
            return (attn_mask.signature, known)
        return (attn_mask.signature, known, grad and dense.requires_grad, dense.is_cpu or bias_is_aligned(dense))
    raise TypeError("a mask of another type has no key: it is described at every call")
