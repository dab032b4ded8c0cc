"""What a FlexAttention block mask's blocks speak for, found by looking at it once."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anyattn.errors import InvalidCallError
from anyattn.spec import BlockSpec

_VALUELESS = frozenset(
    ("new_ones", "new_zeros", "new_full", "new_empty", "ones_like", "zeros_like", "full_like", "empty_like")
)
"""Operations that take a tensor's shape and dtype and not its value, as torch's own `noop_mask` does."""

_seen: weakref.WeakKeyDictionary[Any, BlockSpec] = weakref.WeakKeyDictionary()


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which of some tensors' values any operation takes."""

    def __init__(self, *watched: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched = watched
        self.used = [False] * len(watched)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ not in _VALUELESS:
            for leaf in tree_leaves((args, kwargs)):
                for index, tensor in enumerate(self.watched):
                    if leaf is tensor:
                        self.used[index] = True
        return func(*args, **kwargs)


def _looks_at(block_mask: Any) -> tuple[bool, bool]:
    """Find out whether a block mask's function looks at the batch or head index, by watching one call."""
    device = block_mask.kv_num_blocks.device
    b, h, q, kv = (torch.zeros((), dtype=torch.int32, device=device) for _ in range(4))
    with torch.no_grad(), _Watch(b, h) as watch:
        block_mask.mask_mod(b, h, q, kv)
    return watch.used[0], watch.used[1]


def block_spec(block_mask: Any) -> BlockSpec:
    """Describe a block mask; looked at once, which may synchronise with its device.

    Raises:
        InvalidCallError: If it is being made inside code that torch.compile traces.
    """
    found = _seen.get(block_mask)
    if found is not None:
        return found
    if not isinstance(getattr(block_mask, "kv_num_blocks", None), Tensor):
        raise InvalidCallError("Make the block mask outside the compiled function: it has to be looked at once.")
    batch, heads = (int(size) for size in block_mask.kv_num_blocks.shape[:2])
    per_batch, per_head = _looks_at(block_mask)
    undecided = (per_batch and batch == 1) or (per_head and heads == 1)
    partial = undecided and _is_of_first_entry(block_mask, batch, heads)
    spec = BlockSpec(batch, heads, per_batch, per_head, partial)
    _seen[block_mask] = spec
    return spec


def _is_of_first_entry(block_mask: Any, batch: int, heads: int) -> bool:
    """Whether the blocks are what `create_block_mask` makes of the function with None for B or H."""
    from torch.nn.attention.flex_attention import create_block_mask

    seqlen_q, seqlen_kv = block_mask.seq_lengths
    made = create_block_mask(
        block_mask.mask_mod,
        batch if batch > 1 else None,
        heads if heads > 1 else None,
        seqlen_q,
        seqlen_kv,
        device=block_mask.kv_num_blocks.device,
        BLOCK_SIZE=block_mask.BLOCK_SIZE,
    )
    return torch.equal(made.to_dense() != 0, block_mask.to_dense() != 0)
