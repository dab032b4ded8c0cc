"""The picture of a recording: a bar for each layer, in the colours of the backends that ran it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anyattn.errors import InvalidCallError
from anyattn.records.row import Row

_MOST_BARS = 40


def draw(rows: Sequence[Row], path: Path) -> None:
    """Save the picture of these rows.

    Raises:
        InvalidCallError: If matplotlib isn't installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InvalidCallError(
            'Drawing needs matplotlib, which isn\'t installed. Install it with: pip install "anyattn[plots]"'
        ) from None

    timed = any(row.seconds is not None for row in rows)
    amounts: dict[str, dict[str, float]] = {}
    for row in rows:
        amount = (row.seconds or 0.0) * 1e3 if timed else float(row.count)
        bar = amounts.setdefault(row.layer, {})
        bar[row.backend or "none"] = bar.get(row.backend or "none", 0.0) + amount
    layers = list(amounts)[:_MOST_BARS]
    backends = sorted({backend for layer in layers for backend in amounts[layer]})
    figure = Figure(figsize=(9, 1.2 + 0.28 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    starts = [0.0] * len(layers)
    for backend in backends:
        lengths = [amounts[layer].get(backend, 0.0) for layer in layers]
        axes.barh(layers, lengths, left=starts, label=backend)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("attention, ms in all" if timed else "calls")
    more = len(amounts) - len(layers)
    axes.set_title(f"Attention by layer and backend{f' (and {more} more layers)' if more else ''}")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
