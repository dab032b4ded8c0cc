"""FlexAttention's block masks: what their blocks cover, and how they are made from functions."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattn.errors import InvalidCallError
from anyattn.masks.functions import MaskFunction, MaskMod, looks_at
from anyattn.process.tracing import is_plain
from anyattn.types.spec import BlockSpec

_seen: weakref.WeakKeyDictionary[Any, BlockSpec] = weakref.WeakKeyDictionary()


def block_at(address: int) -> Any:
    """Find a living block mask by its `id`.

    While torch.compile traces, an object can't be passed to code that isn't traced (torch 2.11 refuses it), but its id
    can. All objects that Python's garbage collector knows are compared, so an id of no object does no harm.

    Raises:
        InvalidCallError: If there is none, as when the traced code makes it.
    """
    found = next((thing for thing in gc.get_objects() if id(thing) == address), None)
    if found is None or not hasattr(found, "kv_num_blocks"):
        raise InvalidCallError("Make the block mask outside the compiled function: its blocks have to be read once.")
    return found


def block_spec(block_mask: Any) -> BlockSpec:
    """Describe a block mask; its blocks are read once, which may synchronise with its device.

    Raises:
        InvalidCallError: If code that torch.compile traces makes it.
    """
    found = _seen.get(block_mask)
    if found is not None:
        return found
    if not isinstance(getattr(block_mask, "kv_num_blocks", None), Tensor):
        raise InvalidCallError("Make the block mask outside the compiled function: its blocks have to be read once.")
    batch, heads = (int(size) for size in block_mask.kv_num_blocks.shape[:2])
    per_batch, per_head, _ = looks_at(block_mask.mask_mod, block_mask.kv_num_blocks.device)
    undecided = (per_batch and batch == 1) or (per_head and heads == 1)
    partial = undecided and _is_of_first_entry(block_mask, batch, heads)
    spec = BlockSpec(batch, heads, per_batch, per_head, partial)
    _seen[block_mask] = spec
    return spec


def _is_of_first_entry(block_mask: Any, batch: int, heads: int) -> bool:
    """Whether the blocks are what `create_block_mask` makes from the function with None as B or H."""
    device = block_mask.kv_num_blocks.device
    lengths = (int(block_mask.seq_lengths[0]), int(block_mask.seq_lengths[1]))
    made = make_block_mask(block_mask.mask_mod, batch, heads, *lengths, device, block_mask.BLOCK_SIZE)
    return torch.equal(made.to_dense() != 0, block_mask.to_dense() != 0)


BLOCK = (128, 128)
"""Rows and columns of a block: torch's default."""

_AT_ONCE = 1 << 26
"""How many positions (batch * heads * seqlen_q * seqlen_kv) of a function are written out at once."""


