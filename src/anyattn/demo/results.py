"""What the demo found, as frozen values; nothing here runs anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from anyattn.demo.models import Output
from anyattn.demo.recipes import ModelName
from anyattn.reference.tolerance import budget

__all__ = ["BackendRun", "DemoResult", "Errors", "ModelResult", "Status", "allow", "measure"]

Status = Literal["passed", "failed", "refused", "measured"]
"""`passed` and `failed`: an exact backend inside or outside of the budget, or broken; `refused`: it declined
a call of the model, with reasons; `measured`: a quantised backend, which the budget doesn't judge."""


@dataclass(frozen=True, slots=True)
class Errors:
    """One number for the latents and one for the image, in their own units.

    Attributes:
        latents: Largest absolute difference of the last latents, or what is allowed of it.
        image: The same for the decoded image, whose values lie in [0, 1].
    """

    latents: float
    image: float

    def within(self, allowed: Errors) -> bool:
        """Whether both stay inside a budget; a NaN is outside of every budget."""
        return self.latents <= allowed.latents and self.image <= allowed.image

    def to_dict(self) -> dict[str, float]:
        """Return the fields as plain data, for JSON."""
        return {"latents": self.latents, "image": self.image}


def measure(output: Output, truth: Output) -> Errors:
    """Compute the largest absolute differences between a run and the float64 truth."""
    return Errors(
        latents=float((output.latents.double() - truth.latents).abs().max()),
        image=float((output.image.double() - truth.image).abs().max()),
    )


def allow(plain: Output, truth: Output, dtype: torch.dtype) -> Errors:
    """Derive what a run may be off by from what plain arithmetic of the same dtype is off by.

    Args:
        plain: The run with `plain_attention` in `dtype`.
        truth: The run in float64.
        dtype: What the judged runs compute in.

    Source:
        `anyattn.reference.tolerance`: twice the plain run's error against float64, plus a rounding band. One number for
        all of the latents and one for all of the image, because every error of a denoising step spreads over
        the whole picture in the next.
    """

    def largest(true: Tensor, given: Tensor) -> float:
        return float(budget(true, given, dtype, over=tuple(range(true.dim()))))

    return Errors(latents=largest(truth.latents, plain.latents), image=largest(truth.image, plain.image))


@dataclass(frozen=True, slots=True)
class BackendRun:
    """One model through one backend.

    Attributes:
        backend: Its name.
        exact: Whether it claims to be exact, so that the budget judges it.
        status: The result.
        reason: Why it was refused or failed; empty otherwise.
        calls: Attention calls of the model that this backend made, as recorded by anyattn.
        kernels: How often each kernel ran, by name.
        seconds: Wall time of the run, including the first calls of its kernels; None if it didn't finish.
        errors: Largest differences from the truth; None if it didn't finish.
        image: Its images or frames `(n, 3, height, width)` on the CPU, in [0, 1]; None if it didn't
            finish.
    """

    backend: str
    exact: bool
    status: Status
    reason: str = ""
    calls: int = 0
    kernels: tuple[tuple[str, int], ...] = ()
    seconds: float | None = None
    errors: Errors | None = None
    image: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return all but the image as plain data, for JSON."""
        return {
            "backend": self.backend,
            "exact": self.exact,
            "status": self.status,
            "reason": self.reason,
            "calls": self.calls,
            "kernels": dict(self.kernels),
            "seconds": self.seconds,
            "errors": None if self.errors is None else self.errors.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class ModelResult:
    """One model: the truth, the yardstick, and every backend beside them.

    Attributes:
        name: Which model.
        title: Its name for display.
        calls: Attention calls that the model makes.
        image: The truth's images or frames `(n, 3, height, width)` on the CPU, in [0, 1].
        truth_seconds: Wall time of the float64 run.
        plain: Error of plain arithmetic in the judged dtype.
        budget: What a backend may be off by.
        runs: One per backend.
    """

    name: ModelName
    title: str
    calls: int
    image: Tensor
    truth_seconds: float
    plain: Errors
    budget: Errors
    runs: tuple[BackendRun, ...]

    @property
    def ok(self) -> bool:
        """Whether no backend failed, and at least one passed."""
        statuses = {run.status for run in self.runs}
        return "failed" not in statuses and "passed" in statuses

    def to_dict(self) -> dict[str, Any]:
        """Return all but the image as plain data, for JSON."""
        return {
            "name": self.name,
            "title": self.title,
            "calls": self.calls,
            "truth_seconds": self.truth_seconds,
            "plain": self.plain.to_dict(),
            "budget": self.budget.to_dict(),
            "ok": self.ok,
            "runs": [run.to_dict() for run in self.runs],
        }


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo found.

    Attributes:
        device: The device it ran on.
        dtype: What the judged runs computed in.
        steps: Denoising steps per run.
        seed: Of weights and inputs.
        models: One result per model.
    """

    device: str
    dtype: str
    steps: int
    seed: int
    models: tuple[ModelResult, ...]

    @property
    def ok(self) -> bool:
        """Whether every model was run by some backend, and no exact backend left the budget or broke."""
        return all(model.ok for model in self.models)

    def to_dict(self) -> dict[str, Any]:
        """Return all but the images as plain data, for JSON."""
        return {
            "ok": self.ok,
            "device": self.device,
            "dtype": self.dtype,
            "steps": self.steps,
            "seed": self.seed,
            "models": [model.to_dict() for model in self.models],
        }
