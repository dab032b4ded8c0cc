"""Key masks for kernels that take lengths: the allowed keys are moved to the front, on the device.

The order of keys doesn't matter to attention. So a kernel that takes lengths can compute any key mask, once the allowed
keys come first in each batch entry. No value is read on the host. The order is computed once per mask, and cached.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn.lowering.cache import cached
from anyattn.lowering.dense import key_mask


class KeyLayout(NamedTuple):
    """The lengths and the order with which a kernel computes a key mask.

    Attributes:
        lengths: int32 `(B,)`: how many keys each entry has.
        allowed: Boolean `(B, S_kv)`, in the caller's order of keys; None if no gradient flows to the keys.
        order: int64 `(B, S_kv)`: the key at each place; None if no key is moved.
        back: int64 `(B, S_kv)`: the place of each key; None if no key is moved.
    """

    lengths: Tensor
    allowed: Tensor | None
    order: Tensor | None
    back: Tensor | None


class PackedKeys(NamedTuple):
    """The cumulative lengths and the order with which a kernel computes a key mask on packed keys.

    Attributes:
        cu_seqlens: int32 `(B + 1,)`: the index at which each entry's keys begin, and the end of the last.
        allowed: Boolean `(B, S_kv)`, in the caller's order of keys.
        order: int64 `(1, B * S_kv)`: the key at each place; keys that aren't allowed come last.
        back: int64 `(1, B * S_kv)`: the place of each key.
    """

    cu_seqlens: Tensor
    allowed: Tensor
    order: Tensor
    back: Tensor


def key_layout(key: Tensor, batch: int, seqlen_kv: int, *, prefix: bool, grad: bool = True) -> KeyLayout:
    """Return a mask's layout, computed once per mask.

    Args:
        key: Boolean `(B, S_kv)` or `(B or 1, 1, 1, S_kv)`, or integer lengths `(B,)`.
        batch: B.
        seqlen_kv: S_kv.
        prefix: Whether the allowed keys are known to be the first ones.
        grad: Whether gradients flow back to key or value.
    """
    what = ("front", batch, seqlen_kv, prefix, grad)
    return cached(key, what, lambda: _front(key, batch, seqlen_kv, prefix, grad))


def packed_keys(key: Tensor, batch: int, seqlen_kv: int) -> PackedKeys:
    """Return the layout of a mask's keys when packed, computed once per mask; arguments as for `key_layout`."""
    return cached(key, ("packed", batch, seqlen_kv), lambda: _packed(key, batch, seqlen_kv))


def cached_padding(key: Tensor, seqlen_kv: int) -> Tensor:
    """Return a key mask as boolean `(B or 1, 1, 1, S_kv)`: a view of padding; for lengths on a GPU it is cached."""
    if key.dtype == torch.bool:
        return key_mask(key, seqlen_kv)
    if key.is_cpu:
        return key_mask(key, seqlen_kv)  # torch doesn't count writes by NumPy, and this costs little
    return cached(key, ("padding", seqlen_kv), lambda: key_mask(key, seqlen_kv))


def _front(key: Tensor, batch: int, seqlen_kv: int, prefix: bool, grad: bool) -> KeyLayout:
    if key.dtype != torch.bool:
        allowed = _allowed(key, batch, seqlen_kv) if grad else None
        # With lengths beyond S_kv a kernel would read past the keys.
        return KeyLayout(key.clamp(0, seqlen_kv).to(torch.int32, copy=True), allowed, None, None)
    if prefix and not grad:
        lengths = key_mask(key, seqlen_kv)[:, 0, 0].sum(-1, dtype=torch.int32)
        return KeyLayout(lengths.expand(batch).contiguous(), None, None, None)
    allowed = _allowed(key, batch, seqlen_kv)
    lengths = allowed.sum(-1, dtype=torch.int32)
    if prefix:
        return KeyLayout(lengths, allowed, None, None)
    order, back = _moves(allowed)
    return KeyLayout(lengths, allowed, order, back)


def _packed(key: Tensor, batch: int, seqlen_kv: int) -> PackedKeys:
    allowed = _allowed(key, batch, seqlen_kv)
    ends = allowed.sum(-1).cumsum(0)
    cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
    order, back = _moves(allowed.reshape(1, -1))
    return PackedKeys(cu_seqlens, allowed, order, back)


