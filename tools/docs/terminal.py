"""Write the terminal output in the guides by running the command line; a test compares.

python tools/docs/terminal.py [--check]

A block of output follows a comment that says what to run:

    <!-- output: anyattn explain --shape 2,4096,24,128 --as h100 --torch 2.13 -->
    <!-- output on h100 with flash-attn-4=4.0.0b36: anyattn doctor --no-try -->

The second form supposes a machine for commands that have no `--as`. Nothing in a block may depend on the machine that
writes it: no kernel is run, and versions are those of `TORCH` and `PYTHON`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from typer.testing import CliRunner

from anyattn import environment
from anyattn.cli.app import app

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("cli.md",)
COLUMNS = 80
TORCH, PYTHON, PLATFORM = "2.13.0", "3.12.3", "Linux x86_64"

_BLOCK = re.compile(
    r"^(?P<marker><!-- output(?: on (?P<machine>\S+?)(?: with (?P<packages>[^:]+))?)?: anyattn (?P<words>.+?) -->)"
    r"(?:\n+```text\n.*?^```$)?",
    re.MULTILINE | re.DOTALL,
)
# What would change the output of a command: unset while one runs.
_VARIABLES = (
    *("ANYATTN_BACKEND", "ANYATTN_CHECKS", "DIFFUSERS_ATTN_BACKEND", "DIFFUSERS_ATTN_CHECKS", "LOCAL_KERNELS"),
    *("FORCE_COLOR", "TTY_COMPATIBLE"),
)


def written(text: str) -> str:
    """Return a page with the output of every marked block written anew."""
    return _BLOCK.sub(_block, text)


def _block(found: re.Match[str]) -> str:
    arguments = shlex.split(found["words"])
    with _machine(found["machine"], found["packages"] or ""):
        answer = CliRunner().invoke(
            app, arguments, env={"COLUMNS": str(COLUMNS), **dict.fromkeys(_VARIABLES)}, catch_exceptions=False
        )
    lines = [_command(found["words"]), *(line.rstrip() for line in answer.output.splitlines())]
    if answer.exit_code:
        lines += ["$ echo $?", str(answer.exit_code)]
    return "\n".join([found["marker"], "", "```text", *lines, "```"])


@contextlib.contextmanager
def _machine(name: str | None, packages: str) -> Iterator[None]:
    """Suppose a machine in the block, if one is named."""
    if name is None:
        yield
        return
    installed = dict(package.split("=", 1) for package in packages.split())
    machine = environment.preset(name, packages=installed, torch_version=TORCH)
    with environment.supposed(dataclasses.replace(machine, python=PYTHON, platform=PLATFORM)):
        yield


def _command(words: str) -> str:
    """Write a command as it is typed, continued on further lines before an option if it is long."""
    lines = ["$ anyattn"]
    for piece in re.split(r" (?=--)", words):
        if len(lines[-1]) + len(piece) + 3 > COLUMNS:
            lines[-1] += " \\"
            lines.append(f"    {piece}")
        else:
            lines[-1] += f" {piece}"
    return "\n".join(lines)


def main() -> int:
    """Write the pages, or with --check compare them and print what differs."""
    differs = False
    for name in PAGES:
        path = DOCS / name
        old = path.read_text(encoding="utf-8")
        new = written(old)
        if "--check" not in sys.argv:
            path.write_text(new, encoding="utf-8")
        elif new != old:
            differs = True
            sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), name, "the program"))
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
