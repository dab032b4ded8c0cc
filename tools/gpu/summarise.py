"""Write the file under verified/ from runs: some of their backends, rounded figures, without texts of refusals.

    python tools/gpu/summarise.py RUN/summary.json ... --backends sage --commit HASH --note TEXT --out FILE

Of several runs, what a later one ran again takes the place of what an earlier one did.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

PARTS = ("traps", "laws", "graphs", "packed", "compile", "overhead", "speed")
KEPT = ("outcome", "error_over_budget", "rounding_over_budget", "relative_error", "context", "returncode")
"""What is kept of one trap; why a call was refused is in the tests of refusals."""


def rounded(value: Any) -> Any:
    """Round every float to four significant digits; leave out why something was refused."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        refused = value.get("outcome") == "refused"
        return {key: rounded(one) for key, one in value.items() if not (refused and key == "why")}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def joined_laws(runs: list[dict[str, Any]], backend: str) -> dict[str, Any]:
    """Join the laws of a backend; the last run of a law counts."""
    laws: dict[str, Any] = {}
    for run in runs:
        laws |= {law["law"]: law for law in run.get("laws", {}).get(backend, {}).get("laws", [])}
    broken = any("outcome" in law or law["failures"] for law in laws.values())
    return {
        "status": "failed" if broken else "passed",
        "run": sum(law.get("run", 0) for name, law in laws.items() if name != "rejected"),
        "laws": list(laws.values()),
    }


def summary(runs: list[dict[str, Any]], backends: list[str], commit: str, note: str) -> dict[str, Any]:
    """Build the file's content."""
    about = {key: value for key, value in runs[-1]["about"].items() if key != "cudnn_file"}
    found: dict[str, Any] = {"commit": commit, "note": note, "about": about}
    for part in PARTS:
        rows: dict[str, Any] = {}
        for run in runs:
            rows |= run.get(part, {})
        if part == "laws":
            rows = {backend: joined for backend in backends if (joined := joined_laws(runs, backend))["laws"]}
        elif part == "traps":
            rows = {trap: {name: row[name] for name in backends if name in row} for trap, row in rows.items()}
            rows = {trap: row for trap, row in rows.items() if row}
            counted = {name: Counter(row[name]["outcome"] for row in rows.values() if name in row) for name in backends}
            found |= {"traps counted": {name: dict(counts) for name, counts in counted.items()}} if rows else {}
            rows = {
                trap: {name: {key: one[key] for key in KEPT if key in one} for name, one in row.items()}
                for trap, row in rows.items()
            }
        elif part in ("graphs", "packed", "compile"):
            rows = {name: rows[name] for name in backends if name in rows}
        elif "native" not in backends:
            continue
        if rows:
            found[part] = rows
    return rounded(found)  # type: ignore[no-any-return]


def main() -> None:
    """Read the runs and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--backends", required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in options.runs]
    found = summary(runs, options.backends.split(","), options.commit, options.note)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
