"""One rule of a policy: which layers and steps it selects, and what they get."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

from anyattn.errors import InvalidSettingError, UnknownBackendError
from anyattn.pins.spans import parse
from anyattn.selection import registry
from anyattn.selection.preferences import make_preference
from anyattn.types.decision import Precision, Preference

ROLES: Final = ("self", "cross", "joint", "vae", "text_encoder", "image_encoder")
"""What an attention layer can be for; a joint layer is a self-attention layer too."""

Names = str | Sequence[str]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of a policy: the layers and denoising steps that it selects, and their backend.

    A selector that is left out selects everything. Several selectors must all agree.

    Attributes:
        name: What `record`, `explain` and errors call it: one line of text.
        backend: A name, which is required, or `"auto"` or a list in order of preference, as elsewhere.
        precision: The loosest precision that lists and `auto` may use: `"exact"`, `"int8"`, `"fp8"` or `"fp4"`.
        role: One or several of `"self"`, `"cross"` and `"joint"` (layers of the model that denoises, or of any model
            that has no other role), `"vae"`, `"text_encoder"` and `"image_encoder"` (all layers of such a component).
            `"joint"` are self-attention layers with projections of their own for text tokens; `"self"` includes them.
        modules: One or several patterns, as of a shell, for the dotted name of a layer or of a module that it is in:
            `"transformer_blocks.*.attn1"`, `"vae"`. In a pipeline a name may start with its component's name.
        layers: Which of the layers that `role` and `modules` select, counted in each component in the order in which it
            runs them: a slice such as `"2:-2"`, `"0.25:0.75"` (fractions of their number) or `"::2"`, or one index.
        steps: Which denoising steps, written like `layers`. Outside of counted steps the rule doesn't apply.
        optional: Whether the rule may select no layer at all of a model; otherwise that is an error.

    Raises:
        InvalidSettingError: If a value has no meaning.
        UnknownBackendError: If no backend has such a name.

    Example:
        >>> import anyattn
        >>> rule = anyattn.Rule(
        ...     "middle", ["sage", "auto"], precision="fp8", role="self", layers="2:-2", steps="0.2:0.8"
        ... )
        >>> print(rule)
        middle: sage, auto; precision fp8; role self; layers 2:-2; steps 0.2:0.8
    """

    name: str
    backend: Names
    precision: Precision = "exact"
    role: Names | None = None
    modules: Names | None = None
    layers: str | None = None
    steps: str | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        name: object = self.name
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise InvalidSettingError(f"A policy rule needs a name, as one line of text; {name!r} was given.")
        for key in ("backend", "role", "modules"):
            object.__setattr__(self, key, self._names(key))
        for key in ("layers", "steps"):
            object.__setattr__(self, key, self._span(key))
        if self.precision not in get_args(Precision):
            raise self._wrong("precision", f"one of {_listed(get_args(Precision))}", self.precision)
        if not isinstance(self.optional, bool):
            raise self._wrong("optional", "true or false", self.optional)
        for role in self.roles:
            if role not in ROLES:
                raise self._wrong("role", f"of {_listed(ROLES)}", role, nearest(role, ROLES))
        for one in _several(self.backend):
            try:
                registry.resolve_name(one)
            except UnknownBackendError as error:
                raise UnknownBackendError(f"Policy rule {self.name!r}: {error}") from None

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that it selects; empty for every role."""
        return _several(self.role)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of names that it selects; empty for every name."""
        return _several(self.modules)

    @property
    def preference(self) -> Preference:
        """What it asks for, with canonical names."""
        backend = self.backend if isinstance(self.backend, str) else tuple(self.backend)
        return make_preference(backend, f"policy rule {self.name!r}", self.precision)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rule:
        """Make a rule from plain data: the keys are the attributes.

        Raises:
            InvalidSettingError: If a key is unknown or missing, or a value has no meaning.
            UnknownBackendError: If no backend has such a name.
        """
        if not isinstance(data, Mapping):
            raise InvalidSettingError(f"A policy rule is a table of keys and values; {data!r} was given.")
        known = [field.name for field in dataclasses.fields(cls)]
        where = f"policy rule {data['name']!r}" if "name" in data else "a policy rule"
        check_keys(data, known, where)
        missing = [key for key in ("name", "backend") if key not in data]
        if missing:
            raise InvalidSettingError(f"{_listed(missing)} is missing in {where}; {dict(data)!r} was given.")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes that differ from their defaults as plain data."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                found[field.name] = list(value) if isinstance(value, tuple) else value
        return found

    def __str__(self) -> str:
        parts = [f"{self.name}: {self.preference}"]
        for key, value in self.to_dict().items():
            if key not in ("name", "backend", "optional"):
                parts.append(f"{key} {', '.join(_several(value))}")
        return "; ".join([*parts, "optional"] if self.optional else parts)

    def _names(self, key: str) -> str | tuple[str, ...] | None:
        value: Any = getattr(self, key)
        if value is None and key != "backend":
            return None
        names = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not names or not all(isinstance(one, str) and one and one.isprintable() for one in names):
            raise self._wrong(key, "a name or a list of names", value)
        return value if isinstance(value, str) else names

    def _span(self, key: str) -> str | None:
        value: Any = getattr(self, key)
        if value is None:
            return None
        text = value
        if isinstance(value, slice):
            ends = ["" if end is None else str(end) for end in (value.start, value.stop, value.step)]
            text = ":".join(ends if value.step is not None else ends[:2])
        elif type(value) is int:
            text = str(value)
        if not isinstance(text, str):
            raise self._wrong(key, 'a slice such as "2:-2" or "0.2:0.8", or one index', value)
        try:
            parse(text)
        except ValueError as error:
            raise self._wrong(key, 'a slice such as "2:-2" or "0.2:0.8", or one index', value, f": {error}") from None
        return text

    def _wrong(self, key: str, needed: str, given: object, more: str = "") -> InvalidSettingError:
        return InvalidSettingError(f"Policy rule {self.name!r}: {key} must be {needed}; {given!r} was given{more}.")


def check_keys(data: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Refuse keys that have no meaning.

    Raises:
        InvalidSettingError: If there is one; it names the nearest known key.
    """
    for key in data:
        if key not in known:
            raise InvalidSettingError(
                f"{key!r} in {where} is unknown{nearest(str(key), known)}. Known keys: {', '.join(known)}."
            )


def nearest(word: str, known: Sequence[str]) -> str:
    """Return a question for what was perhaps meant; empty if nothing is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _several(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (str(value),)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
