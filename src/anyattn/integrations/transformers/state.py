"""Whether the integration is enabled, and how to undo it."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from anyattn.integrations.transformers import versions
from anyattn.integrations.transformers.versions import NAME, UnsupportedVersionError

lock = threading.RLock()
"""Held while anything of the integration changes."""

_undo: ExitStack | None = None

at_disable: list[Callable[[], None]] = []
"""Functions to call before anything is undone; the module that sets pins adds its own."""


def enable() -> None:
    """Let Transformers reach anyattn under the name `"anyattn"`; calling it again changes nothing.

    Afterwards `attn_implementation="anyattn"` works in `from_pretrained`, `from_config`, in a config and in
    `model.set_attn_implementation`. Models with another implementation compute what they did before. Transformers
    doesn't save the choice with a model, and a spawned process has to enable again.

    Raises:
        UnsupportedVersionError: If this version of Transformers isn't supported, or another package has registered the
            name; nothing is changed then.
    """
    global _undo
    with lock:
        if _undo is not None:
            return
        versions.check_version()
        versions.check_interface()
        with ExitStack() as stack:
            # These modules read Transformers' own when they are imported.
            attention = _load("calls.attention")
            masks = _load("calls.masks")
            functions = (attention.attention_forward, masks.mask_of)
            for path, function in zip(versions.MAPPINGS, functions, strict=True):
                _register(path, function, stack)
            _load("hooks").install(stack)
            _undo = stack.pop_all()


def disable() -> None:
    """Undo `enable` and every pin set through this integration, exactly; a second call changes nothing.

    A model that was given the name by hand can't run until it gets another with `set_attn_implementation`, or until
    `enable` is called again: Transformers raises KeyError for a name that isn't registered.
    """
    global _undo
    with lock:
        if _undo is None:
            return
        for undo in at_disable:
            undo()
        stack, _undo = _undo, None
        stack.close()


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """Enable inside a block; afterwards the integration is as it was before, also if the block raises."""
    with lock:
        was = _undo is not None
        enable()
    try:
        yield
    finally:
        if not was:
            disable()


def is_enabled() -> bool:
    """Whether Transformers can reach anyattn now."""
    return _undo is not None


def _load(name: str) -> Any:
    return importlib.import_module(f"anyattn.integrations.transformers.{name}")


def _register(path: str, function: Callable[..., Any], undo: ExitStack) -> None:
    """Put a function under the name into one of Transformers' tables, and remember to take it out.

    Raises:
        UnsupportedVersionError: If the name is taken.
    """
    table = versions.find(path)
    if NAME in table:
        raise UnsupportedVersionError(
            f"Another package has registered {NAME!r} in transformers.{path}. Nothing was changed. Take that one out "
            "first."
        )

    def take_out() -> None:
        if table.get(NAME) is function:
            del table[NAME]

    undo.callback(take_out)
    table[NAME] = function
