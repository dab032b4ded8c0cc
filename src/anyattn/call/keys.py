"""What a call is looked up by: everything that its spec depends on, read without describing it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from anyattn.call.arguments import _autocast_on, _deterministic, _grad_enabled, autocast_dtype
from anyattn.masks.objects import Mask
from anyattn.masks.values import _not_all_true
from anyattn.process.bounded import Bounded
from anyattn.types.spec import MaskSpec

_names: Bounded[Any, int] = Bounded(4096)
_numbers = itertools.count()


def tensor_name(tensor: Tensor) -> Any:
    """Give what the short table knows a mask tensor by: a CPU boolean one seen to forbid something.

    Raises:
        KeyError: If it knows none, so that the rest of the key needn't be made.
    """
    if tensor.dtype is not torch.bool or not tensor.is_cpu:
        raise KeyError
    seen = _not_all_true[id(tensor)]
    if seen() is not tensor:
        raise KeyError
    return tensor.shape


def short_name(attn_mask: Any, spec: MaskSpec) -> Any:
    """Give a mask object the number under which the short table holds its decisions, or None.

    A pattern alone has one, and so has a CPU mask that was seen to forbid something: should its values change, the
    decision stays right. Every other mask is looked at each time.
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
    if any(not tensor.is_cpu or tensor.dtype != torch.bool or id(tensor) not in _not_all_true for tensor in tensors):
        return None
    if len(tensors) != (spec.key is not None) + (spec.dense is not None):
        return None
    number = _names.get(attn_mask.signature)
    if number is None:
        number = _names[attn_mask.signature] = next(_numbers)
    attn_mask.short = number
    return number


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
        _grad_enabled() and (query.requires_grad, key.requires_grad, value.requires_grad),
        _autocast_on() and autocast_dtype(query.device.type),
        _deterministic(),
    )
