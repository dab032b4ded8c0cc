"""Devices that commands run on, as a person writes them."""

from __future__ import annotations

import torch

from anyattn.cli.reports import UsageError


def checked_device(name: str | None) -> str:
    """Give a device that tensors can be made on; None is the CUDA device where there is one, else the CPU.

    Raises:
        UsageError: If there is no such device here.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: no such device here ({first}).") from None
    return name
