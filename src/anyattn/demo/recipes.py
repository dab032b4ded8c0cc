"""What the demo's models are: real Diffusers classes, small configurations, random inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from anyattn.demo.extras import load_diffusers

__all__ = ["BUILDERS", "MODELS", "PIXELS", "TITLES", "Inputs", "ModelName"]

ModelName = Literal["flux", "sd3", "sdxl", "wan", "qwen_image", "lumina2"]

TITLES: dict[ModelName, str] = {
    "flux": "FLUX",
    "sd3": "Stable Diffusion 3",
    "sdxl": "Stable Diffusion XL",
    "wan": "Wan (video)",
    "qwen_image": "Qwen-Image",
    "lumina2": "Lumina 2",
}
MODELS: tuple[ModelName, ...] = tuple(TITLES)

PIXELS = 64
LATENT_CHANNELS = 4
# The VAEs shrink by 4, so a latent is 16 x 16 and, in patches of 2 x 2, 64 tokens.
LATENT = PIXELS // 4
TOKENS = (LATENT // 2) ** 2
PACKED_CHANNELS = LATENT_CHANNELS * 4
# Every kernel takes heads of 64; a text of 13 tokens gives joint lengths off the powers of two.
HEAD_DIM = 64
ROPE_AXES = (16, 24, 24)
TEXT_LENGTH = 13
TEXT_DIM = 32
FRAMES = 5


class Inputs:
    """Random inputs in float32, drawn in order from one generator."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Draw from N(0, 1)."""
        return torch.randn(shape, generator=self.generator)

    def prompts(self, count: int = 1, *, negative: bool = False, pooled: bool = False) -> dict[str, Tensor]:
        """Prompt embeddings under the names that the pipelines use."""
        found: dict[str, Tensor] = {}
        for prefix in ("", "negative_") if negative else ("",):
            found[f"{prefix}prompt_embeds"] = self.normal(count, TEXT_LENGTH, TEXT_DIM)
            if pooled:
                found[f"{prefix}pooled_prompt_embeds"] = self.normal(count, TEXT_DIM)
        return found


def _padded(*lengths: int) -> Tensor:
    """A 0/1 mask `(prompts, TEXT_LENGTH)` for prompts of these lengths, as a tokenizer gives it."""
    return (torch.arange(TEXT_LENGTH) < torch.tensor(lengths)[:, None]).long()


def _sigmas(steps: int) -> dict[str, Any]:
    # 1, 1/2, 1/4, ...: their timesteps (1000, 500, 250, 125) are exact in bfloat16. Two of the pipelines hand
    # the timestep over in the model's dtype, and its rounding would drown every other error.
    return {"num_inference_steps": steps, "sigmas": [0.5**step for step in range(steps)]}


def _image_vae() -> Any:
    (autoencoder,) = load_diffusers("AutoencoderKL")
    return autoencoder(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
    )


def _video_vae(name: str, **config: Any) -> Any:
    (autoencoder,) = load_diffusers(name)
    return autoencoder(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        **config,
    )


def _flux(inputs: Inputs, steps: int) -> tuple[Any, dict[str, Any]]:
    """Joint attention of text and image; no mask."""
    pipeline, transformer, scheduler = load_diffusers(
        "FluxPipeline", "FluxTransformer2DModel", "FlowMatchEulerDiscreteScheduler"
    )
    built = pipeline(
        scheduler=scheduler(),
        vae=_image_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer(
            in_channels=PACKED_CHANNELS,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            pooled_projection_dim=TEXT_DIM,
            axes_dims_rope=ROPE_AXES,
        ),
    )
    latents = inputs.normal(1, TOKENS, PACKED_CHANNELS)
    return built, {"latents": latents, **inputs.prompts(pooled=True), **_sigmas(steps)}


