"""Put a function of ours where torch's is found by its name, while any block or pin needs it, and take it out again.

A function mode would be asked at every call of torch; a replaced name costs nothing elsewhere. Where neither a block
nor a pin is in force, as in another thread, the replacement calls what was there before.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from anyattn.pins.covering import Mark
from anyattn.pins.pins import live_scope
from anyattn.process.bounded import Bounded
from anyattn.scopes import _in_force as core
from anyattn.scopes import defaults, lifetime
from anyattn.sdpa import _in_force, calls

NAME: Final = "scaled_dot_product_attention"
TORCHS: Final[Callable[..., Tensor]] = torch._C._nn.scaled_dot_product_attention
"""Torch's own function, whatever stands in its place."""

_current = defaults.current.get
_thread = defaults.thread
_held = lifetime.held
_tracing = torch.compiler.is_dynamo_compiling

_lock = threading.RLock()
_blocks = 0
_marks: weakref.WeakSet[Mark] = weakref.WeakSet()
_undo: list[tuple[Any, str, Any, Any]] = []
_scanned: set[str] = set()
_holding: list[tuple[weakref.ref[ModuleType], str]] = []
_made: Bounded[int, tuple[Any, Any]] = Bounded(64)


def begin() -> None:
    """Count a block that begins."""
    global _blocks
    with _lock:
        _blocks += 1
        _settle()


def end() -> None:
    """Count a block that ended."""
    global _blocks
    with _lock:
        _blocks -= 1
        _settle()


def hold(mark: Mark) -> None:
    """Keep the function replaced as long as a pin is active and some module has it."""
    with _lock:
        if mark not in _marks:
            _marks.add(mark)
            weakref.finalize(mark, settle).atexit = False
        _settle()


def settle() -> None:
    """Put torch's function back if nothing needs its replacement any more."""
    with _lock:
        _settle()


def _settle() -> None:
    wanted = _blocks > 0 or any(mark.active for mark in list(_marks))
    if wanted and not _undo:
        _install()
    elif not wanted and _undo:
        _uninstall()


def _install() -> None:
    _put(F, NAME, _attention_in_place_of(getattr(F, NAME)))
    # torch's modules for attention have a fast path in inference that calls no Python.
    _put(torch.backends.mha, "get_fastpath_enabled", _fast_path_in_place_of(torch.backends.mha.get_fastpath_enabled))
    ours = _attention_in_place_of(TORCHS)
    for module, name in _holders():
        if vars(module).get(name) is TORCHS:
            _put(module, name, ours)


def _put(owner: Any, name: str, replacement: Any) -> None:
    _undo.append((owner, name, getattr(owner, name), replacement))
    setattr(owner, name, replacement)


def _uninstall() -> None:
    for owner, name, before, ours in reversed(_undo):
        # What another library put on top of ours stays; it then reaches torch's through ours.
        if getattr(owner, name, None) is ours:
            setattr(owner, name, before)
    _undo.clear()


def _holders() -> list[tuple[ModuleType, str]]:
    """List where modules hold torch's function by a name of their own; each module is searched once."""
    for module_name in sys.modules.keys() - _scanned:
        _scanned.add(module_name)
        module = sys.modules.get(module_name)
        if not isinstance(module, ModuleType) or module_name.partition(".")[0] in ("torch", "anyattn"):
            continue
        # `vars` and not getattr: a lazy module would import things to answer.
        names = [name for name, found in list(vars(module).items()) if found is TORCHS]
        _holding.extend((weakref.ref(module), name) for name in names)
    return [(module, name) for reference, name in _holding if (module := reference()) is not None]


def _asked() -> bool:
    """Whether a block or a pin is in force."""
    if _tracing():
        if _in_force.asked:
            return True
        for entered in core.entered:  # noqa: SIM110 - Dynamo traces this
            if entered[0] == "pin":
                return True
        return False
    scope = _current()
    if scope.look or _thread.entered or _held:
        scope = live_scope(scope)
    return scope.settings.sdpa or scope.settings.pin is not None


def _recorded_by_fx(*tensors: Any) -> bool:
    """Whether torch.fx traces: it then records torch's function, as it does for every other one."""
    for tensor in tensors:  # noqa: SIM110 - Dynamo traces this
        if isinstance(tensor, torch.fx.Proxy):
            return True
    return False


def _made_for(before: Any, make: Callable[[Any], Any]) -> Any:
    """Return the one replacement of a function: compiled code guards on its identity."""
    found = _made.get(id(before))
    if found is None or found[0] is not before:
        found = (before, make(before))
        _made[id(before)] = found
    return found[1]


def _attention_in_place_of(before: Any) -> Any:
    return _made_for(before, _make_attention)


def _make_attention(before: Any) -> Any:
    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Run torch's function, or anyattn's where a block or pin is in force."""
        # TorchScript compiles the first branch alone, so that a script holds torch's function.
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return torch._C._nn.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        else:  # noqa: RET505 - TorchScript goes by it
            if not _asked() or _recorded_by_fx(query, key, value):
                return before(  # type: ignore[no-any-return]
                    query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
                )
            return calls.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    return scaled_dot_product_attention


def _fast_path_in_place_of(before: Any) -> Any:
    return _made_for(before, _make_fast_path)


def _make_fast_path(before: Any) -> Any:
    def get_fastpath_enabled() -> bool:
        """Say whether torch's modules may take their fast path: not where a block or pin is in force."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return True
        else:  # noqa: RET505 - TorchScript goes by it
            return not _asked() and before()

    return get_fastpath_enabled
