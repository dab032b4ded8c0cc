"""The mixin for backends whose kernel comes from the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from anyattn.backend.protocol import Backend
from anyattn.environment import Environment
from anyattn.sources.hub import KERNELS, HubKernel
from anyattn.sources.packages import FUNCTIONS, Package
from anyattn.types.reasons import Reason


class FromHub(Backend):
    """A mixin for adapters whose kernel comes from the Hub; put it before the adapter's class and set `hub`.

    The version of the adapter's own package means nothing here. An adapter that reads it must do so in a method that
    the subclass overrides (see `Flash2.kernel_version`).
    """

    packages: ClassVar[tuple[Package, ...]] = (KERNELS,)
    downloads = True
    hub: ClassVar[HubKernel]

    def availability(self, env: Environment) -> Iterator[Reason]:
        """Yield why the kernel can't be had here; the adapter's own package isn't needed."""
        yield from self.no_device(env)
        yield from self.hub.reasons(env)

    def origin(self, env: Environment) -> str:
        """Return the kernel's revision, or the local folder used instead."""
        return self.hub.origin(env)

    def load(self) -> None:
        """Import the kernel, and download it before if it isn't on this machine."""
        FUNCTIONS[self.name] = self.prepare(self.hub.load(self.name))
