"""Pins of modules that belong to no host: they reach torch's function too, and copies do."""

from __future__ import annotations

from typing import Final

from torch import nn

from anyattn.pins.covering import Mark
from anyattn.sdpa import replacing


class _Host:
    """The callbacks for pins of plain modules; one object, pickled by its name."""

    def __reduce__(self) -> str:
        return "HOST"

    def arrived(self, mark: Mark) -> None:
        """Have torch's function replaced for a copied or unpickled pin."""
        replacing.hold(mark)

    def watch(self, layer: nn.Module, mark: Mark) -> None:
        """Note the class of a layer's processor: there is nothing to check."""
        mark.judged |= {type(getattr(layer, "processor", None))}

    def watch_traced(self, kind: type) -> None:
        """Check nothing."""

    def reaches(self, layer: nn.Module) -> bool:
        """Whether the pin is in force where a layer runs: always."""
        return True


HOST: Final = _Host()
JUDGED: Final = frozenset((type(None),))
"""The classes of processors that need no check: that of a layer without one."""
