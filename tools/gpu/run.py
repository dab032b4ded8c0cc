"""Run on a GPU what CI can't: the laws, the traps, graph capture, torch.compile and the benchmarks; write JSON.

    python tools/gpu/run.py --out DIR [--device cuda] [--only laws,traps,graphs,compile,packed,devices,speed,overhead]
        [--backends native,flex] [--laws right,unwritten_memory]
        [--cases N] [--shards flex=4] [--workers N] [--timeout SECONDS]

Each part runs in processes of its own, so that one that loses the CUDA context leaves the others be. DIR gets
`summary.json`; commit it under `verified/` with the device and torch in its name.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
Save = Callable[[Any], None]
BACKENDS = ("native", "native_flash", "native_efficient", "native_cudnn", "native_math", "flex")
SLOWEST_FIRST = (
    "compiled",
    "right",
    "liveness",
    "halves",
    "dead_rows",
    "unwritten_memory",
    "packed_tails",
    "strides",
    "permutation",
    "unchanged",
    "deterministic",
    "dropout",
    "rejected",
)
"""Every law, so ordered that the processes end at about the same time."""


def last_json(text: str) -> Any:
    """Read the last line that is JSON."""
    for line in reversed(text.strip().splitlines()):
        try:
            return json.loads(line)
        except json.JSONDecodeError:
            continue
    return None


class Ended(NamedTuple):
    """How a script ended, and what it printed; `returncode` is None where it ran out of time."""

    returncode: int | None
    stdout: str
    stderr: str


_PROCESSES = multiprocessing.get_context("forkserver")
"""Each process is forked from one that has imported what all need: an import of torch takes seconds."""
_PROCESSES.set_forkserver_preload(["torch", "hypothesis", "anyattn.testing"])


def _run_script(folder: str, arguments: list[str]) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")


def ended(arguments: list[str], timeout: int) -> Ended:
    """Run a script in a process of its own, and wait for its end."""
    with tempfile.TemporaryDirectory() as folder:
        process = _PROCESSES.Process(target=_run_script, args=(folder, arguments))
        process.start()
        process.join(timeout)
        returncode = process.exitcode
        if returncode is None:
            process.kill()
            process.join()
        stdout, stderr = (
            path.read_text(errors="replace") if (path := Path(folder) / name).exists() else ""
            for name in ("stdout", "stderr")
        )
        return Ended(returncode, stdout, stderr)


def child(arguments: list[str], timeout: int) -> dict[str, Any]:
    """Run a script, and give what it printed, or how it ended."""
    done = ended(arguments, timeout)
    if done.returncode is None:
        return {"outcome": "TIMED OUT", "seconds": timeout}
    found = last_json(done.stdout)
    if done.returncode or found is None:
        return {"outcome": "DIED", "returncode": done.returncode, "stderr": done.stderr[-2000:]}
    return found  # type: ignore[no-any-return]


def traps(device: str, backends: Sequence[str], workers: int) -> dict[str, Any]:
    """Run every trap on every backend."""
    sys.path.insert(0, str(HERE))
    from traps import TRAPS

    names = list(TRAPS)
    pieces = [(backend, names[start::_PIECES]) for backend in backends for start in range(_PIECES)]
    with ThreadPoolExecutor(workers) as pool:
        rows = list(pool.map(lambda piece: _traps_of(piece[0], device, piece[1]), pieces))
    found: dict[str, Any] = {trap: {} for trap in TRAPS}
    for (backend, _), row in zip(pieces, rows, strict=True):
        for trap, outcome in row.items():
            found[trap][backend] = outcome
    return found


_PIECES = 6
"""How many processes the traps of a backend are split over: kernels that are compiled first take seconds each."""


def _traps_of(backend: str, device: str, names: list[str]) -> dict[str, Any]:
    """Run the traps for one backend: in one process as long as it lives, then in another."""
    found: dict[str, Any] = {}
    while names:
        done = ended([str(HERE / "traps.py"), backend, device, *names], 550)
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"trap"')]
        found |= {row.pop("trap"): row for row in rows}
        names = names[len(rows) :]
        if names:
            stderr = done.stderr[-1500:]
            found[names[0]] = {"outcome": "DIED", "returncode": done.returncode, "stderr": stderr}
            names = names[1:]
    return found


def laws(device: str, backends: Sequence[str], options: argparse.Namespace, save: Save) -> dict[str, Any]:
    """Run each law of each backend in a process of its own, several at a time."""
    thin, shards = _numbers(options.thin), _numbers(options.shards)
    pieces = [
        (law, backend, f"{number}/{shards.get(backend, 1)}")
        for law in SLOWEST_FIRST
        if not options.laws or law in options.laws.split(",")
        for backend in backends
        for number in range(shards.get(backend, 1))
    ]

    def run(piece: tuple[str, str, str]) -> dict[str, Any]:
        law, backend, shard = piece
        arguments = [law, str(thin.get(backend, 1)), options.keep, shard]
        return child([str(HERE / "parts.py"), "laws", device, backend, str(options.cases), *arguments], options.timeout)

    found: dict[str, Any] = {backend: {"status": "passed", "run": 0, "laws": []} for backend in backends}
    with ThreadPoolExecutor(options.workers) as pool:
        waiting = {pool.submit(run, piece): piece for piece in pieces}
        for done in as_completed(waiting):
            law, backend, _ = waiting[done]
            _add(found[backend], law, done.result())
            save(found)  # a run that is cut off keeps what it has
    return found


def _numbers(text: str) -> dict[str, int]:
    """Read `flex=4,flash4=2`."""
    return {name: int(number) for name, number in (pair.split("=") for pair in text.split(",") if pair)}


def _add(report: dict[str, Any], law: str, row: dict[str, Any]) -> None:
    """Put what became of one law, or of a shard of it, into a backend's report."""
    if "outcome" in row:
        report["laws"].append({"law": law} | row)
        report["status"] = _status(report)
        return
    (one,) = row["backends"]
    report["unusable"] = one["unusable"]
    report["run"] += one["run"]
    for new in one["laws"]:
        old = next((old for old in report["laws"] if old["law"] == law and "outcome" not in old), None)
        if old is None:
            report["laws"].append(new)
            continue
        for count in ("run", "passed", "refused"):
            old[count] += new[count]
        old["worst"] = max(old["worst"], new["worst"])
        old["failures"] += new["failures"]
        for code, number in new["reasons"].items():
            old["reasons"][code] = old["reasons"].get(code, 0) + number
    report["status"] = _status(report)


