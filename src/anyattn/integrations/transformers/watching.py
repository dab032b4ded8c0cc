"""Pins after they were set: copies, pickles, and models whose implementation is changed."""

from __future__ import annotations

import warnings
from typing import Any, Final

from torch import nn

from anyattn.errors import AnyattnWarning
from anyattn.integrations.transformers import layers, state
from anyattn.integrations.transformers.versions import NAME, UnsupportedVersionError
from anyattn.pins.covering import Mark


class _Switched:
    """The class of nothing: it marks a pin as already warned about."""


class _Host:
    """The integration's callbacks for its pins; one object, pickled by its name."""

    def __reduce__(self) -> str:
        return "HOST"

    def arrived(self, mark: Mark) -> None:
        """Enable the integration for a copied or unpickled pin; if that fails, clear the pin and warn."""
        try:
            state.enable()
        except UnsupportedVersionError as error:
            warnings.warn(
                f"This model was pinned to {mark} when it was saved, and isn't here: {error}",
                AnyattnWarning,
                stacklevel=2,
            )
            mark.clear()

    def watch(self, layer: nn.Module, mark: Mark) -> None:
        """Warn, once a pin, before a layer runs that was given another implementation since."""
        config: Any = getattr(layer, "config", None)
        if config is None or getattr(config, "_attn_implementation", NAME) == NAME or _Switched in mark.judged:
            return
        if layers.asks(layer):
            mark.judged |= {_Switched}
            warnings.warn(
                f"A backend ({mark}) was set on this model, and then its attn_implementation was changed to "
                f"{config._attn_implementation!r}: its attention runs without the backend. Set {NAME!r} again, or call "
                "anyattn.reset_attention_backend on it.",
                AnyattnWarning,
                stacklevel=3,
            )

    def watch_traced(self, kind: type) -> None:
        """Check nothing: layers of Transformers have no processors."""

    def reaches(self, layer: nn.Module) -> bool:
        """Whether attention inside a module reaches anyattn."""
        found = layers.attention_layers(layer)
        return not found or any(one.reached for one in found)


HOST: Final = _Host()
