"""Run on a GPU what CI can't: the laws, the traps, graph capture, torch.compile and the benchmarks; write JSON.

    python tools/gpu/run.py --out DIR [--device cuda] [--only laws,traps,graphs,compile,speed,overhead] [--cases N]

Each part runs in processes of its own, so that one that loses the CUDA context leaves the others be. DIR gets
`summary.json`; commit it under `verified/` with the device and torch in its name.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BACKENDS = ("native", "native_flash", "native_efficient", "native_cudnn", "native_math", "flex")


def last_json(text: str) -> Any:
    """Read the last line that is JSON."""
    for line in reversed(text.strip().splitlines()):
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            continue
    return None


def child(arguments: list[str], timeout: int) -> dict[str, Any]:
    """Run a script, and give what it printed, or how it ended."""
    try:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"outcome": "TIMED OUT", "seconds": timeout}
    found = last_json(done.stdout)
    if done.returncode or found is None:
        return {"outcome": "DIED", "returncode": done.returncode, "stderr": done.stderr[-2000:]}
    return found  # type: ignore[no-any-return]


def traps(device: str) -> dict[str, Any]:
    """Run every trap on every backend."""
    sys.path.insert(0, str(HERE))
    from traps import TRAPS

    names = [(trap, backend) for trap in TRAPS for backend in BACKENDS]
    with ThreadPoolExecutor(6 if device == "cuda" else 2) as pool:
        script = str(HERE / "traps.py")
        rows = list(pool.map(lambda pair: child([script, *pair, device], 300), names))
    found: dict[str, Any] = {}
    for (trap, backend), row in zip(names, rows, strict=True):
        found.setdefault(trap, {})[backend] = row
    return found


def part(name: str, device: str, cases: int) -> Any:
    """Run one part."""
    if name == "traps":
        return traps(device)
    if name == "overhead":
        return child([str(HERE.parents[1] / "benchmarks" / "overhead.py"), "--device", device, "--json", "-"], 600)
    if name == "laws":
        found = {}
        for backend in BACKENDS:
            found[backend] = child([str(HERE / "parts.py"), name, device, backend, str(cases)], 900)
        return found
    return child([str(HERE / "parts.py"), name, device], 600)


def main() -> None:
    """Run the parts and write the summary after each, so that nothing is lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="about,traps,graphs,compile,speed,overhead,laws")
    parser.add_argument("--cases", type=int, default=60)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in options.only.split(","):
        start = time.time()
        summary[name] = part(name, options.device, options.cases)
        summary.setdefault("seconds", {})[name] = round(time.time() - start, 1)
        path.write_text(json.dumps(summary, indent=1))
        print(name, summary["seconds"][name], "s", flush=True)


if __name__ == "__main__":
    main()
