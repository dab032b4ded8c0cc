"""Small pipelines, run with a policy: which rule decided for each layer, at each denoising step."""

from __future__ import annotations

from typing import Any

import torch

import anyattn
from anyattn.demo.models import DemoPipeline, build_pipeline

Decided = list[dict[str, str]]
"""For each step, the rule or other source that decided for each layer; for VAE and text encoders a last entry."""


def demo(name: Any, steps: int = 4) -> DemoPipeline:
    return build_pipeline(name, steps=steps)


def by_step(run: Any, pipeline: Any, **changes: Any) -> Decided:
    """Run a pipeline, and give what decided in each of its steps and after them."""
    ends: list[int] = []

    def note(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        ends.append(len(calls))
        return tensors

    arguments = {**run, "height": 64, "width": 64, "output_type": "pt", "callback_on_step_end": note, **changes}
    with anyattn.record() as calls:
        pipeline(**{key: value for key, value in arguments.items() if value is not None})
    found = []
    for first, last in zip([0, *ends], [*ends, len(calls)], strict=True):
        span = zip(calls.layers[first:last], calls[first:last], strict=True)
        found.append({layer.partition(".")[2]: named(call) for layer, call in span})
    return found


def named(call: anyattn.Decision) -> str:
    return call.preference.source.removeprefix("policy rule ").strip("'")


def rules_by_step(run: Any, pipeline: Any, **changes: Any) -> list[set[str]]:
    return [set(step.values()) for step in by_step(run, pipeline, **changes)]


def by_forward(model: torch.nn.Module, call: Any) -> list[set[str]]:
    """Give what decided in each forward of a model during a call."""
    ends: list[int] = []
    hook = model.register_forward_hook(lambda *_: ends.append(len(calls)))
    with anyattn.record() as calls:
        call()
    hook.remove()
    return [{named(one) for one in calls[first:last]} for first, last in zip([0, *ends], ends, strict=False)]


def hunyuan_video() -> tuple[Any, dict[str, Any]]:
    """Build a small HunyuanVideo pipeline with random weights, and its arguments."""
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=6,
        num_single_layers=6,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 6, 8),
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipeline = diffusers.HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    arguments = {
        "prompt_embeds": torch.randn(1, 7, 16),
        "pooled_prompt_embeds": torch.randn(1, 8),
        "prompt_attention_mask": torch.ones(1, 7),
        "num_frames": 5,
        "num_inference_steps": 5,
    }
    return pipeline, arguments
