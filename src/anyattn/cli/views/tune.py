"""The terminal view of `anyattn tune`: each call with its times, and what changes."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from anyattn.cli.commands.tune import Tuning, gain
from anyattn.cli.views.parts import BAD, GOOD, PALE, section, under
from anyattn.timings.store import Row
from anyattn.tuning.tuner import Tuned


def show(found: Tuning) -> RenderableType:
    """Build the view: what `auto` takes now and why, what failed, and where the measurements are."""
    parts: list[RenderableType] = [Text(found.machine, style=PALE)]
    for name, call in found.calls:
        parts += ["", under(Text(name, style="bold"), *_lines(call))]
    if found.skipped:
        parts.append(section("Not measured", *(f"{name}: {why}" for name, why in found.skipped)))
    changed = sum(call.before != call.after for _, call in found.calls)
    where = f"in {found.file}" if found.file else "for this process alone"
    verdict = f"{len(found.calls)} calls measured in {found.seconds:.0f} s, {changed} choices changed; kept {where}."
    parts += ["", Text(verdict, style=GOOD if found.calls else BAD)]
    if found.left:
        parts.append(f"The budget left {found.left} calls out; the same command goes on with them.")
    return Group(*parts)


def _lines(call: Tuned) -> Iterator[RenderableType]:
    faster = gain(call)
    if call.before != call.after:
        why = f", {faster:.2f} times as fast" if faster else ""
        why = f", as the result of {call.before} was wrong" if call.before in call.wrong else why
        yield Text.assemble((call.after or "nothing", GOOD), f" instead of {call.before or 'nothing'}{why}")
    else:
        yield Text.assemble((call.after, GOOD), " as before" if call.measured else " (measured before)")
    for mode in ("eager", "graph"):
        rows = [row for row in call.rows if row.key.mode == mode and row.seconds is not None]
        if rows:
            yield f"{mode}: {', '.join(_time(row) for row in sorted(rows, key=lambda row: row.seconds or 0.0))}"
    for backend, error in call.wrong.items():
        yield Text(f"{backend}: wrong, {error:.3g} times the error budget", style=BAD)
    for backend, error_text in call.failed.items():
        yield Text(f"{backend}: {error_text}", style=BAD)


def _time(row: Row) -> str:
    spread = f" ± {(row.spread or 0.0) / 2 * 1e3:.2g}"
    return f"{row.backend} {(row.seconds or 0.0) * 1e3:.4g}{spread} ms"
