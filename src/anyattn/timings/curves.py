"""What a kernel takes for sizes that were never measured, from the sizes that were.

One curve is of one kernel, head_dim, ratio of query heads to key/value heads, kind of mask, dtype and direction. A time
is explained by three costs that add up: a fixed one, one for each operation and one for each number moved;
operations cost more where the last round of tiles fills a part of the device only. How far measured times are from that
is interpolated between the nearest calls. A curve says nothing of calls far from all that were measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from anyattn.timings.keys import Key, rounded

FEWEST: Final = 2
"""How many measured calls a curve needs to predict another."""

GAIN: Final = 1.2
"""How many times as fast another backend must be predicted to be to run instead. Predictions of one call of the shipped
tables from their others are off by 8 to 9 % in the median; with less than this they change choices for the worse."""

FAR: Final = 4.0
"""Up to how many times less or more work, and keys, than those of a measured call a prediction is made."""

TILE: Final = 128
"""How many query rows one tile holds, in the kernels for large GPUs."""

Sizes = tuple[int, ...]
"""`(B, S_q, S_kv, H, H_kv, D, D_v)`."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measured call.

    Attributes:
        sizes: `(B, S_q, S_kv, H, H_kv, D, D_v)`.
        seconds: Its time.
    """

    sizes: Sizes
    seconds: float


def work(sizes: Sizes) -> float:
    """Return the floating-point operations of a call without mask: two matrix products."""
    batch, rows, keys, heads, _, dim, dim_v = sizes
    return 2.0 * batch * heads * rows * keys * (dim + dim_v)


def moved(sizes: Sizes) -> float:
    """Return how many numbers a call reads and writes at least."""
    batch, rows, keys, heads, kv_heads, dim, dim_v = sizes
    return float(batch * (rows * heads + keys * kv_heads) * (dim + dim_v))


def tiles(sizes: Sizes) -> int:
    """Return into how many tiles a call is split, each of which one processor of the device computes."""
    batch, rows, _, heads, *_ = sizes
    return batch * heads * -(-rows // TILE)


def filled(sizes: Sizes, units: int) -> float:
    """Return the share of a device's processors that compute, averaged over the rounds of tiles; 1 if unknown."""
    count = tiles(sizes)
    return count / (-(-count // units) * units) if units else 1.0


class Curve:
    """The cost of one kernel for one kind of call.

    Args:
        points: The measured calls.
        units: How many processors the device has; 0 if unknown.

    Raises:
        ValueError: If there is no point.
    """

    def __init__(self, points: Iterable[Point], units: int = 0) -> None:
        self.points = tuple(points)
        self.units = units
        if not self.points:
            raise ValueError("A curve needs at least one measured call.")
        costs = [self._costs(point.sizes) for point in self.points]
        self.weights = _fitted(costs, [point.seconds for point in self.points])
        self._off = [math.log(point.seconds / self._plain(point.sizes)) for point in self.points]

    def _costs(self, sizes: Sizes) -> tuple[float, float, float]:
        return (1.0, work(sizes) / filled(sizes, self.units), moved(sizes))

    def _plain(self, sizes: Sizes) -> float:
        return sum(weight * cost for weight, cost in zip(self.weights, self._costs(sizes), strict=True))

    def seconds(self, sizes: Sizes) -> float | None:
        """Predict the time of a call; None if every measured call is far from it."""
        if min(_times_apart(sizes, point.sizes) for point in self.points) > FAR:
            return None
        near = [1.0 / (_distance(sizes, point.sizes) ** 2 + 1e-4) for point in self.points]
        off = sum(weight * value for weight, value in zip(near, self._off, strict=True)) / sum(near)
        return self._plain(sizes) * math.exp(off)


Kind = tuple[int, int, int, str, str, str, str]
"""head_dim, head_dim_v, query heads for each key/value head, mask class, dtype, direction and launch mode."""


def kind_of(sizes: Sizes, mask: str, dtype: str, direction: str, mode: str) -> Kind:
    """Return which curves a call belongs to."""
    return (sizes[5], sizes[6], sizes[3] // sizes[4], mask, dtype, direction, mode)


class Curves:
    """The curves of all kernels on one device; each is fitted when it is first asked for.

    Args:
        points: What was measured: kind, backend and call.
        units: How many processors the device has; 0 if unknown.
    """

    def __init__(self, points: Iterable[tuple[Kind, str, Point]], units: int = 0) -> None:
        self.units = units
        self._points: dict[Kind, dict[str, list[Point]]] = {}
        self._fitted: dict[tuple[Kind, str], Curve] = {}
        for kind, backend, point in points:
            self._points.setdefault(kind, {}).setdefault(backend, []).append(point)

    def predict(self, key: Key, sizes: Sizes, mode: str | None = None) -> dict[str, float]:
        """Predict the times of a call by backend; the same for all calls of one bucket of sizes."""
        kind = kind_of(sizes, key.mask, key.dtype, key.direction, key.mode if mode is None else mode)
        typical = (*map(rounded, sizes[:3]), *sizes[3:])
        found = {}
        for backend, points in self._points.get(kind, {}).items():
            if len(points) >= FEWEST:
                curve = self._fitted.get((kind, backend))
                if curve is None:
                    curve = self._fitted[kind, backend] = Curve(points, self.units)
                seconds = curve.seconds(typical)
                if seconds is not None:
                    found[backend] = seconds
        return found


def _times_apart(one: Sizes, other: Sizes) -> float:
    """Return the larger of two ratios of 1 or more: of the work, and of the numbers of keys."""
    pairs = ((work(one), work(other)), (one[2], other[2]))
    return max(max(mine / theirs, theirs / mine) for mine, theirs in pairs)


def _distance(one: Sizes, other: Sizes) -> float:
    """Return how far two calls are apart: in work, keys, numbers moved and tiles, each as a logarithm."""
    parts = (
        math.log(work(one) / work(other)),
        math.log(one[2] / other[2]),
        math.log(moved(one) / moved(other)),
        math.log(tiles(one) / tiles(other)),
    )
    return math.sqrt(sum(part * part for part in parts))


def _fitted(costs: Sequence[tuple[float, ...]], seconds: Sequence[float], steps: int = 60) -> tuple[float, ...]:
    """Return weights of 0 or more whose sums are near the times, relative to each time.

    Coordinate descent on the squared relative error: three weights, and always a result, whatever the points are.
    """
    rows = [[cost / time for cost in row] for row, time in zip(costs, seconds, strict=True)]
    scale = [max(row[column] for row in rows) for column in range(3)]
    rows = [[cell / size for cell, size in zip(row, scale, strict=True)] for row in rows]
    weights = [0.0, 1.0, 0.0]
    for _ in range(steps):
        for column in range(3):
            rest = [1.0 - sum(weights[k] * row[k] for k in range(3) if k != column) for row in rows]
            bottom = sum(row[column] ** 2 for row in rows)
            top = sum(row[column] * left for row, left in zip(rows, rest, strict=True))
            weights[column] = max(0.0, top / bottom)
    if not any(weights):
        weights[1] = 1.0
    return tuple(weight / size for weight, size in zip(weights, scale, strict=True))
