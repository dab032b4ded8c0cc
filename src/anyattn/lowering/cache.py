"""What was worked out of a mask's tensor, kept while that tensor lives and isn't written to.

It is known by identity and version counter, and held by weak references; each CUDA stream has its own, and the number
of tensors is bounded. Nothing is kept for a tensor that is traced, captured in a CUDA graph, or without a version
counter. Writes that torch doesn't count (through `.data`, NumPy, or another library) aren't seen.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anyattn.process.tracing import is_captured, is_plain

_MOST_MASKS = 64


class _Slot:
    """What is kept for one mask: it is good while the tensor is the same object, at the same version."""

    __slots__ = ("found", "place", "reference", "version")

    def __init__(self, reference: weakref.ref[Tensor], version: int, place: int) -> None:
        self.reference = reference
        self.version = version
        self.place = place
        self.found: dict[Any, Any] = {}


_slots: dict[int, _Slot] = {}
# Reentrant: collecting garbage inside it may end a mask, whose end is told here.
_lock = threading.RLock()


def kept(key: Tensor, what: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """Give what is kept for a tensor, or work it out.

    Args:
        key: The tensor.
        what: What is worked out, with everything that it depends on besides the tensor.
        make: Works it out; asks the device for values only where integers are what is kept (`host_lengths`). It must
            not be, or hold, the tensor or a view of it: that would keep it alive.
    """
    if torch.compiler.is_dynamo_compiling() or not _may_be_kept(key):
        return make()
    # Work queued on one stream may not be finished when another uses it: each stream has its own.
    stream = _stream_of(key.get_device()) if key.is_cuda else 0
    name, version, place = id(key), key._version, key.data_ptr()
    slot = _slots.get(name)
    if slot is None or slot.reference() is not key or slot.version != version or slot.place != place:
        slot = _new_slot(name, key, version, place)
    what = (*what, stream)
    found = slot.found.get(what)
    if found is None:
        # Born outside inference mode, so that a training step may meet it later.
        with torch.inference_mode(False), torch.no_grad():
            found = make()
        slot.found[what] = found
    return found


def _may_be_kept(key: Tensor) -> bool:
    if type(key) is not Tensor or key.is_inference() or key.is_meta or not is_plain():
        return False
    # In a graph the work has to be replayed: the mask may hold other values then.
    return not is_captured(key)


# torch.cuda.current_stream makes an object of it, which takes most of what giving something kept does.
_stream_of: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream
)


def _new_slot(name: int, key: Tensor, version: int, place: int) -> _Slot:
    def gone(reference: weakref.ref[Tensor]) -> None:
        # Another tensor may have got the id since.
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
    """Drop everything that is kept."""
    with _lock:
        _slots.clear()
