"""Mask objects: each names what it means, so nothing is guessed from a shape.

A mask has at most one *pattern* (causal or window), one *key mask* (padding or lengths), one *dense* mask (boolean or
bias) and one *block* mask or mask function; `a & b` joins two masks and a position is allowed where both allow it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from anyattn.errors import InvalidCallError
from anyattn.masks import scalars
from anyattn.masks.base import Mask, Pattern, is_key_mask, join_patterns
from anyattn.masks.functions import MaskMod, looked_at, prefix_then_causal, same_document, same_or_earlier_frame
from anyattn.types.spec import Align

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Align",
    "Bias",
    "Block",
    "Boolean",
    "Causal",
    "KeyLengths",
    "KeyPadding",
    "Mask",
    "Pattern",
    "SlidingWindow",
    "document",
    "frame_causal",
    "from_function",
    "join_patterns",
    "prefix_lm",
]

_ALIGNS = ("upper_left", "lower_right")


def _check_align(align: object) -> None:
    if align not in _ALIGNS:
        raise InvalidCallError(f"align must be 'upper_left' or 'lower_right', not {align!r}.")


def _side(name: str, value: Any) -> int:
    side = value if torch.compiler.is_dynamo_compiling() else scalars.index(f"The window's {name} side", value)
    if isinstance(side, bool) or not isinstance(side, int) or side < -1:
        raise InvalidCallError(f"A window's {name} side must be an int >= 0, or -1 for unbounded; {value!r} was given.")
    return side


def _check_tensor(owner: str, tensor: object) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise InvalidCallError(f"{owner} needs a tensor, not {type(tensor).__name__}.")


class Causal(Mask):
    """Causal attention, with its alignment.

    Args:
        align: `"upper_left"` allows column j for row i if `j <= i` (torch SDPA's `is_causal`);
            `"lower_right"` if `j <= i + S_kv - S_q` (flash-attn's). They are the same if S_q equals S_kv.

    Example:
        >>> Causal("lower_right").pattern
        (-1, 0, 'lower_right')
    """

    __slots__ = ()

    def __init__(self, align: Align = "upper_left") -> None:
        _check_align(align)
        super().__init__(pattern=(-1, 0, align))


class SlidingWindow(Mask):
    """Row i sees `left` columns before its own position, that position, and `right` columns after it.

    Args:
        left: Columns before, >= 0; -1 is unbounded.
        right: Columns after, >= 0; -1 is unbounded.
        align: Which column is row i's own position: i (`"upper_left"`) or `i + S_kv - S_q` (`"lower_right"`).
    """

    __slots__ = ()

    def __init__(self, left: int, right: int, align: Align = "upper_left") -> None:
        _check_align(align)
        super().__init__(pattern=(_side("left", left), _side("right", right), align))


class KeyPadding(Mask):
    """Which keys of each batch entry may be attended to, by every query and head.

    Args:
        mask: Boolean `(B, S_kv)`, True = attend. The allowed keys may lie anywhere.
    """

    __slots__ = ()

    def __init__(self, mask: Tensor) -> None:
        _check_tensor("KeyPadding", mask)
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise InvalidCallError(
                f"KeyPadding needs a boolean tensor (B, S_kv), True = attend; {mask.dtype} of shape "
                f"{tuple(mask.shape)} was given. Turn a 0/1 mask into one with mask.bool()."
            )
        super().__init__(key=mask)


class KeyLengths(Mask):
    """How many leading keys of each batch entry may be attended to.

    Args:
        lengths: int32 or int64 `(B,)`, each from 0 to S_kv.
    """

    __slots__ = ()

    def __init__(self, lengths: Tensor) -> None:
        _check_tensor("KeyLengths", lengths)
        if lengths.dtype not in (torch.int32, torch.int64) or lengths.dim() != 1:
            raise InvalidCallError(
                f"KeyLengths needs an int32 or int64 tensor (B,); {lengths.dtype} of shape "
                f"{tuple(lengths.shape)} was given."
            )
        super().__init__(key=lengths)


class Boolean(Mask):
    """A dense boolean mask, True = attend, broadcastable to `(B, H, S_q, S_kv)`.

    One of shape `(B or 1, 1, 1, S_kv)` depends only on batch and key, and is handled as a key mask.
    """

    __slots__ = ()

    def __init__(self, mask: Tensor) -> None:
        _check_tensor("Boolean", mask)
        if mask.dtype != torch.bool:
            raise InvalidCallError(f"Boolean needs a boolean tensor, True = attend; {mask.dtype} was given.")
        if is_key_mask(mask):
            super().__init__(key=mask)
        else:
            super().__init__(dense=mask)


class Bias(Mask):
    """A dense bias, added to the scaled scores; broadcastable to `(B, H, S_q, S_kv)`; -inf forbids."""

    __slots__ = ()

    def __init__(self, bias: Tensor) -> None:
        _check_tensor("Bias", bias)
        if not bias.is_floating_point():
            raise InvalidCallError(f"Bias needs a floating-point tensor; {bias.dtype} was given.")
        super().__init__(dense=bias)


class Block(Mask):
    """A FlexAttention block mask: a position is allowed where its blocks and its function both allow it.

    If the function reads the head (or batch) index but the mask was made with `H=None` (`B=None`), its blocks are those
    of the first head, and compiled kernels would use them for all heads. Such a mask is made again from its function,
    with the full B and H, and the decision says so.

    Args:
        block_mask: A `torch.nn.attention.flex_attention.BlockMask`.
    """

    __slots__ = ()

    def __init__(self, block_mask: Any) -> None:
        if not (hasattr(block_mask, "kv_num_blocks") and hasattr(block_mask, "mask_mod")):
            raise InvalidCallError(
                f"Block needs a torch.nn.attention.flex_attention.BlockMask, not {type(block_mask).__name__}."
            )
        super().__init__(block=block_mask)


def from_function(fn: MaskMod) -> Mask:
    """Make a mask from a function of indices, as FlexAttention's mask functions are.

    The function is called once here, to find out whether it reads the batch index or the head index. What a backend
    makes from it (flex a block mask, native a dense one) is cached with the mask, per shape. So make the mask once, and
    outside compiled code. If a name that the function captures is bound to another object, or a tensor that it reads is
    written to in place, the cache is dropped. Writes that torch doesn't count (through `.data`, or NumPy) aren't seen.

    Args:
        fn: `fn(b, h, q_idx, kv_idx)` of four integer tensors; it returns a boolean tensor, True = attend.

    Raises:
        InvalidCallError: If it can't be called so, or returns anything but a boolean tensor.

    Example:
        >>> from_function(lambda b, h, q_idx, kv_idx: (q_idx + kv_idx) % 2 == 0) & Causal()
        Mask[window(left=-1, right=0, align='upper_left') & function]
    """
    return Mask(block=looked_at(fn))


def document(ids: Tensor) -> Mask:
    """Let tokens attend only within their own document; join it with `Causal()` for packed language modelling.

    Args:
        ids: Integer `(B, S)`, or `(1, S)` for every batch entry: which document each token belongs to. Queries and
            keys are the same S tokens.
    """
    return Mask(block=same_document(ids))


def prefix_lm(prefix_lengths: Tensor | int) -> Mask:
    """Let every row attend to the whole prefix, and causally (upper-left) to what comes after it.

    Args:
        prefix_lengths: How long the prefix is: an int >= 0, or int32 or int64 `(B,)`, or `(1,)` for every batch entry.
    """
    return Mask(block=prefix_then_causal(prefix_lengths))


def frame_causal(tokens_per_frame: int) -> Mask:
    """Let each row attend to its own frame of a video and to every earlier one (upper-left).

    Args:
        tokens_per_frame: How many tokens one frame has, >= 1.
    """
    return Mask(block=same_or_earlier_frame(tokens_per_frame))
