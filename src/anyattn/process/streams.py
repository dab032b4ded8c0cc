"""The CUDA stream that is current, as a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

raw_stream: Final[Callable[[int], int]] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream
)
"""Returns a device's current stream, given the device's index; 0 is the default stream.

`torch.cuda.current_stream` makes an object, which would take most of the time of a look-up.
"""
