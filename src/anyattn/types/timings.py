"""What is known of how long backends take for a call, as values that a choice is made from."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from anyattn.types.reasons import Reason

TimingSource = Literal["measured", "shipped", "predicted"]

GAIN = 1.02
"""How many times as fast another backend must be to run in place of the one that would run without timings."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one backend takes for a call.

    Attributes:
        backend: The backend.
        seconds: The time of one call.
        spread: The distance between the quartiles of the times, in seconds; None if unknown.
        first_call: What the first call took, compilation included, in seconds; None if unknown.
        error: The error of the result as a multiple of its budget; None if it wasn't compared here.
        time: When it was measured on this machine, in seconds since 1970; None for other sources.
    """

    backend: str
    seconds: float
    spread: float | None = None
    first_call: float | None = None
    error: float | None = None
    time: float | None = None

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {self.spread / 2 * 1e3:.2g}"
        return f"{self.backend} {self.seconds * 1e3:.4g}{spread} ms"


@dataclass(frozen=True, slots=True)
class Timings:
    """What one source knows of a call.

    Attributes:
        rows: The timings, one for each backend.
        source: `"measured"` on this machine, `"shipped"` in a table, or `"predicted"` from other calls.
        words: The source in words, such as `"shipped table for NVIDIA H200"`.
        gain: How many times as fast another backend must be to be chosen.
        least: How many seconds it must save besides: times of a device alone lack what the host needs.
        refused: Backends whose result was wrong when it was measured, each with the reason.
    """

    rows: tuple[Timing, ...] = ()
    source: TimingSource = "measured"
    words: str = "measured on this machine"
    gain: float = GAIN
    least: float = 0.0
    refused: Mapping[str, Reason] = field(default_factory=dict)

    def of(self, backend: str) -> Timing | None:
        """Return a backend's timing."""
        return next((row for row in self.rows if row.backend == backend), None)

    def in_order(self) -> tuple[Timing, ...]:
        """Return the timings, the fastest first."""
        return tuple(sorted(self.rows, key=lambda row: row.seconds))

    def faster_than(self, backend: str) -> tuple[str, ...]:
        """Return the backends that are faster than another by enough, the fastest first; none if it isn't timed."""
        own = self.of(backend)
        if own is None:
            return ()
        return tuple(
            row.backend
            for row in self.in_order()
            if row.seconds * self.gain <= own.seconds and own.seconds - row.seconds >= self.least
        )

    def told(self) -> str:
        """Return the source in words, with the age of what was measured."""
        times = [row.time for row in self.rows if row.time is not None]
        return f"{self.words} {age(min(times))}" if times else self.words

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for JSON: times in seconds."""
        names = ("backend", "seconds", "spread", "first_call", "error", "time")
        return {
            "source": self.source,
            "words": self.words,
            "rows": [{name: getattr(row, name) for name in names} for row in self.rows],
        }


def age(when: float, now: float | None = None) -> str:
    """Return how long ago something was, in words; a clock that was set back is no error."""
    seconds = (time.time() if now is None else now) - when
    if seconds < -60:
        return "at a time that this machine's clock hasn't reached"
    for name, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(seconds // size)
        if count >= 1:
            return f"{count} {name}{'' if count == 1 else 's'} ago"
    return "less than a minute ago"
