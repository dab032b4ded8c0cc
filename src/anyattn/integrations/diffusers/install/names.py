"""Make Diffusers know the name anyattn: in its enumeration and in its table of backends."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

from anyattn.integrations.diffusers.calls import doors
from anyattn.integrations.diffusers.versions import BACKEND_NAME, UnsupportedVersionError, load

MEMBER = BACKEND_NAME.upper()
VARIABLE = "DIFFUSERS_ATTN_BACKEND"


def import_dispatcher() -> Any:
    """Import Diffusers' dispatcher, even with `DIFFUSERS_ATTN_BACKEND=anyattn`.

    Diffusers looks the name up in its enumeration while it is imported, when the name can't have been added yet. So
    the variable is hidden from it during the import.
    """
    constants = load("utils.constants")
    asked = getattr(constants, VARIABLE)
    if not _is_ours(asked):
        return load("models.attention_dispatch")
    setattr(constants, VARIABLE, "native")
    try:
        return load("models.attention_dispatch")
    finally:
        setattr(constants, VARIABLE, asked)


def install(dispatcher: Any, undo: ExitStack) -> None:
    """Add the name to the enumeration and the registry; make it active if the environment variable asks for it."""
    member = _add_member(dispatcher.AttentionBackendName, undo)
    registry = dispatcher._AttentionBackendRegistry
    for table, entry in (
        (registry._backends, doors.registered_backend),
        (registry._constraints, []),
        (registry._supported_arg_names, doors.EveryName(doors.REGISTERED_NAMES)),
    ):
        undo.callback(table.pop, member, None)
        table[member] = entry
    before = registry._active_backend

    def put_back() -> None:
        if registry._active_backend == member:
            registry.set_active_backend(before)

    undo.callback(put_back)
    at_import = getattr(load("utils.constants"), VARIABLE)
    # Diffusers read the variable when it was imported; it may have been set since, with nothing else chosen.
    asked = _is_ours(at_import) or _is_ours(os.environ.get(VARIABLE, ""))
    if asked and before in (at_import, "native"):
        registry.set_active_backend(member)


def is_active() -> bool:
    """Whether Diffusers uses anyattn for layers that don't name a backend."""
    return bool(doors.Stock.registry._active_backend == BACKEND_NAME)


def _add_member(names: Any, undo: ExitStack) -> Any:
    """Add a member to an enumeration, as its own class body would have."""
    member = str.__new__(names, BACKEND_NAME)
    member._name_ = MEMBER
    member._value_ = BACKEND_NAME
    member.__objclass__ = names
    member._sort_order_ = len(names._member_names_)
    undo.callback(_remove_member, names)
    # The class attribute comes first: an enumeration refuses to set one whose name is in its map already.
    setattr(names, MEMBER, member)
    names._member_names_.append(MEMBER)
    names._member_map_[MEMBER] = member
    names._value2member_map_[BACKEND_NAME] = member
    if hasattr(names, "_hashable_values_"):  # Python 3.12.5 and newer look here for `value in names`.
        names._hashable_values_.append(BACKEND_NAME)
    if names(BACKEND_NAME) is not member or names[MEMBER] is not member or member not in list(names):
        raise UnsupportedVersionError(
            f"This Python's enumerations accept no new member, so {BACKEND_NAME!r} can't be added to Diffusers."
        )
    return member


def _remove_member(names: Any) -> None:
    names._member_map_.pop(MEMBER, None)
    names._value2member_map_.pop(BACKEND_NAME, None)
    hashable = getattr(names, "_hashable_values_", [])
    for listed, entry in ((names._member_names_, MEMBER), (hashable, BACKEND_NAME)):
        if entry in listed:
            listed.remove(entry)
    if MEMBER in vars(names):
        delattr(names, MEMBER)


def _is_ours(word: str) -> bool:
    return word.strip().lower() == BACKEND_NAME
