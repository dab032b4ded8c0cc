"""The command line: `anyattn doctor`, `explain`, `record`, `tune`, `verify` and `demo`.

Each command is a function that returns a frozen report (`to_dict`, `exit_code`); only `render` prints. Needs the extra
`anyattn[cli]`.
"""

from __future__ import annotations

import importlib
import io
import sys


def main() -> None:
    """Run the command line; the entry point of the script `anyattn`.

    Raises:
        SystemExit: Always, with the command's exit code; 2 if typer or rich isn't installed.
    """
    for package in ("typer", "rich"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            if (error.name or package).partition(".")[0] != package:
                raise
            sys.stderr.write(
                f"anyattn's command line needs {package}, which isn't installed: pip install 'anyattn[cli]'\n"
            )
            raise SystemExit(2) from None
    for stream in (sys.stdout, sys.stderr):
        # A kernel may have said anything; a terminal that can't show a letter of it must not lose the report.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    from anyattn.cli.app import app

    app(prog_name="anyattn")
