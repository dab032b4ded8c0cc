"""Errors of calls that no requested backend runs: the reasons, the backends that would, and the list to write."""

from __future__ import annotations

import json
from collections.abc import Sequence

from anyattn.backend.protocol import Backend
from anyattn.environment import detect
from anyattn.errors import AnyattnError, BackendUnavailableError, UnsupportedCallError
from anyattn.selection import registry
from anyattn.selection.resolve import order
from anyattn.types.decision import Candidate, Decision, Preference
from anyattn.types.folding import distinct, folded
from anyattn.types.names import AUTO
from anyattn.types.reasons import Reason

_UNAVAILABLE = frozenset(("not_installed", "wrong_version", "broken_import", "setting", "no_device"))

_SPELLED = {
    "backend=": "backend={}",
    "model": "anyattn.set_attention_backend(model, {})",
    "context": "anyattn.attention_backend({})",
    "default": "anyattn.set_default_backend({})",
    "built-in": "anyattn.set_default_backend({})",
}


def listed(head: str, reasons: Sequence[Reason]) -> str:
    """Write a headline and reasons, each on a line."""
    return "\n".join([head, *(f"  - {reason}" for reason in reasons)])


def refusal(decision: Decision) -> AnyattnError:
    """Return the error of a decision that chose nothing."""
    wish, after = decision.preference, _what_would_run(decision)
    if wish.mode == "require":
        reasons = distinct(decision.reasons(wish.names[0]))
        missing = tuple(reason for reason in reasons if reason.code in _UNAVAILABLE)
        if missing:
            text = listed(f"The attention backend {_requested(wish)} can't be used here:", missing)
            return BackendUnavailableError(text + after, backend=wish.names[0], reasons=missing)
        text = f"The attention backend {_requested(wish)} refuses the call {decision.spec}:"
        return UnsupportedCallError(listed(text, reasons) + after, decision=decision)
    groups = folded((candidate.name, candidate.reasons) for candidate in _tried(decision))
    head = f"No backend of {_requested(wish)} runs the call {decision.spec}{':' if groups else '.'}"
    lines = [head, *(listed(f"{', '.join(names)}:", reasons) for names, reasons in groups)]
    return UnsupportedCallError("\n".join(lines) + after, decision=decision)


def _requested(wish: Preference) -> str:
    return f"{wish} ({'the default' if wish.source == 'built-in' else f'requested by {wish.source}'})"


def _tried(decision: Decision) -> tuple[Candidate, ...]:
    """Return the candidates that were requested, by name or through `auto`."""
    wish = decision.preference
    names = set(wish.names)
    if AUTO in names:
        at_hand = [found for name, found in _backends(decision) if not found.downloads]
        names |= set(order(decision.spec.device_type, at_hand, decision.spec)[0])
    return tuple(candidate for candidate in decision.candidates if candidate.name in names and candidate.reasons)


def _what_would_run(decision: Decision) -> str:
    """Say which backends would run the call, and the list that adds one of them to those requested."""
    wish = decision.preference
    admit = [candidate.name for candidate in decision.candidates if candidate.admits]
    if not admit:
        return "\nNo other backend runs it either; anyattn.explain lists every reason."
    text = f"\nBackends that would run it: {', '.join(admit)}."
    first = _first_of(admit, decision)
    if not first:
        return text
    return f"{text}\nTo fall back to {first}, write: {spelled(wish, (*wish.names, first))}"


def _first_of(admit: Sequence[str], decision: Decision) -> str:
    """Return the backend that a list should end with: an exact one that needs no download."""
    spec, env = decision.spec, detect()
    backends = {name: found for name, found in _backends(decision) if name in admit}
    for name in dict.fromkeys(("native", *order(spec.device_type, list(backends.values()), spec)[0], *admit)):
        backend = backends.get(name)
        caps = None if backend is None else backend.capabilities(spec, env)
        if backend is not None and caps is not None and caps.exact and not backend.downloads:
            return name
    return ""


def _backends(decision: Decision) -> list[tuple[str, Backend]]:
    return registry.known(candidate.name for candidate in decision.candidates)


def spelled(wish: Preference, names: Sequence[str]) -> str:
    """Write a list of backends as code for the place of the request: an argument, a function or a variable."""
    text = json.dumps(list(names))
    if wish.source in _SPELLED:
        return _SPELLED[wish.source].format(text)
    return f"{wish.source}={','.join(names)}" if wish.source.isupper() else f"backend={text} in {wish.source}"
