"""Attention in plain torch and float64: this file defines what every argument means.

Slow and memory-hungry on purpose, and differentiable by autograd in every input. Layout is (B, S, H, D).
Source: Vaswani et al. 2017 (arXiv:1706.03762) for attention; Gemma 2 (arXiv:2408.00118) for softcap; Xiao et al. 2023
(arXiv:2309.17453) and gpt-oss for sinks as extra logits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from anyattn.masks.functions import MaskFunction
from anyattn.masks.objects import Mask


def allowed_positions(mask: Mask | None, batch: int, heads: int, seqlen_q: int, seqlen_kv: int) -> Tensor:
    """Compute which positions a mask allows, as a boolean `(B, H, S_q, S_kv)` on the CPU or the mask's device.

    A bias forbids a position only with -inf.
    """
    tensors = [] if mask is None else [t for t in (mask.key, mask.dense) if t is not None]
    device = tensors[0].device if tensors else torch.device("cpu")
    allowed = torch.ones(batch, heads, seqlen_q, seqlen_kv, dtype=torch.bool, device=device)
    if mask is None:
        return allowed
    row = torch.arange(seqlen_q, device=device)[:, None]
    column = torch.arange(seqlen_kv, device=device)[None, :]
    if mask.pattern is not None:
        left, right, align = mask.pattern
        position = row + (seqlen_kv - seqlen_q if align == "lower_right" else 0)
        if left >= 0:
            allowed = allowed & (column >= position - left)
        if right >= 0:
            allowed = allowed & (column <= position + right)
    if mask.key is not None:
        keys = mask.key if mask.key.dtype == torch.bool else column < mask.key[:, None]
        allowed = allowed & (keys if keys.dim() == 4 else keys[:, None, None, :])
    if mask.dense is not None:
        allowed = allowed & (mask.dense if mask.dense.dtype == torch.bool else mask.dense > -math.inf)
    if mask.block is not None:
        allowed = allowed & _block_positions(mask.block, batch, heads, seqlen_q, seqlen_kv).to(device)
    return allowed


def _block_positions(block: Any, batch: int, heads: int, seqlen_q: int, seqlen_kv: int) -> Tensor:
    """Write a FlexAttention block mask out: its function, and its blocks if they hold for all heads and entries."""
    from torch.nn.attention.flex_attention import create_mask

    if isinstance(block, MaskFunction):
        whole: Tensor = create_mask(block.mask_mod, batch, heads, seqlen_q, seqlen_kv, device=block.device)
        return whole
    device = block.kv_num_blocks.device
    written = create_mask(block.mask_mod, batch, heads, seqlen_q, seqlen_kv, device=device)
    blocks = block.to_dense() != 0
    rows, columns = block.BLOCK_SIZE
    wide = blocks.repeat_interleave(rows, -2).repeat_interleave(columns, -1)[..., :seqlen_q, :seqlen_kv]
    # With B=None or H=None, create_block_mask makes the blocks from the function's first entry only, and they say
    # nothing about the others: then the function is the mask.
    tiles = torch.nn.functional.pad(written, (0, -seqlen_kv % columns, 0, -seqlen_q % rows))
    counts = (tiles.shape[-2] // rows, tiles.shape[-1] // columns)
    tiles = tiles.reshape(batch, heads, counts[0], rows, counts[1], columns).any(-1).any(-2)
    if torch.equal(tiles[: blocks.shape[0], : blocks.shape[1]], blocks):
        return written
    both: Tensor = written & wide
    return both


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Compute attention by its definition.

    Args:
        query: `(B, S_q, H, D)`, any floating dtype.
        key: `(B, S_kv, H_kv, D)`; H is a multiple of H_kv, and query head h reads head `h // (H // H_kv)`.
        value: `(B, S_kv, H_kv, D_v)`.
        mask: Which positions are allowed, and a bias added to the scores; None allows all and adds nothing.
        scale: The factor of the scores; None is `1 / sqrt(D)`.
        softcap: Scores become `softcap * tanh(score / softcap)`, after the scale and before the bias.
        sinks: `(H,)`: logits that count in the softmax's denominator and have no value.
        dtype: The dtype to compute in. Any but float64 is for measuring that dtype's own error.

    Returns:
        The output `(B, S_q, H, D_v)` and the natural log-sum-exp of the scores `(B, H, S_q)`, both of
        `dtype`. A row without a key gives zeros and -inf (or the sink).
    """
    batch, seqlen_q, heads, dim = query.shape
    seqlen_kv, group = key.shape[1], heads // key.shape[2]
    q = query.to(dtype).transpose(1, 2)
    k = key.to(dtype).repeat_interleave(group, dim=2).transpose(1, 2)
    v = value.to(dtype).repeat_interleave(group, dim=2).transpose(1, 2)

    scores = q @ k.transpose(-1, -2) * (1 / math.sqrt(dim) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dense is not None and mask.dense.dtype != torch.bool:
        scores = scores + mask.dense.to(dtype)
    allowed = allowed_positions(mask, batch, heads, seqlen_q, seqlen_kv).to(scores.device)
    scores = torch.where(allowed, scores, -math.inf)
    if sinks is not None:
        column = sinks.to(dtype)[None, :, None, None].expand(batch, heads, seqlen_q, 1)
        scores = torch.cat([scores, column], dim=-1)

    # The largest score is subtracted before exp; a row without any score has none.
    top = scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((batch, heads, seqlen_q, 1), -math.inf)
    top = torch.where(top == -math.inf, 0.0, top).detach()
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    dead = total == 0
    probabilities = weights[..., :seqlen_kv] / torch.where(dead, 1.0, total)
    out = (probabilities @ v).transpose(1, 2)
    lse = torch.where(dead, -math.inf, torch.log(torch.where(dead, 1.0, total)) + top).squeeze(-1)
    return out, lse
