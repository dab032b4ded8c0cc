"""How keys move: right for every mask, cached while the mask lives and isn't written to, and never stale."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import Tensor

from anyattn.lowering import cache as module
from anyattn.lowering.key_layout import key_layout, packed_keys, to_front, to_packed

BATCH, SEQLEN, HEADS, DIM = 3, 11, 2, 4


@pytest.fixture(autouse=True)
def _fresh() -> None:
    module.forget()


def _mask(kind: str) -> Tensor:
    torch.manual_seed(len(kind))
    mask = torch.rand(BATCH, SEQLEN) > 0.4
    if kind == "left":
        mask = torch.arange(SEQLEN) >= torch.tensor([[0], [4], [9]])
    elif kind == "right":
        mask = torch.arange(SEQLEN) < torch.tensor([[11], [4], [1]])
    elif kind == "empty entry":
        mask[1] = False
    return mask


def _key_value(layout: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    key, value = torch.randn(2, BATCH, SEQLEN, HEADS, DIM).unbind(0)
    if layout == "BHSD":
        key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (key, value))
    elif layout == "packed":
        key, value = torch.randn(BATCH, SEQLEN, 2, HEADS, DIM).unbind(2)
    return key, value


@pytest.mark.parametrize("layout", ["BSHD", "BHSD", "packed"])
@pytest.mark.parametrize("kind", ["scattered", "left", "right", "empty entry"])
@pytest.mark.parametrize("wide", [False, True])
def test_allowed_keys_come_first_in_their_order_and_gradients_go_back(kind: str, layout: str, wide: bool) -> None:
    mask = _mask(kind)
    key, value = (t.detach().requires_grad_() for t in _key_value(layout))
    given = mask[:, None, None, :] if wide else mask
    found = key_layout(given, BATCH, SEQLEN, prefix=False)
    moved_key, moved_value = to_front(found, key, value, grad=True)
    assert found.lengths.dtype == torch.int32
    assert found.lengths.tolist() == mask.sum(-1).tolist()
    weight = torch.randn_like(moved_key)
    for b in range(BATCH):
        n = int(found.lengths[b])
        assert torch.equal(moved_key[b, :n], key[b][mask[b]])
        assert torch.equal(moved_value[b, :n], value[b][mask[b]])
        weight[b, n:] = float("nan")  # what a kernel leaves in rows that it doesn't use
    moved_key.backward(weight)
    assert key.grad is not None
    for b in range(BATCH):
        assert torch.equal(key.grad[b][mask[b]], weight[b, : int(found.lengths[b])])
        assert not key.grad[b][~mask[b]].any()
    plain = to_front(found, key.detach(), value.detach(), grad=False)
    assert torch.equal(plain[0], moved_key.detach())


@pytest.mark.parametrize("layout", ["BSHD", "BHSD", "packed"])
@pytest.mark.parametrize("kind", ["scattered", "left", "right", "empty entry"])
def test_packed_keys_stand_one_after_the_other(kind: str, layout: str) -> None:
    mask = _mask(kind)
    key, value = (t.detach().requires_grad_() for t in _key_value(layout))
    found = packed_keys(mask, BATCH, SEQLEN)
    moved, _ = to_packed(found, key, value, grad=True)
    assert found.cu_seqlens.tolist() == [0, *mask.sum(-1).cumsum(0).tolist()]
    total = int(mask.sum())
    assert torch.equal(moved[:total], key[mask])
    flow = torch.randn_like(moved)
    flow[total:] = float("nan")
    moved.backward(flow)
    assert key.grad is not None
    assert torch.equal(key.grad[mask], flow[:total])
    assert not key.grad[~mask].any()


def test_lengths_and_known_prefixes_move_nothing() -> None:
    key, value = _key_value("BSHD")
    lengths = key_layout(torch.tensor([3, 0, 11]), BATCH, SEQLEN, prefix=True)
    known = key_layout(_mask("right"), BATCH, SEQLEN, prefix=True)
    assert lengths.order is None
    assert known.order is None
    assert known.lengths.tolist() == [11, 4, 1]
    assert to_front(known, key, value, grad=False)[0] is key
    key.requires_grad_()
    guarded, _ = to_front(known, key, value, grad=True)
    guarded.backward(torch.full_like(guarded, float("nan")).where(known.allowed[:, :, None, None], torch.nan))
    assert key.grad is not None
    assert not key.grad[~known.allowed].any()


def test_layout_is_worked_out_once_per_mask() -> None:
    mask = _mask("scattered")
    assert key_layout(mask, BATCH, SEQLEN, prefix=False) is key_layout(mask, BATCH, SEQLEN, prefix=False)
    assert packed_keys(mask, BATCH, SEQLEN) is packed_keys(mask, BATCH, SEQLEN)


def test_write_in_place_is_followed() -> None:
    mask = _mask("scattered")
    before = key_layout(mask, BATCH, SEQLEN, prefix=False).lengths.clone()
    mask[0] = False
    after = key_layout(mask, BATCH, SEQLEN, prefix=False).lengths
    assert after.tolist() == [0, *before[1:].tolist()]
    view = mask[1:]
    view.fill_(True)
    assert key_layout(mask, BATCH, SEQLEN, prefix=False).lengths.tolist() == [0, SEQLEN, SEQLEN]


def test_freed_mask_is_forgotten_and_its_storage_reused_safely() -> None:
    for count in range(1, 12):
        mask = torch.zeros(BATCH, SEQLEN, dtype=torch.bool)
        mask[:, :count] = True
        assert key_layout(mask, BATCH, SEQLEN, prefix=False).lengths.tolist() == [count] * BATCH
        del mask
        gc.collect()
        assert not module._slots


def test_cached_layouts_are_bounded() -> None:
    masks = [torch.rand(1, 4) > 0.5 for _ in range(module._MOST_MASKS + 20)]
    for mask in masks:
        key_layout(mask, 1, 4, prefix=False)
    assert len(module._slots) == module._MOST_MASKS
    for mask in masks:
        assert key_layout(mask, 1, 4, prefix=False).lengths.tolist() == mask.sum(-1).tolist()


def test_inference_tensors_have_no_version_and_are_looked_at_each_time() -> None:
    with torch.inference_mode():
        mask = torch.ones(BATCH, SEQLEN, dtype=torch.bool)
        key_layout(mask, BATCH, SEQLEN, prefix=False)
        mask[0] = False
        assert key_layout(mask, BATCH, SEQLEN, prefix=False).lengths.tolist() == [0, SEQLEN, SEQLEN]


def test_layout_made_in_inference_mode_serves_training() -> None:
    mask = _mask("scattered")
    with torch.inference_mode():
        key_layout(mask, BATCH, SEQLEN, prefix=False)
    key, value = (t.requires_grad_() for t in _key_value("BSHD"))
    to_front(key_layout(mask, BATCH, SEQLEN, prefix=False), key, value, grad=True)[0].sum().backward()


def test_threads_see_their_own_masks() -> None:
    wrong: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(200):
            mask = torch.rand(BATCH, SEQLEN, generator=generator) > 0.5
            if key_layout(mask, BATCH, SEQLEN, prefix=False).lengths.tolist() != mask.sum(-1).tolist():
                wrong.append(str(seed))
            mask.logical_not_()
            if key_layout(mask, BATCH, SEQLEN, prefix=False).lengths.tolist() != mask.sum(-1).tolist():
                wrong.append(str(seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_lengths_written_through_numpy_are_followed_by_native() -> None:
    import anyattn

    q, k, v = torch.randn(3, 2, 8, 2, 16).unbind(0)
    lengths = torch.tensor([8, 3])
    mask = anyattn.masks.KeyLengths(lengths)
    anyattn.attention(q, k, v, mask)
    lengths.numpy()[0] = 2
    fresh = anyattn.attention(q, k, v, anyattn.masks.KeyLengths(torch.tensor([2, 3])))
    assert torch.equal(anyattn.attention(q, k, v, mask), fresh)


def test_plan_from_a_prepared_prefix_takes_any_padding() -> None:
    import dataclasses

    import anyattn
    import doubles

    q, k, v = torch.randn(3, 2, 8, 2, 16, dtype=torch.bfloat16).unbind(0)
    keep = torch.rand(2, 8) > 0.5
    keep[:, 3] = True
    mask = anyattn.masks.KeyPadding(keep)
    with doubles.installed("flash4"):
        spec = anyattn.explain(q, k, v, mask, backend="flash4").spec
        spec = spec.replace(mask=dataclasses.replace(spec.mask, prefix=True))
        out = anyattn.plan(spec, backend="flash4")(q, k, v, mask)
    truth = anyattn.reference.attention(q, k, v, mask)[0]
    assert float((out.double() - truth).norm() / truth.norm()) < 1e-2


def test_function_that_may_leave_rows_dead_reaches_no_cudnn_as_boolean() -> None:
    import dataclasses

    import anyattn

    q, k, v = torch.randn(3, 2, 8, 2, 16, dtype=torch.bfloat16).unbind(0)
    mask = anyattn.masks.from_function(lambda b, h, q_idx, kv_idx: (q_idx > 5) & (kv_idx <= q_idx))
    spec = anyattn.explain(q, k, v, mask).spec.replace(device_type="cuda", device_index=0)
    env = anyattn.environment.preset("h100", torch_version="2.11.0")
    env = dataclasses.replace(env, cudnn=(9, 19, 0))
    codes = {conversion.code for conversion in anyattn.explain(spec, env=env, backend="native").conversions}
    assert "additive_mask" in codes or "steered" in codes
