"""The only code that prints: tables for people, JSON for programs, and on stderr how far a command is."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from anyattn.cli.reports import Progress, Report, Step
from anyattn.errors import AnyattnError


def _console(*, stderr: bool = False) -> Console:
    # Reasons hold words in brackets such as 'torch_xla[tpu]', which are no markup.
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def line(text: str) -> None:
    """Print one line."""
    print(text)


def report(found: Report, show: Callable[[Any], RenderableType], as_json: bool) -> None:
    """Print a command's answer.

    Args:
        found: The answer.
        show: Builds the terminal view of it.
        as_json: Whether to print it as JSON instead.
    """
    if as_json:
        _print_json(found.to_dict())
    else:
        # Not cropped: lines to copy may be longer than the terminal is wide.
        _console().print(show(found), crop=False)


def failure(error: AnyattnError, as_json: bool) -> None:
    """Print why a command has no answer: on stderr for people, as JSON for programs."""
    if as_json:
        _print_json({"ok": False, "error": {"type": type(error).__name__, "message": str(error)}})
    else:
        _console(stderr=True).print(f"{type(error).__name__}: {error}", style="red", soft_wrap=True)


@contextlib.contextmanager
def busy(as_json: bool) -> Iterator[Progress]:
    """Show progress on stderr while a command works, and keep stdout clean for JSON.

    Args:
        as_json: Whether stdout is to hold one JSON document: whatever kernels and libraries print goes to
            stderr then.
    """
    console = _console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("", total=None, visible=False)

    def show(step: Step) -> None:
        bar.start()
        bar.update(task, description=step.text, completed=step.done, total=step.total or None, visible=True)

    with _stdout_reserved() if as_json else contextlib.nullcontext():
        try:
            yield show
        finally:
            bar.stop()


@contextlib.contextmanager
def _stdout_reserved() -> Iterator[None]:
    """Send whatever is written to stdout to stderr, by Python or by compiled code."""
    sys.stdout.flush()
    with contextlib.redirect_stdout(sys.stderr):
        try:
            saved = os.dup(1)
        except OSError:  # there is no stdout to keep clean
            yield
            return
        try:
            with contextlib.suppress(OSError):
                os.dup2(2, 1)
            yield
        finally:
            os.dup2(saved, 1)
            os.close(saved)


def _print_json(data: Mapping[str, Any]) -> None:
    print(json.dumps(_plain(data), indent=2, allow_nan=False))


def _plain(data: Any) -> Any:
    """Write what JSON has no numbers for as words that float() reads."""
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    if isinstance(data, Mapping):
        return {str(name): _plain(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return data
