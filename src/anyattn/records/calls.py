"""The list that a recording gives: decisions, with each call's layer and time, as a table, JSON and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anyattn.errors import InvalidCallError
from anyattn.records import times
from anyattn.records.layers import Layers
from anyattn.records.plot import draw
from anyattn.records.row import Row
from anyattn.types.decision import Decision

SCHEMA = 1
"""The version of the JSON that `Calls.save` writes."""

_SHOWN = 40


class Calls(list[Decision]):
    """The decisions of the recorded calls, in order; printed, it is a table of layers and kernels.

    `layers[i]` is the layer that made call `i`, a dotted name with the model's class in front.
    """

    def __init__(self, items: Iterable[Decision] = ()) -> None:
        super().__init__(items)
        self.layers: list[str] = [""] * len(self)
        self._spans: list[Any] = [None] * len(self)
        self._names = Layers()

    def note(self, decision: Decision, span: Any = None) -> None:
        """Add a call that has just been made; `span` is what `times.stopped` gave."""
        self.append(decision)
        self.layers.append(self._names.running())
        self._spans.append(span)

    @property
    def seconds(self) -> list[float | None]:
        """Return the time of each call in seconds: on a GPU the device's, elsewhere the clock's.

        None for a call that wasn't timed: `times=True` wasn't given, or a CUDA graph was being captured. Waits until
        the GPU has run the calls. The first call of a kind may include the compilation of its kernel.
        """
        self._spans = [times.seconds(span) for span in self._spans]
        return list(self._spans)

    def rows(self) -> list[Row]:
        """Return the calls by layer, backend, kernel and shape: those that took longest first, else in order."""
        groups: dict[tuple[str, ...], list[float | None]] = {}
        for decision, layer, seconds in zip(self, self.layers, self.seconds, strict=True):
            source = decision.preference.source
            group = (layer, decision.chosen or "", decision.kernel, str(decision.spec), source)
            groups.setdefault(group, []).append(seconds)
        found = []
        for (layer, backend, kernel, call, source), spans in groups.items():
            timed = [span for span in spans if span is not None]
            total, median = (sum(timed), statistics.median(timed)) if timed else (None, None)
            found.append(Row(layer, backend, kernel, call, source, len(spans), total, median))
        return sorted(found, key=lambda row: -(row.seconds or 0.0))

    def to_dict(self) -> dict[str, Any]:
        """Return the rows as plain data, for JSON: times in milliseconds, each with its call's spec."""
        specs = {str(decision.spec): decision.spec.to_dict() for decision in self}
        rows = [
            {
                "layer": row.layer,
                "backend": row.backend,
                "kernel": row.kernel,
                "source": row.source,
                "count": row.count,
                "ms": None if row.seconds is None else row.seconds * 1e3,
                "median_ms": None if row.median_seconds is None else row.median_seconds * 1e3,
                "spec": specs[row.call],
            }
            for row in self.rows()
        ]
        return {"schema": SCHEMA, "calls": rows}

    def save(self, path: str | Path) -> None:
        """Write the rows as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        rows = self.rows()
        timed = any(row.seconds is not None for row in rows)
        shown = ("ms", "ms each") if timed else ()
        table: list[tuple[str, ...]] = [("layer", "backend", "calls", *shown, "call")]
        for row in rows[:_SHOWN]:
            both = (row.seconds, row.median_seconds) if timed else ()
            spans = ["-" if span is None else f"{span * 1e3:.3f}" for span in both]
            table.append((row.layer, row.backend or "none", str(row.count), *spans, row.call))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        widths[-1] = 0
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        if len(rows) > _SHOWN:
            lines.append(f"and {len(rows) - _SHOWN} more; save(path) writes all")
        return "\n".join(lines) if rows else "no calls were recorded"

    __repr__ = __str__

    def plot(self, path: str | Path) -> None:
        """Draw each layer's time by backend, or its number of calls if it wasn't timed, and save the picture.

        Needs matplotlib (`pip install "anyattn[plots]"`).

        Args:
            path: The picture's file; its ending chooses the format, for example `.png` or `.svg`.

        Raises:
            InvalidCallError: If matplotlib isn't installed, or nothing was recorded.
        """
        rows = self.rows()
        if not rows:
            raise InvalidCallError("There is nothing to draw: no call was recorded. Make calls inside the block.")
        draw(rows, Path(path))
