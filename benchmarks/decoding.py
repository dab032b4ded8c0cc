"""Time the attention of a decoding step on the device: few queries on many keys, by backend.

Each call is captured into a CUDA graph, so that the host takes no part, and replayed in random order. Beside it stands
the time of a call at a length that was never seen, host included, in which a kernel may prepare something.

    python benchmarks/decoding.py [--backends native native_flash flash3] [--rounds 9] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import anyattn
from anyattn.errors import AnyattnError

SHAPES = ((1, 32, 8, 128, 1), (8, 32, 8, 128, 1), (1, 32, 32, 128, 1), (16, 16, 16, 64, 1), (1, 32, 8, 128, 16))
"""Batch, heads, key heads, head_dim and queries: Llama 8B, a batch of it, one without GQA, a small one, a draft."""
LENGTHS = (512, 2048, 8192, 32768)
CALLS = 20


def tensors(shape: tuple[int, ...], keys: int) -> list[torch.Tensor]:
    """Make query, key and value, `(B, H, S, D)`."""
    batch, heads, kv_heads, dim, rows = shape
    sizes = ((batch, heads, rows, dim), (batch, kv_heads, keys, dim), (batch, kv_heads, keys, dim))
    return [torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in sizes]


def graph_of(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture calls into a graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph


def replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Give the microseconds of one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / CALLS * 1e3


def first_call(shape: tuple[int, ...], keys: int, backend: str) -> float:
    """Give the milliseconds of a call at a length that comes first here; the length before it was seen."""
    found = []
    for length in (keys + 1, keys + 2, keys + 3):
        given = tensors(shape, length)
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(given, shape, backend)
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) * 1e3)
    return statistics.median(found)


def run(given: list[torch.Tensor], shape: tuple[int, ...], backend: str) -> object:
    """Make the call."""
    return anyattn.scaled_dot_product_attention(*given, enable_gqa=shape[1] != shape[2], backend=backend)


def measure(shape: tuple[int, ...], keys: int, backends: list[str], rounds: int) -> dict[str, Any]:
    """Time one call with every backend."""
    given = tensors(shape, keys)
    graphs, rows = {}, {}
    for backend in backends:
        try:
            graphs[backend] = graph_of(lambda backend=backend: run(given, shape, backend))  # type: ignore[misc]
        except AnyattnError as error:
            rows[backend] = {"refused": str(error)[:200]}
    times: dict[str, list[float]] = {backend: [] for backend in graphs}
    for _ in range(rounds):
        for backend in random.sample(list(graphs), len(graphs)):
            times[backend].append(replayed(graphs[backend]))
    for backend, taken in times.items():
        first = first_call(shape, keys, backend)
        rows[backend] = {"device_us": round(statistics.median(taken), 2), "new_length_ms": round(first, 3)}
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["native", "native_flash", "flash3", "auto"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    report: dict[str, Any] = {"about": about, "rounds": options.rounds, "calls": []}
    with torch.no_grad():
        for shape in SHAPES:
            for keys in LENGTHS:
                rows = measure(shape, keys, options.backends, options.rounds)
                names = ("batch", "heads", "kv_heads", "head_dim", "seqlen_q")
                report["calls"].append({**dict(zip(names, shape, strict=True)), "seqlen_kv": keys, "backends": rows})
                print(shape, keys, rows, flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
