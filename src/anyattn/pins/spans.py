"""Parts of a counted row, such as the middle steps of a denoising run or the middle layers of a model."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from fractions import Fraction

_END = re.compile(r"[+-]?\d+|\d*\.\d+|\d+\.\d*")
_MOST_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a row, as a slice: each end is an index, negative from the row's end, or a fraction of its length.

    Attributes:
        start: Where it starts; None is the beginning.
        stop: Where it stops, not included; None is the end.
        step: Every how many places.
    """

    start: int | Fraction | None
    stop: int | Fraction | None
    step: int = 1

    def holds(self, index: int, total: int) -> bool:
        """Whether a place of a row of `total` places belongs to it."""
        return index in self.range(total)

    def range(self, total: int) -> range:
        """Return the places of a row of `total` places that belong to it."""
        return range(*slice(_place(self.start, total), _place(self.stop, total), self.step).indices(total))


def _place(end: int | Fraction | None, total: int) -> int | None:
    return math.ceil(end * total) if isinstance(end, Fraction) else end


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> Span:
    """Read a span: `"2:-2"`, `"0.2:0.8"`, `"::2"`, or a single place, `"0"` or `"-1"`.

    A number with a point is a fraction of the row's length, from 0.0 to 1.0, and exact as written.

    Raises:
        ValueError: If the text is no span, or no place can belong to it; the message says what is wrong with it.
    """
    parts = [part.strip() for part in text.split(":")]
    if len(parts) > 3:
        raise ValueError("it has more than two colons")
    if len(parts) == 1:
        place = _end(parts[0])
        if not isinstance(place, int):
            raise ValueError("a single place is a whole number")
        return Span(place, place + 1 if place != -1 else None)
    start, stop = _end(parts[0]), _end(parts[1])
    step = _end(parts[2]) if len(parts) == 3 else None
    if step is not None and (not isinstance(step, int) or step < 1):
        raise ValueError("its step is not a whole number above 0")
    if start is not None and stop is not None and type(start) is type(stop) and stop <= start:
        same_end = isinstance(start, Fraction) or (start < 0) == (stop < 0)
        if same_end:
            raise ValueError("it stops before it starts")
    return Span(start, stop, 1 if step is None else step)


def _end(text: str) -> int | Fraction | None:
    if not text:
        return None
    if len(text) > _MOST_DIGITS or not text.isascii() or _END.fullmatch(text) is None:
        raise ValueError(f"{text!r} is neither a whole number nor a fraction such as 0.25")
    if "." not in text:
        return int(text)
    fraction = Fraction(text)
    if fraction > 1:
        raise ValueError(f"{text} is a fraction above 1.0")
    return fraction
