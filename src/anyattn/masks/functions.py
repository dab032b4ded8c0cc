"""Masks given as functions of indices: which indices such a function reads, and a cache of the masks made from it."""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from anyattn.errors import InvalidCallError
from anyattn.masks import scalars
from anyattn.process.tracing import has_values

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`fn(b, h, q_idx, kv_idx)`: a boolean tensor, True = attend."""

_MOST_CACHED = 8
"""How many shapes of one function are cached."""

_VALUELESS = frozenset(
    ("new_ones", "new_zeros", "new_full", "new_empty", "ones_like", "zeros_like", "full_like", "empty_like")
)
"""Operations that take a tensor's shape and dtype and not its value, as torch's own `noop_mask` does."""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record which watched tensors' values an operation reads, and which other tensors it reads."""

    def __init__(self, *watched: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched = watched
        self.used = [False] * len(watched)
        self.captured: dict[int, Tensor] = {}
        self._made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._note(leaf, func.overloadpacket.__name__)
        result = func(*args, **kwargs)
        self._made |= {id(leaf): leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        return result

    def _note(self, leaf: Tensor, operation: str) -> None:
        for index, tensor in enumerate(self.watched):
            if leaf is tensor:
                self.used[index] = self.used[index] or operation not in _VALUELESS
                return
        if id(leaf) not in self._made:
            self.captured[id(leaf)] = leaf


def looks_at(mask_mod: MaskMod, device: Any) -> tuple[bool, bool, tuple[Tensor, ...]]:
    """Call a function once, and return whether it reads the batch index, the head index, and which tensors it captures.

    Raises:
        InvalidCallError: If it returns anything but a boolean tensor.
    """
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        b, h, q, kv = (torch.zeros((), dtype=torch.int32, device=device) for _ in range(4))
        with _Watch(b, h) as watch:
            result = mask_mod(b, h, q, kv)
    if not isinstance(result, Tensor) or result.dtype != torch.bool:
        given = result.dtype if isinstance(result, Tensor) else type(result).__name__
        raise InvalidCallError(f"A mask function must return a boolean tensor, True = attend; it returned {given}.")
    return watch.used[0], watch.used[1], tuple(watch.captured.values())


class MaskFunction:
    """A mask function, what it reads, and the masks that were made from it, per shape.

    Attributes:
        mask_mod: `fn(b, h, q_idx, kv_idx)`.
        per_batch: Whether it reads the batch index.
        per_head: Whether it reads the head index.
        sizes: B, S_q and S_kv, each if its tensors fix it, else None.
        captured: The tensors that it reads.
        broadcasts: Whether it may be called with index tensors of several dimensions, as well as with single indices.
    """

    __slots__ = (
        "__weakref__",
        "_cached",
        "_lock",
        "_state",
        "broadcasts",
        "captured",
        "mask_mod",
        "per_batch",
        "per_head",
        "sizes",
    )

    def __init__(
        self,
        mask_mod: MaskMod,
        per_batch: bool,
        per_head: bool,
        sizes: tuple[int | None, int | None, int | None] = (None, None, None),
        captured: tuple[Tensor, ...] = (),
        *,
        broadcasts: bool = False,
    ) -> None:
        self.mask_mod = mask_mod
        self.per_batch = per_batch
        self.per_head = per_head
        self.sizes = sizes
        self.captured = captured
        self.broadcasts = broadcasts
        self._state: Any = None
        self._cached: dict[Any, Any] = {}
        # Made when first needed: torch.compile traces no locks, and a function may be made while it traces.
        self._lock: Any = None

    @property
    def device(self) -> torch.device:
        """The device of its tensors; the CPU if it has none."""
        return self.captured[0].device if self.captured else torch.device("cpu")

    def cached(self, key: Any, device: torch.device, make: Callable[[], Any]) -> Any:
        """Return what is cached under a key, or make it; an entry is dropped once the function reads other values.

        Nothing is cached while something traces, transforms or captures a CUDA graph, nor if the function reads a
        tensor without a version counter (one made in inference mode).
        """
        if not self._may_cache(device):
            return make()
        if self._lock is None:
            self._lock = threading.RLock()
        # Work queued on one stream may not be finished when another uses it.
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (key, device, stream)
        state = [*_state(self.mask_mod, 0), *(_Seen(tensor) for tensor in self.captured)]
        with self._lock:
            if state != self._state:
                self._cached.clear()
                self._state = state
            found = self._cached.get(key)
        if found is not None:
            return found
        # Made outside inference mode, since a training step may use it later.
        with torch.inference_mode(False), torch.no_grad():
            found = make()
        with self._lock:
            if state == self._state:
                if len(self._cached) >= _MOST_CACHED:
                    self._cached.pop(next(iter(self._cached)))
                self._cached[key] = found
        return found

    def _may_cache(self, device: torch.device) -> bool:
        if torch.compiler.is_compiling() or not has_values(*self.captured):
            return False
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False  # a graph must replay the work: its tensors may hold other values then
        return not any(tensor.is_inference() for tensor in self.captured)


class _Seen:
    """A value that was read: equal to another if it is the same object and wasn't written to since."""

    __slots__ = ("reference", "version")

    def __init__(self, value: Any) -> None:
        self.reference: Callable[[], Any]
        try:
            self.reference = weakref.ref(value)
        except TypeError:
            self.reference = lambda: value
        self.version = value._version if isinstance(value, Tensor) and not value.is_inference() else 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Seen):
            return NotImplemented
        mine = self.reference()
        return mine is not None and mine is other.reference() and self.version == other.version

    __hash__ = None  # type: ignore[assignment]


_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)


