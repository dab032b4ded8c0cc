"""Whether the integration is enabled, and how to undo it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack

from anyattn.integrations.diffusers import versions
from anyattn.integrations.diffusers.install import names, patches, setters, watching

lock = threading.RLock()
"""Held while anything of the integration changes; there is only one, so no deadlock is possible."""

_undo: ExitStack | None = None
_explicit = False

at_disable: list[Callable[[], None]] = []
"""Functions to call before the patches are undone; the modules that set pins add theirs."""


def enable() -> None:
    """Let Diffusers reach anyattn; calling it again changes nothing.

    Afterwards Diffusers knows the backend name `"anyattn"`, in `model.set_attention_backend`, in its own
    `attention_backend` context manager and in `DIFFUSERS_ATTN_BACKEND`; and every model of Diffusers follows
    anyattn's pins and contexts, those that call torch's scaled_dot_product_attention themselves among them.
    Enabling alone changes no call: without a pin, a context or a name, Diffusers computes what it did before.
    anyattn's process default and `ANYATTN_BACKEND` don't send calls to anyattn either; they choose the backend of
    the calls that reach it.

    `DIFFUSERS_ATTN_BACKEND=anyattn` sends every model of Diffusers to anyattn. Then call `enable` before the first
    model class is imported, since Diffusers refuses a name that it doesn't know yet (`import diffusers` imports no
    model class). The variable may also be set later, but before `enable`.

    Raises:
        UnsupportedVersionError: If this version of Diffusers isn't supported; nothing is changed then.
    """
    global _explicit
    with lock:
        _install()
        _explicit = True


def disable() -> None:
    """Undo `enable` and every pin set through this integration, exactly; a second call changes nothing."""
    global _undo, _explicit
    with lock:
        if _undo is None:
            return
        for undo in at_disable:
            undo()
        stack, _undo, _explicit = _undo, None, False
        stack.close()


def is_enabled() -> bool:
    """Whether Diffusers can reach anyattn now."""
    return _undo is not None


def enable_implicitly() -> bool:
    """Enable for a setter, and return whether that changed anything; the end of the last pin disables again."""
    with lock:
        return _install()


watching.enablers.append(enable_implicitly)


def disable_if_implicit() -> None:
    """Disable again if only a setter had enabled, and nothing else needs the integration since."""
    with lock:
        if _undo is None:
            return
        if not (_explicit or watching.is_needed() or names.is_active()):
            disable()


def _install() -> bool:
    global _undo
    if _undo is not None:
        return False
    versions.check_version()
    with ExitStack() as stack:
        dispatcher = names.import_dispatcher()
        versions.check_interface()
        names.install(dispatcher, stack)
        patches.install_dispatcher(dispatcher, stack)
        patches.install_sdpa(stack)
        setters.install(stack)
        _undo = stack.pop_all()
    return True
