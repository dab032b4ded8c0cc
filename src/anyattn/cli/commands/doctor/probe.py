"""The parent's side of a trial: start the child, watch it, and report how far it came."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyattn.cli.commands.doctor import trial
from anyattn.cli.commands.doctor.trial import Trial

AT_A_TIME = 2
"""Children that run side by side: most of each one's time is spent importing torch."""

_POLL = 0.05
# A child ends itself when a step takes too long, and shows where it hung; the parent ends it if it can't.
_GRACE = 5.0
_TAIL = 12
_FRAMES = 3
# The child gets the parent's own module path: `python -m` would put the current folder first, where a checkout of a
# kernel's sources may lie.
_BOOT = (
    "import json, sys; job = json.loads(sys.argv[1]); sys.path[:] = job.pop('sys_path'); "
    "from anyattn.cli.commands.doctor.trial import main; main(**job)"
)
# Windows' own codes for a process that was ended (ntstatus.h).
_NT_STATUS = {0xC0000005: "an access violation", 0xC0000409: "an abort", 0xC00000FD: "a stack overflow"}


@dataclass(frozen=True, slots=True)
class Job:
    """What one child is to do.

    Attributes:
        name: The backend; empty for whatever is in force by default.
        run: Whether to call its kernel, or only to import and describe it.
        environ: The environment variables; None is this process's.
        named: Whether the user named it: only then is a kernel downloaded.
    """

    name: str
    run: bool = True
    environ: Mapping[str, str] | None = field(default=None, compare=False)
    named: bool = False


@dataclass(frozen=True, slots=True)
class Probe:
    """How far a child came.

    Attributes:
        name: The backend; empty for the default.
        described: What it said of the backend (family, exact, reasons), or None if it never came to that.
        trials: What came of each step.
        ended: How it ended, in words; empty if it finished.
        output: The last lines that it wrote, if it didn't finish.
        broke_import: Whether it ended while the kernel, or the package that brings the backend, was imported.
    """

    name: str
    described: Mapping[str, Any] | None
    trials: tuple[Trial, ...]
    ended: str = ""
    output: tuple[str, ...] = ()
    broke_import: bool = False


def run_all(
    jobs: Sequence[Job], *, timeout: float, finished: Callable[[Job, int], None] | None = None
) -> dict[str, Probe]:
    """Run every job in a child of its own, a few at a time.

    Args:
        jobs: What to do.
        timeout: Seconds that one step may take (importing torch is a step too).
        finished: Called with each finished job and how many that makes.

    Returns:
        What came of each, by name.
    """
    stop = threading.Event()
    found: dict[str, Probe] = {}
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        try:
            # Inside: the first child runs while the others are still being handed out.
            futures = {pool.submit(_run, job, timeout, stop): job for job in jobs}
            for future in as_completed(futures):
                job = futures[future]
                found[job.name] = future.result()
                if finished is not None:
                    finished(job, len(found))
        finally:
            # On Ctrl-C no child may stay behind; after the last one this does nothing.
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    return found


def _run(job: Job, timeout: float, stop: threading.Event) -> Probe:
    with tempfile.TemporaryDirectory(prefix="anyattn-") as folder:
        events, output = Path(folder, "events"), Path(folder, "output")
        events.touch()
        details = {
            "path": str(events),
            "name": job.name,
            "run": job.run,
            "named": job.named,
            "timeout": timeout,
            "sys_path": sys.path,
        }
        with output.open("wb") as file:
            child = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(details)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=None if job.environ is None else dict(job.environ),
                start_new_session=True,
            )
            hung = _watch(child, events, timeout, stop)
        said = output.read_text("utf-8", "replace").splitlines()
        return _read(job, events.read_text("utf-8"), child.returncode, timeout if hung else None, said)


def _watch(child: subprocess.Popen[bytes], events: Path, timeout: float, stop: threading.Event) -> bool:
    """Wait for a child, and end it if a step takes too long; return whether it did."""
    size, since = 0, time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_POLL)
            return child.returncode != 0 and time.monotonic() - since > timeout - 2 * _POLL
        if events.stat().st_size != size:
            size, since = events.stat().st_size, time.monotonic()
        if stop.is_set() or time.monotonic() - since > timeout + _GRACE:
            _end(child)
            return True


def _end(child: subprocess.Popen[bytes]) -> None:
    if os.name == "posix":
        # The whole session, not only the child: torch.compile has worker processes of its own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    else:
        child.kill()
    child.wait()


def _read(job: Job, text: str, returncode: int, timeout: float | None, said: Sequence[str]) -> Probe:
    """Turn what the child wrote into what is known of it; pure."""
    described: Mapping[str, Any] | None = None
    trials: list[Trial] = []
    step: Mapping[str, str] = {"device": "", "step": "import"}
    done = False
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # cut off in the middle: the child died while it wrote
        kind = event.pop("event")
        if kind == "described":
            described = event
        elif kind == "begin":
            step = event
        elif kind == "end":
            trials.append(Trial(**event["trial"]))
        done = done or kind == "done"
    if done and returncode == 0:
        return Probe(job.name, described, tuple(trials))
    how = how_it_ended(returncode) if timeout is None else f"took more than {timeout:g} s and was ended"
    if done:
        return Probe(job.name, described, tuple(trials), f"{how} after the last step", _telling(said))
    importing = step["step"] == "import"
    if not importing and (not trials or (trials[-1].device, trials[-1].step) != tuple(step.values())):
        outcome: Any = "died" if timeout is None else "hung"
        trials.append(Trial(job.name, step["device"], step["step"], outcome, detail=how))
    return Probe(job.name, described, tuple(trials), f"{how} during {_where(step)}", _telling(said), importing)


def _telling(said: Sequence[str]) -> tuple[str, ...]:
    """Keep what tells of the end: what the kernel wrote last, and the innermost frames of faulthandler's dump."""
    lines: list[str] = []
    frames = 0
    for line in said:
        if line.startswith(("Thread 0x", "Current thread 0x")):
            frames = 0
        elif line.startswith('  File "'):
            frames += 1
            if frames <= _FRAMES and not line.startswith(f'  File "{trial.__file__}"'):
                lines.append(line)
        elif line.strip() and not line.startswith("Extension modules: "):
            lines.append(line)
    return tuple(lines[-_TAIL:])


def _where(step: Mapping[str, str]) -> str:
    return "the import" if step["step"] == "import" else f"{step['step']} on {step['device']}"


def how_it_ended(returncode: int) -> str:
    """Say in words what a process's exit code means."""
    if returncode < 0:
        try:
            return f"aborted by signal {signal.Signals(-returncode).name}"
        except ValueError:
            return f"aborted by signal {-returncode}"
    if returncode in _NT_STATUS:
        return f"aborted by {_NT_STATUS[returncode]}"
    return f"ended before it was done, with exit code {returncode}"
