"""Fill uninitialised memory with NaN, so that a kernel that reads it, or returns it, is found.

Allocators reuse memory that was freed. Here such memory is filled with bytes of 255 first, which are NaN in every
floating-point format, -1 as an integer and True as a boolean. Tensors are copied into larger ones that are filled in
the same way: before the first element, after the last, and in every gap that strides leave.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from anyattn.masks.objects import Mask
from anyattn.testing.cases.case import Inputs

_ROWS = 256
"""How many positions beyond the end a tile of a kernel may reach."""

_MOST = 1 << 18
"""How many filled elements follow a tensor, at most."""

_SMALL = tuple(1 << power for power in range(9, 24))
"""Sizes in bytes of the blocks filled for every call; torch's allocator has a pool of its own for those below 1 MiB."""


def fill_free_memory(device: torch.device, sizes: Iterable[int] = ()) -> None:
    """Fill free memory, so that the memory allocated next holds NaN.

    On CUDA the shared memory of the processors is filled too, by multiplying matrices of NaN: a kernel that computes
    with rows of a tile which it never loaded reads them from there. On a CPU it depends on the C library's allocator
    how much is filled.

    Args:
        device: The device.
        sizes: Sizes in bytes of the blocks that a call will allocate, besides the common sizes.
    """
    wanted = [size for size in sizes if size for _ in range(4)]
    if device.type != "cpu":
        wanted += [size for size in _SMALL for _ in range(3)]
    blocks = [torch.full((size,), 255, dtype=torch.uint8, device=device) for size in wanted]
    if device.type == "cuda":
        matrix = torch.full((2048, 1024), math.nan, dtype=torch.float16, device=device)
        blocks.append(matrix @ matrix.t())
    # A last block keeps the C library from returning the others to the system.
    blocks.append(torch.zeros(64, device=device))
    del blocks[:-1]


def sizes_of(inputs: Inputs) -> list[int]:
    """Return the sizes in bytes of a call's results and of copies: in its dtype, in float32, with head_dim padded."""
    case = inputs.case
    found = []
    for rows, heads in ((case.seqlen_q, case.heads), (case.seqlen_kv, case.kv_heads), (case.seqlen_kv, case.heads)):
        for dim in {case.head_dim, case.head_dim_v or case.head_dim, -(-case.head_dim // 64) * 64}:
            found += [case.batch * rows * heads * dim * width for width in {inputs.query.element_size(), 4}]
    return [*found, case.batch * case.heads * case.seqlen_q * 4]


def surrounded(inputs: Inputs, *, apart: bool) -> Inputs:
    """Copy a call's tensors into storage whose every other byte is 255; shapes, values and alignment stay.

    Args:
        inputs: The call.
        apart: Whether entries of the batch are apart too, so that a row behind one's last isn't the next one's first.
            Strides stay as they are otherwise.
    """
    axis = 1 if inputs.case.layout == "BSHD" else 2
    query, key, value = (
        _surrounded(tensor, _ROWS * tensor.stride(axis), apart=axis if apart else None)
        for tensor in (inputs.query, inputs.key, inputs.value)
    )
    mask = inputs.mask
    if mask is not None:
        parts = {"key": mask.key, "dense": mask.dense}
        copied = {name: None if part is None else _surrounded(part, _ROWS) for name, part in parts.items()}
        mask = Mask(pattern=mask.pattern, block=mask.block, **copied)
    sinks = None if inputs.sinks is None else _surrounded(inputs.sinks, _ROWS)
    flow = None if inputs.flow is None else _surrounded(inputs.flow, _ROWS * inputs.flow.stride(1))
    return inputs.replace(query=query, key=key, value=value, mask=mask, sinks=sinks, flow=flow)


def _surrounded(tensor: Tensor, behind: int, *, apart: int | None = None) -> Tensor:
    before = 256 + int(tensor.storage_offset()) % 64
    if apart is not None and tensor.is_contiguous():
        shape = list(tensor.shape)
        shape[apart] += _ROWS // 2
        wide = _unwritten(before + math.prod(shape), tensor)[before:].view(shape)
        view = wide.narrow(apart, 0, tensor.shape[apart])
    else:
        # With a stride of 0, one element stands for all.
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        storage = _unwritten(before + max(span, 0) + min(max(behind, 64), _MOST), tensor)
        view = storage.as_strided(tensor.shape, tensor.stride(), before)
    written = view
    source = tensor.detach()
    for axis, stride in enumerate(view.stride()):
        if stride == 0 and view.shape[axis] > 1:
            written, source = written.narrow(axis, 0, 1), source.narrow(axis, 0, 1)
    written.copy_(source)
    return view.requires_grad_(tensor.requires_grad)


def _unwritten(count: int, like: Tensor) -> Tensor:
    if like.dtype == torch.bool:
        return torch.ones(count, dtype=torch.bool, device=like.device)
    width = like.element_size()
    return torch.full((count * width,), 255, dtype=torch.uint8, device=like.device).view(like.dtype)
