"""Which of a layer's rules is in force at the running denoising step, as module attributes.

torch.compile refuses `ContextVar.get`, but reads a module's missing attribute through the module's `__getattr__`
and reads it again before each call; see `anyattn.scopes._in_force`. The attribute's name holds the spans, so equal
rules have equal names: compiled code is compiled once for each rule, and not for each step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

from anyattn.pins import steps
from anyattn.pins.spans import Span, parse

_PREFIX: Final = "rule_at_"
_ALWAYS: Final = "*"


def name_of(spans: Sequence[str | None]) -> str:
    """Return the name of the attribute for rules with these spans of steps; None is any step."""
    return _PREFIX + ",".join(_ALWAYS if span is None else span for span in spans).encode().hex()


@functools.lru_cache(maxsize=1024)
def _spans(name: str) -> tuple[Span | None, ...]:
    text = bytes.fromhex(name.removeprefix(_PREFIX)).decode()
    return tuple(None if part == _ALWAYS else parse(part) for part in text.split(","))


def __getattr__(name: str) -> int:
    """Return the number of the rule in force, or how many there are if none is; -1 minus that outside of every run."""
    if not name.startswith(_PREFIX):
        raise AttributeError(name)
    clock = steps.current.get()
    now = None if clock is None else clock.now()
    spans = _spans(name)
    fits = (number for number, span in enumerate(spans) if span is None or (now is not None and span.holds(*now)))
    number = next(fits, len(spans))
    return number if clock is not None else -1 - number
