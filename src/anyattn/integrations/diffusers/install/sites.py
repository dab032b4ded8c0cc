"""The places where Diffusers computes attention without its own dispatcher, as data; a test searches for them again.

A key is a module below the package diffusers, or `module:Class.method` in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Alias = Literal["F", "nn"]

SDPA_CALLERS: Mapping[str, Alias] = {
    "models.attention_processor": "F",
    "models.embeddings": "F",
    "models.autoencoders.autoencoder_kl_cosmos": "F",
    "models.autoencoders.autoencoder_kl_hunyuanimage": "F",
    "models.autoencoders.autoencoder_kl_hunyuanimage_refiner": "nn",
    "models.autoencoders.autoencoder_kl_hunyuanvideo15": "nn",
    "models.autoencoders.autoencoder_kl_qwenimage": "F",
    "models.autoencoders.autoencoder_kl_qwenimage21": "F",
    "models.autoencoders.autoencoder_kl_wan": "F",
    "models.autoencoders.autoencoder_vidtok": "F",
    "models.transformers.sana_transformer": "F",
    "models.transformers.transformer_cogview4": "F",
    "models.transformers.transformer_easyanimate": "F",
    "models.transformers.transformer_hidream_image": "F",
    "models.transformers.transformer_lumina2": "F",
    "models.transformers.transformer_omnigen": "F",
    "models.transformers.transformer_sana_wm": "F",
    "pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero": "F",
    "pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_zero_sdxl": "F",
}
"""Modules that call torch's scaled_dot_product_attention themselves, and the name through which they do."""

WHOLE_MATRIX = "it computes the whole matrix of weights itself"
TEXT_ENCODER = "it belongs to a text encoder"

OWN_KERNELS: Mapping[str, str] = {
    "get_attention_scores": WHOLE_MATRIX,
    "memory_efficient_attention": "it calls xformers itself",
    "npu_fusion_attention": "it calls torch_npu itself",
    "flash_attention": "it calls torch_xla's kernel itself",
    "_na3d": "it calls NATTEN's neighbourhood attention itself",
}
"""Calls with which a processor computes attention past anyattn; the reason is shown to the user."""

OWN_LAYERS: Mapping[str, str] = {
    "torch.nn.modules.activation:MultiheadAttention": "torch.nn.MultiheadAttention runs inside torch",
    "diffusers.models.unets.unet_1d_blocks:SelfAttention1d": WHOLE_MATRIX,
    "diffusers.models.autoencoders.autoencoder_kl_ltx2_audio:LTX2AudioAttnBlock": WHOLE_MATRIX,
    "diffusers.models.embeddings:AttentionPooling": WHOLE_MATRIX,
    "diffusers.models.embeddings:IPAdapterTimeImageProjectionBlock": WHOLE_MATRIX,
    "diffusers.models.transformers.consisid_transformer_3d:PerceiverAttention": WHOLE_MATRIX,
    "diffusers.models.transformers.consisid_transformer_3d:PerceiverCrossAttention": WHOLE_MATRIX,
    "diffusers.pipelines.kolors.text_encoder:CoreAttention": TEXT_ENCODER,
    "diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion:LDMBertAttention": TEXT_ENCODER,
}
"""Layers, by `module:Class`, that compute softmax attention past both doors without a processor."""
