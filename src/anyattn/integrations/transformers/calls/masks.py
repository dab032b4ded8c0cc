"""The mask function that Transformers calls once per forward and kind of layer, instead of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils as stock
from transformers.utils.import_utils import is_tracing

from anyattn.errors import InvalidCallError
from anyattn.integrations.transformers.calls import notes, packed, patterns
from anyattn.masks.base import Pattern
from anyattn.masks.functions import same_document
from anyattn.masks.objects import Mask

FLOAT_MASKS = frozenset(("deepseek_v4",))
"""Types of models that cast an additive bias to the mask's dtype, so that a boolean mask would be inverted."""

TESTED = frozenset(("gemma2", "gpt_oss", "vaultgemma", "t5gemma", "flint", "mimo_v2_flash"))
"""Types of models that refuse `sdpa`, and whose causal layers were seen to say that they are."""

trusted: set[str] = set()
"""Types of models in this process that support `sdpa`: their layers say whether they are causal.

Others may have causal layers that say the opposite (NLLB-MoE's decoder), so they always get a mask.
"""

_IGNORED = frozenset(("allow_torch_fix",))


def mask_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = stock.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    **rest: Any,
) -> Tensor | None:
    """Make the mask of a kind of layers; the arguments are those of Transformers' `sdpa_mask`.

    Transformers' own function leaves out masks that mean upper-left causal over more keys than queries. This one leaves
    a mask out only where it is lower-right causal over all given keys, or allows everything.

    Returns:
        None, or a boolean `(B, 1, S_q, S_kv)`, True = attend, with a note where an object of anyattn says the same.

    Raises:
        InvalidCallError: For an unknown argument.
    """
    unknown = [name for name, value in rest.items() if value is not None and name not in _IGNORED]
    if unknown:
        raise InvalidCallError(
            f"Transformers passes {', '.join(unknown)} to the mask function, which anyattn doesn't know. Use another "
            "attn_implementation for this model."
        )
    given: dict[str, Any] = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
    given |= {"q_offset": q_offset, "kv_offset": kv_offset, "mask_function": mask_function}
    given |= {"attention_mask": attention_mask, "use_vmap": use_vmap, "device": device}
    if getattr(config, "model_type", None) in FLOAT_MASKS:
        return stock.eager_mask(**given, dtype=dtype)
    traced = is_tracing(attention_mask) or is_tracing(q_offset if isinstance(q_offset, Tensor) else None)
    keep = _used_keys(attention_mask, kv_length, kv_offset, traced)
    found = patterns.recognise(mask_function)
    if found is not None:
        found = found.within(kv_length, kv_offset)
    if found is not None and keep is None:
        kind = getattr(config, "model_type", None)
        may_skip = allow_is_causal_skip and (kind in trusted or kind in TESTED)
        if may_skip and _is_lower_right(found, q_length, kv_length, q_offset, kv_offset):
            return None
        if allow_is_bidirectional_skip and found.allows_all(kv_length):
            return None
    dense = stock.sdpa_mask(**given, allow_is_causal_skip=False)
    if dense is None or traced or found is None:
        return dense
    return _noted(dense, found, keep, q_offset, kv_offset)


def _used_keys(attention_mask: Tensor | None, kv_length: int, kv_offset: Any, traced: bool) -> Tensor | None:
    """Return which of the given keys aren't padding, boolean `(B, S_kv)`; None if none is known to be.

    Reading the values waits for the device, as Transformers' own function does.
    """
    if attention_mask is None:
        return None
    padded: Any = stock.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    keep: Tensor = padded[:, kv_offset : kv_offset + kv_length].bool()
    return None if not traced and bool(keep.all()) else keep


def _is_lower_right(found: patterns.Found, q_length: int, kv_length: int, q_offset: Any, kv_offset: Any) -> bool:
    """Whether lower-right causal over all given keys is exactly what a mask function allows."""
    if found.right != 0 or found.chunk or found.documents is not None:
        return False
    if isinstance(q_offset, Tensor) or isinstance(kv_offset, Tensor):
        return False
    if q_offset + q_length != kv_offset + kv_length:
        return False
    return True if found.left < 0 or kv_length <= found.left + 1 else False  # noqa: SIM210 - a guard, when traced


def _noted(dense: Tensor, found: patterns.Found, keep: Tensor | None, q_offset: Any, kv_offset: Any) -> Tensor:
    batch, _, q_length, kv_length = dense.shape
    if found.chunk:
        alone = keep is None and found.documents is None and (found.left, found.right) == (-1, 0)
        return notes.write(dense, None, chunk=found.chunk) if alone else dense
    if keep is not None and keep.shape[0] != batch:
        return dense
    if q_length == 1:
        # A mask of one row is a key mask already. A static cache's is known without a synchronisation to be lengths.
        if keep is None and isinstance(q_offset, Tensor) and (found.left, found.right) == (-1, 0):
            lengths = (q_offset - kv_offset + 1).reshape(1).expand(batch)
            return notes.write(dense, Mask(key=lengths))
        return dense
    pattern = _pattern(found, q_length, kv_length, int(q_offset), int(kv_offset))
    if pattern is None and found.right != -1:
        return dense
    if found.documents is None:
        return notes.write(dense, Mask(pattern=pattern, key=keep)) if pattern or keep is not None else dense
    documents = found.documents
    if keep is not None or q_length != kv_length or documents.shape != (batch, q_length):
        return dense
    starts = packed.starts_of(documents) if batch == 1 else None
    return notes.write(dense, Mask(pattern=pattern, block=same_document(documents)), starts)


def _pattern(found: patterns.Found, q_length: int, kv_length: int, q_offset: int, kv_offset: int) -> Pattern | None:
    """Return the pattern with its alignment; None if there is none, or if no alignment says where its rows are."""
    if (found.left, found.right) == (-1, -1):
        return None
    if q_offset + q_length == kv_offset + kv_length:
        return (found.left, found.right, "lower_right")
    return (found.left, found.right, "upper_left") if q_offset == kv_offset else None