def make_block_mask(
    mask_mod: MaskMod,
    batch: int | None,
    heads: int | None,
    seqlen_q: int,
    seqlen_kv: int,
    device: torch.device,
    block_size: tuple[int, int] = BLOCK,
) -> Any:
    """Make what torch's `create_block_mask` makes; a band of rows at a time if the whole would take much memory."""
    from torch.nn.attention.flex_attention import create_block_mask

    options: dict[str, Any] = {"device": device, "BLOCK_SIZE": block_size}
    if torch.compiler.is_compiling() or (batch or 1) * (heads or 1) * seqlen_q * seqlen_kv <= _AT_ONCE:
        return create_block_mask(mask_mod, batch, heads, seqlen_q, seqlen_kv, **options)
    rows = block_size[0]
    band = max(1, _AT_ONCE // ((batch or 1) * (heads or 1) * rows * seqlen_kv)) * rows
    sizes = [(start, min(band, seqlen_q - start)) for start in range(0, seqlen_q, band)]
    counts = [
        block_counts(_from_row(mask_mod, start), batch, heads, height, seqlen_kv, device, block_size)
        for start, height in sizes
    ]
    found = torch.cat(counts, -2)
    return _of_blocks(mask_mod, found > 0, found == block_size[0] * block_size[1], (seqlen_q, seqlen_kv), block_size)


def make_band_block_mask(
    mask_mod: MaskMod,
    seqlen_q: int,
    seqlen_kv: int,
    device: torch.device,
    *,
    low: int | None = None,
    high: int | None = None,
    keys: Tensor | None = None,
) -> Any:
    """Make the block mask of a band of the diagonal and of allowed keys, without computing every position.

    Args:
        mask_mod: Returns whether a position is allowed.
        seqlen_q: S_q.
        seqlen_kv: S_kv, as the kernel gets it.
        device: The device to make it on.
        low: The smallest `column - row` that is allowed; None is no limit.
        high: The largest `column - row` that is allowed; None is no limit.
        keys: Boolean `(B or 1, S_kv)`: which keys are allowed; None is all.
    """
    some, whole = band_blocks(seqlen_q, seqlen_kv, device, low=low, high=high, keys=keys)
    return _of_blocks(mask_mod, some, whole, (seqlen_q, seqlen_kv), BLOCK)


def band_blocks(
    seqlen_q: int, seqlen_kv: int, device: torch.device, *, low: int | None, high: int | None, keys: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute which blocks may hold an allowed position, and which hold no other: `(B or 1, 1, rows, columns)` each."""
    rows, columns = BLOCK
    top = torch.arange(0, seqlen_q, rows, device=device)[:, None]
    first = torch.arange(0, seqlen_kv, columns, device=device)
    least = first - (top + (rows - 1)).clamp(max=seqlen_q - 1)
    most = (first + (columns - 1)).clamp(max=seqlen_kv - 1) - top
    # torch counts positions beyond the ends as forbidden, so blocks there are never whole.
    some, whole = most >= least, (top + rows <= seqlen_q) & (first + columns <= seqlen_kv)
    if low is not None:
        some, whole = some & (most >= low), whole & (least >= low)
    if high is not None:
        some, whole = some & (least <= high), whole & (most <= high)
    some, whole = some[None, None], whole[None, None]
    if keys is not None:
        each = F.pad(keys, (0, -seqlen_kv % columns)).view(keys.shape[0], 1, 1, -1, columns)
        some, whole = some & each.any(-1), whole & each.all(-1)
    return some, whole


def _of_blocks(mask_mod: MaskMod, some: Tensor, whole: Tensor, lengths: tuple[int, int], size: tuple[int, int]) -> Any:
    """Make a block mask from two maps: blocks with an allowed position, and blocks with no other."""
    from torch.nn.attention.flex_attention import BlockMask

    partial = ordered(some & ~whole)
    return BlockMask.from_kv_blocks(*partial, *ordered(whole), BLOCK_SIZE=size, mask_mod=mask_mod, seq_lengths=lengths)


def _from_row(mask_mod: MaskMod, start: int) -> MaskMod:
    return lambda b, h, q, kv: mask_mod(b, h, q + start, kv)


def block_counts(
    mask_mod: MaskMod,
    batch: int | None,
    heads: int | None,
    seqlen_q: int,
    seqlen_kv: int,
    device: torch.device,
    block_size: tuple[int, int],
) -> Tensor:
    """Count the allowed positions of each block: `(B or 1, H or 1, S_q / rows, S_kv / columns)`, rounded up."""
    rows, columns = block_size
    allowed = positions(mask_mod, batch or 1, heads or 1, seqlen_q, seqlen_kv, device)
    allowed = F.pad(allowed, (0, -seqlen_kv % columns, 0, -seqlen_q % rows))
    blocks = allowed.view(*allowed.shape[:2], -1, rows, allowed.shape[-1] // columns, columns)
    counts: Tensor = blocks.sum((-3, -1), dtype=torch.int32)
    return counts


def positions(mask_mod: MaskMod, batch: int, heads: int, seqlen_q: int, seqlen_kv: int, device: torch.device) -> Tensor:
    """Call a mask function at every position: boolean `(B, H, S_q, S_kv)`.

    In traced code this does the same as torch's `create_mask`, which reads the function's signature: dynamo can't trace
    that before torch 2.10.
    """
    from torch.nn.attention import flex_attention

    if not torch.compiler.is_compiling():
        return flex_attention.create_mask(mask_mod, batch, heads, seqlen_q, seqlen_kv, device=device)
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    indices = (torch.arange(size, device=device) for size in (batch, heads, seqlen_q, seqlen_kv))
    function: Any = mask_mod
    for axis in (3, 2, 1, 0):
        function = torch.vmap(function, in_dims=tuple(0 if place == axis else None for place in range(4)))
    with TransformGetItemToIndex():
        found: Tensor = function(*indices)
    return found


def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's number of blocks, and its columns in an order that has those of its blocks first."""
    number = blocks.sum(-1, dtype=torch.int32)
    order = torch.argsort(blocks.to(torch.int32), dim=-1, descending=True, stable=True)
    return number, order.to(torch.int32).contiguous()


_MOST_CACHED_BYTES = 1 << 24
"""The largest dense mask that is cached with its function; larger ones are made at each call."""


def written_out(
    function: MaskFunction, batch: int, heads: int, seqlen_q: int, seqlen_kv: int, device: torch.device
) -> Tensor:
    """Write a mask function out as a dense boolean mask `(B or 1, H or 1, S_q, S_kv)`."""
    entries, each = batch if function.per_batch else 1, heads if function.per_head else 1
    if not torch.compiler.is_compiling() and not is_plain():
        # create_mask uses torch.vmap, which not every tracer and transform can handle.
        if function.broadcasts:
            return _broadcast(function, entries, each, seqlen_q, seqlen_kv, device)
        if torch._C._get_tracing_state() is not None:
            raise InvalidCallError(
                "torch.jit.trace can't follow a mask made with masks.from_function. Pass the mask as a boolean tensor."
            )

    def make() -> Tensor:
        return positions(function.mask_mod, entries, each, seqlen_q, seqlen_kv, device)

    if torch.compiler.is_compiling() or entries * each * seqlen_q * seqlen_kv > _MOST_CACHED_BYTES:
        return make()
    found: Tensor = function.cached(("dense", entries, each, seqlen_q, seqlen_kv), device, make)
    return found


def _broadcast(
    function: MaskFunction, entries: int, heads: int, seqlen_q: int, seqlen_kv: int, device: torch.device
) -> Tensor:
    """Write a mask function out in one call, with indices that broadcast to `(B or 1, H or 1, S_q, S_kv)`."""
    b, h, q, kv = (torch.arange(size, device=device) for size in (entries, heads, seqlen_q, seqlen_kv))
    return function.mask_mod(b[:, None, None, None], h[:, None, None], q[:, None], kv)
