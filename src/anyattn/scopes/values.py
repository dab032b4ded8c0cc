"""What has been asked for in one scope, as a value."""

from __future__ import annotations

from dataclasses import dataclass

from anyattn.types.decision import Precision, Preference


@dataclass(frozen=True, slots=True)
class Settings:
    """What has been asked for in one scope.

    Attributes:
        context: The wish of the innermost `attention_backend` block.
        override: Whether that wish beats pins.
        pin: The wish pinned to the module whose forward is running.
        precision: The loosest precision allowed, where a block or pin says so.
        routed: Whether the model that is running was given to anyattn by its host's own setter.
    """

    context: Preference | None = None
    override: bool = False
    pin: Preference | None = None
    precision: Precision = "exact"
    routed: bool = False
