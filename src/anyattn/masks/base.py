"""What every mask is: up to four parts, a signature that names it in tables, and how two masks are joined."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch

from anyattn.errors import InvalidCallError
from anyattn.masks.functions import MaskFunction, joined
from anyattn.process.tracing import is_plain
from anyattn.types.spec import Align

if TYPE_CHECKING:
    from torch import Tensor


Pattern = tuple[int, int, Align]
"""`(left, right, align)`: row i may see columns from `p - left` to `p + right`, where p is i (`upper_left`) or
`i + seqlen_kv - seqlen_q` (`lower_right`); -1 is unbounded."""


def join_patterns(first: Pattern, second: Pattern) -> Pattern:
    """Intersect two patterns of one alignment; -1 is unbounded on either side.

    Raises:
        InvalidCallError: If the alignments differ.
    """
    if first[2] != second[2]:
        raise InvalidCallError(
            f"Two patterns can only be joined with one alignment; {first[2]} and {second[2]} were given. "
            "Pass the same align to both."
        )
    sides = [max(a, b) if min(a, b) < 0 else min(a, b) for a, b in zip(first[:2], second[:2], strict=True)]
    return (sides[0], sides[1], first[2])


class Mask:
    """A mask of up to four parts; make one with the classes of this module and join them with `&`.

    Attributes:
        pattern: `(left, right, align)` or None.
        key: Boolean `(B, S_kv)` or `(B or 1, 1, 1, S_kv)`, True = attend, or integer lengths `(B,)`; or None.
        dense: Boolean (True = attend) or floating (added to the scores), broadcastable to
            `(B, H, S_q, S_kv)`; or None.
        block: A `torch.nn.attention.flex_attention.BlockMask`, a mask function, or None.
    """

    __slots__ = ("__weakref__", "_signature", "_wide_key", "block", "dense", "key", "pattern", "short")

    def __init__(
        self,
        *,
        pattern: Pattern | None = None,
        key: Tensor | None = None,
        dense: Tensor | None = None,
        block: Any | None = None,
    ) -> None:
        self.pattern = pattern
        self.key = key
        self.dense = dense
        self.block = block
        self._signature: tuple[Any, ...] | None = None
        self._wide_key: Tensor | None = None
        # The mask's key in the table of decided calls; -1 until it is known that the mask may have one.
        self.short = -1

    def wide_key(self) -> Tensor:
        """Return the key padding as `(B, 1, 1, S_kv)`: a view, made once per storage, that follows in-place writes."""
        key = self.key
        assert key is not None
        if key.dim() == 4:
            return key
        found = self._wide_key
        if found is None or found.data_ptr() != key.data_ptr():
            found = key[:, None, None, :]
            if type(found) is torch.Tensor and is_plain():
                self._wide_key = found  # a view made while tracing must not be used outside
        return found

    @property
    def signature(self) -> tuple[Any, ...]:
        """All that the choice of a kernel may depend on, hashable; no value is read."""
        found = self._signature
        if found is None:
            found = (
                self.pattern,
                _tensor_signature(self.key),
                _tensor_signature(self.dense),
                None if self.block is None else serial_of(self.block),
            )
            if is_plain():
                self._signature = found  # sizes are tensors while torch.jit.trace runs
        return found

    def __and__(self, other: object) -> Mask:
        """Join two masks: allowed where both allow.

        Raises:
            InvalidCallError: If both have a key, a dense or a block mask, or patterns of different alignment.
        """
        if not isinstance(other, Mask):
            return NotImplemented
        if self.pattern is not None and other.pattern is not None:
            pattern: Pattern | None = join_patterns(self.pattern, other.pattern)
        else:
            pattern = self.pattern if other.pattern is None else other.pattern
        (key, dense), (other_key, other_dense) = _parts_to_join(self, other)
        return Mask(
            pattern=pattern,
            key=_only_one("key mask (KeyPadding, KeyLengths)", key, other_key),
            dense=_only_one("dense mask (Boolean, Bias)", dense, other_dense),
            block=_joined_blocks(self.block, other.block),
        )

    def __repr__(self) -> str:
        parts = []
        if self.pattern is not None:
            left, right, align = self.pattern
            parts.append(f"window(left={left}, right={right}, align={align!r})")
        for name, tensor in (("key", self.key), ("dense", self.dense)):
            if tensor is not None:
                parts.append(f"{name}({tensor.dtype}, {tuple(tensor.shape)})")
        if self.block is not None:
            parts.append("function" if isinstance(self.block, MaskFunction) else "block")
        return f"Mask[{' & '.join(parts) or 'all'}]"


_serials = itertools.count()
_serial_by_block: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def serial_of(block: Any) -> int:
    """Return a number that no other block mask has or will have; an `id` may be used again."""
    found = _serial_by_block.get(block)
    if found is None:
        found = _serial_by_block.setdefault(block, next(_serials))
    return found


def _tensor_signature(tensor: Tensor | None) -> tuple[Any, ...] | None:
    if tensor is None:
        return None
    return (tensor.shape, tensor.dtype, tensor.device)


_Parts = tuple["Tensor | None", "Tensor | None"]


def _parts_to_join(first: Mask, second: Mask) -> tuple[_Parts, _Parts]:
    """Return each side's key mask and dense mask.

    If both sides have a key mask, one that was passed as a dense tensor counts as dense again.
    """
    parts: list[_Parts] = [(first.key, first.dense), (second.key, second.dense)]
    if first.key is not None and second.key is not None:
        for index, (key, dense) in enumerate(parts):
            if key is not None and key.dim() == 4 and dense is None:
                parts[index] = (None, key)
                break
    return parts[0], parts[1]


def is_key_mask(tensor: Tensor) -> bool:
    """Whether a dense mask is a key mask by its dtype and shape: boolean `(B or 1, 1, 1, S_kv)`."""
    if tensor.dtype != torch.bool or tensor.dim() != 4:
        return False
    shape = tensor.shape
    return shape[1] == 1 and shape[2] == 1 and shape[3] != 1


def _joined_blocks(first: Any, second: Any) -> Any:
    if isinstance(first, MaskFunction) and isinstance(second, MaskFunction):
        return joined(first, second)
    return _only_one("block mask (Block) or mask function", first, second)


def _only_one(what: str, first: Any, second: Any) -> Any:
    if first is not None and second is not None:
        raise InvalidCallError(f"A mask holds at most one {what}, and both sides of & have one. Combine them first.")
    return second if first is None else first
