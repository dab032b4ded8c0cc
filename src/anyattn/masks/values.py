"""What is known of a mask's values, learnt where looking costs no synchronisation or was asked for."""

from __future__ import annotations

import sys
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn.backend.protocol import Parts
from anyattn.errors import InvalidCallError
from anyattn.masks.base import is_key_mask
from anyattn.masks.objects import Block, Causal, Mask
from anyattn.process.tracing import has_values, is_plain


class Known(NamedTuple):
    """What a mask's values are known to be.

    Attributes:
        all_true: Every position is allowed.
        live: Every row has a key.
        shortest: The least of key lengths; -1 where that isn't what the tensor holds.
        prefix: The keys allowed are the first ones of each batch entry.
    """

    all_true: bool = False
    live: bool = False
    shortest: int = -1
    prefix: bool = False


NOTHING = Known()
_ALL_TRUE = Known(all_true=True)

_seen: dict[int, tuple[weakref.ref[Tensor], int, Known]] = {}


def as_mask(attn_mask: Any) -> Mask | None:
    """Turn whatever may be given as attn_mask into a mask object.

    Raises:
        InvalidCallError: For a type that means nothing as a mask.
    """
    if attn_mask is None or isinstance(attn_mask, Mask):
        return attn_mask
    if isinstance(attn_mask, Tensor):
        bias = sys.modules.get("torch.nn.attention.bias")
        if bias is not None and isinstance(attn_mask, bias.CausalBias):
            return _from_causal_bias(attn_mask)
        return Mask(key=attn_mask) if is_key_mask(attn_mask) else Mask(dense=attn_mask)
    if hasattr(attn_mask, "kv_num_blocks") and hasattr(attn_mask, "mask_mod"):
        return Block(attn_mask)
    raise InvalidCallError(
        f"attn_mask must be a tensor, an object of anyattn.masks or a BlockMask; {type(attn_mask).__name__} was given."
    )


def _from_causal_bias(bias: Any) -> Mask:
    # torch's CausalBias is a Tensor subclass over uninitialised memory: only its variant and lengths mean anything.
    align = "upper_left" if bias.variant.name == "UPPER_LEFT" else "lower_right"
    mask = Causal(align)  # type: ignore[arg-type]
    return Mask(pattern=mask.pattern, block=MadeFor(bias.seq_len_q, bias.seq_len_kv))


class MadeFor:
    """The lengths that torch's CausalBias was made for, which torch itself trusts unchecked."""

    def __init__(self, seqlen_q: int, seqlen_kv: int) -> None:
        self.seq_lengths = (seqlen_q, seqlen_kv)


def parts_of(mask: Mask | None, sinks: Tensor | None = None) -> Parts:
    """Take a mask object apart into what `Backend.run` gets; a dense mask gets four dimensions."""
    if mask is None:
        return Parts(sinks=sinks)
    dense = mask.dense
    if dense is not None and dense.dim() < 4:
        dense = dense[(None,) * (4 - dense.dim())]
    block = None if isinstance(mask.block, MadeFor) else mask.block
    return Parts(mask.key, dense, block, sinks)


def autocast_mask(mask: Mask | None, dtype: torch.dtype) -> Mask | None:
    """Cast a mask as autocast does where it is of the other half precision; float32 is kept, being more precise."""
    if mask is None or mask.dense is None or mask.dense.dtype not in _HALF or mask.dense.dtype == dtype:
        return mask
    # What float16 can't hold would become -inf in it: a row of bfloat16's least would lose every key.
    to = torch.float32 if dtype == torch.float16 else dtype
    return Mask(pattern=mask.pattern, key=mask.key, dense=mask.dense.to(to), block=mask.block)


_HALF = (torch.float16, torch.bfloat16)


def known_of(mask: Mask, seqlen_kv: int) -> Known:
    """Say what is known of a mask's values without a synchronisation.

    CPU tensors are looked at: a mask may have been written since the last call by means that torch doesn't
    count (NumPy, `.data`). Others are known only from `prepare_mask`.
    """
    key, dense = mask.key, mask.dense
    if dense is None:
        return NOTHING if key is None else _look(key, seqlen_kv)
    if key is None:
        return _look(dense, seqlen_kv)
    return Known(_look(key, seqlen_kv).all_true and _look(dense, seqlen_kv).all_true)


def known_of_tensor(tensor: Tensor) -> Known:
    """Say what is known of a dense mask's values without a synchronisation."""
    return _look(tensor, 0)


_not_all_true: dict[int, weakref.ref[Tensor]] = {}


