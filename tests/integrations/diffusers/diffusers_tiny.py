"""Tiny models of Diffusers with random weights, each with inputs, and what the tests measure on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import anyattn
from anyattn.reference.tolerance import budget, excess

SDPA = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Tiny:
    """A model class made small: how to build it, its inputs, and how to call it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    call: Callable[[nn.Module, dict[str, Any]], Tensor]


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


def encode_and_decode(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model.decode(model.encode(inputs["sample"]).latent_dist.mean).sample


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )


def flux_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([1.0, 1.0]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(7, 3),
    }


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "pooled_projections": torch.randn(2, 64),
        "timestep": torch.tensor([1.0, 1.0]),
    }


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        norm_num_groups=8,
    )


def unet_inputs() -> dict[str, Any]:
    return {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 32), "time_ids": torch.ones(2, 6)},
    }


def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def wan_inputs() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
    }


def qwen() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )


def qwen_inputs() -> dict[str, Any]:
    """Two prompts of 7 and 3 tokens in one batch; the text comes first, so the padding is a hole."""
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 3:] = 0
    return {
        "hidden_states": torch.randn(2, 16, 16),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.tensor([1.0, 1.0]),
        "img_shapes": [[(1, 4, 4)]] * 2,
    }


def lumina2() -> nn.Module:
    from diffusers import Lumina2Transformer2DModel

    return Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 64, 64),
        cap_feat_dim=16,
    )


def lumina2_inputs() -> dict[str, Any]:
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.rand(2),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_attention_mask": mask,
    }


def vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        norm_num_groups=8,
        latent_channels=4,
    )


def vae_inputs() -> dict[str, Any]:
    return {"sample": torch.randn(1, 3, 16, 16)}


TINY: dict[str, Tiny] = {
    "flux": Tiny(flux, flux_inputs, run),
    "sd3": Tiny(sd3, sd3_inputs, run),
    "unet": Tiny(unet, unet_inputs, run),
    "wan": Tiny(wan, wan_inputs, run),
    "qwen": Tiny(qwen, qwen_inputs, run),
    "lumina2": Tiny(lumina2, lumina2_inputs, run),
    "vae": Tiny(vae, vae_inputs, encode_and_decode),
}


MAIN = tuple(TINY)
"""The models that every property is tested on; `diffusers_classes` adds more to `TINY`."""


def make(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Build a model in evaluation mode and its inputs, the same ones every time."""
    torch.manual_seed(7)
    model = TINY[name].build().eval()
    # Some models start with zeroed outputs, which would hide any mistake before them.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or not parameter.abs().sum():
                parameter.normal_(std=0.2)
    return model, TINY[name].inputs()


def output(name: str, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return TINY[name].call(model, inputs)


def chosen(name: str, model: nn.Module, inputs: dict[str, Any]) -> set[str | None]:
    """Run a model and give the backends that anyattn ran for it; none where Diffusers kept its calls."""
    with anyattn.record() as calls:
        output(name, model, inputs)
    return {call.chosen for call in calls}


class CountSdpa(TorchFunctionMode):
    """Counts the calls of torch's function, whoever makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is SDPA
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Stock:
    """What Diffusers alone makes of a model, and how far from the truth another run may be.

    Attributes:
        output: Its output in float32.
        calls: How often it computed attention.
        truth: The output in float64.
        allowed: The error budget of `anyattn.reference.tolerance`, from a run with plain arithmetic in float32.
    """

    output: Tensor
    calls: int
    truth: Tensor
    allowed: Tensor

    def agrees(self, result: Tensor) -> bool:
        """Whether a float32 run stays inside the budget."""
        return excess(result, self.truth, self.allowed) <= 1.0


@cache
def stock(name: str) -> Stock:
    """Run a model in Diffusers alone; the integration must be disabled or unasked."""
    model, inputs = make(name)
    with CountSdpa() as counter:
        out = output(name, model, inputs)
    with sdpa_kernel(SDPBackend.MATH):
        plain = output(name, model, inputs)
    truth = output(name, model.double(), in_float64(inputs))
    return Stock(out, counter.calls, truth, budget(truth, plain, torch.float32, over=tuple(range(truth.dim()))))


def in_float64(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: in_float64(entry) for key, entry in value.items()}
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value
