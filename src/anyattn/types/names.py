"""How names of backends are compared; the names themselves are in `anyattn.selection.registry`."""

from __future__ import annotations

from collections.abc import Iterable

AUTO = "auto"


def spellings(name: str) -> tuple[str, str]:
    """Return the forms under which a name is looked up: case and the kind of dash don't matter."""
    lowered = name.strip().lower()
    return lowered, lowered.replace("-", "_")


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names that look most like a misspelt one, the likeliest first."""
    import difflib

    return difflib.get_close_matches(name.strip().lower(), list(known), n=4, cutoff=0.4)
