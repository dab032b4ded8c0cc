"""Calls are surrounded by memory that tells: values, strides and alignment stay, and all else is NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anyattn.testing import Case
from anyattn.testing.cases.recipes import STRIDES
from anyattn.testing.laws.unwritten import fill_free_memory, surrounded

MASKS = ("none", "padding:left", "lengths", "boolean:bhqk", "bias:hqk:own", "bias:qk:float32", "causal & boolean:qk")


def _others(tensor: Tensor) -> Tensor:
    """Give the elements of a tensor's storage that aren't the tensor's."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    flat = tensor.detach().as_strided((count,), (1,), 0)
    own = torch.arange(count).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    rest = torch.ones(count, dtype=torch.bool)
    rest[own.flatten()] = False
    return flat[rest]


def _tells(tensor: Tensor) -> bool:
    others = _others(tensor)
    assert len(others) >= 64
    if tensor.dtype == torch.bool:
        return bool(others.all())
    return bool((others.isnan() if tensor.is_floating_point() else others == -1).all())


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
@pytest.mark.parametrize("strides", STRIDES)
def test_query_key_and_value_stay_and_all_else_is_nan(strides: str, layout: str, apart: bool) -> None:
    inputs = Case(strides=strides, layout=layout, dtype="bfloat16", grad="k", head_dim=40).build()
    found = surrounded(inputs, apart=apart)
    for name in ("query", "key", "value"):
        before, after = getattr(inputs, name), getattr(found, name)
        assert torch.equal(before, after)
        assert after.requires_grad == (name == "key")
        assert after.is_leaf
        assert after.data_ptr() % 16 == before.data_ptr() % 16
        assert _tells(after)
        if not (apart and before.is_contiguous()):
            assert after.stride() == before.stride()
        elif layout == "BSHD":
            assert after.stride(0) > before.stride(0), "what follows an entry's last row isn't the next one's first"


@pytest.mark.parametrize("mask", MASKS)
def test_masks_and_sinks_stay_and_all_else_is_garbage(mask: str) -> None:
    inputs = Case(mask=mask, sinks=True, grad="m" if mask == "bias:hqk:own" else "").build()
    found = surrounded(inputs, apart=False)
    assert found.sinks is not None
    assert inputs.sinks is not None
    assert torch.equal(found.sinks, inputs.sinks)
    assert _tells(found.sinks)
    if inputs.mask is None or found.mask is None:
        assert found.mask is inputs.mask
        return
    assert found.mask.pattern == inputs.mask.pattern
    for one, other in ((inputs.mask.key, found.mask.key), (inputs.mask.dense, found.mask.dense)):
        if one is None or other is None:
            assert one is other
            continue
        assert torch.equal(one, other)
        assert other.requires_grad == one.requires_grad
        assert _tells(other)


def test_memory_that_is_handed_out_next_is_nan() -> None:
    fill_free_memory(torch.device("cpu"), [4096])
    # Holes that other tests left in the heap may come first: the C library takes the best fit.
    handed_out = [torch.empty(1024) for _ in range(512)]
    assert any(bool(block.isnan().any()) for block in handed_out)
