"""The machine as a frozen value, and the only code that inspects the machine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from packaging.version import InvalidVersion, Version

from anyattn.process import installed
from anyattn.process.installed import Modules, Packages

Arch = tuple[int, int]

BUILDS: tuple[str, ...] = ("fa3_fwd_config", "flash_attn_config")
"""The modules of plain Python that list what a build of FlashAttention-3 left out."""

VARIABLES: tuple[str, ...] = ("HF_HUB_OFFLINE", "KERNELS_CACHE", "LOCAL_KERNELS", "TRANSFORMERS_OFFLINE")
"""The environment variables that set where a kernel's code comes from; `anyattn.scopes` reads those of preferences."""


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of device that tensors can be on.

    Attributes:
        type: `"cuda"`, `"cpu"`, `"mps"`, ...
        name: What the driver calls it.
        arch: CUDA compute capability such as `(9, 0)`, or None if it has none.
        index: Its index among devices of its type.
        rocm: Whether a `"cuda"` device is an AMD one.
        units: How many multiprocessors (compute units) it has; 0 if unknown.
    """

    type: str
    name: str = ""
    arch: Arch | None = None
    index: int = 0
    rocm: bool = False
    units: int = 0


@dataclass(frozen=True)
class Environment:
    """Everything outside a call that choosing a backend may depend on.

    Attributes:
        torch: The version of torch.
        devices: The devices, cpu always among them.
        packages: Version of each installed distribution, by name as pip compares names. For this machine each is looked
            up when it is read; `holding` adds those that a report lists.
        cudnn: The version of cuDNN, such as `(9, 19, 0)`, or None.
        cpu: The widest instruction set that torch uses on the processor, such as `"AVX512"`.
        cxx: Whether there is a C++ compiler, which compiled CPU code needs.
        python: The version of Python.
        platform: The operating system and processor.
        modules: The modules whose files exist; looked up in the same way.
        variables: Those of `VARIABLES` that are set.
        builds: Per installed module of `BUILDS`, each feature and whether the build left it out.
        overrides: torch's CUDA kernels that are replaced in this process (`"native_flash"`, `"native_cudnn"`,
            `"varlen_attn"`), and by what: `"FA3"`, `"FA4"`, or the file that registered another kernel.
        cudnn_file: The file of the cuDNN that is loaded; empty if unknown.
        driver: The version of the NVIDIA driver; empty if there is none.
        processor: The processor's model and the number of threads that torch computes with; empty if unknown.
    """

    torch: Version
    devices: tuple[Device, ...] = (Device("cpu"),)
    packages: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cudnn: tuple[int, int, int] | None = None
    cpu: str = ""
    cxx: bool = False
    python: str = ""
    platform: str = ""
    modules: frozenset[str] = frozenset()
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    builds: Mapping[str, Mapping[str, bool]] = dataclasses.field(default_factory=dict)
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cudnn_file: str = ""
    driver: str = ""
    processor: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.packages, Packages):
            object.__setattr__(self, "packages", Packages(self.packages))
        object.__setattr__(self, "variables", MappingProxyType(dict(self.variables)))
        object.__setattr__(self, "overrides", MappingProxyType(dict(self.overrides)))
        builds = {name: MappingProxyType(dict(flags)) for name, flags in self.builds.items()}
        object.__setattr__(self, "builds", MappingProxyType(builds))

    def __hash__(self) -> int:
        mappings = (self.packages, self.variables, self.overrides, *self.builds.values())
        pairs = tuple(tuple(sorted(mapping.items())) for mapping in mappings)
        return hash((self.torch, self.devices, pairs, self.cudnn, self.cpu, self.cxx, self.modules))

    def device(self, device_type: str, index: int | None = None) -> Device | None:
        """Find a device; without an index, the first of its type."""
        if device_type == "meta":
            return Device("meta", "shapes only")
        for device in self.devices:
            if device.type == device_type and index in (None, device.index):
                return device
        return None

    def holding(self, distributions: Iterable[str] = (), modules: Iterable[str] = ()) -> Environment:
        """Return the same machine with these looked up; those that are installed are then listed."""
        packages = {**self.packages, **{name: self.packages[name] for name in distributions if name in self.packages}}
        found = frozenset((*self.modules, *(name for name in modules if name in self.modules)))
        return dataclasses.replace(self, packages=packages, modules=found)

    def supposing(self, packages: Mapping[str, str]) -> Environment:
        """Return the same machine with other versions of some distributions, installed or not."""
        known = self.packages
        found = known.with_others(packages) if isinstance(known, Packages) else Packages({**known, **packages})
        return dataclasses.replace(self, packages=found)

    def version(self, distribution: str) -> Version | None:
        """Return an installed distribution's version, or None if it is absent or invalid."""
        try:
            return Version(self.packages[distribution])
        except (KeyError, InvalidVersion):
            return None

    def left_out(self, config: str, feature: str) -> bool | None:
        """Return whether a build, by its module of `BUILDS`, left a feature out; None if unknown."""
        return self.builds.get(config, {}).get(feature)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for JSON."""
        return {
            "torch": str(self.torch),
            "devices": [dataclasses.asdict(device) for device in self.devices],
            "packages": dict(self.packages),
            "cudnn": None if self.cudnn is None else ".".join(map(str, self.cudnn)),
            "cpu": self.cpu,
            "cxx": self.cxx,
            "python": self.python,
            "platform": self.platform,
            "modules": sorted(self.modules),
            "variables": dict(self.variables),
            "builds": {name: dict(flags) for name, flags in self.builds.items()},
            "overrides": dict(self.overrides),
            "cudnn_file": self.cudnn_file,
            "driver": self.driver,
            "processor": self.processor,
        }


_supposed: list[Environment] = []


def detect() -> Environment:
    """Return this machine, inspected once per process until `forget`; inside `supposed`, return that machine.

    Only `overrides` is read each time, since a program can replace torch's kernels at any moment.
    """
    return _supposed[-1] if _supposed else _with(tuple(sorted(installed.overrides().items())))


def forget() -> None:
    """Have the next `detect` inspect this machine again."""
    _look.cache_clear()
    _with.cache_clear()


@contextlib.contextmanager
def supposed(env: Environment) -> Iterator[None]:
    """Have `detect` return another machine inside the block, in every thread: for tests and contract doubles."""
    _supposed.append(env)
    try:
        yield
    finally:
        _supposed.remove(env)


@functools.lru_cache(maxsize=16)
def _with(overrides: tuple[tuple[str, str], ...]) -> Environment:
    return dataclasses.replace(_look(), overrides=dict(overrides))


@functools.lru_cache(maxsize=1)
def _look() -> Environment:
    cudnn = _cudnn()
    return Environment(
        torch=Version(torch.__version__),
        devices=_devices(),
        packages=Packages({}, installed.version_of),
        cudnn=cudnn,
        cpu=torch.backends.cpu.get_cpu_capability(),
        cxx=any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")),
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        modules=Modules(()),
        variables=variables_now(),
        builds={name: flags for name in BUILDS if (flags := installed.build_flags(name)) is not None},
        cudnn_file="" if cudnn is None else installed.cudnn_file(),
        driver="" if cudnn is None else installed.driver(),
        processor=f"{installed.processor()}, {torch.get_num_threads()} threads",
    )


def variables_now() -> dict[str, str]:
    """Return those of `VARIABLES` that are set now; `detect` returns those set when it inspected the machine."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def _devices() -> tuple[Device, ...]:
    found = [Device("cpu", platform.processor() or platform.machine())]
    if torch.cuda.is_available():
        rocm = torch.version.hip is not None
        for index in range(torch.cuda.device_count()):
            name = torch.cuda.get_device_name(index)
            arch = None if rocm else torch.cuda.get_device_capability(index)
            units = torch.cuda.get_device_properties(index).multi_processor_count
            found.append(Device("cuda", name, arch, index, rocm, units))
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple GPU"))
    for kind in ("xpu", "npu"):
        module = getattr(torch, kind, None)
        if module is not None and module.is_available():
            found.extend(Device(kind, kind, None, index) for index in range(module.device_count()))
    xla = _xla_type()
    if xla:
        found.append(Device("xla", xla))
    return tuple(found)


