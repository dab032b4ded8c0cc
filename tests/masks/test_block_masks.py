"""Block masks made of bounds hold what torch makes by looking at every position."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from anyattn.masks.block_masks import make_band_block_mask

CPU = torch.device("cpu")


def _blocks(number: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Write counts and orders of blocks out as booleans `(B, 1, rows, columns)`."""
    found = torch.zeros(*number.shape, columns, dtype=torch.bool)
    for place in torch.cartesian_prod(*map(torch.arange, number.shape)).tolist():
        found[tuple(place)][indices[tuple(place)][: number[tuple(place)]].long()] = True
    return found


def _mod(low: int | None, high: int | None, keys: Tensor | None) -> Any:
    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        allowed = kv >= 0
        if low is not None:
            allowed = allowed & (kv - q >= low)
        if high is not None:
            allowed = allowed & (kv - q <= high)
        return allowed if keys is None else allowed & keys[b, kv]

    return mask_mod


@pytest.mark.parametrize("seed", range(60))
def test_blocks_of_bounds_are_those_of_every_position(seed: int) -> None:
    rng = random.Random(seed)
    seqlen_q, seqlen_kv = (rng.choice((1, 100, 128, 200, 256, 300, 515)) for _ in range(2))
    low = rng.choice((None, None, -400, -128, -60, 0))
    high = rng.choice((None, 0, 1, 127, 200))
    batch = rng.choice((0, 0, 2))
    keys = None if batch == 0 else torch.rand(batch, seqlen_kv) < rng.choice((0.01, 0.98))
    if keys is not None:
        keys[0, : seqlen_kv // 2] = True
    mask_mod = _mod(low, high, keys)
    found = make_band_block_mask(mask_mod, seqlen_q, seqlen_kv, CPU, low=low, high=high, keys=keys)
    true = create_block_mask(mask_mod, batch or None, None, seqlen_q, seqlen_kv, device="cpu")
    columns = -(-seqlen_kv // 128)
    assert torch.equal(
        _blocks(found.full_kv_num_blocks, found.full_kv_indices, columns),
        _blocks(true.full_kv_num_blocks, true.full_kv_indices, columns),
    )
    partial = _blocks(found.kv_num_blocks, found.kv_indices, columns)
    needed = _blocks(true.kv_num_blocks, true.kv_indices, columns)
    # A block where a band and keys meet nowhere may be looked at in vain.
    assert torch.equal(partial, needed) if keys is None else bool((needed <= partial).all())
    assert found.seq_lengths == true.seq_lengths


def test_long_windows_hold_few_blocks() -> None:
    made = make_band_block_mask(_mod(-256, 0, None), 1 << 17, 1 << 17, CPU, low=-256, high=0)
    assert made.sparsity() > 99.7
    # Blocks at the end of the window are partial, those within it whole.
    assert made.kv_num_blocks[0, 0, 10] == 2
    assert made.full_kv_num_blocks[0, 0, 10] == 1
