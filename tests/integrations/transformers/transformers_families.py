"""Tiny models of many families of Transformers, with random weights large enough that attention isn't uniform."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCAB = 48
PLAIN: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "head_dim": 8}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
BIDIRECTIONAL = {**PLAIN, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model class with a small config.

    Attributes:
        name: What it is called here.
        kind: `"decoder"`, `"encoder"`, `"seq2seq"`, or `"inputs"` if `inputs` makes what the model is called with.
        model: The name of the class in transformers.
        config: The name of the config's class.
        arguments: The config's arguments.
        calls: How many attention calls one forward makes.
        backend: What to pin, if `native` refuses the family.
        gradients: Whether a backend on a CPU has gradients for it.
        pads: Whether left and right padding are compared.
        inputs: What the model is called with.
    """

    name: str
    kind: str
    model: str
    config: str
    arguments: dict[str, Any]
    calls: int = 2
    backend: str | list[str] | None = None
    gradients: bool = True
    pads: bool = True
    inputs: Callable[[], dict[str, Any]] | None = None

    def make_config(self) -> Any:
        return getattr(hf, self.config)(**self.arguments)

    def make(self, implementation: Any = "eager") -> Any:
        """Make the model in float32 on the CPU, always with the same weights."""
        torch.manual_seed(0)
        model = getattr(hf, self.model)._from_config(self.make_config(), attn_implementation=implementation)
        enlarge(model)
        return model.eval()


