"""What setting a policy did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anyattn.policy.layers import Component
from anyattn.policy.matching import Matched
from anyattn.policy.policy import Policy


@dataclass(frozen=True, slots=True)
class Share:
    """What one rule decides in one component.

    Attributes:
        rule: The rule's name.
        component: The component's names in the pipeline and its class.
        layers: The names of the layers that it may decide for, in the order in which they run.
        total: How many attention layers the component has.
    """

    rule: str
    component: str
    layers: tuple[str, ...]
    total: int


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """What setting a policy did; printed, it is a table of rules and components.

    Attributes:
        policy: The policy.
        shares: What each rule decides in each component.
        left: Layers that no rule selects, by component: they are decided as without the policy.
        unreached: Layers that a rule selects and anyattn doesn't reach, each with the reason.
    """

    policy: Policy
    shares: tuple[Share, ...]
    left: tuple[tuple[str, int], ...]
    unreached: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = str(self.policy).splitlines()
        found = [lines[0]]
        for rule, line in zip(self.policy.rules, lines[1:], strict=True):
            shares = [share for share in self.shares if share.rule == rule.name]
            texts = [f"{len(one.layers)} of {one.total} attention layers ({one.component})" for one in shares]
            found += [line, *(f"    {text}" for text in texts or ["no layer"])]
        found += [f"  no rule: {count} attention layers ({component})" for component, count in self.left]
        found += [f"  not reached: {name}: {reason}" for name, reason in self.unreached]
        return "\n".join(found)


def report(policy: Policy, components: Sequence[Component], matched: Matched, selected: set[int]) -> PolicyReport:
    """Describe a policy on components; `selected` holds the identities of the layers that any rule selects."""
    shares, left, unreached = [], [], []
    for component in components:
        for rule in policy.rules:
            names = tuple(layer.names[0] for layer in component.layers if rule in matched.get(layer, ()))
            if names:
                shares.append(Share(rule.name, str(component), names, len(component.layers)))
        missing = [layer for layer in component.layers if layer not in matched]
        unreached += [
            (f"{component}: {layer.names[0]}", layer.reason)
            for layer in missing
            if layer.reason and id(layer.module) in selected
        ]
        count = sum(1 for layer in missing if id(layer.module) not in selected)
        if count:
            left.append((str(component), count))
    return PolicyReport(policy, tuple(shares), tuple(left), tuple(unreached))
