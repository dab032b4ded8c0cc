"""How long calls take: interleaved in random order, warmed until stable, with a cold cache on a GPU."""

from __future__ import annotations

import contextlib
import functools
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyattn.process.tracing import has_values

Call = Callable[[], object]

STABLE = 0.05
"""Warming ends when the medians of two successive rounds differ by no more than this."""

_WARMING = 20
_FEWEST, _MOST = 5, 60
_QUEUED = 8


@dataclass(frozen=True, slots=True)
class Times:
    """What was measured of one call, in seconds.

    Attributes:
        seconds: The median time of a call in eager code. On a GPU several calls are queued before the device is waited
            for: it is the larger of the host's and the device's time, as in a model that doesn't wait.
        spread: The distance between the quartiles of these times.
        device: The median time on the device alone, by events, with a cold L2 cache; on a CPU it equals `seconds`.
        graph: The median time when a CUDA graph launches the call, with a cold L2 cache; None if it wasn't captured.
        graph_spread: The distance between the quartiles of those.
        runs: How many times were measured.
    """

    seconds: float
    spread: float
    device: float
    graph: float | None = None
    graph_spread: float | None = None
    runs: int = 0


def can_measure(*tensors: Tensor | None) -> bool:
    """Whether calls may be measured now: nothing compiles, traces, transforms or captures, and tensors have values."""
    return not torch.compiler.is_compiling() and has_values(*tensors)


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Restore the state of the random generators afterwards, those of the CPU and of the device."""
    accelerators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=accelerators):
        yield


def first_call(call: Call, device: torch.device) -> tuple[float, object]:
    """Run a call for the first time; return the seconds until its result is there, and the result."""
    wait(device)
    start = time.perf_counter()
    result = call()
    wait(device)
    return time.perf_counter() - start, result


def fewest_runs(device: torch.device) -> int:
    """Return how often each call runs if the budget is spent at once: queued, alone and in a graph on a GPU."""
    return (_QUEUED + 2) * (_FEWEST + 3) if device.type == "cuda" else _FEWEST + 3


def wait(device: torch.device) -> None:
    """Wait until a device has run what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(
    calls: Mapping[str, Call], device: torch.device, *, budget: float, captured: Collection[str] = (), seed: int = 0
) -> dict[str, Times]:
    """Measure calls against each other: each round runs every call once, in a new random order.

    Args:
        calls: The calls by name; each has run before, so nothing is left to compile.
        device: The device that they run on.
        budget: For how many seconds to measure; each call is measured 5 times at least.
        captured: Which calls to measure in CUDA graphs too, on a GPU.
        seed: Random seed of the order; the generators of torch and Python aren't touched.
    """
    order = random.Random(seed)
    on_gpu = device.type == "cuda"
    sample = functools.partial(_queued, device=device) if on_gpu else _clock
    eager = {name: functools.partial(sample, call) for name, call in calls.items()}
    wait(device)
    _warm(eager, order, budget / 4)
    if not on_gpu:
        found = _rounds(eager, order, budget * 3 / 4)
        return {name: Times(*_middle(times), _middle(times)[0], runs=len(times)) for name, times in found.items()}
    flush = _flusher(device)
    on_device = functools.partial(_events, device=device, flush=flush)
    alone = {name: functools.partial(on_device, call) for name, call in calls.items()}
    graphs = {name: _graph(calls[name], device) for name in captured if name in calls}
    replays = {name: functools.partial(on_device, graph.replay) for name, graph in graphs.items() if graph is not None}
    share = budget * 3 / 4 / (3 if replays else 2)
    queued, device_times, replayed = (_rounds(kind, order, share) for kind in (eager, alone, replays))
    return {name: _times(queued[name], device_times[name], replayed.get(name)) for name in calls}


def _times(queued: Sequence[float], device: Sequence[float], replayed: Sequence[float] | None) -> Times:
    graph, graph_spread = (None, None) if replayed is None else _middle(replayed)
    return Times(*_middle(queued), _middle(device)[0], graph, graph_spread, len(queued))


def _warm(samples: Mapping[str, Callable[[], float]], order: random.Random, budget: float) -> None:
    """Run rounds until the times no longer fall, or the budget is spent."""
    end = time.perf_counter() + budget
    before: dict[str, float] = {}
    for _ in range(_WARMING):
        now = {name: statistics.median(times) for name, times in _rounds(samples, order, 0.0, fewest=3).items()}
        if before and all(abs(now[name] - before[name]) <= STABLE * before[name] for name in now):
            return
        if time.perf_counter() > end:
            return
        before = now


def _rounds(
    samples: Mapping[str, Callable[[], float]], order: random.Random, budget: float, *, fewest: int = _FEWEST
) -> dict[str, list[float]]:
    """Take samples in rounds, each in a new random order, for a time; but `fewest` rounds at least."""
    end = time.perf_counter() + budget
    found: dict[str, list[float]] = {name: [] for name in samples}
    names = list(samples)
    for done in range(_MOST):
        if done >= fewest and time.perf_counter() > end:
            break
        order.shuffle(names)
        for name in names:
            found[name].append(samples[name]())
    return found


def _middle(times: Sequence[float]) -> tuple[float, float]:
    """Return the median and the distance between the quartiles."""
    first, middle, third = statistics.quantiles(times, n=4, method="inclusive")
    return middle, third - first


def _clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _queued(call: Call, device: torch.device) -> float:
    """Return the time of a call when several are queued before the device is waited for."""
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(_QUEUED):
        call()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / _QUEUED


def _events(call: Call, device: torch.device, flush: Call) -> float:
    """Return a call's time on the device, after its L2 cache was filled with other data."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        flush()
        start.record()
        call()
        end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _flusher(device: torch.device) -> Call:
    """Return what overwrites the L2 cache, and keeps the device busy while the host launches the call."""
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
    buffer = torch.empty(2 * size, dtype=torch.int8, device=device)
    return buffer.zero_


def _graph(call: Call, device: torch.device) -> torch.cuda.CUDAGraph | None:
    """Capture a call in a CUDA graph; None if its kernel can't be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                call()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                call()
    except RuntimeError:
        return None
    return graph
