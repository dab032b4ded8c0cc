"""The time of a call: by events on a GPU, which wait for nothing, else by the clock."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor


def started(tensor: Tensor) -> Any:
    """Begin to time a call on a tensor's device; None while a CUDA graph is captured."""
    if not tensor.is_cuda:
        return time.perf_counter()
    if torch.cuda.is_current_stream_capturing():
        return None
    event = torch.Event("cuda", enable_timing=True)
    event.record(torch.cuda.current_stream(tensor.device))
    return event


def stopped(start: Any) -> Any:
    """End what `started` began; pass the result to `seconds`."""
    if start is None:
        return None
    if isinstance(start, float):
        return time.perf_counter() - start
    event = torch.Event("cuda", enable_timing=True)
    event.record()
    return start, event


def seconds(span: Any) -> float | None:
    """Return the seconds of a call; waits until the GPU has run it."""
    if span is None or isinstance(span, float):
        return span
    start, end = span
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
