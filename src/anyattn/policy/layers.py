"""The attention layers of a model as rules see them: their names, their order and what they are for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from anyattn.pins.covering import Host


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One attention layer of a component.

    Attributes:
        module: The layer.
        names: Its dotted names inside the component: several if the model holds it in several places.
        roles: What it is for.
        reason: Why its attention doesn't reach anyattn; empty if it does.
    """

    module: nn.Module
    names: tuple[str, ...]
    roles: frozenset[str]
    reason: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Component:
    """A model that a policy is applied to, by itself or in a pipeline.

    Attributes:
        root: The model.
        names: Its names in the pipeline; one empty name for a model given by itself.
        layers: Its attention layers, in the order in which it runs them.
        host: What belongs to its marks.
        judged: The classes of processors that its host has checked.
        undo: Undoes what had to be changed so that its layers are reached; True if nothing was set on them after all.
    """

    root: nn.Module
    names: tuple[str, ...]
    layers: tuple[Layer, ...]
    host: Host
    judged: frozenset[type]
    undo: Callable[[bool], None]

    def __str__(self) -> str:
        kind = type(self.root).__name__
        return f"{' and '.join(self.names)} ({kind})" if self.names != ("",) else kind


Reached = Sequence[tuple[nn.Module, str]]
"""The attention layers of a model, each with the reason why anyattn doesn't reach it, or an empty text."""


class Family(Protocol):
    """A host's models, as a policy needs them; each integration has one."""

    @property
    def host(self) -> Host:
        """What belongs to the marks of its layers."""

    def reach(self, root: nn.Module) -> tuple[Reached, frozenset[type], Callable[[bool], None]]:
        """Make a model's layers reach anyattn.

        Returns:
            The layers, the classes of processors that were checked, and the function that undoes what was changed; it
            is called with True if no rule selects a layer. If it raises, nothing is changed.
        """


_NAMES = (
    ("vae", re.compile(r"(^|_)(vae|vqvae|vqgan|movq|autoencoder)(_|$|\d)")),
    ("image_encoder", re.compile(r"(image|vision)_(encoder|model|tower)|safety_checker")),
    ("text_encoder", re.compile(r"(text|language|prompt)_?(encoder|model)|^(bert|mllm|llm|clip)$")),
)
_CLASSES = (
    ("image_encoder", re.compile(r"VisionModel(With\w+)?$")),
    ("text_encoder", re.compile(r"(Text|Encoder)Model(With\w+)?$")),
)
_CROSS = re.compile(r"cross|^attn2$|^multihead_attn$|encoder_attn|encdec|_to_\w+_attn", re.IGNORECASE)
_ORDER = {"down_blocks": 0, "mid_block": 1, "mid_blocks": 1, "up_blocks": 2}
"""Parts of U-Nets in the order in which they run; as modules they are registered in another."""


def role_of_name(name: str) -> str:
    """Return the role that a component's name in a pipeline says; empty if it says none."""
    return next((role for role, pattern in _NAMES if pattern.search(name.lower())), "")


def collect(root: nn.Module, names: tuple[str, ...], family: Family) -> Component:
    """Make a model's layers reach anyattn, and describe them."""
    reached, judged, undo = family.reach(root)
    try:
        known: dict[int, list[str]] = {}
        for name, module in root.named_modules(remove_duplicate=False):
            known.setdefault(id(module), []).append(name)
        whole = whole_role(root, names)
        found = []
        for module, reason in reached:
            own = tuple(known[id(module)])
            found.append(Layer(module, own, _roles(root, module, own, whole), reason))
        return Component(root, names, _ordered(found), family.host, judged, undo)
    except BaseException:
        undo(True)
        raise


def whole_role(root: nn.Module, names: tuple[str, ...]) -> str:
    """Return the role of all layers of a component, by its name or class; empty if it has none."""
    role = next((role for role in map(role_of_name, names) if role), "")
    if role or not _is_from(root, "transformers"):
        return role
    found = next((role for role, pattern in _CLASSES if pattern.search(type(root).__name__)), "")
    return found or ("text_encoder" if names != ("",) else "")


def _ordered(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Put the parts of U-Nets in the order in which they run, and keep the order of all else."""
    first: dict[tuple[str, ...], int] = {}
    keys = []
    for number, layer in enumerate(layers):
        path = layer.names[0].split(".")
        at = next((index for index, part in enumerate(path) if part in _ORDER), None)
        if at is None:
            keys.append((number, 0, number))
        else:
            keys.append((first.setdefault(tuple(path[:at]), number), _ORDER[path[at]], number))
    return tuple(layers[key[2]] for key in sorted(keys))


def _roles(root: nn.Module, layer: nn.Module, names: tuple[str, ...], whole: str) -> frozenset[str]:
    own = _is_from(root, "diffusers") or _is_from(root, "transformers")
    for name in names:
        path = name.split(".")
        inside = [root.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
        if not whole and any(_is_from(module, "diffusers.models.autoencoders") for module in inside):
            whole = "vae"
        if not whole and not own and len(path) > 1:  # a person's own model that holds others
            whole = role_of_name(path[0])
    if whole:
        return frozenset((whole,))
    is_cross = getattr(layer, "is_cross_attention", None)
    if not isinstance(is_cross, bool):
        is_cross = any(_CROSS.search(name.rpartition(".")[2]) for name in names)
        is_cross = is_cross or _CROSS.search(type(layer).__name__) is not None
    if is_cross:
        return frozenset(("cross",))
    joint = any(getattr(layer, name, None) is not None for name in ("added_kv_proj_dim", "add_k_proj"))
    return frozenset(("self", "joint")) if joint else frozenset(("self",))


def _is_from(module: nn.Module, package: str) -> bool:
    return any(f"{base.__module__}.".startswith(f"{package}.") for base in type(module).__mro__)
