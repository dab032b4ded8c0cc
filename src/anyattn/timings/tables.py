"""Shipped tables: what real runs measured on a GPU model, for machines where nothing was measured yet."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from anyattn.environment import Environment
from anyattn.timings import curves
from anyattn.timings.keys import Key, bucket, sizes_of
from anyattn.types.spec import AttentionSpec
from anyattn.types.timings import Timing, Timings

SCHEMA: Final = 1

HOST: Final = 6e-6
"""How many seconds more of the host one kernel's call may take than another's; tables hold the device's time alone."""

Call = tuple[str, str, str, str]
"""Shape bucket, mask class, dtype and direction."""


@dataclass(frozen=True, slots=True)
class Table:
    """The times of one GPU model.

    Attributes:
        device: The model in words.
        names: The names by which its driver calls it.
        about: Where the times come from: versions, date and command.
        calls: For each kind of call the device's seconds by backend.
        sizes: For each kind of call the sizes that were measured, `(B, S_q, S_kv, H, H_kv, D, D_v)`.
    """

    device: str
    names: tuple[str, ...]
    about: str
    calls: Mapping[Call, Mapping[str, float]]
    sizes: Mapping[Call, tuple[int, ...]]


def read(data: Mapping[str, Any]) -> Table:
    """Read a table from its JSON.

    Raises:
        ValueError: If its schema is another one, or a time isn't a positive number.
        KeyError: If a field is missing.
    """
    if data["schema"] != SCHEMA:
        raise ValueError(f"A table must have schema {SCHEMA}; it has {data['schema']!r}.")
    calls: dict[Call, dict[str, float]] = {}
    sizes: dict[Call, tuple[int, ...]] = {}
    for row in data["rows"]:
        measured = tuple(int(size) for size in row["sizes"])
        times = {str(name): float(milliseconds) / 1e3 for name, milliseconds in row["ms"].items()}
        if len(measured) != 7 or not all(seconds > 0 for seconds in times.values()):
            raise ValueError(f"A row must have seven sizes and positive times: {row}")
        call = (bucket(measured), row["mask"], row["dtype"], row["direction"])
        calls.setdefault(call, {}).update(times)
        sizes[call] = measured
    return Table(data["device"], tuple(data["names"]), data["about"], calls, sizes)


@functools.lru_cache(maxsize=1)
def tables() -> tuple[Table, ...]:
    """Return the tables of this package."""
    folder = importlib.resources.files("anyattn.timings") / "tables"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)
    return tuple(read(json.loads(file.read_text(encoding="utf-8"))) for file in files)


def table_for(env: Environment, device_type: str, device_index: int | None = None) -> Table | None:
    """Return the table of a machine's device, or None."""
    device = env.device(device_type, device_index)
    if device is None or device.type != "cuda" or device.rocm:
        return None
    return next((table for table in tables() if device.name in table.names), None)


def timings_of(spec: AttentionSpec, env: Environment, key: Key) -> Timings | None:
    """Return what the device's table has for a call; None if it has no time, or only one backend's."""
    table = table_for(env, spec.device_type, spec.device_index)
    times = {} if table is None else table.calls.get((key.shape, key.mask, key.dtype, key.direction), {})
    if table is None or len(times) < 2:
        return None
    rows = tuple(Timing(name, seconds) for name, seconds in times.items())
    least = HOST if key.mode == "eager" else 0.0
    return Timings(rows, "shipped", f"shipped table for {table.device}", least=least)


def predicted(spec: AttentionSpec, env: Environment, key: Key) -> Timings | None:
    """Return what the device's table predicts for a call that it doesn't have; None for fewer than two backends."""
    table = table_for(env, spec.device_type, spec.device_index)
    device = env.device(spec.device_type, spec.device_index)
    if table is None or device is None:
        return None
    times = _curves(device.name, device.units).predict(key, sizes_of(spec), mode="")
    rows = tuple(Timing(name, seconds) for name, seconds in times.items())
    least = HOST if key.mode == "eager" else 0.0
    words = f"predicted from the shipped table for {table.device}"
    return Timings(rows, "predicted", words, curves.GAIN, least) if len(rows) > 1 else None


@functools.lru_cache(maxsize=8)
def _curves(name: str, units: int) -> curves.Curves:
    """Return the curves of the table for a device's name."""
    table = next(table for table in tables() if name in table.names)
    return curves.Curves(
        (
            (curves.kind_of(table.sizes[call], *call[1:], mode=""), backend, curves.Point(table.sizes[call], seconds))
            for call, times in table.calls.items()
            for backend, seconds in times.items()
        ),
        units,
    )
