"""More model classes of Diffusers, made tiny: every door, every layout of masks, and all kinds of autoencoders."""

from __future__ import annotations

from typing import Any

import torch
from diffusers_tiny import TINY, Tiny, run
from torch import Tensor, nn


def sample_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).sample


def round_trip(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    encoded = model.encode(inputs["x"])
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
    return model.decode(latents).sample


def middle_of_controlnet(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, return_dict=False)[1]


def padded(*lengths: int, total: int) -> Tensor:
    return torch.arange(total) < torch.tensor(lengths)[:, None]


def add(name: str, kind: str, config: dict[str, Any], call: Any = run, **shapes: Any) -> None:
    """List a class; a tuple among the inputs is the shape of a random tensor, all else is given as it is."""

    def build() -> nn.Module:
        import diffusers

        return getattr(diffusers, kind)(**config)

    def inputs() -> dict[str, Any]:
        return {key: torch.randn(value) if isinstance(value, tuple) else value for key, value in shapes.items()}

    CLASSES[name] = Tiny(build, inputs, call)


CLASSES: dict[str, Tiny] = {}
ONE, TWO = torch.tensor([1]), torch.tensor([1, 1])

VIDEO_VAE = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 1}
ROPE_PARTS = {"patch_size": 1, "in_channels": 4, "attention_head_dim": 16, "num_attention_heads": 2}
TWO_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1}
FOUR_HEADS = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1}

