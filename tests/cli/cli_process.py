"""Run the command line as a person does, in a process of its own, beside packages that are made for the test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

MAIN = "from anyattn.cli import main; main()"
VARIABLES = ("ANYATTN_BACKEND", "DIFFUSERS_ATTN_BACKEND", "ANYATTN_CHECKS", "DIFFUSERS_ATTN_CHECKS")


def environ_of(extra: Mapping[str, str]) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return {**plain, "OMP_NUM_THREADS": "1", "COLUMNS": "100", **extra}


def start(*arguments: str, **extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ_of(extra),
    )


def run(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    process = start(*arguments, **extra)
    try:
        out, err = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def install(folder: Path, module: str, entries: Mapping[str, str]) -> str:
    """Make a folder hold an installed distribution with entry points, and give the PYTHONPATH for it."""
    info = folder / f"{module}_dist-3.2.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}-dist\nVersion: 3.2.1\n")
    lines = "".join(f"{name} = {target}\n" for name, target in entries.items())
    (info / "entry_points.txt").write_text(f"[anyattn.backends]\n{lines}")
    return os.pathsep.join([str(folder), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
