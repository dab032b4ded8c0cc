"""Masks of two and three dimensions, and padding that isn't at the end: what Diffusers' dispatcher guesses.

anyattn reads a tensor as torch's SDPA does, and takes padding by its name; the integration takes Diffusers' own
reading, and refuses where that would be a guess.
"""

from __future__ import annotations

import functools

import pytest
import torch
from doors_to_backends import Attend, assert_right, differ, padding, tensors, triangle, truth

import anyattn
from anyattn import masks


@pytest.fixture
def call(backend: str) -> Attend:
    """A call of anyattn with one backend."""
    return functools.partial(anyattn.attention, backend=backend)


# Its flex takes a (B, S_kv) mask for one of query rows, where the lengths let it.
@pytest.mark.parametrize("where", ["right", "left", "hole"])
@pytest.mark.parametrize("seqlen_q", [6, 9])
def test_padding_masks_keys_and_never_rows(attend: Attend, seqlen_q: int, where: str) -> None:
    q, k, v = tensors(3, seqlen_q)
    keep = padding(3, 9, where)
    wanted = truth(q, k, v, keep[:, None, None])
    if seqlen_q == 9:
        assert differ(wanted, truth(q, k, v, keep[:, None, :, None]))
    assert_right(attend(q, k, v, masks.KeyPadding(keep)), wanted)


@pytest.mark.parametrize("where", ["right", "left", "hole"])
@pytest.mark.parametrize("seqlen_q", [6, 9])
def test_two_dimensional_padding_from_diffusers_masks_keys_and_never_rows(
    dispatch: Attend, seqlen_q: int, where: str
) -> None:
    q, k, v = tensors(3, seqlen_q)
    keep = padding(3, 9, where)
    wanted = truth(q, k, v, keep[:, None, None])
    assert_right(dispatch(q, k, v, keep), wanted)
    additive = torch.zeros(3, 9).masked_fill(~keep, float("-inf"))
    assert_right(dispatch(q, k, v, additive), wanted)


# Its packing backends count the allowed keys of an entry and then take that many from the start.
@pytest.mark.parametrize("where", ["right", "left", "hole"])
def test_padding_takes_the_keys_that_are_marked_and_not_as_many_from_the_start(attend: Attend, where: str) -> None:
    q, k, v = tensors(3)
    keep = padding(3, 9, where)
    counted = torch.arange(9) < keep.sum(-1, keepdim=True)
    wanted, of_lengths = truth(q, k, v, keep[:, None, None]), truth(q, k, v, counted[:, None, None])
    assert differ(wanted, of_lengths) == (where != "right")
    assert_right(attend(q, k, v, masks.KeyPadding(keep)), wanted)
    assert_right(attend(q, k, v, masks.KeyLengths(keep.sum(-1))), of_lengths)


# Nine of its backends read two dimensions as (B, S_kv) or (S_q, S_kv), as the sizes happen to fall.
def test_two_dimensional_tensor_means_rows_and_columns_whatever_the_batch_size(call: Attend) -> None:
    for batch in (1, 2, 6):
        q, k, v = tensors(batch)
        mask = triangle(6, 9, 2)
        wanted = truth(q, k, v, mask)
        if batch == 6:
            assert differ(wanted, truth(q, k, v, mask[:, None, None]))
        assert_right(call(q, k, v, mask), wanted)
        assert_right(call(q, k, v, torch.zeros(6, 9).masked_fill(~mask, float("-inf"))), wanted)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_tensor_that_could_only_be_padding_is_refused_with_the_name_for_it(call: Attend, dtype: torch.dtype) -> None:
    q, k, v = tensors(2)
    mask = torch.ones(2, 9, dtype=dtype)
    with pytest.raises(anyattn.InvalidCallError, match="KeyPadding"):
        call(q, k, v, mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_two_dimensional_mask_from_diffusers_is_refused_where_two_readings_fit(
    dispatch: Attend, dtype: torch.dtype
) -> None:
    q, k, v = tensors(6)
    mask = triangle(6, 9, 2)
    with pytest.raises(anyattn.InvalidCallError, match=r"ambiguous.*mask\[:, None, None, :\].*mask\[None, None\]"):
        dispatch(q, k, v, mask.to(dtype))
    assert_right(dispatch(q, k, v, mask[:, None, None, :]), truth(q, k, v, mask[:, None, None]))
    assert_right(dispatch(q, k, v, mask[None, None]), truth(q, k, v, mask))


def test_two_dimensional_mask_from_diffusers_keeps_its_reading_for_every_batch_size(dispatch: Attend) -> None:
    mask = triangle(6, 9, 2)
    for batch in (1, 2, 3):
        q, k, v = tensors(batch)
        assert_right(dispatch(q, k, v, mask), truth(q, k, v, mask))


# It documents (B, S_q, S_kv), and gives batch entry i's mask to head i where there are as many heads as entries.
def test_three_dimensional_tensor_means_heads_as_in_torch(call: Attend) -> None:
    for batch, heads in ((2, 4), (4, 4)):
        q, k, v = tensors(batch, heads=heads)
        mask = torch.rand(heads, 6, 9) > 0.4
        assert_right(call(q, k, v, mask), truth(q, k, v, mask))
        torch_gives = torch.nn.functional.scaled_dot_product_attention(
            *(tensor.transpose(1, 2) for tensor in (q, k, v)), mask
        )
        assert torch.allclose(torch.nan_to_num(torch_gives).transpose(1, 2), call(q, k, v, mask), atol=1e-5)
    q, k, v = tensors(2)
    with pytest.raises(anyattn.InvalidCallError, match=r"mask\[:, None\]"):
        call(q, k, v, torch.ones(2, 6, 9, dtype=torch.bool))


def test_three_dimensional_mask_from_diffusers_means_batch_entries_or_is_refused(dispatch: Attend) -> None:
    mask = torch.rand(2, 6, 9) > 0.4
    q, k, v = tensors(2)
    assert_right(dispatch(q, k, v, mask), truth(q, k, v, mask[:, None]))
    q, k, v = tensors(2, heads=2)
    assert differ(truth(q, k, v, mask[:, None]), truth(q, k, v, mask[None]))
    with pytest.raises(anyattn.InvalidCallError, match=r"ambiguous.*mask\[:, None\]"):
        dispatch(q, k, v, mask)
    assert_right(dispatch(q, k, v, mask[:, None]), truth(q, k, v, mask[:, None]))
    assert_right(dispatch(q, k, v, mask[None]), truth(q, k, v, mask[None]))


# A mask that allows everything costs a slower kernel there, and with uneven shards it is even applied askew.
@pytest.mark.parametrize("kind", ["padding", "dense"])
def test_mask_that_allows_everything_changes_nothing(attend: Attend, kind: str) -> None:
    q, k, v = tensors()
    everything = torch.ones(2, 9, dtype=torch.bool)
    mask = masks.KeyPadding(everything) if kind == "padding" else everything[:, None, None]
    assert torch.equal(attend(q, k, v, mask), attend(q, k, v))
