"""What steers the choice: blocks, the process's default, and starting afresh."""

from __future__ import annotations

from types import TracebackType

import torch

from anyattn import _in_force, environment, policy
from anyattn.decision import Precision, Preference
from anyattn.dispatch import Backends, make_preference
from anyattn.pins import live_scope

_current = policy.current.get
_tracing = torch.compiler.is_dynamo_compiling


class attention_backend:
    """Choose the backend of every call inside a `with` block, in this thread or task alone.

    Gradient checkpointing runs a forward again during the backward, which may be outside the block and, on a GPU, is on
    another thread: pin the model (`anyattn.set_attention_backend`) for checkpointed training. A block inside a
    generator lasts while the generator is suspended.

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
    """

    def __init__(self, backend: Backends, *, override: bool = False, precision: Precision = "exact") -> None:
        self.override = override
        if _tracing():
            is_list = not isinstance(backend, str)
            names = tuple(backend) if is_list else (backend,)
            mode = "prefer" if is_list or backend == "auto" else "require"
            self.wish = Preference(names, mode, "context", precision)  # type: ignore[arg-type]
        else:
            self.wish = make_preference(backend, "context", precision)

    def __enter__(self) -> attention_backend:
        if _tracing():
            _in_force.entered.append(policy.plain("context", self.wish, self.override))
        else:
            scope = live_scope(_current())
            policy.outer.set((scope, *policy.outer.get()))
            policy.current.set(policy.enter(scope, self.wish, self.override))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _tracing():
            _in_force.entered.pop()
        else:
            scope, *rest = policy.outer.get()
            policy.outer.set(tuple(rest))
            policy.current.set(scope)


def set_default_backend(backend: Backends | None, *, precision: Precision = "exact") -> None:
    """Set the process's default, for calls that no block, pin or argument decides; None clears it.

    Raises:
        UnknownBackendError: If a name is unknown; nothing is changed then.
    """
    policy.set_default(None if backend is None else make_preference(backend, "default", precision))


def reset() -> None:
    """Forget every decision and every kernel's fault, and look at the machine and the environment variables again.

    What `set_default_backend` set stays. Call it after `torch.nn.attention.activate_flash_attention_impl` and the like:
    calls that were decided before go on as they are until another call is decided, or one of them fails.
    """
    environment.forget()
    policy.forget_faults()
    policy.forget()
