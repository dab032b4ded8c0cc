"""What is known of each backend before anything is tried: its package, its reasons, and what would fix them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from anyattn.backend.known_bad import table
from anyattn.backend.protocol import Backend
from anyattn.environment import Environment
from anyattn.selection import registry
from anyattn.types.reasons import Reason
from anyattn.types.spec import AttentionSpec

BESIDE = ("diffusers", "transformers", "triton")
"""Distributions that no choice depends on, and that reports list too."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One known backend.

    Attributes:
        name: Its name.
        family: The group that shares a kernel source; `"third party"` for other packages' backends.
        package: The distribution its kernel comes in.
        found: That distribution's version here; empty if it isn't installed.
        wanted: What it needs, in words.
        install: The command that installs that; empty if it comes with torch.
        exact: Whether it computes in the inputs' precision.
        reasons: Why it isn't usable here; None if only importing it would tell (another package's).
        double: Whether a contract double stands for its kernel in this process.
        downloads: Whether its kernel may be downloaded, so that it is tried only if it is named.
        origin: Where its kernel's code comes from.
    """

    name: str
    family: str
    package: str
    found: str
    wanted: str
    install: str
    exact: bool
    reasons: tuple[Reason, ...] | None
    double: bool = False
    downloads: bool = False
    origin: str = ""


def listed(env: Environment) -> tuple[Listed, ...]:
    """List every known backend, without importing any kernel or any other package's backend."""
    third = {point.name: point for point in importlib.metadata.entry_points(group=registry.ENTRY_POINT_GROUP)}
    rows = [_ours(backend, env) for _, backend in registry.known(registry.built_in_names())]
    for name in registry.third_parties():
        origin = third[name].dist if name in third else None
        package, version = (origin.name, origin.version) if origin is not None else ("", "")
        wanted = package or "registered in this process"
        rows.append(Listed(name, "third party", package, version, wanted, "", True, None))
    return tuple(rows)


def machine(env: Environment) -> Environment:
    """Return a machine with what a report lists of it looked up."""
    return env.holding((*registry.distributions(), *BESIDE), registry.modules())


def _ours(backend: Backend, env: Environment) -> Listed:
    names = [name for package in backend.packages for name in (package.distribution, *package.others) if name]
    package = next((name for name in names if name in env.packages), next(iter(names), "torch"))
    return Listed(
        backend.name,
        backend.family,
        package,
        str(env.torch) if package == "torch" else env.packages.get(package, ""),
        backend.needs,
        backend.install,
        all(caps.exact for caps in backend.declarations.values()),
        tuple(backend.availability(env)),
        backend.is_double,
        backend.downloads,
        backend.origin(env),
    )


def cure(reasons: Sequence[Reason], install: str, env: Environment) -> str:
    """Return what would make a backend usable: a command if there is one; empty if nothing helps."""
    codes = {reason.code for reason in reasons}
    fixes = [reason.hint for reason in reasons if reason.code in ("wrong_version", "broken_import") and reason.hint]
    if fixes:
        return "; ".join(dict.fromkeys(fixes))
    if "not_installed" in codes and install:
        return install
    hints = [reason.hint for reason in reasons if reason.hint]
    wants_cuda = any(reason.code == "no_device" and "cuda" in reason.need for reason in reasons)
    if wants_cuda and env.torch.local == "cpu":
        # The commonest cause of all: pip's CPU wheel on a machine with an NVIDIA GPU.
        hints.append("this torch is built for CPUs only; with an NVIDIA GPU, install the build for it (pytorch.org)")
    return "; ".join(dict.fromkeys(hints))


@dataclass(frozen=True, slots=True)
class KnownBadReport:
    """A kernel that is known to be wrong or fatal on a machine like this one.

    Attributes:
        name: A short, stable name.
        backends: The kernels it concerns.
        device: The type of device.
        when: The condition on the call.
        what: What happens.
        instead: What to use.
        link: Where it is documented, or how it was seen.
    """

    name: str
    backends: tuple[str, ...]
    device: str
    when: str
    what: str
    instead: str
    link: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for JSON."""
        return {**dataclasses.asdict(self), "backends": list(self.backends)}


def known_bad_here(env: Environment) -> tuple[KnownBadReport, ...]:
    """Return the rows of the known-bad table that concern a machine, whatever the call."""
    found = []
    for row in table.TABLE:
        # The row's own test of versions and devices decides; only its condition on the call is left open.
        any_call = dataclasses.replace(row, holds=lambda spec: True)
        places = [_any_spec(device.type, device.index) for device in env.devices]
        if any(any_call.concerns(backend, env, spec) for backend in row.backends for spec in places):
            found.append(
                KnownBadReport(row.name, row.backends, row.device_type, row.when, row.what, row.instead, row.link)
            )
    return tuple(found)


def _any_spec(device_type: str, index: int) -> AttentionSpec:
    return AttentionSpec(1, 1, 1, 1, 1, 8, 8, torch.float32, device_type, 1.0, index)