def _look(tensor: Tensor, seqlen_kv: int) -> Known:
    if not tensor.is_cpu:
        return _prepared(tensor, seqlen_kv)
    if type(tensor) is not Tensor or tensor.dtype.is_floating_point:
        return NOTHING
    # A mask once seen to forbid something isn't looked at again: should that change, it is merely not dropped. One that
    # allowed everything is, at every call, since NumPy and `.data` write without torch's counting.
    name = id(tensor)
    seen = _not_all_true.get(name)
    if seen is not None and seen() is tensor:
        return NOTHING
    if not has_values(tensor):
        return NOTHING
    if tensor.dtype == torch.bool:
        all_true = bool(tensor.all())
    else:
        all_true = tensor.numel() > 0 and int(tensor.min()) >= seqlen_kv
    if all_true:
        return _ALL_TRUE
    _not_all_true[name] = weakref.ref(tensor, lambda _: _not_all_true.pop(name, None))
    return NOTHING


def _prepared(tensor: Tensor, seqlen_kv: int) -> Known:
    entry = _seen.get(id(tensor))
    if entry is None or entry[0]() is not tensor or tensor.is_inference() or entry[1] != tensor._version:
        return NOTHING
    if not is_plain():
        return NOTHING  # a graph that is recorded may run with another mask in this one's place
    known = entry[2]
    if tensor.requires_grad:
        known = known._replace(all_true=False)  # asked for a gradient since: it must not be dropped
    return known if known.shortest < 0 else known._replace(all_true=known.shortest >= seqlen_kv)


def prepare_mask(attn_mask: Any, *, seqlen_kv: int | None = None) -> Mask | None:
    """Look at a mask's values once, so that calls with it need not.

    This synchronises with the device. What is learnt (the mask allows everything; no row is without a key; the keys
    allowed are each entry's first, so that none has to be moved) belongs to the tensor, until it is written to in
    place; writes that torch does not count (through `.data`, or NumPy) must not be made after preparing.

    Where there are no values to look at (while something is traced or transformed, on fake and meta tensors), nothing
    is learnt.

    Args:
        attn_mask: What attention takes as attn_mask.
        seqlen_kv: S_kv, needed for `KeyLengths` alone.

    Returns:
        The mask without the parts that allow everything; None where nothing is left.

    Raises:
        InvalidCallError: If it is no mask, an integer tensor, or lengths are given without `seqlen_kv`.

    Example:
        >>> import torch, anyattn
        >>> anyattn.prepare_mask(torch.ones(2, 1, 1, 8, dtype=torch.bool)) is None
        True
    """
    mask = as_mask(attn_mask)
    if mask is None:
        return None
    key = mask.key
    if key is not None and key.dtype != torch.bool and seqlen_kv is None:
        raise InvalidCallError("Preparing KeyLengths needs seqlen_kv=, the number of keys.")
    if key is not None and _learn(key, seqlen_kv or 0).all_true:
        key = None
    dense = mask.dense
    if dense is not None and dense.dtype != torch.bool and not dense.is_floating_point():
        raise InvalidCallError(
            f"A mask tensor must be bool or floating-point; {dense.dtype} was given: an integer 0/1 mask means nothing "
            "by itself: use mask.bool() for True = attend."
        )
    if dense is not None and _learn(dense, 0).all_true:
        dense = None
    if mask.pattern is None and key is None and dense is None and mask.block is None:
        return None
    return Mask(pattern=mask.pattern, key=key, dense=dense, block=mask.block)


def _learn(tensor: Tensor, seqlen_kv: int) -> Known:
    if torch.compiler.is_compiling() or not has_values(tensor):
        return NOTHING
    # All that is asked of the device comes in one answer: each is waited for.
    if tensor.dtype == torch.bool:
        gap = (tensor[..., 1:] & ~tensor[..., :-1]).any()
        all_true, live, no_prefix = torch.stack((tensor.all(), live_rows(tensor).all(), gap)).tolist()
        known = Known(all_true, live, prefix=not no_prefix)
    elif tensor.is_floating_point():
        some, live = torch.stack((tensor.detach().any(), live_rows(tensor).all())).tolist()
        known = Known(not tensor.requires_grad and not some, live)
    else:
        shortest = int(tensor.min()) if tensor.numel() else 0
        known = Known(shortest >= seqlen_kv, shortest > 0, shortest, prefix=True)
    if not tensor.is_inference():
        name = id(tensor)
        reference = weakref.ref(tensor, lambda _: _seen.pop(name, None))
        _seen[name] = (reference, tensor._version, known)
    return known


def live_rows(mask: Tensor) -> Tensor:
    """Say which rows of a mask allow any key: boolean `(..., S_q or 1)`."""
    return (mask if mask.dtype == torch.bool else mask > float("-inf")).any(-1)
