"""Whether the integration is enabled, and how to undo it: the one thing here that changes in time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack

from anyattn.integrations.diffusers import versions
from anyattn.integrations.diffusers.install import names, patches, setters, watching

lock = threading.RLock()
"""Held while anything of the integration changes; one for all, so that no two can wait for each other."""

_undo: ExitStack | None = None
_explicit = False

at_disable: list[Callable[[], None]] = []
"""What else has to be undone before the patches are; filled by the modules that set pins."""


def enable() -> None:
    """Let Diffusers reach anyattn; calling it again changes nothing.

    Afterwards Diffusers knows the backend name `"anyattn"`, in `model.set_attention_backend`, in its own
    `attention_backend` context manager and in `DIFFUSERS_ATTN_BACKEND`; and every model of Diffusers follows
    anyattn's pins and contexts, those that call torch's scaled_dot_product_attention themselves among them.
    Where nothing asks for anyattn, Diffusers computes what it did before: enabling alone diverts no call, and
    neither do anyattn's process default and `ANYATTN_BACKEND`, which say what runs once a call has got there.

    `DIFFUSERS_ATTN_BACKEND=anyattn` sends every model of Diffusers to anyattn. Call `enable` before the first
    model class is imported then, since Diffusers itself refuses a name that it doesn't know yet; `import
    diffusers` alone is no trouble. The variable may also be set later, as long as it is before `enable`.

    Raises:
        UnsupportedVersionError: If this release of Diffusers isn't a known one; nothing is changed then.
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
    """Enable for a setter's sake; True where that changed something, so that the last pin's end undoes it."""
    with lock:
        return _install()


watching.enablers.append(enable_implicitly)


def disable_if_implicit() -> None:
    """Disable again where only a setter had enabled, and nothing else has come to rest on it since."""
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
