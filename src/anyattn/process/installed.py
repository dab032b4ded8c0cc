"""What `environment` reads from this machine's files and torch's dispatcher; nothing else calls it.

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
    """Normalise a distribution's name as pip does: `Typing_Extensions` is `typing-extensions`."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


class Packages(Mapping[str, str]):
    """The version of each installed distribution; names are compared as pip compares them.

    Iteration, length and comparison cover the versions given. For this machine any other distribution is looked up when
    it is asked for. The answer is stored, so it stays the same.

    Args:
        given: Versions by name.
        look_up: Returns the version of any other distribution, or None. Pass None for a machine that isn't this one.
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
        """Return a copy with other versions of some distributions."""
        names = {canonical_name(name) for name in versions}
        left = {name: version for name, version in self._given.items() if canonical_name(name) not in names}
        return Packages({**left, **versions}, self._look_up)

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __eq__(self, other: object) -> bool:
        # Look-ups that are still to come may differ, so two objects that look up are equal only if they share them.
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
    """The modules that could be imported: those given; any other of this machine is looked for when it is asked for."""

    _asked: dict[str, bool]

    def __new__(cls, given: Iterable[str]) -> Modules:
        """Make it from the names that are known already; `in` looks for other modules."""
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
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def module_exists(name: str) -> bool:
    """Whether a module's file exists, without importing it or its parents; a namespace without a file doesn't count."""
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
    """Read which features a build of FlashAttention-3 left out, from its configuration module of plain Python.

    Returns:
        Per feature (`"BACKWARD"`, `"HDIM96"`, ...) whether it was left out; None if the module isn't there or has no
        `CONFIG["build_flags"]`.
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
"""torch's kernels that a package can replace for the whole process, each with the operator that shows it."""

_DEFINES_VARLEN = "torch.nn.attention.varlen"
"""The module that defines the operator; code that replaces its kernel has imported it."""

# torch's own registrations name a C++ file, and some of them are boxed too (torch 2.11).
_LINE = re.compile(r"^CUDA: registered at (.*?\.py)(?::\d+)? :: .*\[ boxed \]", re.MULTILINE)


def overrides() -> dict[str, str]:
    """Return which of torch's CUDA kernels are replaced in this process, and by what.

    torch itself knows what `torch.nn.attention.activate_flash_attention_impl` activated. For other packages the
    dispatcher shows the file in which Python registered a kernel in place of torch's.
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
        line = _LINE.search(torch._C._dispatch_dump(operator))
        if line is not None:
            found[kernel] = line[1]
    active = _active_flash()
    # cudnn-frontend's provider is named CUDNN, and doesn't replace the flash kernel.
    if active is not None and (active != "CUDNN" or "native_flash" in found):
        found["native_flash"] = active
    return found


def varlen_is_replaced() -> bool:
    """Whether torch's `varlen_attn` is replaced at this moment; takes well below a microsecond."""
    if _DEFINES_VARLEN not in sys.modules:
        return False
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(_REPLACEABLE["varlen_attn"], "CUDA"))


def _active_flash() -> str | None:
    from torch.nn import attention

    ask = getattr(attention, "current_flash_attention_impl", None)  # since torch 2.11 or so
    return None if ask is None else ask()


_MAIN_LIBRARY = re.compile(r"/libcudnn\.so[.\d]*$")


def cudnn_file() -> str:
    """Return the file of the cuDNN that this process has loaded; empty if it isn't known.

    Only Linux shows it. On other systems, asking would load a library.
    """
    maps = Path("/proc/self/maps")
    if platform.system() != "Linux" or not maps.exists():
        return ""
    lines = maps.read_text().splitlines()
    return next((line.split(maxsplit=5)[5] for line in lines if _MAIN_LIBRARY.search(line)), "")


def driver() -> str:
    """Return the version of the NVIDIA driver; where its file isn't there, the CUDA version that it supports."""
    try:
        found = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    if found is not None:
        return found[0]
    supported: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    return f"for CUDA {supported}"


def processor() -> str:
    """Return the processor's model, or its architecture if the system doesn't show the model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