def _sd3(inputs: Inputs, steps: int) -> tuple[Any, dict[str, Any]]:
    """Joint attention through processors that call SDPA themselves; guided, so a batch of two."""
    pipeline, transformer, scheduler = load_diffusers(
        "StableDiffusion3Pipeline", "SD3Transformer2DModel", "FlowMatchEulerDiscreteScheduler"
    )
    built = pipeline(
        transformer=transformer(
            sample_size=LATENT,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=2,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            caption_projection_dim=2 * HEAD_DIM,
            pooled_projection_dim=TEXT_DIM,
            pos_embed_max_size=LATENT,
        ),
        scheduler=scheduler(),
        vae=_image_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    latents = inputs.normal(1, LATENT_CHANNELS, LATENT, LATENT)
    prompts = inputs.prompts(negative=True, pooled=True)
    return built, {"latents": latents, **prompts, "guidance_scale": 4.0, **_sigmas(steps)}


def _sdxl(inputs: Inputs, steps: int) -> tuple[Any, dict[str, Any]]:
    """A UNet: self-attention and cross-attention to the text, through SDPA processors."""
    pipeline, unet, scheduler = load_diffusers(
        "StableDiffusionXLPipeline", "UNet2DConditionModel", "EulerDiscreteScheduler"
    )
    time_ids, time_dim = 6, 8
    built = pipeline(
        vae=_image_vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet(
            sample_size=LATENT,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            block_out_channels=(64, 128),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            # In this class the argument is the number of heads per block, whatever its name says.
            attention_head_dim=(1, 128 // HEAD_DIM),
            transformer_layers_per_block=1,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=time_dim,
            projection_class_embeddings_input_dim=time_ids * time_dim + TEXT_DIM,
            cross_attention_dim=TEXT_DIM,
            norm_num_groups=8,
        ),
        scheduler=scheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )
    latents = inputs.normal(1, LATENT_CHANNELS, LATENT, LATENT)
    prompts = inputs.prompts(negative=True, pooled=True)
    return built, {"latents": latents, **prompts, "guidance_scale": 4.0, "num_inference_steps": steps}


def _wan(inputs: Inputs, steps: int) -> tuple[Any, dict[str, Any]]:
    """Video: self-attention over frames and space, cross-attention to the text."""
    pipeline, transformer, scheduler = load_diffusers(
        "WanPipeline", "WanTransformer3DModel", "FlowMatchEulerDiscreteScheduler"
    )
    built = pipeline(
        tokenizer=None,
        text_encoder=None,
        vae=_video_vae("AutoencoderKLWan", scale_factor_temporal=2, scale_factor_spatial=4),
        scheduler=scheduler(),
        transformer=transformer(
            num_attention_heads=2,
            attention_head_dim=HEAD_DIM,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            text_dim=TEXT_DIM,
            freq_dim=64,
            ffn_dim=4 * HEAD_DIM,
            num_layers=2,
            rope_max_seq_len=32,
        ),
    )
    latents = inputs.normal(1, LATENT_CHANNELS, (FRAMES + 1) // 2, LATENT, LATENT)
    arguments = {"latents": latents, **inputs.prompts(negative=True), "guidance_scale": 4.0}
    return built, {**arguments, "num_frames": FRAMES, "num_inference_steps": steps}


def _qwen_image(inputs: Inputs, steps: int) -> tuple[Any, dict[str, Any]]:
    """Joint attention over two prompts of different lengths: padding in the middle of the keys."""
    pipeline, transformer, scheduler = load_diffusers(
        "QwenImagePipeline", "QwenImageTransformer2DModel", "FlowMatchEulerDiscreteScheduler"
    )
    built = pipeline(
        scheduler=scheduler(),
        vae=_video_vae("AutoencoderKLQwenImage"),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer(
            in_channels=PACKED_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=2,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=2,
            joint_attention_dim=TEXT_DIM,
            axes_dims_rope=ROPE_AXES,
        ),
    )
    latents = inputs.normal(2, TOKENS, PACKED_CHANNELS)
    arguments = {"latents": latents, **inputs.prompts(2), "prompt_embeds_mask": _padded(TEXT_LENGTH, 7)}
    return built, {**arguments, "true_cfg_scale": 1.0, **_sigmas(steps)}


def _lumina2(inputs: Inputs, steps: int) -> tuple[Any, dict[str, Any]]:
    """Grouped queries (four heads share two of keys and values) and padded prompts, guided."""
    pipeline, transformer, scheduler = load_diffusers(
        "Lumina2Pipeline", "Lumina2Transformer2DModel", "FlowMatchEulerDiscreteScheduler"
    )
    built = pipeline(
        transformer=transformer(
            sample_size=LATENT,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            hidden_size=4 * HEAD_DIM,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=32,
            axes_dim_rope=ROPE_AXES,
            axes_lens=(64, 32, 32),
            cap_feat_dim=TEXT_DIM,
        ),
        scheduler=scheduler(),
        vae=_image_vae(),
        text_encoder=None,
        tokenizer=None,
    )
    return built, {
        "latents": inputs.normal(2, LATENT_CHANNELS, LATENT, LATENT),
        **inputs.prompts(2, negative=True),
        "prompt_attention_mask": _padded(TEXT_LENGTH, 7),
        "negative_prompt_attention_mask": _padded(5, TEXT_LENGTH),
        "guidance_scale": 4.0,
        **_sigmas(steps),
    }


BUILDERS: dict[ModelName, Callable[[Inputs, int], tuple[Any, dict[str, Any]]]] = {
    "flux": _flux,
    "sd3": _sd3,
    "sdxl": _sdxl,
    "wan": _wan,
    "qwen_image": _qwen_image,
    "lumina2": _lumina2,
}
