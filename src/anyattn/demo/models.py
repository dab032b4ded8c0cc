"""Build the demo's pipelines: weights drawn under a fixed seed, rounded to one dtype, ready to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anyattn.demo.recipes import BUILDERS, MODELS, PIXELS, Inputs, ModelName
from anyattn.errors import InvalidCallError

__all__ = ["DemoPipeline", "Output", "build_pipeline", "check_choice"]


@dataclass(frozen=True)
class Output:
    """What one run of a pipeline gave.

    Attributes:
        latents: The last latents, before decoding.
        image: Decoded, in [0, 1]: `(images or frames, 3, height, width)`.
    """

    latents: Tensor
    image: Tensor


@dataclass(frozen=True)
class DemoPipeline:
    """A pipeline and the arguments of its one call.

    Attributes:
        name: Which model of the demo it is.
        pipeline: The Diffusers pipeline.
        arguments: What it is called with: latents and prompt embeddings, so the pipeline draws and encodes nothing.
    """

    name: ModelName
    pipeline: Any
    arguments: dict[str, Any]

    def run(self) -> Output:
        """Denoise and decode once."""
        last: dict[str, Tensor] = {}

        def keep(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            last.update(tensors)
            return {}

        decoded = self.pipeline(
            **self.arguments,
            height=PIXELS,
            width=PIXELS,
            output_type="pt",
            return_dict=False,
            callback_on_step_end=keep,
            callback_on_step_end_tensor_inputs=["latents"],
        )[0]
        return Output(latents=last["latents"], image=decoded.flatten(0, -4))


def build_pipeline(
    name: ModelName,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    widen: bool = False,
    steps: int = 3,
    seed: int = 0,
) -> DemoPipeline:
    """Build one model of the demo; the same arguments give the same weights and inputs, bit for bit.

    Args:
        name: One of `MODELS`.
        device: The device it runs on.
        dtype: What its weights and inputs are rounded to.
        widen: Afterwards turn all of it into float64, so that it is the same model in exact arithmetic.
        steps: Denoising steps, at least 1.
        seed: Of weights and inputs.

    Raises:
        InvalidCallError: If there is no such model or `steps` is below 1.
        MissingExtraError: If Diffusers or Transformers isn't installed.
    """
    check_choice(name, steps)
    inputs = Inputs(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline, arguments = BUILDERS[name](inputs, steps)
    pipeline.set_progress_bar_config(disable=True)
    models = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    for model in models:
        _draw_weights(model, inputs.generator)
        _round_weights(model, dtype)
        nn.Module.to(model, device, torch.float64 if widen else None)

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            value = value.to(dtype).to(torch.float64 if widen else dtype)
        return value.to(device)

    return DemoPipeline(name, pipeline, {key: place(value) for key, value in arguments.items()})


def check_choice(name: str, steps: int) -> None:
    """Check a model's name and the number of steps.

    Raises:
        InvalidCallError: If there is no such model or `steps` is below 1.
    """
    if name not in BUILDERS:
        raise InvalidCallError(f"The demo's models are {', '.join(MODELS)}; {name!r} was given.")
    if steps < 1:
        raise InvalidCallError(f"steps must be at least 1; {steps!r} was given.")


def _draw_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight matrix and filter from N(0, 1/fan_in).

    Signals keep their size through the layers then, and attention counts for as much as everything else;
    under the default initialisation it counts for so little that bfloat16's rounding hides a wrong kernel.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and name.endswith("weight"):
            # Half as wide at the last layer of a decoder: fewer pixels are cut off at black and white.
            gain = 0.5 if name == "decoder.conv_out.weight" else 1.0
            nn.init.normal_(parameter, std=gain * parameter[0].numel() ** -0.5, generator=generator)


def _round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    # Parts that a model keeps in float32 when it is loaded in half precision stay float32 here too
    # (Diffusers 0.42.1: Wan's norms and time embedding). ModelMixin.to would only warn about them.
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype.itemsize < 4 else set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not kept.intersection(name.split(".")):
            tensor.data = tensor.data.to(dtype)