def _status(report: dict[str, Any]) -> str:
    """Say of a report what `verify` says: the law about refusals executes no kernel."""
    if any("outcome" in law or law["failures"] for law in report["laws"]):
        return "failed"
    return "passed" if any(law["run"] for law in report["laws"] if law["law"] != "rejected") else "not verified"


def part(name: str, options: argparse.Namespace, save: Save) -> Any:
    """Run one part."""
    backends, device = options.backends.split(","), options.device
    if name == "traps":
        return traps(device, backends, options.workers)
    if name == "overhead":
        return child([str(HERE.parents[1] / "benchmarks" / "overhead.py"), "--device", device, "--json", "-"], 600)
    if name == "laws":
        return laws(device, backends, options, save)
    if name == "compile":
        sys.path.insert(0, str(HERE))
        from parts import KINDS

        pieces = [(backend, kind) for backend in backends for kind in KINDS.split(",")]

        def compiled(piece: tuple[str, str]) -> dict[str, Any]:
            row = child([str(HERE / "parts.py"), name, device, *piece], options.timeout)
            return row.get(piece[0], {piece[1]: row})  # type: ignore[no-any-return]

        found: dict[str, Any] = {backend: {} for backend in backends}
        with ThreadPoolExecutor(options.workers) as pool:
            for piece, row in zip(pieces, pool.map(compiled, pieces), strict=True):
                found[piece[0]] |= row
        return found
    return child([str(HERE / "parts.py"), name, device, options.backends], options.timeout)


def main() -> None:
    """Run the parts and write the summary after each, so that nothing is lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="about,traps,graphs,compile,packed,speed,overhead,laws")
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--laws", default="", help="these laws alone, by name; all of them by default")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--thin", default="", help="run every Nth case alone: flex=4")
    parser.add_argument("--shards", default="", help="split each law of a backend over processes: flex=4")
    parser.add_argument("--keep", default="{}", help="JSON: the dtypes and largest head_dim of a trimmed build")
    parser.add_argument("--workers", type=int, default=6, help="processes at a time, for laws and traps")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for each process")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in options.only.split(","):
        start = time.time()

        def save(found: Any, name: str = name) -> None:
            path.write_text(json.dumps(summary | {name: found}, indent=1))

        summary[name] = part(name, options, save)
        summary.setdefault("seconds", {})[name] = round(time.time() - start, 1)
        path.write_text(json.dumps(summary, indent=1))
        print(name, summary["seconds"][name], "s", flush=True)


if __name__ == "__main__":
    main()
