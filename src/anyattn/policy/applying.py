"""Put a policy on a model or pipeline, and take it off."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from anyattn.errors import AnyattnWarning, InvalidCallError
from anyattn.pins import choices
from anyattn.pins.choices import Applied, Choice
from anyattn.policy.layers import Component, Family, collect, whole_role
from anyattn.policy.matching import Matched, match, select
from anyattn.policy.policy import Policy
from anyattn.policy.report import PolicyReport, report
from anyattn.sdpa import reaching

IntegrationOf = Callable[[Any], Any]
"""Gives the integration whose library made an object, or None."""

_DENOISING = frozenset(("self", "cross", "joint"))


def apply(policy: Policy, model: Any, integration_of: IntegrationOf) -> PolicyReport:
    """Put a policy on a model or pipeline.

    Raises:
        InvalidCallError: If the object is neither, if a rule that isn't optional selects no layer, or if nothing counts
            the steps that rules name; nothing is changed then.
    """
    parts = _parts(model, integration_of)
    if not parts:
        raise InvalidCallError(
            f"A policy is set on a torch.nn.Module or a Diffusers pipeline; {type(model).__name__} was given."
        )
    if isinstance(model, nn.Module):
        return _put(policy, parts[0][1], parts, integration_of)
    schedules = integration_of(model).schedules
    timed = any(rule.steps is not None for rule in policy.rules)
    if timed and not schedules.schedulers(model):
        raise InvalidCallError(
            f"The policy has rules by denoising step, and {type(model).__name__} has no scheduler whose steps could be "
            "counted. Nothing was changed. Leave `steps` out, or set the policy on the pipeline's model and call it "
            "inside `with anyattn.denoising_step(index, total):`."
        )
    found = _put(policy, model, parts, integration_of)
    (schedules.follow if timed else schedules.leave)(model)
    return found


def remove(model: Any, integration_of: IntegrationOf) -> bool:
    """Take off what was put on a model or pipeline; return whether there was anything."""
    parts = [part for _, part in _parts(model, integration_of)]
    _leave(model, integration_of)
    return bool(choices.remove(getattr(model, "_orig_mod", model), parts))


def replaced(model: Any, integration_of: IntegrationOf) -> None:
    """Take a policy off an object that was given a backend since, and warn of others that beat the backend."""
    _leave(model, integration_of)
    choices.remove(getattr(model, "_orig_mod", model))
    rules = [rule for _, part in _parts(model, integration_of) for rule in choices.rules_of(part)]
    if rules:
        warnings.warn(
            f"The backend that was set waits in layers for which {', '.join(dict.fromkeys(rules))} decides: a policy "
            "beats pins. Give the policy a rule for these layers, or reset it on the object that it was set on.",
            AnyattnWarning,
            stacklevel=3,
        )


def _parts(model: Any, integration_of: IntegrationOf) -> list[tuple[str, nn.Module]]:
    """Return the components of a pipeline with their names; a model is its own, with an empty name."""
    if isinstance(model, nn.Module):
        return [("", getattr(model, "_orig_mod", model))]
    integration = integration_of(model)
    return [] if integration is None else list(integration.policies.components(model))


def _leave(model: Any, integration_of: IntegrationOf) -> None:
    if not isinstance(model, nn.Module) and (integration := integration_of(model)) is not None:
        integration.schedules.leave(model)


def _put(
    policy: Policy, target: Any, parts: Sequence[tuple[str, nn.Module]], integration_of: IntegrationOf
) -> PolicyReport:
    with ExitStack() as failed:
        components = []
        for root, names in _distinct(parts):
            if names != ("",) and not _concerns(policy, whole_role(root, names)):
                continue
            integration = integration_of(root)
            family: Family = reaching.FAMILY if integration is None else integration.policies.FAMILY
            components.append(collect(root, names, family))
            failed.callback(components[-1].undo, True)
        matched = match(policy, components, type(target).__name__)
        new = [_applied(target, component, matched) for component in components]
        used = [one for one in new if one.layers]
        if not used:
            raise InvalidCallError(
                f"This policy would change nothing: no rule selects an attention layer of {type(target).__name__} that "
                "anyattn reaches. Nothing was changed."
            )
        for choice in {choice for one in used for choice in list(one.layers.values())}:
            if choice.host is not None:
                choice.host.arrived(choice)
        failed.pop_all()
    choices.apply(used)
    for one, component in zip(new, components, strict=True):
        if not one.layers:
            component.undo(True)
    selected = {id(layer.module) for rule in policy.rules for part in components for layer in select(rule, part)}
    found = report(policy, components, matched, selected)
    if found.unreached:
        texts = "; ".join(f"{name}: {reason}" for name, reason in found.unreached)
        warnings.warn(f"A policy selects layers that anyattn doesn't reach: {texts}", AnyattnWarning, stacklevel=4)
    return found


def _concerns(policy: Policy, role: str) -> bool:
    """Whether a rule may select layers of a component; an encoder that none does isn't even looked into."""
    if role not in ("text_encoder", "image_encoder"):
        return True
    return any(not rule.roles or role in rule.roles for rule in policy.rules)


def _distinct(parts: Sequence[tuple[str, nn.Module]]) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Join the names of a model that is several components."""
    found: dict[int, tuple[nn.Module, tuple[str, ...]]] = {}
    for name, root in parts:
        before = found[id(root)][1] if id(root) in found else ()
        found[id(root)] = (root, (*before, name))
    return list(found.values())


def _applied(target: Any, component: Component, matched: Matched) -> Applied:
    """Make one choice for each group of layers with the same rules."""
    groups: dict[Any, Choice] = {}
    layers = {}
    for layer in component.layers:
        rules = matched.get(layer)
        if rules is None:
            continue
        lead = isinstance(target, nn.Module) or bool(layer.roles & _DENOISING)
        key = (rules, lead)
        if key not in groups:
            timed = tuple((rule.steps, rule.preference) for rule in rules)
            choice = groups[key] = Choice(timed, component.host, lead)
            choice.owner, choice.judged = weakref.ref(component.root), component.judged
        layers[layer.module] = groups[key]
    found = Applied(target, component.root, layers)
    found.undo.append(functools.partial(component.undo, False))  # it must not hold the model
    return found
