"""Policies as values: made in Python, from plain data, from a file, by name, or from the environment."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from anyattn.errors import InvalidSettingError
from anyattn.policy import files, named
from anyattn.policy.rule import Rule, check_keys, nearest

ENV_POLICY: Final = "ANYATTN_POLICY"

_KEYS: Final = ("schema", "name", "rules")
_SCHEMA: Final = 1
"""The version of the plain data and of the file."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Which backend and precision each attention layer of a model gets, at which denoising step.

    The first rule that selects a layer, and whose steps are running, decides its calls. A call that no rule selects is
    decided as without the policy. Set it with `anyattn.set_attention_backend(model, policy)`.

    Policies are values: equal if their rules and names are.

    Attributes:
        rules: The rules in order of precedence; mappings are read as by `Rule.from_dict`.
        name: What reports call it, or None.

    Raises:
        InvalidSettingError: If there are no rules, or two have the same name.

    Example:
        >>> import torch, anyattn
        >>> policy = anyattn.Policy([
        ...     anyattn.Rule("first layers", "native_math", layers=":1"),
        ...     anyattn.Rule("the rest", "auto"),
        ... ])
        >>> layer = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 2).eval()
        >>> print(anyattn.set_attention_backend(model, policy))
        policy:
          first layers: native_math; layers :1
            1 of 2 attention layers (TransformerEncoder)
          the rest: auto
            1 of 2 attention layers (TransformerEncoder)
        >>> with anyattn.record() as calls, torch.no_grad():
        ...     out = model(torch.randn(1, 5, 16))
        >>> [(call.chosen, call.preference.source) for call in calls]
        [('native_math', "policy rule 'first layers'"), ('native', "policy rule 'the rest'")]
        >>> anyattn.reset_attention_backend(model)
    """

    rules: tuple[Rule, ...]
    name: str | None = None

    def __init__(self, rules: Iterable[Rule | Mapping[str, Any]], name: str | None = None) -> None:
        if isinstance(rules, Rule | Mapping | str) or not isinstance(rules, Iterable):
            raise InvalidSettingError(f"A policy takes a list of rules; {rules!r} was given.")
        made = tuple(rule if isinstance(rule, Rule) else Rule.from_dict(rule) for rule in rules)
        if not made:
            raise InvalidSettingError("A policy needs at least one rule; an empty list was given.")
        names = [rule.name for rule in made]
        twice = next((one for one in names if names.count(one) > 1), None)
        if twice is not None:
            raise InvalidSettingError(f"Two rules of a policy are named {twice!r}; give each a name of its own.")
        if name is not None and (not isinstance(name, str) or not name.strip() or not name.isprintable()):
            raise InvalidSettingError(f"A policy's name is one line of text; {name!r} was given.")
        object.__setattr__(self, "rules", made)
        object.__setattr__(self, "name", name)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Policy:
        """Make a policy from plain data: `{"name": ..., "rules": [{"name": ..., "backend": ...}, ...]}`.

        Raises:
            InvalidSettingError: If a key is unknown or missing, or a value has no meaning.
            UnknownBackendError: If no backend has such a name.
        """
        if not isinstance(data, Mapping):
            raise InvalidSettingError(f"A policy is a table with the key 'rules'; {data!r} was given.")
        check_keys(data, _KEYS, "a policy")
        if "rules" not in data:
            raise InvalidSettingError(f"'rules' is missing in a policy; its keys are {sorted(data)}.")
        if data.get("schema", _SCHEMA) != _SCHEMA or isinstance(data.get("schema"), bool):
            raise InvalidSettingError(
                f"This policy has schema {data['schema']!r}; this version of anyattn reads schema {_SCHEMA}."
            )
        return cls(data["rules"], data.get("name"))

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as plain data, which `from_dict` reads to an equal policy."""
        name = {} if self.name is None else {"name": self.name}
        return {"schema": _SCHEMA, **name, "rules": [rule.to_dict() for rule in self.rules]}

    def save(self, path: str | Path) -> Path:
        """Write the policy as TOML, and return the file.

        Args:
            path: A file that ends in `.toml`, or a folder, such as a model's, which gets `anyattn_policy.toml`.
        """
        file = files.file_for(Path(path))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(files.to_toml(self.to_dict()), encoding="utf-8")
        return file

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a policy from a TOML file, or from the `anyattn_policy.toml` in a folder.

        Raises:
            FileNotFoundError: If there is no such file.
            InvalidSettingError: If it isn't TOML, a key is unknown or missing, or a value has no meaning.
            UnknownBackendError: If no backend has such a name.
        """
        file = files.file_for(Path(path))
        data = files.read(file)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise type(error)(f"{file}: {error}") from None

    @classmethod
    def named(cls, name: str) -> Policy:
        """Return a ready-made policy: `"flux"`, `"wan"` or `"hunyuan_video"`.

        Each keeps exact kernels at both ends, of the model and of the denoising run, and allows quantised ones only for
        self-attention in the middle of both. `docs/policies.md` says what each does and how its speed and error are
        measured.

        Raises:
            InvalidSettingError: If there is none of this name.
        """
        if name not in named.POLICIES:
            raise InvalidSettingError(
                f"There is no ready-made policy {name!r}{nearest(str(name), tuple(named.POLICIES))}. "
                f"There are: {', '.join(named.POLICIES)}."
            )
        return cls(named.POLICIES[name], name)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the ready-made policies."""
        return tuple(named.POLICIES)

    @classmethod
    def from_env(cls, default: Policy | None = None, *, environ: Mapping[str, str] | None = None) -> Policy:
        """Return the policy that the environment variable `ANYATTN_POLICY` names.

        The variable holds the name of a ready-made policy, or the path of a TOML file or of a folder with an
        `anyattn_policy.toml`. A name of a ready-made policy wins over a file of that name; write `./flux` for the file.

        Args:
            default: What to return if the variable isn't set.
            environ: The variables; those of the process if left out.

        Raises:
            InvalidSettingError: If the variable isn't set and there is no default, or nothing has this name.
        """
        value = (os.environ if environ is None else environ).get(ENV_POLICY, "").strip()
        if not value:
            if default is not None:
                return default
            raise InvalidSettingError(
                f"{ENV_POLICY} isn't set. Set it to a ready-made policy ({', '.join(named.POLICIES)}) or to the path "
                "of a TOML file, or give Policy.from_env a default."
            )
        if value in named.POLICIES:
            return cls.named(value)
        try:
            return cls.load(value)
        except FileNotFoundError:
            raise InvalidSettingError(
                f"{ENV_POLICY} is {value!r}, which is neither a ready-made policy ({', '.join(named.POLICIES)})"
                f"{nearest(value, tuple(named.POLICIES))} nor a file or folder with a policy."
            ) from None
        except ValueError as error:
            raise type(error)(f"{ENV_POLICY} is {value!r}. {error}") from None

    def __str__(self) -> str:
        title = "policy" if self.name is None else f"policy {self.name!r}"
        return "\n".join([f"{title}:", *(f"  {rule}" for rule in self.rules)])
