"""One line of a recording's table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """The calls of one layer that were alike.

    Attributes:
        layer: The layer's dotted name with its model's class in front; `(no module)` for a call outside modules.
        backend: The backend that ran them; empty if none did.
        kernel: Which entry of the backend's kernel.
        call: The call in words: device, dtype, sizes, mask.
        source: The setting that asked for the backend, such as `model`, `context` or `backend=`.
        count: How many calls there were.
        seconds: Their time together; None if times weren't asked for.
        median_seconds: The median time of one call; None likewise.
    """

    layer: str
    backend: str
    kernel: str
    call: str
    source: str
    count: int
    seconds: float | None
    median_seconds: float | None
