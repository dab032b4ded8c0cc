"""The denoising step that is running, in each thread and task."""

from __future__ import annotations

import contextvars
from types import TracebackType
from typing import Final

import torch

from anyattn.errors import InvalidCallError


class Clock:
    """Which step of how many is running; a subclass follows a scheduler."""

    __slots__ = ("_latest",)

    def __init__(self, latest: tuple[int, int] | None = None) -> None:
        self._latest = latest

    def now(self) -> tuple[int, int] | None:
        """Return the step, counted from 0, and the number of steps; None before the first and after the last."""
        return self._latest


class _Block(Clock):
    """The step that a `denoising_step` block says, and what was in force outside of the block."""

    __slots__ = ("before", "owner")

    def __init__(self, index: int, total: int, owner: denoising_step, before: Clock | None) -> None:
        super().__init__((index, total))
        self.owner, self.before = owner, before


current: Final[contextvars.ContextVar[Clock | None]] = contextvars.ContextVar("anyattn_clock", default=None)
"""What counts the steps in this thread or task; None outside of every run."""


class denoising_step:
    """Say which denoising step runs inside a `with` block, for the rules of a policy that name steps.

    A Diffusers pipeline that a policy was set on counts its steps itself. Use this block in a denoising loop of your
    own, around the model's call. It is in force in this thread or task, and is entered outside of code that
    torch.compile compiles. A block inside another one replaces it until it is left. Leave it before a generator yields:
    while the generator waits, its consumer is inside the block too.

    Args:
        index: The step, counted from 0.
        total: The number of steps.

    Raises:
        InvalidCallError: If the step isn't one of them.

    Example:
        >>> import torch, anyattn
        >>> model = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
        >>> policy = anyattn.Policy([anyattn.Rule("middle steps", "native_math", steps="1:-1")])
        >>> report = anyattn.set_attention_backend(model, policy)
        >>> with anyattn.record() as calls, torch.no_grad():
        ...     for step in range(3):
        ...         with anyattn.denoising_step(step, 3):
        ...             out = model(torch.randn(1, 5, 16))
        >>> [call.chosen for call in calls]
        ['native_math']
        >>> anyattn.reset_attention_backend(model)
    """

    def __init__(self, index: int, total: int) -> None:
        if torch.compiler.is_dynamo_compiling():
            raise InvalidCallError("Enter denoising_step outside of the code that torch.compile compiles.")
        whole = type(index) is int and type(total) is int
        if not whole or not 0 <= index < total:
            raise InvalidCallError(
                f"denoising_step takes a step counted from 0 and the number of steps, as whole numbers; "
                f"({index!r}, {total!r}) was given."
            )
        self._index, self._total = index, total

    def __enter__(self) -> denoising_step:
        current.set(_Block(self._index, self._total, self, current.get()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        now = current.get()
        if isinstance(now, _Block) and now.owner is self:
            current.set(now.before)
