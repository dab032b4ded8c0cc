"""Measure a call of shapes that were never seen, which is described, checked and decided, and one that was.

A miss is timed once per shape; the Python functions that it enters are counted in a run of their own. With another
checkout both packages are measured in processes of their own, in random order, and the ratios are of the same round.

    python benchmarks/misses.py [--misses 400] [--json misses.json]
    python benchmarks/misses.py --beside ../older-checkout [--rounds 15]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import anyattn

WAYS: dict[str, dict[str, Any]] = {
    "miss": {},
    "miss, causal": {"is_causal": True},
    "miss, auto": {"backend": "auto"},
}
"""What is measured, each with the keyword arguments of its calls."""

HITS = 2000
SIZES = tuple(itertools.product(range(8, 48), range(1, 6), (8, 16, 24, 32)))
"""Length, heads and head_dim of the calls: all so small that the kernel's own time hardly counts."""


def inputs(count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield query, key and value of sizes that none before them had."""
    for length, heads, head_dim in random.Random(0).sample(SIZES, count):
        yield tuple(torch.randn(1, length, heads, head_dim) for _ in range(3))  # type: ignore[misc]


def python_calls(call: Callable[[], object]) -> int:
    """Count the Python functions entered during a call, the call itself aside."""
    found = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal found
        found += event == "call"

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found - 1


def measure(misses: int) -> dict[str, dict[str, float]]:
    """Measure every way in this process: Python calls, and microseconds of the median miss and of a hit."""
    rows = {}
    for name, options in WAYS.items():
        times, calls = [], 0
        for number, (query, key, value) in enumerate(inputs(misses)):
            if number == misses - 1:
                calls = python_calls(lambda q=query, k=key, v=value, o=options: anyattn.attention(q, k, v, **o))
                break
            start = time.perf_counter_ns()
            anyattn.attention(query, key, value, **options)
            times.append((time.perf_counter_ns() - start) / 1e3)
        # The first calls import adapters and fill caches that shapes have no part in.
        rows[name] = {"us": statistics.median(times[len(times) // 4 :]), "calls": float(calls)}
        rows[name.replace("miss", "hit")] = hits(options)
    return rows


def hits(options: dict[str, Any]) -> dict[str, float]:
    """Measure a call that was seen before: the fastest tenth of many, which shared machines disturb least."""
    query, key, value = (torch.randn(1, 16, 2, 16) for _ in range(3))
    anyattn.attention(query, key, value, **options)
    times = []
    for _ in range(100):
        start = time.perf_counter_ns()
        for _ in range(HITS // 100):
            anyattn.attention(query, key, value, **options)
        times.append((time.perf_counter_ns() - start) / (HITS // 100) / 1e3)
    calls = python_calls(lambda: anyattn.attention(query, key, value, **options))
    return {"us": statistics.quantiles(times, n=10)[0], "calls": float(calls)}


def measured_in(checkout: Path, misses: int) -> dict[str, dict[str, float]]:
    """Measure a checkout's package in a process of its own."""
    command = [sys.executable, __file__, "--misses", str(misses), "--json", "-"]
    found = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(checkout)}, check=True, capture_output=True, text=True
    )
    rows: dict[str, dict[str, float]] = json.loads(found.stdout)
    return rows


def compare(beside: Path, rounds: int, misses: int) -> dict[str, dict[str, float]]:
    """Measure this package and another checkout's in random order; give medians, and the median ratio of a round."""
    sources = {"this": Path(anyattn.__file__).parents[1], "other": beside.resolve() / "src"}
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in sources}
    for _ in range(rounds):
        for name in random.sample(sorted(sources), len(sources)):
            found[name].append(measured_in(sources[name], misses))
    rows = {}
    for way in found["this"][0]:
        this, other = ([each[way]["us"] for each in found[name]] for name in ("this", "other"))
        rows[way] = {
            "us": statistics.median(this),
            "other_us": statistics.median(other),
            "ratio": statistics.median(mine / theirs for mine, theirs in zip(this, other, strict=True)),
            "calls": found["this"][0][way]["calls"],
            "other_calls": found["other"][0][way]["calls"],
        }
    return rows


def main() -> None:
    """Run, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--misses", type=int, default=400)
    parser.add_argument("--beside", type=Path, help="another checkout, whose src is measured beside this package")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.beside is None:
        rows = measure(options.misses)
    else:
        rows = compare(options.beside, options.rounds, options.misses)
    if options.json == "-":
        print(json.dumps(rows))
        return
    columns = ["us", "calls"] if options.beside is None else ["us", "other_us", "ratio", "calls", "other_calls"]
    print(f"{'call':16}" + "".join(f"{column:>13}" for column in columns))
    for name, row in rows.items():
        print(f"{name:16}" + "".join(f"{row[column]:13.2f}" for column in columns))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