add("wan_vae", "AutoencoderKLWan", {"base_dim": 3, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    round_trip, x=(1, 3, 5, 16, 16))  # fmt: skip
add("qwen_vae", "AutoencoderKLQwenImage",
    {"base_dim": 6, "z_dim": 4, "dim_mult": [1, 2, 4], "num_res_blocks": 1, "temperal_downsample": [False, True],
     "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, round_trip, x=(1, 3, 1, 16, 16))  # fmt: skip
add("hunyuan_image_vae", "AutoencoderKLHunyuanImage",
    {**VIDEO_VAE, "block_out_channels": (32, 32), "spatial_compression_ratio": 2, "sample_size": 16},
    round_trip, x=(2, 3, 16, 16))  # fmt: skip
add("hunyuan_video15_vae", "AutoencoderKLHunyuanVideo15",
    {**VIDEO_VAE, "block_out_channels": (8, 8, 8, 8), "spatial_compression_ratio": 4,
     "temporal_compression_ratio": 2}, round_trip, x=(1, 3, 5, 16, 16))  # fmt: skip
add("hunyuan_video_vae", "AutoencoderKLHunyuanVideo",
    {**VIDEO_VAE, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4,
     "down_block_types": ("HunyuanVideoDownBlock3D",) * 4, "up_block_types": ("HunyuanVideoUpBlock3D",) * 4},
    round_trip, x=(1, 3, 9, 16, 16))  # fmt: skip
add("mochi_vae", "AutoencoderKLMochi",
    {"latent_channels": 4, "out_channels": 3, "encoder_block_out_channels": (32,) * 4,
     "decoder_block_out_channels": (32,) * 4, "layers_per_block": (1,) * 5},
    round_trip, x=(1, 3, 7, 16, 16))  # fmt: skip
add("cosmos_vae", "AutoencoderKLCosmos",
    {"latent_channels": 4, "encoder_block_out_channels": (8,) * 4, "decode_block_out_channels": (8,) * 4,
     "attention_resolutions": (8,), "resolution": 64, "num_layers": 1, "spatial_compression_ratio": 4,
     "temporal_compression_ratio": 4}, sample_of, sample=(1, 3, 9, 32, 32))  # fmt: skip
add("vidtok", "AutoencoderVidTok",
    {"is_causal": False, "in_channels": 3, "out_channels": 3, "ch": 8, "ch_mult": [1, 1, 1, 1], "z_channels": 4,
     "double_z": False, "num_res_blocks": 1, "regularizer": "fsq", "codebook_size": 4096},
    sample_of, sample=(1, 3, 16, 32, 32))  # fmt: skip
add("vq", "VQModel",
    {"block_out_channels": (8, 16), "norm_num_groups": 8, "latent_channels": 3,
     "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
     "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")}, sample_of, sample=(1, 3, 16, 16))  # fmt: skip
add("mochi", "MochiTransformer3DModel",
    {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 16,
     "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 4, "max_sequence_length": 16},
    hidden_states=(2, 4, 2, 16, 16), encoder_hidden_states=(2, 16, 16), timestep=TWO,
    encoder_attention_mask=padded(16, 9, total=16))  # fmt: skip
add("cogview4", "CogView4Transformer2DModel",
    {"in_channels": 4, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 4, "out_channels": 4,
     "text_embed_dim": 32, "time_embed_dim": 8, "condition_dim": 4},
    hidden_states=(2, 4, 8, 8), encoder_hidden_states=(2, 8, 32), timestep=TWO,
    original_size=torch.full((2, 2), 20), target_size=torch.full((2, 2), 20),
    crop_coords=torch.zeros(2, 2))  # fmt: skip
add("sana", "SanaTransformer2DModel",
    {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 4,
     "num_attention_heads": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 4,
     "cross_attention_dim": 8, "caption_channels": 8}, hidden_states=(2, 4, 8, 8),
    encoder_hidden_states=(2, 8, 8), timestep=TWO, encoder_attention_mask=padded(8, 5, total=8).long())  # fmt: skip
add("pixart", "PixArtTransformer2DModel",
    {"sample_size": 8, "num_layers": 1, "attention_head_dim": 2, "num_attention_heads": 2, "in_channels": 4,
     "cross_attention_dim": 4, "caption_channels": 8, "use_additional_conditions": False},
    hidden_states=(2, 4, 8, 8), encoder_hidden_states=(2, 8, 8), timestep=TWO,
    encoder_attention_mask=padded(8, 5, total=8).long(),
    added_cond_kwargs={"resolution": None, "aspect_ratio": None})  # fmt: skip
add("controlnet", "ControlNetModel",
    {"block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 2,
     "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 4,
     "conditioning_embedding_out_channels": (8, 16)}, middle_of_controlnet,
    sample=(1, 4, 8, 8), timestep=1, encoder_hidden_states=(1, 7, 16), controlnet_cond=(1, 3, 16, 16))  # fmt: skip
add("unet_added_kv", "UNet2DConditionModel",
    {"block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 4,
     "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), "norm_num_groups": 8,
     "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
     "mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
    sample=(1, 4, 8, 8), timestep=1, encoder_hidden_states=(1, 7, 16))  # fmt: skip
add("unet3d", "UNet3DConditionModel",
    {"block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 16, "layers_per_block": 1,
     "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "attention_head_dim": 4,
     "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")},
    sample=(1, 4, 2, 8, 8), timestep=1, encoder_hidden_states=(1, 7, 16))  # fmt: skip
add("cogvideox", "CogVideoXTransformer3DModel",
    {**TWO_HEADS, "out_channels": 4, "time_embed_dim": 2, "text_embed_dim": 8, "sample_width": 8,
     "sample_height": 8, "sample_frames": 8, "max_text_seq_length": 8},
    hidden_states=(1, 2, 4, 8, 8), encoder_hidden_states=(1, 8, 8), timestep=ONE)  # fmt: skip
add("hunyuan_video", "HunyuanVideoTransformer3DModel",
    {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
     "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "text_embed_dim": 16,
     "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)},
    hidden_states=(2, 4, 1, 8, 8), encoder_hidden_states=(2, 12, 16), pooled_projections=(2, 8),
    encoder_attention_mask=padded(12, 7, total=12).long(), timestep=TWO, guidance=torch.ones(2))  # fmt: skip
add("ltx", "LTXVideoTransformer3DModel",
    {**FOUR_HEADS, "out_channels": 4, "cross_attention_dim": 32, "caption_channels": 16},
    hidden_states=(2, 16, 4), encoder_hidden_states=(2, 8, 16), timestep=TWO,
    encoder_attention_mask=padded(8, 5, total=8), num_frames=1, height=4, width=4)  # fmt: skip
add("auraflow", "AuraFlowTransformer2DModel",
    {"sample_size": 8, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
     "attention_head_dim": 8, "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 32,
     "pos_embed_max_size": 64},
    hidden_states=(1, 4, 8, 8), encoder_hidden_states=(1, 7, 32), timestep=ONE)  # fmt: skip
add("stable_audio", "StableAudioDiTModel",
    {**FOUR_HEADS, "sample_size": 4, "num_key_value_attention_heads": 2, "out_channels": 4,
     "cross_attention_dim": 4, "time_proj_dim": 8, "global_states_input_dim": 8, "cross_attention_input_dim": 4},
    hidden_states=(1, 4, 4), timestep=ONE, encoder_hidden_states=(1, 7, 4),
    global_hidden_states=(1, 1, 8))  # fmt: skip
add("easyanimate", "EasyAnimateTransformer3DModel",
    {"attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 4, "mmdit_layers": 1, "num_layers": 2,
     "out_channels": 4, "sample_height": 8, "sample_width": 8, "text_embed_dim": 16, "time_embed_dim": 8,
     "patch_size": 2},
    hidden_states=(1, 4, 2, 8, 8), timestep=ONE, encoder_hidden_states=(1, 8, 16))  # fmt: skip
add("chroma", "ChromaTransformer2DModel",
    {**ROPE_PARTS, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8),
     "approximator_hidden_dim": 32, "approximator_layers": 1, "approximator_num_channels": 16},
    hidden_states=(2, 16, 4), encoder_hidden_states=(2, 7, 32), timestep=torch.ones(2),
    img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(7, 3), attention_mask=padded(23, 20, total=23))  # fmt: skip
add("flux2", "Flux2Transformer2DModel",
    {**ROPE_PARTS, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32,
     "timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4)},
    hidden_states=(1, 16, 4), encoder_hidden_states=(1, 7, 32), timestep=torch.ones(1), guidance=torch.ones(1),
    img_ids=torch.zeros(1, 16, 4), txt_ids=torch.zeros(1, 7, 4))  # fmt: skip
add("ace_step", "AceStepTransformer1DModel",
    {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
     "num_key_value_heads": 2, "head_dim": 8, "in_channels": 12, "audio_acoustic_hidden_dim": 4,
     "sliding_window": 4},
    hidden_states=(1, 16, 4), context_latents=(1, 16, 8), encoder_hidden_states=(1, 6, 32),
    timestep=torch.full((1,), 0.5), timestep_r=torch.full((1,), 0.5))  # fmt: skip

TINY.update(CLASSES)
