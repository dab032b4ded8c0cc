"""What is known about a mask's values; they are read only if that needs no synchronisation, or by `prepare_mask`."""

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
from anyattn.process.tracing import has_values, is_captured, is_plain


class Known(NamedTuple):
    """What a mask's values are known to be.

    Attributes:
        all_true: Every position is allowed.
        live: Every row has a key.
        shortest: The smallest of the key lengths; -1 for any other tensor.
        prefix: The allowed keys are the first ones of each batch entry.
    """

    all_true: bool = False
    live: bool = False
    shortest: int = -1
    prefix: bool = False


NOTHING = Known()
_ALL_TRUE = Known(all_true=True)

_prepared_values: dict[int, tuple[weakref.ref[Tensor], int, Known]] = {}


def as_mask(attn_mask: Any) -> Mask | None:
    """Convert an attn_mask of any accepted type to a mask object.

    Raises:
        InvalidCallError: If the type can't be a mask.
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
    # torch's CausalBias is a Tensor subclass over uninitialised memory: only its variant and lengths can be used.
    align = "upper_left" if bias.variant.name == "UPPER_LEFT" else "lower_right"
    mask = Causal(align)  # type: ignore[arg-type]
    return Mask(pattern=mask.pattern, block=MadeFor(bias.seq_len_q, bias.seq_len_kv))


class MadeFor:
    """The lengths that a CausalBias was made for; torch itself doesn't check them."""

    def __init__(self, seqlen_q: int, seqlen_kv: int) -> None:
        self.seq_lengths = (seqlen_q, seqlen_kv)


def parts_of(mask: Mask | None, sinks: Tensor | None = None) -> Parts:
    """Split a mask object into the tensors that `Backend.run` gets; a dense mask gets four dimensions."""
    if mask is None:
        return Parts(sinks=sinks)
    dense = mask.dense
    if dense is not None and dense.dim() < 4:
        dense = dense[(None,) * (4 - dense.dim())]
    block = None if isinstance(mask.block, MadeFor) else mask.block
    return Parts(mask.key, dense, block, sinks)


def autocast_mask(mask: Mask | None, dtype: torch.dtype) -> Mask | None:
    """Cast a mask of the other half precision as autocast does; a float32 mask stays, since it is more precise."""
    if mask is None or mask.dense is None or mask.dense.dtype not in _HALF or mask.dense.dtype == dtype:
        return mask
    # A number below float16's range would become -inf: a row of bfloat16's finfo.min would lose every key.
    to = torch.float32 if dtype == torch.float16 else dtype
    return Mask(pattern=mask.pattern, key=mask.key, dense=mask.dense.to(to), block=mask.block)


_HALF = (torch.float16, torch.bfloat16)


def known_of(mask: Mask, seqlen_kv: int) -> Known:
    """Return what is known about a mask's values without a synchronisation.

    CPU tensors are read at each call: NumPy or `.data` may have written to one since the last call, and torch doesn't
    count such writes. Tensors on other devices are known only from `prepare_mask`.
    """
    key, dense = mask.key, mask.dense
    if dense is None:
        return NOTHING if key is None else _look(key, seqlen_kv)
    if key is None:
        return _look(dense, seqlen_kv)
    return Known(_look(key, seqlen_kv).all_true and _look(dense, seqlen_kv).all_true)


def known_of_tensor(tensor: Tensor) -> Known:
    """Return what is known about a dense mask's values without a synchronisation."""
    return _look(tensor, 0)


_not_all_true: dict[int, weakref.ref[Tensor]] = {}


def _look(tensor: Tensor, seqlen_kv: int) -> Known:
    if not tensor.is_cpu:
        return _prepared(tensor, seqlen_kv)
    if type(tensor) is not Tensor or tensor.dtype.is_floating_point:
        return NOTHING
    # A mask that was seen to forbid something isn't read again: if that changes, it is only not dropped. One that
    # allowed everything is read at every call, since torch doesn't count writes by NumPy and through `.data`.
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
    entry = _prepared_values.get(id(tensor))
    if entry is None or entry[0]() is not tensor or tensor.is_inference() or entry[1] != tensor._version:
        return NOTHING
    if not is_plain() or is_captured(tensor):
        return NOTHING  # a recorded graph may run with another mask in place of this one, or with other values in it
    known = entry[2]
    if tensor.requires_grad:
        known = known._replace(all_true=False)  # it requires a gradient since then, and must not be dropped
    return known if known.shortest < 0 else known._replace(all_true=known.shortest >= seqlen_kv)


def prepare_mask(attn_mask: Any, *, seqlen_kv: int | None = None) -> Mask | None:
    """Read a mask's values once; later calls with the mask use what was found.

    This synchronises with the device once. It finds out whether the mask allows everything, whether every row has a
    key, and whether the allowed keys are the first of each batch entry (then no key has to be moved). The result
    belongs to the tensor until it is written to in place. Don't write to a prepared mask through `.data` or NumPy:
    torch doesn't count such writes.

    Calls that are captured in a CUDA graph don't rely on it, since the graph may be replayed with other values.

    If there are no values to read (while something traces or transforms, on fake and meta tensors), it finds nothing.

    Args:
        attn_mask: A mask, as for `attention`.
        seqlen_kv: S_kv; only `KeyLengths` need it.

    Returns:
        The mask without the parts that allow everything; None if nothing is left.

    Raises:
        InvalidCallError: If it is no mask, is an integer tensor, or is `KeyLengths` and `seqlen_kv` is missing.

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
        raise InvalidCallError("prepare_mask needs the number of keys for KeyLengths: pass seqlen_kv=.")
    if key is not None and _learn(key, seqlen_kv or 0).all_true:
        key = None
    dense = mask.dense
    if dense is not None and dense.dtype != torch.bool and not dense.is_floating_point():
        raise InvalidCallError(
            f"A mask tensor must be bool or floating-point; {dense.dtype} was given. An integer 0/1 mask could mean "
            "either: use mask.bool() for True = attend."
        )
    if dense is not None and _learn(dense, 0).all_true:
        dense = None
    if mask.pattern is None and key is None and dense is None and mask.block is None:
        return None
    return Mask(pattern=mask.pattern, key=key, dense=dense, block=mask.block)


def _learn(tensor: Tensor, seqlen_kv: int) -> Known:
    if torch.compiler.is_compiling() or not has_values(tensor):
        return NOTHING
    # One transfer for all answers: each transfer waits for the device.
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
        reference = weakref.ref(tensor, lambda _: _prepared_values.pop(name, None))
        _prepared_values[name] = (reference, tensor._version, known)
    return known


def live_rows(mask: Tensor) -> Tensor:
    """Compute which rows of a mask allow any key: boolean `(..., S_q or 1)`."""
    return (mask if mask.dtype == torch.bool else mask > float("-inf")).any(-1)
