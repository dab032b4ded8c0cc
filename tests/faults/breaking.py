"""What the tests of faults share: kernels that break when they are imported or run, in place of a contract double's."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import anyattn
import doubles
from anyattn import environment
from anyattn.selection import registry

NAMES = tuple(doubles.DOUBLES)
"""Every backend that has a contract double: what holds for one holds for all."""

FROM_HUB = tuple(name for name in NAMES if (found := registry.get(name)) is not None and found.downloads)
"""Those whose kernel the package `kernels` fetches: their kernel's own package is never imported."""

WAYS = tuple((name, "import") for name in NAMES) + tuple((name, "get_kernel") for name in FROM_HUB)
"""How each can fail to load: its package at its import; a kernel of the Hub in `kernels.get_kernel` too."""

IMPORT_ERRORS = (
    ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEa"),
    OSError("libcudart.so.12: cannot open shared object file"),
    RuntimeError("Only a single TORCH_LIBRARY can be used to register the namespace\nand more lines"),
    AttributeError("module 'torch.library' has no attribute 'register_fake'"),
    KeyError("HOPPER"),
    AssertionError(),
)
"""What packages raise that were built for another torch, Python or CUDA."""


class Breaks(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: frozenset[str], error: Exception) -> None:
        self.names = names
        self.error = error
        self.tried = 0

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        found = name in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if found else None

    def create_module(self, spec: Any) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        self.tried += 1
        raise self.error


class Fetches:
    """A `kernels.get_kernel` that raises, or gives something else than the kernel; counts how often it is asked."""

    def __init__(self, error: Exception | None = None, gives: Any = None) -> None:
        self.error = error
        self.gives = gives
        self.tried = 0

    def __call__(self, repo_id: str, *, revision: str | None = None, version: int | None = None) -> Any:
        self.tried += 1
        if self.error is not None:
            raise self.error
        return self.gives


@contextlib.contextmanager
def fetching(name: str, get_kernel: Fetches) -> Iterator[Fetches]:
    """Have the package `kernels` count as installed, with another get_kernel than the double's."""
    double = doubles.double_of(name)

    def modules() -> dict[str, types.ModuleType]:
        found = dict(double.modules())
        found["kernels"].get_kernel = get_kernel  # type: ignore[attr-defined]
        return found

    with doubles.installed(name, dataclasses.replace(double, modules=modules)):
        yield get_kernel


@contextlib.contextmanager
def broken_import(name: str, error: Exception, way: str = "import") -> Iterator[Breaks | Fetches]:
    """Have a backend's package count as installed, and raise when it is imported, or asked for the kernel."""
    if way == "get_kernel":
        with fetching(name, Fetches(error)) as asked:
            yield asked
        return
    double = doubles.double_of(name)
    finder = Breaks(frozenset(double.modules()), error)
    before = {module: sys.modules.pop(module) for module in finder.names if module in sys.modules}
    sys.meta_path.insert(0, finder)
    try:
        with doubles.installed(name, dataclasses.replace(double, modules=dict)):
            yield finder
    finally:
        sys.meta_path.remove(finder)
        sys.modules.update(before)


@contextlib.contextmanager
def nothing_installed() -> Iterator[None]:
    """Suppose this machine without any kernel's package, whatever is installed on it."""
    bare = dataclasses.replace(environment.detect(), packages={}, modules=frozenset())
    with environment.supposed(bare):
        yield


@contextlib.contextmanager
def raising(name: str, error: Exception, only: int | None = None) -> Iterator[list[int]]:
    """Have a backend's kernel raise when it runs, or only where the query is so long; gives the lengths it saw."""
    seen: list[int] = []
    with doubles.installed(name) as backend:
        run = type(backend).run

        def fails(plan: Any, query: Tensor, key: Tensor, value: Tensor, parts: Any) -> Any:
            seen.append(plan.spec.seqlen_q)
            if only is None or plan.spec.seqlen_q == only:
                raise error
            return run(plan, query, key, value, parts)

        type(backend).run = staticmethod(fails)  # type: ignore[method-assign]
        yield seen


def admitted(name: str, seqlen: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """Make a call that a backend admits."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        query, key, value = torch.randn(3, 2, seqlen, 2, 64, dtype=dtype)
        if anyattn.explain(query, key, value, backend=name).chosen == name:
            return query, key, value
    raise AssertionError(f"{name} admits none of the calls")


def preferred(*names: str) -> anyattn.attention_backend:
    """Prefer backends in order, quantised ones too."""
    return anyattn.attention_backend(list(names), precision="fp4")
