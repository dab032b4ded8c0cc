"""Contract doubles: fake kernel packages with the real ones' names, signatures, conventions and refusals.

A double computes in float64 on the CPU. It proves an adapter, never a kernel: reports name which of the two was run,
and what a double itself does is tested against the statements that it was written from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Iterator

from anyattn import environment
from anyattn.backend.protocol import Backend
from anyattn.environment import Environment
from anyattn.scopes import defaults
from anyattn.selection import faults, registry
from anyattn.sources import packages
from doubles.double import Double

__all__ = ["DOUBLES", "Double", "double_of", "installed"]

DOUBLES: dict[str, str] = {
    "flash2": "doubles.kernels.flash2:DOUBLE",
    "flash3": "doubles.kernels.flash3:DOUBLE",
    "flash3_fp8": "doubles.kernels.flash3:FP8",
    "flash4": "doubles.kernels.flash4:DOUBLE",
    "ffpa": "doubles.kernels.ffpa:DOUBLE",
    "xformers": "doubles.kernels.xformers:DOUBLE",
    "sage": "doubles.kernels.sage:PICK",
    "sage_int8_fp16": "doubles.kernels.sage:INT8_FP16",
    "sage_int8_fp16_triton": "doubles.kernels.sage:INT8_FP16_TRITON",
    "sage_int8_fp8": "doubles.kernels.sage:INT8_FP8",
    "sage_int8_fp8_sm90": "doubles.kernels.sage:INT8_FP8_SM90",
    "aiter": "doubles.kernels.aiter:DOUBLE",
    "xla": "doubles.kernels.xla:DOUBLE",
    "npu": "doubles.kernels.npu:DOUBLE",
    "flash2_hub": "doubles.hub:FLASH2",
    "flash3_hub": "doubles.hub:FLASH3",
    "flash4_hub": "doubles.hub:FLASH4",
    "sage_hub": "doubles.hub:SAGE",
    "sage_blackwell_hub": "doubles.hub:SAGE_BLACKWELL",
    "aiter_hub": "doubles.hub:AITER",
}
"""The double of each backend that has one: one line adds one."""


def double_of(backend: str) -> Double:
    """Give a backend's double.

    Raises:
        KeyError: If it has none.
    """
    module, _, attribute = DOUBLES[backend].partition(":")
    found: Double = getattr(importlib.import_module(module), attribute)
    return found


def supposed_environment(double: Double, env: Environment) -> Environment:
    """Give a machine on which the double's packages are installed, and no others that matter."""
    return dataclasses.replace(
        env, packages=dict(double.packages), modules=frozenset(double.found), builds=double.builds, overrides={}
    )


@contextlib.contextmanager
def installed(name: str, double: Double | None = None) -> Iterator[Backend]:
    """Have a backend's adapter run against its double on the CPU, in the whole process, inside the block.

    Args:
        name: The backend.
        double: Another double than its own.

    Example:
        >>> import torch, anyattn
        >>> import doubles
        >>> q = k = v = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16)
        >>> with doubles.installed("flash2"):
        ...     anyattn.attention(q, k, v, backend="flash2").shape
        torch.Size([1, 8, 2, 16])
    """
    double = double_of(name) if double is None else double
    real = registry.get(name)
    assert real is not None
    caps = real.declarations[double.device_type].replace(arch_min=None, arch_max=None)
    made: type[Backend] = type(f"{type(real).__name__}Double", (type(real),), {"declarations": {"cpu": caps}})
    made.is_double = True
    backend = made()
    modules = double.modules()
    before = {module: sys.modules.get(module) for module in modules}
    sys.modules.update(modules)
    try:
        with environment.supposed(supposed_environment(double, environment.detect())), registry.substituted(backend):
            yield backend
    finally:
        packages.FUNCTIONS.pop(name, None)
        for module, found in before.items():
            if found is None:
                sys.modules.pop(module, None)
            else:
                sys.modules[module] = found
        faults.forget_faults()
        defaults.forget()
