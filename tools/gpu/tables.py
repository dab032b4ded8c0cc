"""Turn the measurements of a GPU into a table that anyattn ships, or merge them into one.

    python tools/gpu/tables.py timings.sqlite3 --device "NVIDIA H200" --out src/anyattn/timings/tables/h200.json \
        --about "one H200, torch 2.11.0+cu130, `anyattn tune --presets`"

The file is the one that `anyattn tune` writes (docs/tuning.md). Times of CUDA graphs are taken, as they are those of
the device alone; a row of the table that the file also has is replaced.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anyattn.timings.store import Row, Store
from anyattn.timings.tables import SCHEMA, read

Call = tuple[tuple[int, ...], str, str, str]


def table_of(rows: Iterable[Row], device: str, about: str, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Make a table, as plain data.

    Args:
        rows: Measurements; those of other devices, in eager code, or with a wrong result are left out.
        device: What the driver calls the GPU.
        about: Where the times come from: what was measured with which versions, when, by which command.
        before: A table whose other rows are kept.

    Raises:
        ValueError: If no measurement is left, since the table would be empty.
    """
    found: dict[Call, dict[str, float]] = {}
    for row in rows:
        key = row.key
        right = row.error is not None and row.error <= 1
        if key.machine.split(",")[0] == device and key.mode == "graph" and right and row.seconds is not None:
            call = (row.sizes, key.mask, key.dtype, key.direction)
            found.setdefault(call, {})[row.backend] = round(row.seconds * 1e3, 5)
    if not found:
        raise ValueError(f"The file has no right result in a CUDA graph on a {device!r}.")
    made = [
        {"call": "", "sizes": list(sizes), "mask": mask, "dtype": dtype, "direction": direction, "ms": times}
        for (sizes, mask, dtype, direction), times in found.items()
    ]
    kept = [] if before is None else [row for row in before["rows"] if _call(row) not in found]
    names = [device] if before is None else before["names"]
    rows_now = [*kept, *made]
    for row in rows_now:
        row["ms"] = dict(sorted(row["ms"].items(), key=lambda item: item[1]))
    return {"schema": SCHEMA, "device": device, "names": names, "about": about, "rows": rows_now}


def _call(row: dict[str, Any]) -> Call:
    return (tuple(row["sizes"]), row["mask"], row["dtype"], row["direction"])


def written(table: dict[str, Any]) -> str:
    """Return a table as JSON, with one line for each row."""
    head = json.dumps({name: value for name, value in table.items() if name != "rows"}, indent=1)
    rows = ",\n".join("  " + json.dumps(row) for row in table["rows"])
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def main() -> None:
    """Read the arguments, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, help="the file that `anyattn tune` wrote")
    parser.add_argument("--device", required=True, help="what the driver calls the GPU")
    parser.add_argument("--about", required=True, help="where the times come from")
    parser.add_argument("--out", type=Path, required=True, help="the table; one that exists is merged into")
    given = parser.parse_args()
    before = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else None
    text = written(table_of(Store(given.file).rows(), given.device, given.about, before))
    read(json.loads(text))
    given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
