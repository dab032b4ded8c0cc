"""Shorter ways to run calls of torch's SDPA that convert nothing in query, key and value."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anyattn.adapters.native.kernels import misread
from anyattn.backend.protocol import MaskedRunner, Plan, Runner
from anyattn.lowering.dense import aligned_bias, cached_key_bias, cached_within_base_2, wide
from anyattn.types.spec import AttentionSpec


def bind_sdpa(plan: Plan) -> Runner | None:
    """Return the shortest function for a plain SDPA call, or None if the plan isn't one."""
    spec, lowering = plan.spec, plan.lowering
    if lowering.entry != "sdpa" or lowering.copy or lowering.dense or spec.mask.key or spec.mask.dense:
        return None
    sdpa = torch._C._nn.scaled_dot_product_attention
    # Fewer arguments are parsed faster.
    options = _options(spec)
    if spec.layout == "BHSD":
        if not options and not lowering.is_causal:
            return sdpa
        return functools.partial(sdpa, attn_mask=None, is_causal=lowering.is_causal, **options)
    if not options and not lowering.is_causal:
        return lambda query, key, value: sdpa(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        ).transpose(1, 2)
    is_causal = lowering.is_causal
    return lambda query, key, value: sdpa(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), None, is_causal=is_causal, **options
    ).transpose(1, 2)


def bind_sdpa_masked(plan: Plan) -> MaskedRunner | None:
    """Return the shortest function for an SDPA call with one mask tensor or SDPA's causal flag, or None."""
    spec, lowering = plan.spec, plan.lowering
    if lowering.entry not in ("sdpa", "sdpa_additive") or lowering.copy:
        return None
    if spec.sinks or spec.mask.block is not None or misread(spec):
        return None
    if spec.mask.key == "lengths" and lowering.entry != "sdpa_additive":
        return None
    if (spec.mask.key is not None) + (spec.mask.dense is not None) > 1:
        return None
    if spec.mask.pattern is not None and not lowering.is_causal:
        return None
    plain = bind_sdpa(plan)
    if plain is not None:
        return lambda query, key, value, attn_mask: plain(query, key, value)
    sdpa = torch._C._nn.scaled_dot_product_attention
    options = _options(spec)
    made = _made_mask(plan)
    if made is None:
        if spec.layout == "BHSD":
            return lambda query, key, value, attn_mask: sdpa(query, key, value, wide(attn_mask), **options)
        return lambda query, key, value, attn_mask: sdpa(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), wide(attn_mask), **options
        ).transpose(1, 2)
    if spec.layout == "BHSD":
        return lambda query, key, value, attn_mask: sdpa(query, key, value, made(attn_mask, query, key), **options)

    def swapped(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any) -> Tensor:
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return sdpa(query, key, value, made(attn_mask, query, key), **options).transpose(1, 2)

    return swapped


def bind_kernel(plan: Plan) -> Runner | None:
    """Return the shortest function for a call of one CUDA kernel of SDPA without mask and lse, or None."""
    spec, lowering = plan.spec, plan.lowering
    mask = spec.mask
    if spec.packed or spec.return_lse or spec.sinks or mask.key or mask.dense or mask.block is not None:
        return None
    if lowering.copy or lowering.dense or lowering.repeat_heads or lowering.upcast or lowering.pad_keys:
        return None
    if spec.head_dim % 8 or spec.head_dim_v % 8 or (mask.pattern is not None and not lowering.is_causal):
        return None
    arguments: tuple[Any, ...]
    if lowering.entry == "flash":
        operator, arguments = torch.ops.aten._scaled_dot_product_flash_attention, (lowering.is_causal, False)
        arguments = (spec.dropout_p, *arguments)
    elif lowering.entry == "cudnn":
        operator = torch.ops.aten._scaled_dot_product_cudnn_attention
        arguments = (None, spec.needs_grad, spec.dropout_p, lowering.is_causal, False)
    elif lowering.entry == "efficient" and not spec.storage.expanded_kv:
        operator = torch.ops.aten._scaled_dot_product_efficient_attention
        arguments = (None, spec.needs_grad, spec.dropout_p, lowering.is_causal)
    else:
        return None
    run, scale = operator.default, spec.scale
    if spec.layout == "BHSD":
        return lambda query, key, value: run(query, key, value, *arguments, scale=scale)[0]
    return lambda query, key, value: run(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), *arguments, scale=scale
    )[0].transpose(1, 2)


def _made_mask(plan: Plan) -> Callable[[Any, Tensor, Tensor], Tensor] | None:
    """Return the function that makes SDPA's mask from a mask, query and key; None if SDPA takes it unchanged."""
    if plan.spec.mask.key is not None and plan.lowering.entry == "sdpa_additive":

        def of_keys(attn_mask: Any, query: Tensor, key: Tensor) -> Tensor:
            given = attn_mask if isinstance(attn_mask, Tensor) else attn_mask.key
            return aligned_bias(cached_key_bias(given, key.shape[2], query.dtype), query, key)

        return of_keys
    if plan.lowering.entry == "sdpa_additive":
        return lambda attn_mask, query, key: aligned_bias(wide(attn_mask), query, key)
    dense = plan.spec.mask.dense
    if plan.spec.device_type == "cuda" and dense is not None and dense.dtype in (torch.bfloat16, torch.float32):

        def of_bias(attn_mask: Any, query: Tensor, key: Tensor) -> Tensor:
            return wide(cached_within_base_2(attn_mask if isinstance(attn_mask, Tensor) else attn_mask.dense))

        return of_bias
    return None


def _options(spec: AttentionSpec) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if spec.dropout_p:
        options["dropout_p"] = spec.dropout_p
    if spec.scale != 1.0 / math.sqrt(spec.head_dim):
        options["scale"] = spec.scale
    if spec.is_gqa:
        options["enable_gqa"] = True
    return options
