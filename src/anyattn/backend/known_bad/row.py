"""One row of the known-bad table."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from anyattn.environment import Arch, Environment
from anyattn.types.reasons import Reason
from anyattn.types.spec import AttentionSpec


@functools.lru_cache(maxsize=256)
def _in_range(specifiers: str, version: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifiers).contains(version)


@dataclass(frozen=True, slots=True)
class KnownBad:
    """One way in which a kernel is wrong or fatal.

    Attributes:
        name: A short, stable name.
        backends: The kernels it concerns, as backend names.
        what: What happens.
        when: The condition on the call, in words.
        holds: The condition, as a function of the spec.
        instead: What to use.
        link: Where it is documented, or how it was seen.
        torch: The versions of torch it concerns.
        cudnn: The versions of cuDNN it concerns.
        device_type: The type of device.
        archs: The major compute capabilities it concerns; empty is all.
        unless_cpu: CPUs with this instruction set are right.
    """

    name: str
    backends: tuple[str, ...]
    what: str
    when: str
    holds: Callable[[AttentionSpec], bool]
    instead: str
    link: str
    torch: str = ""
    cudnn: str = ""
    device_type: str = "cuda"
    archs: tuple[int, ...] = ()
    unless_cpu: str = ""

    def concerns(self, backend: str, env: Environment, spec: AttentionSpec) -> bool:
        """Whether the row concerns this backend on this machine for this call."""
        if backend not in self.backends or spec.device_type != self.device_type:
            return False
        if self.torch and not _in_range(self.torch, env.torch.base_version):
            return False
        if self.cudnn and (env.cudnn is None or not _in_range(self.cudnn, ".".join(map(str, env.cudnn)))):
            return False
        if self.unless_cpu and env.cpu.startswith(self.unless_cpu):
            return False
        if self.archs and not self._arch_matches(env, spec):
            return False
        return self.holds(spec)

    def _arch_matches(self, env: Environment, spec: AttentionSpec) -> bool:
        device = env.device(spec.device_type, spec.device_index)
        arch: Arch | None = None if device is None else device.arch
        return arch is not None and arch[0] in self.archs

    def reason(self) -> Reason:
        """Return the row as a reason for refusing."""
        return Reason("known_bad", self.when, self.what, f"use {self.instead}", self.link)
