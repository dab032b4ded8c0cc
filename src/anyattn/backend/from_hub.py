"""The mixin of backends whose kernel comes from the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from anyattn.backend.protocol import Backend
from anyattn.environment import Environment
from anyattn.sources.hub import KERNELS, HubKernel
from anyattn.sources.packages import FUNCTIONS, Package
from anyattn.types.reasons import Reason


class FromHub(Backend):
    """A mixin: an adapter whose kernel comes from the Hub; put it before the adapter's class and set `hub`.

    What the adapter reads from its own package's version must be left to a method that the subclass overrides, since
    that package, installed or not, is not what is called (see `Flash2.kernel_version`).
    """

    packages: ClassVar[tuple[Package, ...]] = (KERNELS,)
    downloads = True
    hub: ClassVar[HubKernel]

    def availability(self, env: Environment) -> Iterator[Reason]:
        """Yield why the kernel isn't to be had; that a package of the same kernel is missing is no ground."""
        yield from self.no_device(env)
        yield from self.hub.reasons(env)

    def origin(self, env: Environment) -> str:
        """Say which revision, or which local folder in its place."""
        return self.hub.origin(env)

    def load(self) -> None:
        """Fetch the kernel where it isn't on this machine, and import it."""
        FUNCTIONS[self.name] = self.prepare(self.hub.load(self.name))
