"""`anyattn tune`: measure calls with every backend that `auto` may take for them, and say what that changes."""

from __future__ import annotations

import dataclasses
import importlib.resources
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anyattn.cli.reports import Progress, Step, UsageError
from anyattn.cli.words import CallWords, checked_device, spec_of
from anyattn.environment import detect
from anyattn.errors import AnyattnError
from anyattn.pins.pins import live_scope
from anyattn.scopes import defaults
from anyattn.selection.decide import decision_for
from anyattn.selection.preferences import make_preference
from anyattn.timings import known
from anyattn.timings.keys import fingerprint, key_of
from anyattn.tuning import inputs as making
from anyattn.tuning.inputs import CanNotMakeError
from anyattn.tuning.tuner import SECONDS, Tuned, measured_before, tune
from anyattn.types.decision import Precision
from anyattn.types.names import AUTO
from anyattn.types.spec import AttentionSpec

__all__ = ["Tuning", "checked_precision", "gain", "presets", "run"]


@dataclass(frozen=True)
class Tuning:
    """What was measured, and what it changes.

    Attributes:
        machine: What was measured on.
        file: Where the measurements are; empty if they last only as long as this process.
        calls: Each call that was measured, now or before, with its name.
        skipped: Each call that can't be measured, with the reason.
        left: How many calls the budget didn't reach.
        seconds: How long it took.
    """

    machine: str
    file: str
    calls: tuple[tuple[str, Tuned], ...]
    skipped: tuple[tuple[str, str], ...]
    left: int
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 if some call is measured, else 1."""
        return 0 if self.calls else 1

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for JSON; times in seconds."""
        return {
            "ok": self.exit_code == 0,
            "machine": self.machine,
            "file": self.file,
            "seconds": self.seconds,
            "left": self.left,
            "calls": [_call(name, found) for name, found in self.calls],
            "skipped": [{"call": name, "why": why} for name, why in self.skipped],
        }


def _call(name: str, found: Tuned) -> dict[str, Any]:
    fields = ("backend", "kernel", "seconds", "spread", "first_call", "error", "time", "source")
    return {
        "call": name,
        "spec": found.spec.to_dict(),
        "before": found.before,
        "after": found.after,
        "measured": found.measured,
        "rows": [{"mode": row.key.mode, **{name: getattr(row, name) for name in fields}} for row in found.rows],
        "wrong": dict(found.wrong),
        "failed": dict(found.failed),
    }


def presets() -> dict[str, CallWords]:
    """Return the attention calls of published models by name, in bfloat16."""
    text = (importlib.resources.files("anyattn.tuning") / "presets.json").read_text(encoding="utf-8")
    calls = json.loads(text).items()
    return {name: CallWords(**{**call, "masks": tuple(call.get("masks", ()))}) for name, call in calls}


def checked_precision(word: str) -> Precision:
    """Return a precision.

    Raises:
        UsageError: If it isn't one.
    """
    known_words: tuple[Precision, ...] = ("exact", "int8", "fp8", "fp4")
    for precision in known_words:
        if word == precision:
            return precision
    raise UsageError(f"--precision must be one of {', '.join(known_words)}; {word!r} was given.")