def enlarge(model: torch.nn.Module) -> None:
    """Give a model weights with which attention is far from uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "sink" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2)
            elif parameter.dim() >= 2:
                fan_in = parameter.shape[-1] if "embed" not in name and "bias" not in name else 1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.3 / fan_in**0.5)


def _decoder(name: str, prefix: str, config: str | None = None, arguments: Any = None, **rest: Any) -> Family:
    settings = {**GROUPED, **(arguments or {})}
    return Family(name, "decoder", f"{prefix}ForCausalLM", config or f"{prefix}Config", settings, **rest)


def _encoder(name: str, prefix: str, arguments: Any = None, **rest: Any) -> Family:
    return Family(name, "encoder", f"{prefix}Model", f"{prefix}Config", {**BIDIRECTIONAL, **(arguments or {})}, **rest)


def _image(channels: int = 3, size: int = 16) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(3))}


IMAGE = {**{k: v for k, v in BIDIRECTIONAL.items() if k != "vocab_size"}, "image_size": 16, "patch_size": 4}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
GPT2 |= {"bos_token_id": 1, "eos_token_id": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
MLA |= {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "head_dim": 4,
    **MOE,
}
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
T5 |= {"pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 1}
BART = {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64}
BART |= {"dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1}
WHISPER = {**BART, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32}
LONG = {**T5, "local_radius": 3, "global_block_size": 4}
NLLB = {**BART, "num_experts": 2, "activation_dropout": 0.0, "attention_dropout": 0.0}
BOTH = ["sliding_attention", "full_attention"]
GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0}


def _speech() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCAB, (2, 6), generator=generator)
    return {"input_features": torch.randn(2, 8, 20, generator=generator), "decoder_input_ids": ids}


def _patches() -> dict[str, Any]:
    grid = torch.tensor([[1, 4, 4], [1, 4, 6]])
    patches = torch.randn(40, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(3))
    return {"hidden_states": patches, "grid_thw": grid}


def _text_and_image() -> dict[str, Any]:
    ids = torch.randint(2, VOCAB, (2, 7), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **_image()}


def _sound() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(3))}


TOWER = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "in_channels": 3, "temporal_patch_size": 2}
CLIP_TEXT = {**PLAIN, "projection_dim": 16, "attention_dropout": 0.0, "eos_token_id": 2}
CLIP = {"text_config": CLIP_TEXT, "vision_config": {**IMAGE, "projection_dim": 16}, "projection_dim": 16}

FAMILIES: tuple[Family, ...] = (
    _decoder("llama", "Llama"),
    Family("gpt2", "decoder", "GPT2LMHeadModel", "GPT2Config", GPT2),
    _decoder("mistral", "Mistral", arguments={"sliding_window": 4}),
    _decoder("mixtral", "Mixtral", arguments={"num_local_experts": 4, "sliding_window": None}),
    _decoder("qwen2", "Qwen2", arguments={"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    _decoder("qwen3", "Qwen3"),
    _decoder("gemma", "Gemma", arguments={"num_key_value_heads": 1}),
    _decoder("gemma2", "Gemma2", arguments=GEMMA, backend="flex", gradients=False),
    _decoder("gemma3", "Gemma3", "Gemma3TextConfig", {**GEMMA, "attn_logit_softcapping": None, "layer_types": BOTH}),
    _decoder(
        "gemma4",
        "Gemma4",
        "Gemma4TextConfig",
        {
            "sliding_window": 4,
            "num_hidden_layers": 4,
            "layer_types": [*BOTH, *BOTH],
            "num_kv_shared_layers": 2,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
        },
        calls=4,
    ),
    _decoder("phi3", "Phi3", arguments={"resid_pdrop": 0.0}),
    _decoder("gpt_neox", "GPTNeoX", arguments={"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    _decoder("opt", "OPT", arguments={"ffn_dim": 32, "word_embed_proj_dim": 32, "dropout": 0.0}),
    _decoder("olmo2", "Olmo2"),
    _decoder(
        "cohere2", "Cohere2", arguments={"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    _decoder("starcoder2", "Starcoder2", arguments={"sliding_window": 4}),
    _decoder("granite", "Granite", arguments={"attention_multiplier": 0.5}),
    _decoder("gpt_oss", "GptOss", arguments={"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    _decoder("deepseek_v3", "DeepseekV3", arguments=MLA),
    _decoder(
        "deepseek_v32", "DeepseekV32", arguments={**MLA, "index_topk": 3, "index_n_heads": 2, "index_head_dim": 8}
    ),
    _decoder(
        "llama4",
        "Llama4",
        "Llama4TextConfig",
        {
            "attention_chunk_size": 4,
            "num_local_experts": 2,
            "intermediate_size_mlp": 32,
            "interleave_moe_layer_step": 2,
        },
    ),
    Family(
        "deepseek_v4",
        "decoder",
        "DeepseekV4ForCausalLM",
        "DeepseekV4Config",
        {
            **PLAIN,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "q_lora_rank": 16,
            "sliding_window": 4,
            "n_routed_experts": 4,
        }
        | {**MOE, "o_lora_rank": 8, "o_groups": 2, "index_topk": 3, "index_n_heads": 2, "index_head_dim": 8}
        | {"qk_rope_head_dim": 4},
    ),
    _decoder("flint", "Flint", arguments={"sliding_window": 4}),
    _decoder(
        "mimo_v2_flash",
        "MiMoV2Flash",
        arguments={"sliding_window": 4, "v_head_dim": 6, "n_routed_experts": 4, **MOE},
    ),
    _decoder("inkling2", "Inkling2", "Inkling2TextConfig"),
    _decoder("doge", "Doge", arguments={"keep_window_size": 4}),
    _decoder(
        "jamba",
        "Jamba",
        arguments={"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False}
        | {"mamba_dt_rank": 4},
        calls=1,
    ),
    _decoder("stablelm", "StableLm"),
    _decoder("smollm3", "SmolLM3"),
    _decoder(
        "qwen3_next",
        "Qwen3Next",
        arguments={
            **MOE,
            "num_experts": 4,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
        calls=1,
    ),
    _encoder("bert", "Bert"),
    _encoder("roberta", "Roberta"),
    _encoder("electra", "Electra", {"embedding_size": 32}),
    _encoder("albert", "Albert", {"embedding_size": 32}),
    Family(
        "distilbert",
        "encoder",
        "DistilBertModel",
        "DistilBertConfig",
        {
            "vocab_size": VOCAB,
            "dim": 32,
            "hidden_dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "dropout": 0.0,
            "pad_token_id": 0,
        }
        | {"attention_dropout": 0.0, "max_position_embeddings": 64},
    ),
    _encoder("modernbert", "ModernBert", {"local_attention": 4, "global_attn_every_n_layers": 2}),
    _encoder("layoutlm", "LayoutLM"),
    _encoder("splinter", "Splinter"),
    Family("clip_text", "encoder", "CLIPTextModel", "CLIPTextConfig", CLIP_TEXT),
    Family("t5", "seq2seq", "T5ForConditionalGeneration", "T5Config", T5, calls=6),
    Family("longt5", "seq2seq", "LongT5ForConditionalGeneration", "LongT5Config", LONG, calls=4),
    Family("nllb_moe", "seq2seq", "NllbMoeForConditionalGeneration", "NllbMoeConfig", NLLB, calls=6),
    Family(
        "t5gemma",
        "seq2seq",
        "T5GemmaForConditionalGeneration",
        "T5GemmaConfig",
        {"encoder": {**GROUPED, **GEMMA}, "decoder": {**GROUPED, **GEMMA}, "vocab_size": VOCAB},
        calls=6,
        backend="flex",
        gradients=False,
    ),
    Family("umt5", "seq2seq", "UMT5ForConditionalGeneration", "UMT5Config", T5, calls=6),
    Family("bart", "seq2seq", "BartForConditionalGeneration", "BartConfig", BART, calls=6),
    Family("marian", "seq2seq", "MarianMTModel", "MarianConfig", BART, calls=6),
    Family("whisper", "inputs", "WhisperForConditionalGeneration", "WhisperConfig", WHISPER, calls=6, inputs=_speech),
    Family("vit", "inputs", "ViTModel", "ViTConfig", IMAGE, inputs=_image),
    Family("dinov2", "inputs", "Dinov2Model", "Dinov2Config", IMAGE, inputs=_image),
    Family("siglip_vision", "inputs", "SiglipVisionModel", "SiglipVisionConfig", IMAGE, inputs=_image),
    Family("clip", "inputs", "CLIPModel", "CLIPConfig", CLIP, calls=4, inputs=_text_and_image),
    Family(
        "qwen2_5_vl_vision",
        "inputs",
        "Qwen2_5_VisionTransformerPretrainedModel",
        "Qwen2_5_VLVisionConfig",
        {**TOWER, "intermediate_size": 32, "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 16}
        | {"spatial_merge_size": 2},
        calls=5,
        inputs=_patches,
    ),
    Family(
        "wav2vec2",
        "inputs",
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        {
            **BIDIRECTIONAL,
            "conv_dim": [8, 8],
            "conv_stride": [5, 4],
            "conv_kernel": [5, 4],
            "num_feat_extract_layers": 2,
        }
        | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
        | {
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "feat_proj_dropout": 0.0,
            "layerdrop": 0.0,
            "activation_dropout": 0.0,
        },
        inputs=_sound,
    ),
)
BY_NAME = {family.name: family for family in FAMILIES}
