"""A cache of what was computed from a mask's tensor, valid while that tensor lives and isn't written to.

The key is the tensor's identity and version counter; tensors are held by weak references, and their number is bounded.
Each CUDA stream has its own entries. Nothing is cached for a tensor that is traced, captured in a CUDA graph, or
without a version counter. Writes that torch doesn't count (through `.data`, NumPy, or another library) aren't seen.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from anyattn.process.streams import raw_stream
from anyattn.process.tracing import is_captured, is_plain

_T = TypeVar("_T")

_MOST_MASKS = 64


class _Slot:
    """What is cached for one tensor; valid while it is the same object, at the same version."""

    __slots__ = ("found", "place", "reference", "version")

    def __init__(self, reference: weakref.ref[Tensor], version: int, place: int) -> None:
        self.reference = reference
        self.version = version
        self.place = place
        self.found: dict[Any, Any] = {}


_slots: dict[int, _Slot] = {}
# Reentrant: garbage collection while it is held may free a tensor, whose callback takes the lock.
_lock = threading.RLock()


def cached(key: Tensor, what: tuple[Any, ...], make: Callable[[], _T]) -> _T:
    """Return what is cached for a tensor, or compute it.

    Args:
        key: The tensor.
        what: A name for the result, with everything that it depends on besides the tensor.
        make: Computes the result. It reads values on the host only if the result is integers (`host_lengths`). The
            result must not be, or hold, the tensor or a view of it: that would keep the tensor alive.
    """
    if torch.compiler.is_dynamo_compiling() or not _may_be_cached(key):
        return make()
    # Work queued on one stream may not be finished when another uses it: each stream has its own.
    stream = raw_stream(key.get_device()) if key.is_cuda else 0
    name, version, place = id(key), key._version, key.data_ptr()
    slot = _slots.get(name)
    if slot is None or slot.reference() is not key or slot.version != version or slot.place != place:
        slot = _new_slot(name, key, version, place)
    what = (*what, stream)
    found: _T | None = slot.found.get(what)
    if found is None:
        # Made outside inference mode, since a training step may use it later.
        with torch.inference_mode(False), torch.no_grad():
            found = make()
        slot.found[what] = found
    return found


def _may_be_cached(key: Tensor) -> bool:
    if type(key) is not Tensor or key.is_inference() or key.is_meta or not is_plain():
        return False
    # A CUDA graph must replay the work: the mask may hold other values then.
    return not is_captured(key)


def _new_slot(name: int, key: Tensor, version: int, place: int) -> _Slot:
    def gone(reference: weakref.ref[Tensor]) -> None:
        # Another tensor may have this id by now.
        with _lock:
            found = _slots.get(name)
            if found is not None and found.reference is reference:
                del _slots[name]

    slot = _Slot(weakref.ref(key, gone), version, place)
    with _lock:
        if len(_slots) >= _MOST_MASKS:
            _slots.pop(next(iter(_slots)))
        _slots[name] = slot
    return slot


def forget() -> None:
    """Clear the cache."""
    with _lock:
        _slots.clear()
