"""Biases made from masks are cached while the mask is the same, and no longer."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from anyattn.lowering import cache as module
from anyattn.lowering import dense
from anyattn.lowering.dense import HUGE, cached_key_bias, cached_within_base_2, within_base_2


@pytest.fixture(autouse=True)
def _nothing_is_cached() -> Iterator[None]:
    module.forget()
    yield
    module.forget()


@pytest.mark.parametrize("seqlen_kv", [16, 21])
@pytest.mark.parametrize("kind", ["padding", "wide", "lengths"])
def test_bias_of_keys_is_made_once_and_follows_writes(kind: str, seqlen_kv: int) -> None:
    lengths = torch.tensor([3, 9])
    padding = torch.arange(seqlen_kv) < lengths[:, None]
    key = {"padding": padding, "wide": padding[:, None, None], "lengths": lengths}[kind].clone()
    bias = cached_key_bias(key, seqlen_kv, torch.bfloat16)
    assert cached_key_bias(key, seqlen_kv, torch.bfloat16) is bias
    assert bias.shape == (2, 1, 1, seqlen_kv)
    assert bias.stride(0) % 16 == 0
    assert torch.equal(bias[:, 0, 0] == 0, padding)
    assert bias[:, 0, 0][~padding].isneginf().all()
    assert cached_key_bias(key, seqlen_kv, torch.float32).dtype == torch.float32
    key.fill_(1)
    allowed = 2 * (1 if kind == "lengths" else seqlen_kv)
    assert int((cached_key_bias(key, seqlen_kv, torch.bfloat16) == 0).sum()) == allowed


def test_drawn_bias_is_made_once_and_follows_writes() -> None:
    bias = torch.full((1, 2, 3, 4), torch.finfo(torch.float32).min)
    drawn = cached_within_base_2(bias)
    assert cached_within_base_2(bias) is drawn
    assert torch.equal(drawn, within_base_2(bias))
    bias.zero_()
    assert not cached_within_base_2(bias).any()


def test_drawn_bias_goes_with_its_mask() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        bias = torch.zeros(2, 2, dtype=dtype)
        alive = weakref.ref(bias)
        cached_within_base_2(bias)
        del bias
        gc.collect()
        assert alive() is None
        assert not module._slots


def test_biases_that_need_gradients_or_much_memory_are_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    leaf = torch.zeros(2, 2, requires_grad=True)
    assert cached_within_base_2(leaf).requires_grad
    monkeypatch.setattr(dense, "_MOST_CACHED_BYTES", 15)
    cached_within_base_2(torch.zeros(2, 2))
    assert not module._slots


def test_expanded_bias_is_drawn_without_being_repeated() -> None:
    row = torch.tensor([-4 * HUGE, 0.0, 1.0])
    bias = row.expand(4, 5, 3)
    drawn = within_base_2(bias)
    assert drawn.untyped_storage().nbytes() == row.untyped_storage().nbytes()
    assert torch.equal(drawn, within_base_2(bias.contiguous()))
