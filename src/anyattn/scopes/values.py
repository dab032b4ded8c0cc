"""The settings of one scope, as a value."""

from __future__ import annotations

from dataclasses import dataclass

from anyattn.types.decision import Precision, Preference


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one scope.

    Attributes:
        context: The preference of the innermost `attention_backend` block.
        override: Whether that preference beats pins.
        pin: The preference pinned to the module whose forward is running.
        precision: The loosest precision that a block or pin allows.
        routed: Whether the host's own setter routed the running model to anyattn.
        sdpa: Whether a `replace_sdpa` block sends calls of torch's own function to anyattn.
    """

    context: Preference | None = None
    override: bool = False
    pin: Preference | None = None
    precision: Precision = "exact"
    routed: bool = False
    sdpa: bool = False

    @property
    def pinned_by(self) -> str:
        """What chose the pin, in words: the rule of a policy, or a pin of the model."""
        return "the model's pin" if self.pin is None or self.pin.source == "model" else self.pin.source
