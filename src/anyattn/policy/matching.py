"""Which rules select which layers of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence

from anyattn.errors import InvalidCallError
from anyattn.pins.spans import parse
from anyattn.policy.layers import Component, Layer
from anyattn.policy.policy import Policy
from anyattn.policy.rule import Rule

Matched = dict[Layer, tuple[Rule, ...]]
"""The rules that may decide for each layer, in order; layers that none selects are left out."""


def match(policy: Policy, components: Sequence[Component], target: str) -> Matched:
    """Return the rules for each layer that anyattn reaches.

    Raises:
        InvalidCallError: If a rule that isn't optional selects no layer, or none that earlier rules leave to it.
    """
    found: dict[Layer, list[Rule]] = {}
    for rule in policy.rules:
        selected = [layer for component in components for layer in select(rule, component)]
        reached = [layer for layer in selected if not layer.reason]
        used = False
        for layer in reached:
            rules = found.setdefault(layer, [])
            if not rules or rules[-1].steps is not None:  # a rule for every step leaves nothing to later ones
                rules.append(rule)
                used = True
        if not used and not rule.optional:
            raise InvalidCallError(_nothing(rule, selected, reached, components, target))
    return {layer: tuple(rules) for layer, rules in found.items()}


def select(rule: Rule, component: Component) -> list[Layer]:
    """Return the layers of a component that a rule selects at some denoising step."""
    roles = frozenset(rule.roles)
    layers = [layer for layer in component.layers if not roles or roles & layer.roles]
    if rule.patterns:
        layers = [layer for layer in layers if _is_named(layer, component, rule.patterns)]
    if rule.layers is None:
        return layers
    return [layers[index] for index in parse(rule.layers).range(len(layers))]


def _is_named(layer: Layer, component: Component, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits a name of the layer, or of a module that it is in."""
    names = set(_enclosing(layer, component))
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _enclosing(layer: Layer, component: Component) -> Iterator[str]:
    for name in layer.names:
        parts = name.split(".") if name else []
        for depth in range(len(parts) + 1):
            inner = ".".join(parts[:depth])
            yield inner
            for outer in component.names:
                yield f"{outer}.{inner}".strip(".")


def _nothing(
    rule: Rule, selected: Sequence[Layer], reached: Sequence[Layer], components: Sequence[Component], target: str
) -> str:
    after = "Nothing was changed. Correct the rule, or set optional=True if models may lack such layers."
    if reached:
        return (
            f"Policy rule {rule.name!r} would never decide: earlier rules decide for every layer of {target} that it "
            f"selects, at every step. {after[:19]} Put it before them."
        )
    if selected:
        reasons = "; ".join(dict.fromkeys(layer.reason for layer in selected))
        return (
            f"Policy rule {rule.name!r} selects {len(selected)} attention layers of {target}, and anyattn reaches none "
            f"of them: {reasons}. {after}"
        )
    has = "; ".join(map(_described, components)) or "no component with attention"
    what = str(rule)[len(rule.name) + 2 :]
    return f"Policy rule {rule.name!r} ({what}) selects no attention layer of {target}. It has: {has}. {after}"


def _described(component: Component) -> str:
    roles = [role for layer in component.layers for role in sorted(layer.roles, reverse=True)]
    counts = ", ".join(f"{roles.count(role)} {role}" for role in dict.fromkeys(roles))
    names = [layer.names[0] for layer in component.layers]
    shown = ", ".join(names[:2]) + (f", ... {names[-1]}" if len(names) > 2 else "")
    return f"{component}: {len(names)} layers" + (f" ({counts}), named {shown}" if names else "")
