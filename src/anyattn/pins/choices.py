"""What a policy chose for single layers: it beats pins, and may change with the denoising step.

Layers of a model that the same rules select share one `Choice`. Each layer holds the one in force as an attribute. What
was applied to which layers is kept here, so that one policy can be removed and another, which it had overruled, is in
force again.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from anyattn.errors import AnyattnWarning
from anyattn.pins import _in_force, steps
from anyattn.pins.covering import CHOICE, Host, Mark, cover, uncover
from anyattn.pins.spans import Span, parse
from anyattn.types.decision import Preference

Rules = tuple[tuple[str | None, Preference], ...]
"""The rules that select a layer, in order: a span of steps or None, and the preference."""


class Choice(Mark):
    """The rules that select a group of layers; the first whose steps are running is in force.

    Attributes:
        rules: The rules; empty after the policy was removed.
        lead: Whether to warn if the layers run outside of every run whose steps are counted.
        parts: If several policies have rules for the layers, the choice of each, the most specific first.
        sources: The rules that name steps, in words.
        name: The attribute of `_in_force` that gives the number of the rule in force; empty without steps.
    """

    __slots__ = ("_always", "_latest", "_spans", "lead", "name", "parts", "rules", "sources")

    def __init__(self, rules: Rules, host: Host | None, lead: bool) -> None:
        self.lead = lead
        self.parts: tuple[Choice, ...] = ()
        self._set(rules)
        super().__init__(None, False, host)
        self._set(rules)

    def _set(self, rules: Rules) -> None:
        self.rules = rules
        self._latest: tuple[object, Preference | None] = (self, None)  # for which step, and what it gets
        timed = any(span is not None for span, _ in rules)
        self._always: Preference | None = None if timed or not rules else rules[0][1]
        spans: list[Span | None] = [None if span is None else parse(span) for span, _ in rules]
        self._spans = tuple(zip(spans, (wish for _, wish in rules), strict=True)) if timed else ()
        self.sources = ", ".join(wish.source for span, wish in rules if span is not None)
        self.name = _in_force.name_of([span for span, _ in rules]) if timed else ""

    @property
    def preference(self) -> Preference | None:
        """The preference in force in this thread or task at its denoising step; None if no rule is."""
        if self._always is not None or not self._spans:
            return self._always
        clock = steps.current.get()
        if clock is None and self.lead:
            self.lead = False
            _say_no_steps(self.sources)
        now = None if clock is None else clock.now()
        known, wish = self._latest
        if known != now:
            wish = self._at(now)
            self._latest = (now, wish)
        return wish

    @preference.setter
    def preference(self, wish: Preference | None) -> None:
        """Remove every rule: what pins call to clear a mark."""
        if wish is None:
            self._set(())

    def _at(self, now: tuple[int, int] | None) -> Preference | None:
        rules = (wish for span, wish in self._spans if span is None or (now is not None and span.holds(*now)))
        return next(rules, None)

    def traced(self) -> Preference | None:
        """Return the preference in force, in code that torch.compile traces."""
        if not self.name:
            return self._always
        number = getattr(_in_force, self.name)
        if number < 0:
            number = -1 - number
            if self.lead:
                _say_no_steps(self.sources)
        return None if number == len(self.rules) else self.rules[number][1]

    @property
    def is_final(self) -> bool:
        """Whether some rule is in force at every step."""
        return bool(self.rules) and self.rules[-1][0] is None

    @property
    def active(self) -> bool:
        """Whether it still chooses."""
        return bool(self.rules)

    def wishes(self) -> tuple[Preference, ...]:
        """Return the preferences of all its rules."""
        return tuple(wish for _, wish in self.rules)

    def __deepcopy__(self, memo: dict[int, Any]) -> Choice:
        made = _restored(self.rules, self.host, self.lead)
        made.judged = self.judged
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.rules, self.host, self.lead)


def _say_no_steps(sources: str) -> bool:
    warnings.warn(
        f"A layer runs outside of every denoising step that is counted, so {sources} can't apply. Steps are counted in "
        "calls of the Diffusers pipeline that the policy was set on; in a loop of your own, call the model inside "
        "`with anyattn.denoising_step(index, total):`.",
        AnyattnWarning,
        stacklevel=4,
    )
    return True


# See `anyattn.run.traced`: for compiled code the function runs while tracing.
_say_no_steps._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _restored(rules: Rules, host: Host | None, lead: bool) -> Choice:
    choice = Choice(rules, host, lead)
    if host is not None and choice.active:
        host.arrived(choice)
    return choice


class Applied:
    """A policy on one component.

    Attributes:
        target: The object that the policy was set on: a pipeline, or the component itself.
        root: The component.
        layers: The choice for each layer that a rule selects.
        undo: What to call once it is removed.
    """

    def __init__(self, target: Any, root: nn.Module, layers: Mapping[nn.Module, Choice]) -> None:
        self.target = weakref.ref(target)
        self.root = weakref.ref(root)
        self.size = sum(1 for _ in root.modules())
        self.layers = weakref.WeakKeyDictionary(layers)
        self.undo: list[Any] = []

    @property
    def is_own(self) -> bool:
        """Whether it was set on the component itself, which is more specific than on a pipeline."""
        target = self.target()
        return target is not None and target is self.root()


_applied: list[Applied] = []
_lock = threading.RLock()


def apply(new: Sequence[Applied]) -> None:
    """Put policies in force; what was set on the same objects before is removed."""
    with _lock:
        targets = {id(one.target()) for one in new}
        old = [one for one in _applied if one.target() is not None and id(one.target()) in targets]
        _applied[:] = [one for one in _applied if one not in old and one.layers] + list(new)
        _settle([layer for one in (*old, *new) for layer in list(one.layers)])
    _release(old)


def remove(target: Any, parts: Iterable[nn.Module] = ()) -> list[nn.Module]:
    """Remove the policy that was set on an object; return the components that had it.

    Args:
        target: The object.
        parts: Its components. Copies of components whose policy was set on another object lose it too, and so do
            components whose pipeline is gone.
    """
    with _lock:
        old = [one for one in _applied if one.target() is target]
        parts = list(parts)
        old += [one for one in _applied if one.target() is None and any(one.root() is part for part in parts)]
        _take(old)
        found = [root for one in old if (root := one.root()) is not None]
        kept = {id(choice) for one in _applied for choice in list(one.layers.values())}
        for part in parts:
            held = [(layer, layer.__dict__[CHOICE]) for layer in part.modules() if CHOICE in layer.__dict__]
            orphans = [layer for layer, it in held if not any(id(one) in kept for one in (it, *it.parts))]
            if any(layer.__dict__[CHOICE].active for layer in orphans):
                found.append(part)
            for layer in orphans:
                layer.__dict__.pop(CHOICE).clear()
                uncover(layer)
    _release(old)
    return list(dict.fromkeys(found))


def remove_all(host: Host) -> None:
    """Remove every policy from the components of one integration, which undoes by itself what they needed."""
    with _lock:
        _take([one for one in _applied if any(choice.host is host for choice in list(one.layers.values()))])


def rules_of(part: nn.Module) -> tuple[str, ...]:
    """Return the sources of the preferences that policies hold for layers inside a module."""
    marks = [layer.__dict__.get(CHOICE) for layer in part.modules()]
    return tuple(dict.fromkeys(wish.source for mark in marks if mark is not None for wish in mark.wishes()))


def _take(old: list[Applied]) -> None:
    _applied[:] = [one for one in _applied if one not in old and one.layers]
    _settle([layer for one in old for layer in list(one.layers)])
    for one in old:
        for choice in list(one.layers.values()):
            choice.clear()


def _release(old: list[Applied]) -> None:
    """Undo what policies needed; not under the lock, since integrations have locks that are held while this one is."""
    for one in old:
        while one.undo:
            one.undo.pop()()


def _settle(layers: list[nn.Module]) -> None:
    """Give layers the choice of the most specific policy: an inner module's, then an outer's, then a pipeline's."""
    ranked = sorted(enumerate(_applied), key=lambda item: (item[1].is_own, -item[1].size * item[1].is_own, item[0]))
    joined: dict[tuple[int, ...], Choice] = {}
    for layer in layers:
        choices: list[Choice] = []
        for _, one in reversed(ranked):
            if layer in one.layers and not (choices and choices[-1].is_final):
                choices.append(one.layers[layer])
        if choices:
            key = tuple(map(id, choices))
            if key not in joined:
                joined[key] = _joined(choices)
            layer.__dict__[CHOICE] = joined[key]
            cover(layer)
        elif layer.__dict__.pop(CHOICE, None) is not None:
            uncover(layer)


def _joined(choices: list[Choice]) -> Choice:
    """Return one choice for layers that have several: at steps for which a policy has no rule the next one decides."""
    if len(choices) == 1:
        return choices[0]
    first = choices[0]
    made = Choice(tuple(rule for one in choices for rule in one.rules), first.host, any(one.lead for one in choices))
    made.parts, made.owner, made.judged = tuple(choices), first.owner, first.judged
    return made
