"""What `environment` asks this machine's files and torch's dispatcher; nothing else calls it.

Sources: `hopper/setup.py` of flash-attention (flash_attn_config), torch 2.13 `torch/nn/attention/_registry.py` (the
flash kernel of the whole process), cudnn-frontend 1.32 `cudnn/torch` (by reading).
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch


def canonical_name(distribution: str) -> str:
    """Write a distribution's name as pip compares it: `Typing_Extensions` is `typing-extensions`."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


class Packages(Mapping[str, str]):
    """The version of each installed distribution, by name as pip compares names.

    Those given are what it holds, compares and lists. Of this machine it also knows every other distribution, which it
    looks up when it is asked for and remembers, so that the answer stays the same.

    Args:
        given: Versions by name.
        look_up: Gives the version of a distribution that isn't among them, or None; None for a made-up machine.
    """

    def __init__(self, given: Mapping[str, str], look_up: Callable[[str], str | None] | None = None) -> None:
        self._given = dict(given)
        self._canonical = {canonical_name(name): version for name, version in given.items()}
        self._look_up = look_up
        self._asked: dict[str, str | None] = {}

    def __getitem__(self, name: str) -> str:
        plain = canonical_name(name)
        found = self._canonical.get(plain)
        if found is None and self._look_up is not None:
            if plain not in self._asked:
                self._asked[plain] = self._look_up(plain)
            found = self._asked[plain]
        if found is None:
            raise KeyError(name)
        return found

    def with_others(self, versions: Mapping[str, str]) -> Packages:
        """Return what this holds and knows, with other versions of some distributions."""
        names = {canonical_name(name) for name in versions}
        left = {name: version for name, version in self._given.items() if canonical_name(name) not in names}
        return Packages({**left, **versions}, self._look_up)

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __eq__(self, other: object) -> bool:
        # What a machine answers later isn't known now: two looks at it aren't equal.
        if isinstance(other, Packages) and (self._look_up or other._look_up):
            return self._asked is other._asked
        return Mapping.__eq__(self, other)

    def __hash__(self) -> int:
        return hash(tuple(sorted(self._given.items())))

    def __len__(self) -> int:
        return len(self._given)

    def __repr__(self) -> str:
        return repr(self._given)


class Modules(frozenset[str]):
    """The modules that could be imported: those given, and every other of this machine when it is asked for."""

    _asked: dict[str, bool]

    def __new__(cls, given: Iterable[str]) -> Modules:
        """Make it of the names that are known already; `in` looks for the others."""
        made = super().__new__(cls, given)
        made._asked = {}
        return made

    def __contains__(self, name: object) -> bool:
        if super().__contains__(name) or not isinstance(name, str):
            return super().__contains__(name)
        if name not in self._asked:
            self._asked[name] = module_exists(name)
        return self._asked[name]


def version_of(distribution: str) -> str | None:
    """Give the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def module_exists(name: str) -> bool:
    """Whether a module's file is there, without importing it or its parents; a bare namespace counts as absent."""
    path: list[str] | None = None
    spec = None
    for part in _prefixes(name):
        spec = importlib.machinery.PathFinder.find_spec(part, path)
        if spec is None:
            return False
        path = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    return spec is not None and spec.origin is not None


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


_FLAG = re.compile(r"FLASH_?ATTENTION_DISABLE_(\w+)")


def build_flags(config: str) -> dict[str, bool] | None:
    """Read what a build of FlashAttention-3 left out, from the module of plain Python beside it.

    Returns:
        Per feature (`"BACKWARD"`, `"HDIM96"`, ...) whether it was left out; None where the module isn't there or
        doesn't hold `CONFIG["build_flags"]`.
    """
    try:
        held: Any = importlib.import_module(config).CONFIG["build_flags"]
        # Two spellings: FLASHATTENTION_DISABLE_BACKWARD and FLASH_ATTENTION_DISABLE_HDIMDIFF64.
        flags = {found[1]: value for name, value in held.items() if (found := _FLAG.fullmatch(name))}
    except (ImportError, AttributeError, KeyError, TypeError, SyntaxError):
        return None
    return {name: value for name, value in flags.items() if isinstance(value, bool)}


_REPLACEABLE: Mapping[str, str] = {
    "native_flash": "aten::_flash_attention_forward",
    "native_cudnn": "aten::_scaled_dot_product_cudnn_attention",
    "varlen_attn": "torch_attn::_varlen_attn",
}
"""The kernels of torch's that a package can replace for the whole process, each with the operator that tells."""

_DEFINES_VARLEN = "torch.nn.attention.varlen"
"""The module that defines the operator; whoever replaces its kernel has imported it."""

# torch's own registrations name a C++ file, and some of them are boxed too (torch 2.11).
_LINE = re.compile(r"^CUDA: registered at (.*?\.py)(?::\d+)? :: .*\[ boxed \]", re.MULTILINE)


def overrides() -> dict[str, str]:
    """Say which of torch's CUDA kernels are replaced in this process, and by what.

    `torch.nn.attention.activate_flash_attention_impl` says so itself; of other packages the dispatcher shows the file
    in which Python registered a kernel in place of torch's.
    """
    found = {}
    for kernel, operator in _REPLACEABLE.items():
        if kernel == "varlen_attn" and _DEFINES_VARLEN not in sys.modules:
            continue
        try:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA"):
                continue
        except RuntimeError:
            continue  # this torch has no such operator
        told = _LINE.search(torch._C._dispatch_dump(operator))
        if told is not None:
            found[kernel] = told[1]
    active = _active_flash()
    # cudnn-frontend's provider calls itself CUDNN, and leaves the flash kernel alone.
    if active is not None and (active != "CUDNN" or "native_flash" in found):
        found["native_flash"] = active
    return found


def varlen_is_replaced() -> bool:
    """Whether torch's packed entry is replaced at this moment; takes well below a microsecond."""
    if _DEFINES_VARLEN not in sys.modules:
        return False
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(_REPLACEABLE["varlen_attn"], "CUDA"))


def _active_flash() -> str | None:
    from torch.nn import attention

    ask = getattr(attention, "current_flash_attention_impl", None)  # since torch 2.11 or so
    return None if ask is None else ask()


_MAIN_LIBRARY = re.compile(r"/libcudnn\.so[.\d]*$")


def cudnn_file() -> str:
    """Give the file of the cuDNN that this process has loaded; empty where that can't be told.

    Linux shows it. Elsewhere there is no way to ask that loads nothing.
    """
    maps = Path("/proc/self/maps")
    if platform.system() != "Linux" or not maps.exists():
        return ""
    lines = maps.read_text().splitlines()
    return next((line.split(maxsplit=5)[5] for line in lines if _MAIN_LIBRARY.search(line)), "")
