"""What is known of how long a call takes: measured on this machine, shipped for its GPU, or predicted from either.

Measurements are read from the file once in a process, and again after `anyattn.reset()` or when this process adds some.
So choices don't change while a program runs, and processes that start together choose alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from anyattn.environment import Environment
from anyattn.process.bounded import Bounded
from anyattn.timings import curves, tables
from anyattn.timings.curves import Curves, Point
from anyattn.timings.keys import Key, fingerprint, key_of, sizes_of
from anyattn.timings.store import Row, Store, default_path
from anyattn.types.reasons import Reason
from anyattn.types.spec import AttentionSpec
from anyattn.types.timings import Timing, Timings

KernelOf = Callable[[str], str | None]
"""Returns where a backend's kernel comes from now, with its version; None if there is no such backend."""

_store: Bounded[None, Store] = Bounded(1)
_read: Bounded[str, dict[Key, list[Row]]] = Bounded(64)
_curves: Bounded[str, Curves] = Bounded(64)
_names: Bounded[int, tuple[Environment, dict[tuple[str, int | None], str]]] = Bounded(8)


def store() -> Store:
    """Return this user's file of measurements."""
    found = _store.get(None)
    if found is None:
        found = _store[None] = Store(default_path())
    return found


def add(rows: Iterable[Row]) -> bool:
    """Store measurements, and have the next choices know them; return whether they are in the file."""
    written = store().add(rows)
    _read.clear()
    _curves.clear()
    return written


def forget() -> None:
    """Have the next choice read the file again, and look for its folder."""
    found = _store.get(None)
    if found is not None and found.path != default_path():
        _store.clear()
    _read.clear()
    _curves.clear()


def rows_of(key: Key) -> list[Row]:
    """Return the measurements stored for a kind of call."""
    return _of_machine(key.machine).get(key, [])


def _of_machine(machine: str) -> dict[Key, list[Row]]:
    found = _read.get(machine)
    if found is None:
        found = {}
        for row in store().rows(machine):
            found.setdefault(row.key, []).append(row)
        _read[machine] = found
    return found


def knows(env: Environment, device_type: str, device_index: int | None = None, *, here: bool = True) -> bool:
    """Whether anything at all is known of a device's times."""
    if here and _of_machine(_machine(env, device_type, device_index)):
        return True
    return device_type == "cuda" and tables.table_for(env, device_type, device_index) is not None


def _machine(env: Environment, device_type: str, device_index: int | None) -> str:
    """Return a device's fingerprint, made once for each machine in use."""
    names = _names.get(id(env))
    if names is None or names[0] is not env:
        names = _names[id(env)] = (env, {})
    found = names[1].get((device_type, device_index))
    if found is None:
        found = names[1][device_type, device_index] = fingerprint(env, device_type, device_index)
    return found


def timings_of(spec: AttentionSpec, env: Environment, kernel_of: KernelOf, *, here: bool = True) -> Timings | None:
    """Return what is known of a call's times, from the best source that knows two backends.

    Args:
        spec: The call.
        env: The machine.
        kernel_of: See `KernelOf`; measurements of another version of a kernel don't count.
        here: Whether `env` is this machine; only then do its measurements count.
    """
    if not knows(env, spec.device_type, spec.device_index, here=here):
        return None
    key = key_of(spec, env)
    if key is None:
        return None
    refused: dict[str, Reason] = {}
    if here:
        rows = [row for row in rows_of(key) if row.kernel == kernel_of(row.backend)]
        refused = {row.backend: _wrong(row) for row in rows if row.error is not None and not row.error <= 1}
        timed = [row for row in rows if row.seconds is not None and row.backend not in refused]
        if len(timed) > 1:
            return Timings(tuple(map(_timing, timed)), refused=refused)
    shipped = tables.timings_of(spec, env, key)
    if shipped is None:
        shipped = (_predicted(spec, env, key, kernel_of) if here else None) or tables.predicted(spec, env, key)
    if shipped is None:
        return Timings(refused=refused) if refused else None
    return Timings(shipped.rows, shipped.source, shipped.words, shipped.gain, shipped.least, refused)


def _predicted(spec: AttentionSpec, env: Environment, key: Key, kernel_of: KernelOf) -> Timings | None:
    """Return what this machine's measurements of other sizes predict for a call; None for fewer than two backends."""
    found = _curves.get(key.machine)
    if found is None:
        device = env.device(spec.device_type, spec.device_index)
        right = [
            row
            for rows in _of_machine(key.machine).values()
            for row in rows
            if row.seconds is not None and row.kernel == kernel_of(row.backend)
        ]
        points = [(_kind(row), row.backend, Point(row.sizes, row.seconds or 0.0)) for row in right]
        found = _curves[key.machine] = Curves(points, 0 if device is None else device.units)
    times = found.predict(key, sizes_of(spec))
    rows = tuple(Timing(name, seconds) for name, seconds in times.items())
    words = "predicted from measurements on this machine"
    return Timings(rows, "predicted", words, curves.GAIN) if len(rows) > 1 else None


def _kind(row: Row) -> curves.Kind:
    return curves.kind_of(row.sizes, row.key.mask, row.key.dtype, row.key.direction, row.key.mode)


def _timing(row: Row) -> Timing:
    assert row.seconds is not None
    return Timing(row.backend, row.seconds, row.spread, row.first_call, row.error, row.time)


def _wrong(row: Row) -> Reason:
    return Reason(
        "inexact",
        "a result within the error budget",
        f"an error of {row.error:.3g} times the budget when it was measured here",
        f"require it by name to run it all the same, or run `anyattn verify {row.backend}`",
    )
