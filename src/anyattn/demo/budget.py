"""The error budget of a run: the library's one rule, applied to a whole pipeline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyattn.demo.models import Output
from anyattn.reference.tolerance import budget

__all__ = ["Errors", "allow", "measure"]


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
        """Give the fields as plain data, for JSON."""
        return {"latents": self.latents, "image": self.image}


def measure(output: Output, truth: Output) -> Errors:
    """Give the largest absolute differences between a run and the float64 truth."""
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
