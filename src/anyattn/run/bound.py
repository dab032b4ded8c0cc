"""The runners that backends bind to a plan, and what is checked around them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from anyattn.backend.protocol import MaskedRunner, Output, Runner
from anyattn.lowering.dense import is_copied_for
from anyattn.process import tracing
from anyattn.run.plan import where_it_belongs
from anyattn.selection.choice import Choice
from anyattn.types.spec import AttentionSpec


class NotForThisCall(LookupError):
    """A runner of the short table met a call that its key doesn't tell from its own; the call is looked up anew."""


def bound_runners(choice: Choice) -> tuple[Runner | None, MaskedRunner | None]:
    """Return the backend's shorter runners; a subclass with a `run` of its own doesn't inherit them."""
    backend, caps, plan = choice.backend, choice.caps, choice.plan
    if (
        plan.lowering.entry == "empty"
        or tracing.exports_onnx()
        or (caps is not None and is_copied_for(caps, plan.spec, plan.lowering))
    ):
        return None, None
    owns, owns_masked = _owned(type(backend).__mro__)
    bound = backend.bind(plan) if owns else None
    bound_masked = backend.bind_masked(plan) if owns_masked else None
    device_type = plan.spec.device_type
    return (
        None if bound is None else where_it_belongs(bound, caps, device_type, at=0),
        None if bound_masked is None else where_it_belongs(bound_masked, caps, device_type, at=0),
    )


def plainly(bound: Runner, otherwise: Runner) -> Runner:
    """Use a bound runner where operations only run, and the whole way elsewhere."""

    def call(query: Tensor, key: Tensor, value: Tensor) -> Output:
        if torch.compiler.is_dynamo_compiling() or not tracing.is_plain():
            return otherwise(query, key, value)
        return bound(query, key, value)

    return call


def masked_plainly(bound: MaskedRunner, otherwise: Callable[..., Output] | None) -> Callable[..., Output]:
    """Do the same for a call with a mask; without `otherwise` the bound runner works everywhere."""

    def call(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, sinks: Tensor | None) -> Output:
        if otherwise is not None and (torch.compiler.is_dynamo_compiling() or not tracing.is_plain()):
            return otherwise(query, key, value, attn_mask, sinks)
        return bound(query, key, value, attn_mask)

    return call


_Bound = TypeVar("_Bound", bound=Callable[..., Output])


def guarded(bound: _Bound | None, spec: AttentionSpec, *, in_graphs: bool) -> _Bound | None:
    """Refuse what the short table's key doesn't hold, by `NotForThisCall`.

    Args:
        bound: The runner, or None.
        spec: The call that it is bound to.
        in_graphs: Whether it may be captured in a CUDA graph.
    """
    if bound is None:
        return None
    run: Callable[..., Output] = bound
    dtype, with_grad = spec.dtype, spec.needs_grad

    def checked(query: Tensor, key: Tensor, value: Tensor, *mask: Any) -> Output:
        index = query.get_device()
        if (
            not (type(query) is type(key) is type(value) is Tensor)
            or not (key.dtype is value.dtype is dtype)
            or not (key.get_device() == value.get_device() == index)
            or not tracing.is_plain()
            or not (in_graphs or not tracing.is_captured(query))
            or not (with_grad or not torch.is_grad_enabled() or not _any_requires_grad(query, key, value))
        ):
            raise NotForThisCall
        return run(query, key, value, *mask)

    return checked  # type: ignore[return-value]


def _any_requires_grad(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return query.requires_grad or key.requires_grad or value.requires_grad


@functools.lru_cache(maxsize=256)
def _owned(order: tuple[type, ...]) -> tuple[bool, bool]:
    """Whether `bind` and `bind_masked` come from the class of `run` or a subclass of it; `order` is the MRO."""

    def owner(name: str) -> type:
        return next(base for base in order if name in vars(base))

    run = owner("run")
    return issubclass(owner("bind"), run), issubclass(owner("bind_masked"), run)


def only_plainly(run: Any) -> MaskedRunner:
    """Refuse to run while a graph is recorded: it may run with unequal lengths, and `run` relies on equal ones."""

    def plainly(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any) -> Output:
        if not tracing.is_plain():
            raise NotForThisCall
        return run(query, key, value, attn_mask)  # type: ignore[no-any-return]

    return plainly
