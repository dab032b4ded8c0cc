"""How a call's tensors lie in memory, computed by code that torch.compile can trace."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Starts = Callable[[Tensor], bool]
"""Returns whether a tensor starts at a multiple of 16 bytes, as far as that is known."""


def storage_facts(
    query: Tensor, key: Tensor, value: Tensor, heads: int, dense: Tensor | None, starts: Starts
) -> tuple[bool, bool, bool, bool]:
    """Return whether rows are aligned, head_dim is contiguous, heads are expanded, and the mask is aligned.

    On a CPU nothing depends on it. Tensors without four dimensions are refused elsewhere.

    Args:
        query: With four dimensions.
        key: As query.
        value: As query.
        heads: The dimension of the heads.
        dense: The dense mask.
        starts: Checks whether a tensor starts at a multiple of 16 bytes.
    """
    if query.device.type == "cpu" or not query.dim() == key.dim() == value.dim() == 4:
        return (True, True, False, True)
    aligned, unit, expanded = True, True, False
    for tensor in (query, key, value):
        # If a row isn't a multiple of 16 bytes long, the kernel's wrapper pads head_dim, which copies.
        padded = tensor.shape[-1] * tensor.element_size() % 16 != 0
        if not (padded or rows_aligned(tensor)) or not starts(tensor):
            aligned = False
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            unit = False
    for tensor in (key, value):
        if tensor.shape[heads] > 1 and tensor.stride(heads) == 0:
            expanded = True
    return (aligned, unit, expanded, dense is None or bias_aligned(dense, starts))


def bias_aligned(dense: Tensor, starts: Starts) -> bool:
    """Whether a dense mask is boolean (it will be copied) or has aligned rows."""
    if dense.dtype == torch.bool:
        return True
    return True if dense.stride(-1) == 1 and rows_aligned(dense) and starts(dense) else False  # noqa: SIM210 - traced


def rows_aligned(tensor: Tensor) -> bool:
    """Whether each row of a tensor starts at a multiple of 16 bytes from the first."""
    size = tensor.element_size()
    for dim in range(tensor.dim() - 1):  # noqa: SIM110 - traced: a plain loop
        if tensor.shape[dim] > 1 and tensor.stride(dim) * size % 16:
            return False
    return True


def starts_on_16(tensor: Tensor) -> bool:
    """Whether a tensor starts at a multiple of 16 bytes; without memory, whether its storage offset is one."""
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # traced or transformed tensors have no storage of their own
        start = int(tensor.storage_offset()) * tensor.element_size()
    return start % 16 == 0
