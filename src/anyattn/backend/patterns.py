"""Exact conversion of causal and windowed patterns to a kernel's alignment.

If needed, rows that see no key and keys that no row sees are left out. This is arithmetic on sizes, without tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from anyattn.types.spec import UNKNOWN, Align, PatternSpec


@dataclass(frozen=True, slots=True)
class KernelPattern:
    """A pattern as it is passed to a kernel, on the rows and keys that are left.

    Attributes:
        left: Columns before a row's own position; -1 is unbounded.
        right: Columns after it; -1 is unbounded.
        align: The alignment, among the rows and keys that are left.
        rows: `(first, end)` of the query rows that are left; the others see no key. None is all.
        keys: `(first, end)` of the keys that are left; no row sees the others. None is all.
    """

    left: int
    right: int
    align: Align
    rows: tuple[int, int] | None = None
    keys: tuple[int, int] | None = None

    @property
    def is_causal(self) -> bool:
        """Whether it is plain causal attention."""
        return self.left == -1 and self.right == 0

    @property
    def is_full(self) -> bool:
        """Whether every row that is left sees every key that is left."""
        return self.left == -1 and self.right == -1


def in_alignment(
    pattern: PatternSpec, seqlen_q: int, seqlen_kv: int, align: Align, *, same_lengths: bool
) -> KernelPattern | None:
    """Convert a pattern to an alignment.

    Args:
        pattern: The pattern.
        seqlen_q: S_q, or UNKNOWN.
        seqlen_kv: S_kv, or UNKNOWN.
        align: The alignment wanted.
        same_lengths: Whether S_q == S_kv, also if both are unknown.

    Returns:
        The pattern; None if unknown lengths matter, or if a side would be negative.
    """
    if same_lengths or UNKNOWN in (seqlen_q, seqlen_kv):
        if same_lengths or align == pattern.align:
            return KernelPattern(pattern.left, pattern.right, align)
        return None
    if align == pattern.align:
        left, right = pattern.left, pattern.right
        return _without_idle_sides(KernelPattern(left, right, align), seqlen_q, seqlen_kv)
    if align == "lower_right":
        return _to_lower_right(pattern, seqlen_q, seqlen_kv)
    return _to_upper_left(pattern, seqlen_q, seqlen_kv)


def _to_lower_right(pattern: PatternSpec, seqlen_q: int, seqlen_kv: int) -> KernelPattern:
    """Row i sees [i - left, i + right]: cut the keys after the last row's reach, then the rows that see nothing."""
    left, right = pattern.left, pattern.right
    keys = seqlen_kv if right == -1 else min(seqlen_kv, seqlen_q + right)
    rows = seqlen_q if left == -1 else min(seqlen_q, keys + left)
    shift = keys - rows
    return _without_idle_sides(
        KernelPattern(
            -1 if left == -1 else left + shift,
            -1 if right == -1 else right - shift,
            "lower_right",
            None if rows == seqlen_q else (0, rows),
            None if keys == seqlen_kv else (0, keys),
        ),
        rows,
        keys,
    )


def _to_upper_left(pattern: PatternSpec, seqlen_q: int, seqlen_kv: int) -> KernelPattern | None:
    """Row i sees [i + d - left, i + d + right]: cut keys before the first row's reach, or rows before the first key."""
    left, right, shift = pattern.left, pattern.right, seqlen_kv - seqlen_q
    first_key = max(0, shift - left) if left != -1 else 0
    first_row = max(0, -shift - right) if right != -1 else 0
    if first_row >= seqlen_q or first_key >= seqlen_kv:
        return None
    shift += first_row - first_key
    if (left != -1 and left < shift) or (right != -1 and right + shift < 0):
        return None
    return _without_idle_sides(
        KernelPattern(
            -1 if left == -1 else left - shift,
            -1 if right == -1 else right + shift,
            "upper_left",
            None if first_row == 0 else (first_row, seqlen_q),
            None if first_key == 0 else (first_key, seqlen_kv),
        ),
        seqlen_q - first_row,
        seqlen_kv - first_key,
    )


def _without_idle_sides(pattern: KernelPattern, rows: int, keys: int) -> KernelPattern:
    """Make a side that masks nothing unbounded."""
    shift = keys - rows if pattern.align == "lower_right" else 0
    left, right = pattern.left, pattern.right
    if left != -1 and rows - 1 + shift - left <= 0:
        left = -1
    if right != -1 and shift + right >= keys - 1:
        right = -1
    return KernelPattern(left, right, pattern.align, pattern.rows, pattern.keys)


def trimmed(pattern: KernelPattern, seqlen_q: int, seqlen_kv: int) -> KernelPattern:
    """Leave out rows (lower right) or keys (upper left) that a right side masks entirely. Exact.

    For kernels that are wrong for rows without a key, or skip a block wrongly.
    """
    if UNKNOWN in (seqlen_q, seqlen_kv) or pattern.right == -1:
        return pattern
    first_row, end_row = pattern.rows or (0, seqlen_q)
    first_key, end_key = pattern.keys or (0, seqlen_kv)
    rows, keys = end_row - first_row, end_key - first_key
    if pattern.align == "lower_right":
        first_row += max(0, rows - keys - pattern.right)
    else:
        end_key = first_key + min(keys, rows + pattern.right)
    return KernelPattern(
        pattern.left,
        pattern.right,
        pattern.align,
        None if (first_row, end_row) == (0, seqlen_q) else (first_row, end_row),
        None if (first_key, end_key) == (0, seqlen_kv) else (first_key, end_key),
    )
