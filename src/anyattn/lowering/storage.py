"""The alignment of tensors in memory, and copies that start at multiples of 16 bytes; in traced code too.

While torch.compile traces, only an operator's fake implementation can read a tensor's storage offset; the shape of its
result carries the answer. Inductor replaces the clone of a contiguous tensor by the tensor itself, however that is
aligned (torch 2.6 to 2.13, `remove_noop_ops`). So the copy is an operator that inductor can't look into.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("anyattn::starts_off", mutates_args=())
def starts_off(tensor: Tensor, elements: int) -> Tensor:
    """Return a tensor of one element if a tensor's storage offset isn't a multiple of `elements`, else an empty one."""
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

    For an input of compiled code this is the alignment of the tensor that was traced. If a later one is misaligned and
    that one wasn't, inductor copies it (`copy_misaligned_inputs`).
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
