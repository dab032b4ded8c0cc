"""What the keywords of Transformers' attention calls mean: each is honoured, without meaning here, or refused."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils import output_capturing

from anyattn.errors import InvalidCallError

_collector: Any = output_capturing._active_collector

MEANINGLESS = frozenset(
    (
        # What a model returns besides its output, or reads for its loss.
        "use_cache",
        "return_dict",
        "return_loss",
        "output_hidden_states",
        "output_router_logits",
        "output_hidden_states_before_downsampling",
        "labels",
        "num_items_in_batch",
        "num_logits_to_keep",
        "logits_to_keep",
        # What was used before the attention call: embeddings, positions, the cache, which is updated by then.
        "input_ids",
        "inputs_embeds",
        "token_type_ids",
        "mm_token_type_ids",
        "position_embeddings",
        "past_key_values",
        "past_key_value",
        "cache_position",
        "cache_params",
        "layer_idx",
        "spatial_shapes",
        "spatial_shapes_list",
        "level_start_index",
        "reference_points",
        "interpolate_pos_encoding",
        "grid_thw",
        "rotary_pos_emb",
        "shared_kv_states",
        # States and masks of other layers: a layer passes its own attention the mask that belongs to it.
        "encoder_hidden_states",
        "encoder_attention_mask",
        "key_value_states",
        "decoder_input_ids",
        "decoder_attention_mask",
        "pixel_values",
        "pixel_values_videos",
        "image_grid_thw",
        "video_grid_thw",
        "image_sizes",
        "input_features",
        # What linear-attention and mixture layers read.
        "seq_idx",
        "conv_mask",
        "layer_head_mask",
        "router_logits",
    )
)
"""Keywords that say nothing about attention itself; they arrive because models pass on what they were given."""

REFUSED: dict[str, str] = {
    "output_attentions": "the weights are never written out; use attn_implementation='eager' to get them",
    "cache": "continuous batching keeps keys in pages, which anyattn doesn't read; use generate instead of "
    "generate_batch, or another attn_implementation for it",
    "block_table": "keys in pages aren't read; use generate instead of generate_batch",
    "k_cache": "keys in pages aren't read; use generate instead of generate_batch",
    "v_cache": "keys in pages aren't read; use generate instead of generate_batch",
    "block_indices": "sparse attention by blocks isn't supported; use attn_implementation='eager' for this model",
    "head_mask": "weights of single heads can't be scaled; use attn_implementation='eager'",
    "deterministic": "torch.use_deterministic_algorithms(True) asks for it, in every backend",
}
"""Keywords that have a meaning which isn't honoured, each with what to do instead."""


def check(module: Any, rest: dict[str, Any]) -> None:
    """Refuse every keyword of a call that has a meaning, or might have one, and that isn't honoured.

    None means that nothing was asked for, and so does False for the keywords of `REFUSED`.

    Weights that the model collects for its output are refused too: a flag in the config isn't passed on, and some
    layers don't pass the one of the call on. Compiled code can't look, and leaves them out as Transformers does.

    Raises:
        InvalidCallError: If such a keyword is there.
    """
    if not torch.compiler.is_compiling():
        for name in _collector.get() or ():
            if "attentions" in name:
                raise InvalidCallError(_refusal(module, "output_attentions"))
    for name, value in rest.items():
        if value is None or name in MEANINGLESS:
            continue
        if name in REFUSED:
            if value is False:
                continue
            raise InvalidCallError(_refusal(module, name))
        raise InvalidCallError(
            f"{type(module).__name__} passes the keyword {name!r} to its attention, and anyattn doesn't know whether "
            f"it changes the result. Leave it out of the call of the model, or use another attn_implementation. If it "
            f"carries no meaning for attention, report it: it belongs on the list of those that are ignored."
        )


def _refusal(module: Any, name: str) -> str:
    return (
        f"{type(module).__name__} was asked for {name}, which attn_implementation='anyattn' doesn't honour: "
        f"{REFUSED[name]}."
    )
