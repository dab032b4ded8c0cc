"""`anyattn record`: run a script, and say which kernel ran in which of its layers."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anyattn.errors import InvalidCallError
from anyattn.records.calls import Calls
from anyattn.scopes.recording import record


@dataclass(frozen=True)
class Recorded:
    """What a script called, and how it ended."""

    calls: Calls
    exit_code: int


def run(script: Path, arguments: Sequence[str], *, out: Path | None, plot: Path | None, times: bool) -> Recorded:
    """Run a script as Python would, and record its calls; the files are written however it ends.

    Raises:
        InvalidCallError: If there is no such script.
    """
    if not script.is_file():
        raise InvalidCallError(f"There is no script {script}. Give the path of a Python file, then its arguments.")
    before_argv, before_path = sys.argv, sys.path[:]
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    calls, exit_code = Calls(), 0
    try:
        with record(out, times=times) as calls:
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        exit_code = _code(end)
    finally:
        sys.argv, sys.path[:] = before_argv, before_path
        if plot is not None and calls:
            calls.plot(plot)
    return Recorded(calls, exit_code)


def _code(end: SystemExit) -> int:
    """Return the exit code that Python would give, and print a message as Python does."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    sys.stderr.write(f"{end.code}\n")
    return 1
