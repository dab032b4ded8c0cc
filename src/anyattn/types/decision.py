"""The backend chosen for a call, and every other backend with its reasons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from anyattn.types.folding import folded
from anyattn.types.reasons import Conversion, Reason
from anyattn.types.spec import AttentionSpec
from anyattn.types.timings import Timings

Mode = Literal["require", "prefer"]
Precision = Literal["exact", "int8", "fp8", "fp4"]


@dataclass(frozen=True, slots=True)
class Preference:
    """Which backends a user wants.

    Attributes:
        names: Backend names in order; `"auto"` stands for the library's own order.
        mode: `"require"` (one name: it runs or the call fails) or `"prefer"` (the first that admits the call).
        source: Where it was requested: `"backend="`, `"model"`, `"context"`, `"default"`, an environment variable's
            name, or `"built-in"`.
        precision: The lowest precision that lists and `auto` may use.
    """

    names: tuple[str, ...]
    mode: Mode
    source: str
    precision: Precision = "exact"

    def __str__(self) -> str:
        return ", ".join(self.names)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One backend, and its reasons for refusing the call; without reasons it admits the call."""

    name: str
    reasons: tuple[Reason, ...] = ()

    @property
    def admits(self) -> bool:
        """Whether the backend can run the call."""
        return not self.reasons


class Carrier:
    """What a decision holds besides its fields; copies and pickles don't have it."""

    __slots__ = ("_choice", "_judge")
    _choice: object
    _judge: Callable[[], tuple[Candidate, ...]]

    def __getattr__(self, name: str) -> Any:
        # Reached only for a slot that isn't filled yet.
        if name != "candidates":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        found = self._judge()
        object.__setattr__(self, "candidates", found)
        return found


@dataclass(frozen=True, slots=True)
class Decision(Carrier):
    """The choice for one call.

    Backends that the choice didn't need are judged when `candidates` is first read, with the choice's own arguments.

    Attributes:
        spec: The call.
        chosen: The backend that runs it, or None.
        kernel: The function of the backend's kernel.
        conversions: What is done to the call so that the kernel can take it; all of it is exact.
        preference: What was requested, and by which setting.
        basis: What decided: `"required"`, `"preferred"`, `"fixed order"`, `"rule by size and mask"`, or the source of
            the timings: `"measured on this machine"`, `"shipped table for NVIDIA H200"`, ...
        candidates: Every known backend, in order, with every reason against it.
        overruled: A preference that a more specific one overruled, in words.
        origin: Where the chosen kernel's code comes from; empty if it is part of torch.
        timings: The timings behind the choice; None if it wasn't made by timings.
    """

    spec: AttentionSpec
    chosen: str | None
    kernel: str
    conversions: tuple[Conversion, ...]
    preference: Preference
    basis: str
    candidates: tuple[Candidate, ...]
    overruled: str = ""
    origin: str = ""
    timings: Timings | None = None

    def reasons(self, name: str) -> tuple[Reason, ...]:
        """Return the reasons against one candidate.

        Raises:
            KeyError: If there is no candidate of this name.
        """
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate.reasons
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for JSON."""
        return {
            "spec": self.spec.to_dict(),
            "chosen": self.chosen,
            "kernel": self.kernel,
            "conversions": [{"code": c.code, "text": c.text} for c in self.conversions],
            "preference": {
                "names": list(self.preference.names),
                "mode": self.preference.mode,
                "source": self.preference.source,
                "precision": self.preference.precision,
            },
            "basis": self.basis,
            "candidates": [
                {"name": c.name, "admits": c.admits, "reasons": [r.to_dict() for r in c.reasons]}
                for c in self.candidates
            ],
            "overruled": self.overruled,
            "origin": self.origin,
            "timings": None if self.timings is None else self.timings.to_dict(),
        }

    def __str__(self) -> str:
        if self.chosen is None:
            lines = [f"nothing runs {self.spec}"]
        else:
            lines = [f"{self.chosen} ({self.kernel}) runs {self.spec}"]
        source = "the default" if self.preference.source == "built-in" else f"by {self.preference.source}"
        basis = self.basis if self.timings is None else self.timings.told()
        lines.append(f"  requested: {self.preference} ({source}); choice: {basis}")
        if self.timings is not None:
            lines.append(f"  times: {', '.join(map(str, self.timings.in_order()))}")
        if self.origin:
            lines.append(f"  from: {self.origin}")
        if self.overruled:
            lines.append(f"  overruled: {self.overruled}")
        lines += [f"  converted: {conversion}" for conversion in self.conversions]
        others = [candidate for candidate in self.candidates if candidate.name != self.chosen]
        admit = [candidate.name for candidate in others if candidate.admits]
        if admit:
            lines.append(f"  {', '.join(admit)}: {'admits' if len(admit) == 1 else 'admit'} the call")
        for names, reasons in folded((candidate.name, candidate.reasons) for candidate in others):
            lines.append(f"  {', '.join(names)}: {'refuses' if len(names) == 1 else 'refuse'}")
            lines += [f"    {reason}" for reason in reasons]
        return "\n".join(lines)


def carry(decision: Decision, choice: object, judge: Callable[[], tuple[Candidate, ...]]) -> Decision:
    """Store what runs a decision, and what judges its candidates when they are first read."""
    object.__setattr__(decision, "_choice", choice)
    object.__setattr__(decision, "_judge", judge)
    object.__delattr__(decision, "candidates")
    return decision


def carried(decision: Decision) -> object:
    """Return what runs a decision; None if nothing was chosen, or if the decision is a copy."""
    return getattr(decision, "_choice", None)
