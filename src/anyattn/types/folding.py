"""Group backends by shared reasons, to write each reason once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from anyattn.types.reasons import Reason


class Shared(NamedTuple):
    """Reasons that the same backends have.

    Attributes:
        names: The backends.
        reasons: The reasons that each of them has, and no other backend.
    """

    names: tuple[str, ...]
    reasons: tuple[Reason, ...]


def distinct(reasons: Iterable[Reason]) -> tuple[Reason, ...]:
    """Return reasons without repeats; `device_type` is left out if `no_device` says the same."""
    found = tuple(dict.fromkeys(reasons))
    if any(reason.code == "no_device" for reason in found):
        return tuple(reason for reason in found if reason.code != "device_type")
    return found


def folded(refusals: Iterable[tuple[str, Iterable[Reason]]]) -> tuple[Shared, ...]:
    """Group backends by the reasons that they share, in the order in which each reason is first met.

    Each reason is in one group only; a backend may be in several.

    Args:
        refusals: Each backend with its reasons; one without reasons is left out.
    """
    names_of: dict[Reason, list[str]] = {}
    for name, reasons in refusals:
        for reason in distinct(reasons):
            names_of.setdefault(reason, []).append(name)
    reasons_of: dict[tuple[str, ...], list[Reason]] = {}
    for reason, names in names_of.items():
        reasons_of.setdefault(tuple(names), []).append(reason)
    return tuple(Shared(names, tuple(reasons)) for names, reasons in reasons_of.items())