def _state(value: Any, depth: int) -> list[Any]:
    """List what a function reads besides its arguments: its cells, its defaults and the globals that it names."""
    if isinstance(value, _PLAIN):
        return [(type(value), value)]
    if depth > 3:
        return [_Seen(value)]
    if isinstance(value, tuple | list):
        return _states(value, depth)
    seen: list[Any] = [_Seen(value)]
    if isinstance(value, functools.partial):
        return seen + _states([value.func, *value.args, *value.keywords.values()], depth)
    if isinstance(value, types.MethodType):
        return _states([value.__self__, value.__func__], depth)
    if isinstance(value, types.FunctionType):
        names = [name for name in value.__code__.co_names if name in value.__globals__]
        cells = [_content(cell) for cell in value.__closure__ or ()]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return seen + _states([*cells, *defaults, *(value.__globals__[name] for name in names)], depth)
    if isinstance(value, Tensor | type | types.ModuleType) or not hasattr(value, "__dict__"):
        return seen
    return seen + _states(vars(value).values(), depth)


def _states(values: Iterable[Any], depth: int) -> list[Any]:
    return [state for value in values for state in _state(value, depth + 1)]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def looked_at(function: Callable[..., Any]) -> MaskFunction:
    """Wrap a user's function; it is called once to find out which indices it reads.

    Raises:
        InvalidCallError: If it can't be called with four index tensors, or returns anything but a boolean tensor.
    """
    if not callable(function):
        kind = type(function).__name__
        raise InvalidCallError(f"from_function needs a function fn(b, h, q_idx, kv_idx), not {kind}.")
    if torch.compiler.is_compiling():
        raise InvalidCallError("Call masks.from_function outside the compiled function: fn has to be called once.")

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        found: Tensor = function(b, h, q, kv)
        return found

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    failure: Exception | None = None
    # An accelerator's tensors can be indexed from the CPU. A function that does more with both needs its indices there.
    for device in ("cpu", accelerator):
        if device is None:
            continue
        try:
            per_batch, per_head, captured = looks_at(mask_mod, device)
        except InvalidCallError:
            raise
        except Exception as error:  # noqa: BLE001 - a user's function may raise anything
            failure = failure or error
        else:
            return MaskFunction(mask_mod, per_batch, per_head, captured=captured)
    raise InvalidCallError(
        f"The mask function raised {type(failure).__name__}: {failure}. It is called as fn(b, h, q_idx, kv_idx) with "
        "four integer tensors and must return a boolean one."
    ) from failure


def joined(first: MaskFunction, second: MaskFunction) -> MaskFunction:
    """Join two functions: allowed where both allow.

    Raises:
        InvalidCallError: If their tensors fix different sizes.
    """
    sizes = []
    for one, other in zip(first.sizes, second.sizes, strict=True):
        if one is not None and other is not None and one != other:
            raise InvalidCallError(f"Two masks of different sizes can't be joined: {first.sizes} and {second.sizes}.")
        sizes.append(other if one is None else one)
    left, right = first.mask_mod, second.mask_mod

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return left(b, h, q, kv) & right(b, h, q, kv)

    return MaskFunction(
        mask_mod,
        first.per_batch or second.per_batch,
        first.per_head or second.per_head,
        (sizes[0], sizes[1], sizes[2]),
        first.captured + second.captured,
        broadcasts=first.broadcasts and second.broadcasts,
    )


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _said(given: object) -> str:
    return f"{given.dtype} of shape {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given)


def same_document(ids: Tensor) -> MaskFunction:
    """Allow keys of the row's own document; `ids` is `(B or 1, S)`."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in _INTEGERS:
        raise InvalidCallError(f"document needs an integer tensor (B, S) of document ids; {_said(ids)} was given.")
    batch, seqlen = ids.shape
    shared = batch == 1

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        entry = b * 0 if shared else b
        return ids[entry, q] == ids[entry, kv]

    return MaskFunction(
        mask_mod, not shared, False, (None if shared else batch, seqlen, seqlen), (ids,), broadcasts=True
    )


def prefix_then_causal(lengths: Tensor | int) -> MaskFunction:
    """Allow the prefix to every row, and after it what isn't later; `lengths` is an int or `(B or 1,)`."""
    if not isinstance(lengths, Tensor | torch.SymInt) and not torch.compiler.is_dynamo_compiling():
        lengths = scalars.index("The prefix's length", lengths)
    if isinstance(lengths, int | torch.SymInt) and not isinstance(lengths, bool) and lengths >= 0:
        whole = lengths
        return MaskFunction(lambda b, h, q, kv: (kv < whole) | (kv <= q), False, False, broadcasts=True)
    if isinstance(lengths, Tensor) and lengths.dim() == 0:
        lengths = lengths[None]
    if not isinstance(lengths, Tensor) or lengths.dim() != 1 or lengths.dtype not in _INTEGERS:
        raise InvalidCallError(f"prefix_lm needs an int >= 0 or an integer tensor (B,); {_said(lengths)} was given.")
    per_entry = lengths
    batch = per_entry.shape[0]
    shared = batch == 1

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv < per_entry[b * 0 if shared else b]) | (kv <= q)

    return MaskFunction(
        mask_mod, not shared, False, (None if shared else batch, None, None), (per_entry,), broadcasts=True
    )


def same_or_earlier_frame(tokens: int) -> MaskFunction:
    """Allow keys of the row's own frame and of earlier ones."""
    if not torch.compiler.is_dynamo_compiling():
        tokens = scalars.index("tokens_per_frame", tokens)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise InvalidCallError(f"frame_causal needs an int >= 1; {_said(tokens)} was given.")
    return MaskFunction(lambda b, h, q, kv: kv // tokens <= q // tokens, False, False, broadcasts=True)