def run(
    file: Path | None = None,
    *,
    names: Sequence[str] = (),
    grid: Sequence[str] = (),
    masks: Sequence[str] = (),
    dtype: str = "bfloat16",
    grad: bool = False,
    device: str | None = None,
    precision: Precision = "exact",
    budget: float | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> Tuning:
    """Measure calls, those first that come first; what was measured before is left out.

    Args:
        file: A recording, as `anyattn record --out` writes it.
        names: Presets; `"all"` is every one.
        grid: Shapes `B,S,H,D`, each number perhaps several with colons: all combinations are measured.
        masks: The masks of the grid's calls.
        dtype: The dtype of the grid's calls.
        grad: Whether presets and the grid's calls need gradients.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, ...; None is the CUDA device if there is one, else the CPU.
        precision: The loosest precision of the kernels that take part.
        budget: After how many seconds to begin no further call; None measures all.
        again: Whether to measure what was measured before.
        progress: Called before each call.

    Raises:
        UsageError: If a word has no meaning, or no call is given.
    """
    place = torch.device(checked_device(device))
    calls = [*_recorded(file, place), *_preset(names, place, grad=grad), *_grid(grid, masks, dtype, place, grad=grad)]
    if not calls:
        raise UsageError("There is nothing to measure: give a recording, --preset NAME (or all), or --grid B,S,H,D.")
    scope = _scope(precision)
    start = time.perf_counter()
    done: list[tuple[str, Tuned]] = []
    skipped: list[tuple[str, str]] = []
    for number, (name, spec) in enumerate(calls):
        spent = time.perf_counter() - start
        if budget is not None and spent >= budget:
            break
        if progress is not None:
            progress(Step(name, number, len(calls)))
        share = SECONDS if budget is None else min(SECONDS, (budget - spent) / (len(calls) - number))
        try:
            done.append((name, _measured(spec, scope, share, again=again)))
        except (CanNotMakeError, torch.OutOfMemoryError, AnyattnError) as error:
            skipped.append((name, str(error).splitlines()[0]))
    left = len(calls) - len(done) - len(skipped)
    path = known.store().path
    machine = fingerprint(detect(), place.type, place.index)
    where = str(path) if path is not None and path.exists() else ""
    return Tuning(machine, where, tuple(done), tuple(skipped), left, time.perf_counter() - start)


def _scope(precision: Precision) -> defaults.Scope:
    scope = live_scope(defaults.current.get())
    return defaults.changed(scope, context=make_preference(AUTO, "context", precision), override=True)


def _measured(spec: AttentionSpec, scope: defaults.Scope, seconds: float, *, again: bool) -> Tuned:
    rows = None if again else measured_before(spec, scope)
    if rows is not None:
        decision = decision_for(spec, scope, detect(), here=True)
        chosen = decision.chosen or ""
        return Tuned(spec, chosen, chosen, rows, decision, measured=False)
    made = making.make_inputs(spec)
    return tune(made.described(spec), made, scope, seconds=seconds)


def _recorded(file: Path | None, device: torch.device) -> Iterator[tuple[str, AttentionSpec]]:
    """Yield the calls of a recording, each kind once: those that took longest come first in the file."""
    if file is None:
        return
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["calls"]
        specs = [making.spec_of(row["spec"], device_type=device.type) for row in rows]
    except (OSError, KeyError, TypeError, ValueError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise UsageError(f"{file} is no recording that `anyattn record --out` wrote ({detail}).") from None
    seen = set()
    for spec in specs:
        plain = spec.replace(captured=False, compiled=False, device_index=device.index)
        key = key_of(plain, detect()) or plain
        if key not in seen:
            seen.add(key)
            yield str(plain), plain


def _preset(names: Sequence[str], device: torch.device, *, grad: bool) -> Iterator[tuple[str, AttentionSpec]]:
    every = presets()
    for name in every if "all" in names else names:
        if name not in every:
            raise UsageError(f"--preset {name}: no such preset. There are: all, {', '.join(every)}.")
        yield name, _on(device, dataclasses.replace(every[name], grad=grad))


def _grid(
    grid: Sequence[str], masks: Sequence[str], dtype: str, device: torch.device, *, grad: bool
) -> Iterator[tuple[str, AttentionSpec]]:
    for text in grid:
        for sizes in itertools.product(*(part.split(":") for part in text.split(","))):
            words = CallWords(",".join(sizes), masks=tuple(masks), dtype=dtype, grad=grad)
            spec = _on(device, words)
            yield str(spec), spec


def _on(device: torch.device, words: CallWords) -> AttentionSpec:
    return spec_of(words, device.type).replace(device_index=device.index)


def gain(found: Tuned) -> float | None:
    """Return how many times as fast the choice is now; None if it didn't change, or a time is unknown."""
    times: Mapping[str, float | None] = {row.backend: row.seconds for row in found.rows if row.key.mode == "eager"}
    before, after = times.get(found.before), times.get(found.after)
    return None if found.before == found.after or not before or not after else before / after
