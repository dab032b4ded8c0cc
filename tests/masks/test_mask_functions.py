"""Masks from functions: right with flex and native, called once, cached while what they read is unchanged."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import anyattn
from anyattn import masks, reference
from anyattn.backend.declared_reasons import MAX_LOWERED_MASK_BYTES, lowered_mask_bytes
from anyattn.errors import InvalidCallError, UnsupportedCallError
from anyattn.masks import block_masks
from anyattn.masks.block_masks import make_block_mask, written_out
from anyattn.masks.functions import MaskFunction
from anyattn.types.spec import AttentionSpec, BlockSpec, DenseSpec, MaskSpec, PatternSpec

BACKENDS = ("native", "native_math", "flex")


def tensors(seqlen: int = 9, batch: int = 2) -> list[torch.Tensor]:
    return [torch.randn(batch, seqlen, 2, 16) for _ in range(3)]


def assert_right(mask: masks.Mask, backend: str, seqlen: int = 9) -> None:
    q, k, v = tensors(seqlen)
    wanted = reference.attention(q, k, v, mask)[0]
    assert (anyattn.attention(q, k, v, mask, backend=backend) - wanted).abs().max().item() < 2e-5


def function_of(mask: masks.Mask) -> MaskFunction:
    assert isinstance(mask.block, MaskFunction)
    return mask.block


def positions(mask: masks.Mask, seqlen: int, batch: int = 1) -> list[list[str]]:
    allowed = reference.allowed_positions(mask, batch, 1, seqlen, seqlen)[:, 0]
    return [["".join("x" if one else "." for one in row) for row in entry.tolist()] for entry in allowed]


def test_ready_made_masks_mean_what_they_say() -> None:
    assert positions(masks.document(torch.tensor([[5, 5, 7], [1, 2, 2]])), 3, 2) == [
        ["xx.", "xx.", "..x"],
        ["x..", ".xx", ".xx"],
    ]
    assert positions(masks.prefix_lm(2), 4) == [["xx..", "xx..", "xxx.", "xxxx"]]
    assert positions(masks.prefix_lm(torch.tensor([0, 3])), 3, 2) == [["x..", "xx.", "xxx"], ["xxx", "xxx", "xxx"]]
    assert positions(masks.frame_causal(2), 4) == [["xx..", "xx..", "xxxx", "xxxx"]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_functions_of_batch_and_head_are_told_apart(backend: str) -> None:
    assert_right(masks.from_function(lambda b, h, q, kv: kv <= q + 3 * h), backend)
    assert_right(masks.from_function(lambda b, h, q, kv: (kv + b) % 2 == 0), backend)
    assert_right(masks.from_function(lambda b, h, q, kv: (kv + b) % 2 == h) & masks.Causal(), backend)
    joined = masks.frame_causal(3) & masks.document(torch.tensor([[0] * 4 + [1] * 5])) & masks.SlidingWindow(4, 4)
    assert_right(joined & masks.KeyLengths(torch.tensor([9, 0])), backend)


def test_what_a_function_looks_at_is_seen_by_one_call() -> None:
    calls = []

    def by_head(b: Any, h: Any, q: Any, kv: Any) -> Any:
        calls.append(1)
        return kv <= q + h

    by_both = function_of(masks.from_function(lambda b, h, q, kv: by_head(b, h, q, kv) & (kv >= b)))
    assert (by_both.per_batch, by_both.per_head, len(calls)) == (True, True, 1)
    plain = function_of(masks.from_function(lambda b, h, q, kv: torch.ones_like(b, dtype=torch.bool)))
    assert (plain.per_batch, plain.per_head) == (False, False)


@pytest.mark.parametrize("backend", ["native", "flex"])
def test_writing_to_a_tensor_that_the_function_reads_is_noticed(backend: str) -> None:
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [0] * 9])
    mask = masks.document(ids) & masks.Causal()
    assert_right(mask, backend)
    ids[1, 4:] = 3
    assert_right(mask, backend)


@pytest.mark.parametrize("backend", ["native", "flex"])
def test_rebinding_what_the_function_captures_is_noticed(backend: str) -> None:
    shift, table = 0, torch.zeros(9, dtype=torch.long)

    def fn(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return kv + table[kv] <= q + shift

    mask = masks.from_function(fn)
    assert_right(mask, backend)
    shift = 2
    assert_right(mask, backend)
    table = torch.arange(9) % 3
    assert_right(mask, backend)


def test_a_shape_is_made_once_and_few_shapes_are_cached() -> None:
    function = function_of(masks.frame_causal(4))
    cpu = torch.device("cpu")
    first = written_out(function, 2, 2, 9, 9, cpu)
    assert written_out(function, 2, 2, 9, 9, cpu) is first
    for seqlen in range(10, 40):
        written_out(function, 2, 2, seqlen, seqlen, cpu)
    assert len(function._cached) == 8
    assert written_out(function, 2, 2, 9, 9, cpu) is not first


def test_nothing_is_cached_under_transforms_traces_or_of_inference_tensors() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    mask = masks.frame_causal(4)
    q = torch.randn(3, 2, 9, 2, 16)
    torch.vmap(lambda a: anyattn.attention(a, a, a, mask))(q)
    make_fx(lambda a: anyattn.attention(a, a, a, mask), tracing_mode="real")(q[0])
    assert not function_of(mask)._cached
    with torch.inference_mode():
        born_there = masks.document(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]]))
        assert_right(born_there, "flex")
        assert not function_of(born_there)._cached
        assert_right(mask, "flex")
    assert function_of(mask)._cached


def test_what_was_made_goes_with_the_mask() -> None:
    mask = masks.document(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]]))
    assert_right(mask, "flex")
    assert_right(mask, "native")
    gone = weakref.ref(mask.block)
    del mask
    gc.collect()
    assert gone() is None


def test_threads_may_share_a_mask() -> None:
    mask, errors = masks.document(torch.arange(40)[None] // 7), []

    def work(seqlen: int) -> None:
        try:
            for step in range(20):
                q = torch.randn(1, 40, 2, 16)
                got = anyattn.attention(q, q, q, mask & masks.SlidingWindow(seqlen, step % 5), backend="native")
                wanted = reference.attention(q, q, q, mask & masks.SlidingWindow(seqlen, step % 5))[0]
                assert (got - wanted).abs().max().item() < 2e-5
        except (AssertionError, RuntimeError, KeyError) as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: masks.from_function(3), "needs a function"),
        (lambda: masks.from_function(lambda q, kv: q >= kv), "called as fn"),
        (lambda: masks.from_function(lambda b, h, q, kv: q - kv), "boolean tensor"),
        (lambda: masks.document(torch.zeros(2, 3)), "document ids"),
        (lambda: masks.prefix_lm(-1), "int >= 0"),
        (lambda: masks.prefix_lm(torch.zeros(2, 3, dtype=torch.int32)), r"\(B,\)"),
        (lambda: masks.frame_causal(0), "int >= 1"),
        (lambda: masks.document(torch.zeros(2, 3, dtype=torch.int32)) & masks.prefix_lm(torch.ones(3).int()), "sizes"),
    ],
)
def test_wrong_arguments_say_what_is_wanted(make: Any, words: str) -> None:
    with pytest.raises(InvalidCallError, match=words):
        make()


@pytest.mark.parametrize("shape", [(2, 8), (3, 9)])
def test_ids_of_another_shape_than_the_call_are_refused(shape: tuple[int, int]) -> None:
    q, k, v = tensors()
    with pytest.raises(InvalidCallError, match="made for"):
        anyattn.attention(q, k, v, masks.document(torch.zeros(shape, dtype=torch.long)))


def spec_with(mask: MaskSpec, **changes: Any) -> AttentionSpec:
    fields: dict[str, Any] = {"batch": 2, "seqlen_q": 1 << 14, "seqlen_kv": 1 << 14, "num_heads": 8, "num_kv_heads": 8}
    fields |= {"head_dim": 64, "head_dim_v": 64, "dtype": torch.bfloat16, "device_type": "cpu", "scale": 0.125}
    return AttentionSpec(**(fields | {"mask": mask} | changes))


def test_dense_masks_are_counted_as_they_are_made() -> None:
    square = 1 << 28
    causal = PatternSpec(-1, 0, "lower_right")
    counted = {
        lowered_mask_bytes(spec_with(MaskSpec(causal))): 3 * square,
        lowered_mask_bytes(spec_with(MaskSpec(causal), dtype=torch.float32)): 5 * square,
        lowered_mask_bytes(spec_with(MaskSpec(causal, "padding"))): 2 * 3 * square,
        lowered_mask_bytes(spec_with(MaskSpec(block=BlockSpec(1, 1, True, True, is_function=True)))): 16 * 3 * square,
        lowered_mask_bytes(spec_with(MaskSpec(None, "padding"))): 2 * 3 << 14,
        lowered_mask_bytes(
            spec_with(MaskSpec(causal, dense=DenseSpec("bias", torch.float32, (1, 8, 1 << 14, 1 << 14))))
        ): 8 * 4 * square,
    }
    assert all(found == wanted for found, wanted in counted.items()), counted


def test_large_functions_are_refused_by_native_and_run_by_flex() -> None:
    head = spec_with(MaskSpec(block=BlockSpec(1, 1, False, True, is_function=True)))
    assert lowered_mask_bytes(head) > MAX_LOWERED_MASK_BYTES
    (reason,) = anyattn.explain(head, backend="native").reasons("native")
    assert reason.code == "memory"
    assert "choose flex" in reason.hint
    assert anyattn.explain(head, backend="auto").candidates
    assert not anyattn.explain(head, backend="flex").reasons("flex")


def test_a_mask_larger_than_the_limit_may_be_joined_if_the_caller_gave_one_as_large() -> None:
    own = DenseSpec("bias", torch.bfloat16, (2, 8, 1 << 14, 1 << 14))
    pattern = PatternSpec(3, 3, "upper_left")
    assert not anyattn.explain(spec_with(MaskSpec(pattern, dense=own)), backend="native").reasons("native")
    smaller = DenseSpec("bias", torch.bfloat16, (1, 8, 1 << 14, 1 << 14))
    spec = spec_with(MaskSpec(None, "padding", dense=smaller))
    assert [r.code for r in anyattn.explain(spec, backend="native").reasons("native")] == ["memory"]


def test_causal_that_would_be_written_out_for_a_negative_scale_is_counted_too() -> None:
    spec = spec_with(MaskSpec(PatternSpec(-1, 0, "upper_left")), seqlen_q=1 << 15, seqlen_kv=1 << 15, scale=-1.0)
    assert [r.code for r in anyattn.explain(spec, backend="native").reasons("native")] == ["memory"]
    assert not anyattn.explain(spec.replace(scale=1.0), backend="native").reasons("native")


def test_block_masks_made_in_bands_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = (torch.rand(2, 700) < 0.01).cumsum(-1)
    for mod, batch, heads in (
        (lambda b, h, q, kv: (ids[b, q] == ids[b, kv]) & (kv <= q + h), 2, 3),
        (lambda b, h, q, kv: kv <= q, None, None),
    ):
        wanted = create_block_mask(mod, batch, heads, 700, 650, device="cpu")
        with monkeypatch.context() as patch:
            patch.setattr(block_masks, "_AT_ONCE", 1)
            found = make_block_mask(mod, batch, heads, 700, 650, torch.device("cpu"))
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks"):
            assert torch.equal(getattr(found, name), getattr(wanted, name)), name
        assert found.seq_lengths == wanted.seq_lengths


def test_kernel_without_dense_masks_names_flex() -> None:
    env = anyattn.environment.preset("h100")
    spec = spec_with(MaskSpec(block=BlockSpec(1, 1, is_function=True)), device_type="cuda")
    (reason,) = [r for r in anyattn.explain(spec, env=env).reasons("native_flash") if r.code == "mask"]
    assert (reason.got, reason.hint) == ("a mask function", "choose flex")


def test_block_mask_and_function_cannot_be_joined() -> None:
    block = masks.Block(create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 9, 9, device="cpu"))
    with pytest.raises(InvalidCallError, match="at most one block mask"):
        block & masks.frame_causal(3)


def test_refusal_of_a_call_names_flex() -> None:
    q = torch.empty(1, 1 << 15, 1, 8)
    with pytest.raises(UnsupportedCallError, match="choose flex"):
        anyattn.attention(q, q, q, masks.frame_causal(4), backend="native")
