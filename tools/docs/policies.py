"""Write the measured part of docs/policies.md from the runs of benchmarks/policies.py under verified/; a test compares.

python tools/docs/policies.py [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "policies.md"
BEGIN, END = "<!-- measured -->\n", "<!-- end of measured -->\n"
NOTHING = "No such run is under `verified/` yet, so no figure is given here.\n"


def table(run: dict[str, Any], where: str) -> str:
    """Return one run as a table of models and ways."""
    about = run["about"]
    lines = [
        f"`{where}`: {about.get('name', about['device'])}, torch {about['torch']}, Diffusers {about['diffusers']}; "
        f"{run['steps']} steps, medians of {run['rounds']} rounds. The error is the norm of the difference to the run "
        "in a wider type, as a part of its norm.",
        "",
        "| model | inputs | way | ms a step | of stock's time | error |",
        "|---|---|---|---|---|---|",
    ]
    for name, model in run["models"].items():
        stock = model["ways"]["stock"]["step_ms"]
        for way, row in model["ways"].items():
            cells = (name, model["what"], way, f"{row['step_ms']:.1f}", f"{row['step_ms'] / stock:.3f}")
            lines.append(f"| {' | '.join(cells)} | {row['error']:.2g} |")
    return "\n".join(lines) + "\n"


def measured(verified: Path) -> str:
    """Return the tables of all runs in a folder, but for those of small models."""
    files = sorted(verified.glob("*/policies.json"))
    runs = [(json.loads(file.read_text(encoding="utf-8")), file.relative_to(verified.parent)) for file in files]
    tables = [table(run, str(where)) for run, where in runs if not run["about"]["small"]]
    return "\n".join(tables) or NOTHING


def page(text: str, verified: Path) -> str:
    """Return the page with its measured part made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{measured(verified)}{END}{after}"


def main() -> int:
    """Write the page, or compare it."""
    text = PAGE.read_text(encoding="utf-8")
    made = page(text, ROOT / "verified")
    if "--check" in sys.argv:
        return int(made != text)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
