"""Scopes, pins and blocks as constants that traced code can hold, and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from anyattn.scopes import scopes
from anyattn.scopes.scopes import Entered, Scope, scope_for
from anyattn.scopes.values import Settings
from anyattn.types.decision import Mode, Precision, Preference

ROUTE: Final[Entered] = ("route", (), "prefer", "", "exact", False)
"""What compiled code enters in a model that its host's own setter routed to anyattn."""


def _text(settings: Settings) -> str:
    """Write settings as text that `scope_of_token` reads back."""
    wishes = [None if wish is None else _plain(wish) for wish in (settings.context, settings.pin)]
    return json.dumps([*wishes, settings.override, settings.precision])


def token(scope: Scope) -> str:
    """Return a scope's name, for torch.compile to guard on: equal settings have equal names."""
    base = scope.base
    base.text = text = base.text or _text(base.settings)
    return f"{scopes.generation} {text}"


def plain(kind: str, wish: Preference, override: bool = False) -> Entered:
    """Write a pin or block as plain constants, which traced code can hold."""
    return (kind, wish.names, wish.mode, wish.source, wish.precision, override)


def _plain(wish: Preference) -> tuple[tuple[str, ...], Mode, str, Precision]:
    return (wish.names, wish.mode, wish.source, wish.precision)


def _wish(plain: Any) -> Preference | None:
    return None if plain is None else Preference(tuple(plain[0]), *plain[1:])


def scope_of_token(text: str, entered: tuple[Entered, ...] = ()) -> Scope:
    """Return the scope that a token names, with what the traced code itself entered on top."""
    context, pin, override, precision = json.loads(text.partition(" ")[2])
    return with_entered(scope_for(Settings(_wish(context), override, _wish(pin), precision)), entered)


def with_entered(scope: Scope, entered: Sequence[Entered], blocks_from: int = 0) -> Scope:
    """Return a scope with what compiled code entered on top; its blocks count from an index on."""
    settings = scope.settings
    for index, (kind, names, mode, source, precision, override) in enumerate(entered):
        wish = Preference(names, mode, source, precision)
        if kind == "route":
            settings = replace(settings, routed=True)
        elif kind == "pin":
            settings = replace(settings, pin=wish)
        elif index >= blocks_from:
            settings = replace(settings, context=wish, override=override, precision=precision)
    return Scope(scope_for(settings), None, None, scope.block, scope.records)
