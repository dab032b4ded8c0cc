"""What steers the choice: blocks, models with a backend of their own, the process's default, and starting afresh."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from anyattn import environment
from anyattn.errors import InvalidCallError
from anyattn.pins import pins
from anyattn.policy import applying
from anyattn.policy.policy import Policy
from anyattn.scopes import _in_force, defaults, lifetime
from anyattn.scopes.decorating import Function, Steps, decorated
from anyattn.scopes.scopes import REPLACE_SDPA, Life, Owner
from anyattn.sdpa import host, replacing
from anyattn.selection import faults
from anyattn.selection.preferences import Backends, make_preference
from anyattn.types.decision import Precision, Preference

_current = defaults.current.get
_tracing = torch.compiler.is_dynamo_compiling


class attention_backend(Owner):
    """Choose the backend of every call inside a `with` block or a decorated function, in this thread or task alone.

    The block is in force where it was entered, and in tasks, threads and contexts that copy that context, until it is
    left; then nowhere. It may be left in any order, and in another thread or context than it was entered in. Leaving
    twice does nothing. One object can be entered again, and in several threads at once.

    A block inside a generator or coroutine is in force at each of its steps, whatever thread or context runs the step,
    and there it beats blocks that the consumer entered. While the generator is suspended, the block also lasts in the
    context where it was entered; that is how a function made with `contextlib.contextmanager` can hold it.

    As a decorator it takes functions, methods, generators, coroutines and async generators; each call has a block of
    its own. That of a generator or coroutine is in force only while it runs, and in the tasks that it starts.

    Gradient checkpointing runs a forward again during the backward, which may be outside the block and, on a GPU, is on
    another thread: pin the model (`anyattn.set_attention_backend`) for checkpointed training.

    A module's own pin beats the block, which is said once; `override=True` turns that round.

    Args:
        backend: A name, an alias, `"auto"`, or a list in order of preference.
        override: Whether the block beats pins.
        precision: The loosest precision that lists and `auto` may use: `"exact"`, `"int8"`, `"fp8"` or `"fp4"`.

    Raises:
        UnknownBackendError: If a name is unknown.

    Example:
        >>> import torch, anyattn
        >>> q = k = v = torch.randn(1, 8, 2, 16)
        >>> with anyattn.attention_backend("native_math"):
        ...     out = anyattn.attention(q, k, v)
        >>> @anyattn.attention_backend("native_math")
        ... def attend(q, k, v):
        ...     return anyattn.attention(q, k, v)
    """

    def __init__(self, backend: Backends, *, override: bool = False, precision: Precision = "exact") -> None:
        self.override = override
        self.lives: list[Life] = []
        if _tracing():
            is_list = not isinstance(backend, str)
            names = tuple(backend) if is_list else (backend,)
            mode = "prefer" if is_list or backend == "auto" else "require"
            self.wish: Preference = Preference(names, mode, "context", precision)  # type: ignore[arg-type]
        else:
            self.wish = make_preference(backend, "context", precision)

    def __enter__(self) -> attention_backend:
        if _tracing():
            _in_force.entered.append(defaults.plain("context", self.wish, self.override))
        else:
            scope = _current()
            lifetime.begin(self, scope, sys._getframe(1))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _tracing():
            _in_force.entered.pop()
        else:
            lifetime.leave(self)

    def __call__(self, function: Function) -> Function:
        """Decorate a function: each call of it is made in a block of its own."""
        wish, override = self.wish, self.override
        return decorated(function, lambda: _Again(wish, override), lambda: Steps(wish, override))


class replace_sdpa(attention_backend):
    """Run torch's `scaled_dot_product_attention` through anyattn inside a `with` block or a decorated function.

    For models that call `torch.nn.functional.scaled_dot_product_attention` themselves, `torch.nn.MultiheadAttention`
    and torch's transformer layers among them, whose fast path for inference is left out inside. The block's lifetime
    and scope are those of `anyattn.attention_backend`: other threads and tasks keep torch's function. Pins and blocks
    inside it choose the backend as they do for anyattn's own calls.

    The function is replaced under its name in `torch.nn.functional`, and in modules that imported it by a name of their
    own before the block was entered. A reference that an object, a default argument or a closure holds isn't reached,
    and neither is `torch._C._nn.scaled_dot_product_attention`; `anyattn.record` shows what was. Afterwards torch's own
    function is back, unless another library put one of its own on top meanwhile, which then stays.

    A call may have any number of dimensions, and leading dimensions of 1, as torch's may. A mask beside
    `is_causal=True`, which torch refuses, forbids what either forbids. A nested tensor is refused.

    Enter the block outside of code that torch.compile compiles; models compiled before are compiled once more for it.
    As with `attention_backend`, gradient checkpointing may run a layer again outside the block, and then with torch's
    function: pin the model (`anyattn.set_attention_backend`) for that.

    Args:
        backend: A name, an alias, `"auto"`, or a list in order of preference.
        override: Whether the block beats pins.
        precision: The loosest precision that lists and `auto` may use: `"exact"`, `"int8"`, `"fp8"` or `"fp4"`.

    Raises:
        UnknownBackendError: If a name is unknown.
        InvalidCallError: When it is entered inside code that torch.compile compiles.

    Example:
        >>> import torch, anyattn
        >>> layer = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
        >>> with anyattn.replace_sdpa("native_math"), anyattn.record() as calls, torch.no_grad():
        ...     out = layer(torch.randn(1, 5, 16))
        >>> [call.chosen for call in calls]
        ['native_math']
    """

    def __init__(self, backend: Backends = "auto", *, override: bool = False, precision: Precision = "exact") -> None:
        _refuse_tracing()
        self.override = override
        self.lives: list[Life] = []
        self.wish: Preference = make_preference(backend, REPLACE_SDPA, precision)

    def __enter__(self) -> replace_sdpa:
        _refuse_tracing()
        lifetime.begin(self, _current(), sys._getframe(1))
        replacing.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if lifetime.leave(self) is not None:
            replacing.end()

    def __call__(self, function: Function) -> Function:
        """Decorate a function: each call of it is made in a block of its own."""
        names, override, precision = self.wish.names, self.override, self.wish.precision
        backend: Backends = names[0] if self.wish.mode == "require" or names == ("auto",) else names

        def again() -> replace_sdpa:
            return replace_sdpa(backend, override=override, precision=precision)

        return decorated(function, again, lambda: _SdpaSteps(self.wish, override))


class _SdpaSteps(Steps):
    """One call of a decorated generator or coroutine; the function is replaced until that ends."""

    def __init__(self, wish: Preference, override: bool) -> None:
        _refuse_tracing()
        super().__init__(wish, override)
        replacing.begin()

    def end(self) -> None:
        super().end()
        replacing.end()


def _refuse_tracing() -> None:
    if _tracing():
        raise InvalidCallError("Enter replace_sdpa outside of the code that torch.compile compiles, around its call.")


class _Again(attention_backend):
    """A block of a wish that is made already."""

    def __init__(self, wish: Preference, override: bool) -> None:
        self.override = override
        self.lives = []
        self.wish = wish


def set_default_backend(backend: Backends | None, *, precision: Precision = "exact") -> None:
    """Set the process's default, for calls that no block, pin or argument decides; None clears it.

    Raises:
        UnknownBackendError: If a name is unknown; nothing is changed then.
    """
    defaults.set_default(None if backend is None else make_preference(backend, "default", precision))


def reset() -> None:
    """Forget every decision and every kernel's fault, and look at the machine and the environment variables again.

    What `set_default_backend` set stays. Call it after `torch.nn.attention.activate_flash_attention_impl` and the like:
    calls that were decided before go on as they are until another call is decided, or one of them fails.
    """
    environment.forget()
    timings = sys.modules.get("anyattn.timings.known")
    if timings is not None:
        timings.forget()
    faults.forget_faults()
    defaults.forget()


_INTEGRATIONS = {
    "diffusers": "anyattn.integrations.diffusers",
    "transformers": "anyattn.integrations.transformers",
}
"""The package of a host library, and the module that knows its models; imported only once the host itself was."""


def _integration_of(model: Any) -> Any:
    """Return the integration whose library made this object, or None."""
    for package, name in _INTEGRATIONS.items():
        if package in sys.modules:
            integration = importlib.import_module(name)
            if integration.handles(model):
                return integration
    return None


def set_attention_backend(
    model: Any, backend: str | list[str] | tuple[str, ...] | Policy, *, precision: Precision = "exact"
) -> Any:
    """Choose the backend of one model or pipeline, or set a policy on it; no other model is touched.

    For a model or pipeline of Diffusers this also routes its attention through anyattn, and a model of Transformers is
    switched to `attn_implementation="anyattn"`. For any other `torch.nn.Module` the choice is a pin: in force while the
    module's forward runs, for the calls of anyattn and of torch's `scaled_dot_product_attention` that are made inside
    it, unless a part of it has a pin of its own. While such a pin exists, torch's function is replaced as
    `replace_sdpa` does it.

    A policy chooses for single layers and denoising steps, of text encoders too if a rule selects them. It beats the
    pins of the layers that its rules select. On one object the latest policy replaces the one before, and so does a
    backend that is set after a policy; a backend that was set before it stays, for the layers that no rule selects.

    Args:
        model: A `torch.nn.Module`, or a Diffusers pipeline.
        backend: A name, an alias, `"auto"`, a list in order of preference, or a policy.
        precision: The loosest precision that lists and `auto` may use: `"exact"`, `"int8"`, `"fp8"` or `"fp4"`. A
            policy's rules have their own.

    Returns:
        For Diffusers, Transformers and policies a report of what was set, else None.

    Raises:
        UnknownBackendError: If a name is unknown.
        InvalidCallError: If the object isn't a module; for these two also where nothing in it would change. For a
            policy: if a rule that isn't optional selects no layer. Nothing is changed then.
    """
    if isinstance(backend, Policy):
        if precision != "exact":
            raise InvalidCallError("A policy's rules have precisions of their own; leave precision out.")
        return applying.apply(backend, model, _integration_of)
    if isinstance(backend, Mapping):
        raise InvalidCallError("A policy as plain data is made one first: anyattn.Policy.from_dict(data).")
    found = _set_pin(model, backend, precision)
    applying.replaced(model, _integration_of)
    return found


def _set_pin(model: Any, backend: str | list[str] | tuple[str, ...], precision: Precision) -> Any:
    integration = _integration_of(model)
    if integration is not None:
        return integration.set_attention_backend(model, backend, precision=precision)
    if not isinstance(model, nn.Module):
        raise InvalidCallError(
            f"A backend is set on a torch.nn.Module or a Diffusers pipeline; {type(model).__name__} was given."
        )
    replacing.hold(pins.pin(model, backend, precision=precision, host=host.HOST, judged=host.JUDGED))
    return None


def reset_attention_backend(model: Any) -> None:
    """Undo `set_attention_backend` on one model or pipeline, policies included, and nothing else.

    Raises:
        InvalidCallError: If the object isn't a module or pipeline, or had no backend set.
    """
    had_policy = applying.remove(model, _integration_of)
    try:
        _reset_pin(model)
    except InvalidCallError:
        if not had_policy:
            raise


def _reset_pin(model: Any) -> None:
    integration = _integration_of(model)
    if integration is not None:
        integration.reset_attention_backend(model)
        return
    if not isinstance(model, nn.Module):
        raise InvalidCallError(
            f"A backend is reset on a torch.nn.Module or a Diffusers pipeline; {type(model).__name__} was given."
        )
    if not pins.unpin(model):
        raise InvalidCallError(f"This {type(model).__name__} has no backend of its own to reset.")
    replacing.settle()