def _allowed(key: Tensor, batch: int, seqlen_kv: int) -> Tensor:
    # Copied: a view would keep the mask alive, and so its cache entry.
    return key_mask(key, seqlen_kv)[:, 0, 0].expand(batch, seqlen_kv).clone(memory_format=torch.contiguous_format)


def _moves(allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the stable order that has the allowed keys first, and its inverse."""
    before = allowed.cumsum(-1)
    place = torch.arange(allowed.shape[-1], device=allowed.device)
    back = torch.where(allowed, before - 1, before[..., -1:] + place - before)
    order = torch.empty_like(back).scatter_(-1, back, place.expand_as(back))
    return order, back


class _Moved(torch.autograd.Function):
    """Reorder key and value; gradients are returned in the old order, with zeros for keys that aren't allowed."""

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, order: Tensor, back: Tensor, allowed: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(back, allowed)
        return _take(key, order), _take(value, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back, allowed = ctx.saved_tensors
        batch, seqlen = allowed.shape
        found = []
        for grad in grads:
            moved = _take(grad, back).reshape(batch, seqlen, *grad.shape[2:])
            # A kernel may leave anything in rows that it doesn't use, NaN too: replaced, not multiplied by zero.
            found.append(torch.where(allowed[:, :, None, None], moved, 0))
        return (*found, None, None, None)


class _Guarded(torch.autograd.Function):
    """Pass key and value through; gradients of keys that aren't allowed are zero, whatever the kernel wrote there."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(allowed)
        return key.view_as(key), value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (allowed,) = ctx.saved_tensors
        return (*(torch.where(allowed[:, :, None, None], grad, 0) for grad in grads), None)


def _take(tensor: Tensor, order: Tensor) -> Tensor:
    """Reorder the rows `(B, S)` of `(B, S, H, D)`; an order `(1, B * S)` is over all entries' rows.

    torch copies fastest with one index over whole rows. If heads come before the sequence in memory, they still do
    in the result.
    """
    batch, seqlen, heads, dim = tensor.shape
    if order.shape[0] == 1 and batch > 1:
        return tensor.reshape(batch * seqlen, heads * dim)[order[0]].view(1, batch * seqlen, heads, dim)
    first = torch.arange(batch, device=tensor.device)
    if heads > 1 and tensor.stride(2) > tensor.stride(1):
        rows = order[:, None] + (first[:, None] * heads + torch.arange(heads, device=tensor.device))[..., None] * seqlen
        flat = tensor.transpose(1, 2).reshape(batch * heads * seqlen, dim)
        return flat[rows.reshape(-1)].view(batch, heads, seqlen, dim).transpose(1, 2)
    rows = order + first[:, None] * seqlen
    return tensor.reshape(batch * seqlen, heads * dim)[rows.reshape(-1)].view(batch, seqlen, heads, dim)


def to_front(layout: KeyLayout, key: Tensor, value: Tensor, *, grad: bool) -> tuple[Tensor, Tensor]:
    """Move the allowed keys to the front.

    Args:
        layout: From `key_layout`.
        key: `(B, S_kv, H_kv, D)`.
        value: `(B, S_kv, H_kv, D_v)`.
        grad: Whether key or value needs a gradient.
    """
    if layout.order is None or layout.back is None:
        guarded: tuple[Tensor, Tensor] = (key, value)
        if grad and layout.allowed is not None:
            guarded = _Guarded.apply(key, value, layout.allowed)  # type: ignore[no-untyped-call]
        return guarded
    if not grad:
        return _take(key, layout.order), _take(value, layout.order)
    moved: tuple[Tensor, Tensor] = _Moved.apply(  # type: ignore[no-untyped-call]
        key, value, layout.order, layout.back, layout.allowed
    )
    return moved


def to_packed(packed: PackedKeys, key: Tensor, value: Tensor, *, grad: bool) -> tuple[Tensor, Tensor]:
    """Pack the allowed keys of all entries one after the other, as `(B * S_kv, H_kv, D)`; the others come last."""
    if grad:
        key, value = _Moved.apply(key, value, packed.order, packed.back, packed.allowed)  # type: ignore[no-untyped-call]
    else:
        key, value = _take(key, packed.order), _take(value, packed.order)
    return key.flatten(0, 1), value.flatten(0, 1)
