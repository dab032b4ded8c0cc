"""Where tensors start in memory, and copies that start at multiples of 16 bytes; in traced code too.

While torch.compile traces, a tensor's storage offset can be read by an operator's fake implementation alone, and what
that says shows in the shape of its result. Inductor takes a contiguous tensor's clone for the tensor itself (torch 2.6
to 2.13, `remove_noop_ops`), wherever that starts: the copy is an operator that it can't see into.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("anyattn::starts_off", mutates_args=())
def starts_off(tensor: Tensor, elements: int) -> Tensor:
    """Give one element where a tensor doesn't start at a multiple of so many elements of its storage, else none."""
    return tensor.new_empty(1 if tensor.storage_offset() % elements else 0)


@starts_off.register_fake
def _(tensor: Tensor, elements: int) -> Tensor:
    return tensor.new_empty(1 if tensor.storage_offset() % elements else 0)


@torch.library.custom_op("anyattn::realign", mutates_args=())
def realign(tensor: Tensor) -> Tensor:
    """Copy to contiguous storage."""
    return tensor.clone(memory_format=torch.contiguous_format)


@realign.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


realign.register_autograd(lambda ctx, grad: grad)


def starts_aligned(tensor: Tensor, size: int = 16) -> bool:
    """Whether a tensor starts at a multiple of `size` bytes of its storage, whose own start torch's allocators align.

    Of an input of compiled code this is what it was when traced. Inductor copies inputs that are off by less than 16
    bytes where those that were traced weren't (`copy_misaligned_inputs`).
    """
    elements = size // tensor.element_size()
    if torch.compiler.is_compiling():
        off: Tensor = torch.ops.anyattn.starts_off(tensor, elements)
        return off.shape[0] == 0
    return tensor.storage_offset() % elements == 0


def realigned(tensor: Tensor) -> Tensor:
    """Copy to contiguous storage, which torch's allocators align to at least 16 bytes."""
    if torch.compiler.is_compiling():
        return torch.ops.anyattn.realign(tensor)  # type: ignore[no-any-return]
    return tensor.clone(memory_format=torch.contiguous_format)