def _xla_type() -> str:
    """Return what torch_xla runs on (`"TPU"`, `"CPU"`, ...), or why that is unknown; empty if it isn't installed.

    Reading the type starts no XLA runtime; counting devices would, and processes spawned later would fail. Source:
    `torch_xla/runtime.py` of torch_xla 2.9.
    """
    if installed.version_of("torch-xla") is None:
        return ""
    try:
        runtime = importlib.import_module("torch_xla.runtime")
        return str(runtime.device_type() or "unknown")
    except Exception as error:  # noqa: BLE001 - a broken build may raise anything; the device's name shows it
        return f"unknown: torch_xla can't be imported ({type(error).__name__}: {error})"


def _cudnn() -> tuple[int, int, int] | None:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    number: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    if number is None:
        return None
    # cuDNN 9 writes 91900 for 9.19.0; cuDNN 8 wrote 8902 for 8.9.2.
    base = 10000 if number >= 90000 else 1000
    return (number // base, number % base // 100, number % 100)


_PRESETS: Mapping[str, Device] = {
    "cpu": Device("cpu", "cpu"),
    "t4": Device("cuda", "Tesla T4", (7, 5)),
    "a100": Device("cuda", "NVIDIA A100", (8, 0)),
    "rtx3090": Device("cuda", "NVIDIA GeForce RTX 3090", (8, 6)),
    "rtx4090": Device("cuda", "NVIDIA GeForce RTX 4090", (8, 9)),
    "l40s": Device("cuda", "NVIDIA L40S", (8, 9)),
    "h100": Device("cuda", "NVIDIA H100 80GB HBM3", (9, 0), units=132),
    "h200": Device("cuda", "NVIDIA H200", (9, 0), units=132),
    "b200": Device("cuda", "NVIDIA B200", (10, 0)),
    "rtx5090": Device("cuda", "NVIDIA GeForce RTX 5090", (12, 0)),
    "mi300": Device("cuda", "AMD Instinct MI300X", None, 0, True),
    "mps": Device("mps", "Apple GPU"),
    "tpu": Device("xla", "TPU"),
    "npu": Device("npu", "Ascend 910B"),
}

PRESET_NAMES: tuple[str, ...] = tuple(_PRESETS)
"""The names that `preset` knows."""


def preset(name: str, *, packages: Mapping[str, str] | None = None, torch_version: str | None = None) -> Environment:
    """Return another machine, to find out what would be chosen on it.

    Args:
        name: One of `PRESET_NAMES`.
        packages: The distributions to take as installed; by default none.
        torch_version: The version of torch; by default this process's.

    Raises:
        ValueError: If there is no preset of this name.
    """
    device = _PRESETS.get(name.lower())
    if device is None:
        raise ValueError(f"There is no device preset {name!r}; the presets are {', '.join(_PRESETS)}.")
    nvidia = device.type == "cuda" and not device.rocm
    devices = (Device("cpu"),) if device.type == "cpu" else (Device("cpu"), device)
    return Environment(
        torch=Version(torch_version or Version(torch.__version__).base_version),
        devices=devices,
        packages=packages or {},
        cudnn=(9, 19, 0) if nvidia else None,
        cxx=True,
        python=platform.python_version(),
        platform=f"supposed: {name}",
    )
