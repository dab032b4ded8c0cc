"""What a backend needs and how to install it, in words made from its packages and declarations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from anyattn.backend.capabilities import Capabilities
from anyattn.sources.packages import Package

TORCH = "torch >=2.8"
"""What anyattn needs, and each backend whose kernel comes with torch."""

_DEVICES: Mapping[str, str] = {"npu": "an Ascend NPU", "xla": "a TPU", "mps": "an Apple GPU", "xpu": "an Intel GPU"}


def needs(packages: Sequence[Package], declarations: Mapping[str, Capabilities]) -> str:
    """Return what is needed: one of the packages, and one of the devices unless a CPU will do."""
    wanted = " or ".join(dict.fromkeys(package.wanted for package in packages)) or TORCH
    device = "" if "cpu" in declarations else " or ".join(_device(kind, declarations[kind]) for kind in declarations)
    computed = dict.fromkeys(caps.quantised for caps in declarations.values() if caps.quantised)
    text = ", ".join(part for part in (wanted, device) if part)
    return f"{text}; computes in {' or '.join(computed)}" if computed else text


def _device(kind: str, caps: Capabilities) -> str:
    if kind != "cuda":
        return _DEVICES.get(kind, f"a {kind} device")
    low, high = caps.arch_min, caps.arch_max
    if low is None:
        return "an AMD GPU" if caps.rocm else "an NVIDIA GPU"
    upto = " or newer" if high is None else "" if high == low else f" to sm{high[0]}{high[1]}"
    return f"an NVIDIA GPU of sm{low[0]}{low[1]}{upto}"


def install(packages: Iterable[Package]) -> str:
    """Join the install commands of the packages that contain one kernel."""
    return ", or ".join(dict.fromkeys(package.command for package in packages if package.command))
