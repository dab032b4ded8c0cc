"""Packed sequences: each is what the reference gives of it alone, on every backend that takes the call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
import doubles
from anyattn import masks, reference
from anyattn.lowering import cache, host_lengths
from anyattn.masks.objects import Mask
from anyattn.reference import tolerance

REAL = ("native", "native_flash", "native_math", "flex")
DOUBLES = ("flash2", "flash3", "flash4", "xformers", "npu")
LENGTHS_Q = (3, 0, 5, 1)
LENGTHS_K = (4, 2, 3, 0)


@contextlib.contextmanager
def _there(backend: str) -> Iterator[None]:
    with doubles.installed(backend) if backend in DOUBLES else contextlib.nullcontext():
        yield


def _starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def _packed(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], dtype: torch.dtype, kv_heads: int = 2
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(lengths_q), 4, 16), (sum(lengths_k), kv_heads, 16), (sum(lengths_k), kv_heads, 16))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _truth(
    tensors: list[Tensor], starts: tuple[Tensor, Tensor], mask: Mask | None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    q, k, v = tensors
    outs, lses = [], []
    for index in range(len(starts[0]) - 1):
        rows = slice(int(starts[0][index]), int(starts[0][index + 1]))
        keys = slice(int(starts[1][index]), int(starts[1][index + 1]))
        out, lse = reference.attention(q[None, rows], k[None, keys], v[None, keys], mask, dtype=dtype)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, -1)


MASKS: dict[str, Mask | None] = {
    "none": None,
    "causal": masks.Causal(),
    "lower right": masks.Causal("lower_right"),
    "window": masks.SlidingWindow(1, 1),
    "window, lower right": masks.SlidingWindow(2, 0, "lower_right"),
}


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("backend", [*REAL, *DOUBLES])
def test_each_sequence_is_by_itself(backend: str, kind: str, same: bool) -> None:
    dtype = torch.bfloat16 if backend in DOUBLES else torch.float32
    lengths_k = LENGTHS_Q if same else LENGTHS_K
    tensors = _packed(LENGTHS_Q, lengths_k, dtype)
    starts = (_starts(LENGTHS_Q), _starts(lengths_k))
    if same:
        starts = (starts[0], starts[0])
    mask = MASKS[kind]
    with _there(backend):
        # A kernel of one alignment can't take lengths that differ, and the plain computation gives no lse.
        may_refuse = (backend in DOUBLES and not same and mask is not None) or backend == "native_math"
        with contextlib.suppress(anyattn.UnsupportedCallError) if may_refuse else contextlib.nullcontext():
            out, lse = anyattn.attention_varlen(
                *tensors, *starts, 5, max(lengths_k), mask, enable_gqa=True, return_lse=True, backend=backend
            )
            _compare(out, lse, tensors, starts, mask)


def _compare(out: Tensor, lse: Tensor, tensors: list[Tensor], starts: tuple[Tensor, Tensor], mask: Mask | None) -> None:
    dtype = tensors[0].dtype
    truth, true_lse = _truth(tensors, starts, mask)
    plain, _ = _truth(tensors, starts, mask, dtype)
    assert out.dtype == dtype
    assert lse.shape == (4, sum(LENGTHS_Q))
    assert tolerance.excess(out, truth, 2 * tolerance.budget(truth, plain, dtype, over=(0, 2))) <= 1
    finite = torch.isfinite(true_lse)
    assert torch.equal(torch.isneginf(lse), ~finite)
    assert torch.allclose(lse[finite].double(), true_lse[finite], atol=1e-5)


@pytest.mark.parametrize("backend", ["native", "flash2", "flash4", "xformers", "npu"])
def test_gradients_are_each_sequences_own(backend: str) -> None:
    dtype = torch.bfloat16 if backend in DOUBLES else torch.float32
    starts = (_starts(LENGTHS_Q), _starts(LENGTHS_K))
    tensors = [t.requires_grad_() for t in _packed(LENGTHS_Q, LENGTHS_K, dtype, kv_heads=4)]
    with _there(backend):
        out = anyattn.attention_varlen(*tensors, *starts, 5, 4, backend=backend)
        flow = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        found = torch.autograd.grad(out, tensors, flow)
    true = torch.autograd.grad(_truth(tensors, starts, None)[0], tensors, flow.double())
    for one, other in zip(found, true, strict=True):
        assert float((one.double() - other.double()).norm() / other.double().norm()) < (
            1e-2 if dtype != torch.float32 else 1e-5
        )


@pytest.mark.parametrize("backend", ["native", "flash2", "flash4", "xformers", "npu"])
def test_sinks_are_in_the_denominator(backend: str) -> None:
    dtype = torch.bfloat16 if backend in DOUBLES else torch.float32
    starts = (_starts((3, 4)), _starts((5, 2)))
    q, k, v = _packed((3, 4), (5, 2), dtype, kv_heads=4)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    with _there(backend):
        out, lse = anyattn.attention_varlen(q, k, v, *starts, 4, 5, sinks=sinks, return_lse=True, backend=backend)
    want, want_lse = reference.attention(q[None, :3], k[None, :5], v[None, :5], sinks=sinks)
    assert torch.allclose(out[:3].double(), want[0], atol=2e-2 if dtype != torch.float32 else 1e-5)
    assert torch.allclose(lse[:, :3].double(), want_lse[0], atol=1e-5)


def test_decision_says_whether_sequences_were_padded() -> None:
    starts = _starts((3, 4))
    for backend, padded in (("native", True), ("flash2", False), ("xformers", False), ("npu", False)):
        dtype = torch.bfloat16
        q, k, v = _packed((3, 4), (3, 4), dtype, kv_heads=4)
        with _there(backend), anyattn.record() as calls:
            anyattn.attention_varlen(q, k, v, starts, starts, 4, 4, backend=backend)
        codes = {conversion.code for conversion in calls[0].conversions}
        assert ("unpacked" in codes) == padded
        assert ("host_lengths" in codes) == (backend in ("xformers", "npu"))
        assert calls[0].spec.packed


@pytest.mark.parametrize("tokens", [(0, 0), (0, 3), (3, 0)])
def test_nothing_to_see_gives_zeros_and_keeps_the_graph(tokens: tuple[int, int]) -> None:
    q, k, v = (t.requires_grad_() for t in _packed((tokens[0],), (tokens[1],), torch.float32, kv_heads=4))
    out, lse = anyattn.attention_varlen(
        q, k, v, _starts((tokens[0],)), _starts((tokens[1],)), tokens[0], tokens[1], return_lse=True
    )
    assert out.shape == (tokens[0], 4, 16)
    assert not out.any()
    assert torch.isneginf(lse).all()
    out.sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": torch.tensor([0, 3, 7])}, "int32"),
        ({"cu_seqlens_q": torch.tensor([1, 3, 7], dtype=torch.int32)}, "begin with 0"),
        ({"cu_seqlens_k": torch.tensor([0, 8, 7], dtype=torch.int32)}, "never decrease"),
        ({"cu_seqlens_k": torch.tensor([0, 3, 8], dtype=torch.int32)}, "number of tokens, 7"),
        ({"cu_seqlens_k": torch.tensor([0, 3, 5, 7], dtype=torch.int32)}, "the same length"),
        ({"cu_seqlens_q": torch.tensor([[0, 7]], dtype=torch.int32)}, "int32 tensor"),
        ({"max_seqlen_q": 3}, "a sequence has 4"),
        ({"max_seqlen_k": 4.0}, "an int"),
        ({"max_seqlen_k": -1}, "an int"),
        ({"query": torch.randn(1, 7, 4, 16)}, "tokens, heads"),
        ({"key": torch.randn(6, 4, 16)}, "same number of tokens"),
        ({"query": torch.randn(7, 8, 16)}, "enable_gqa"),
        ({"attn_mask": masks.KeyLengths(torch.tensor([3, 4]))}, "leave them out of the packed"),
        ({"attn_mask": torch.ones(7, 7, dtype=torch.bool)}, "leave them out of the packed"),
        ({"dropout_p": 1.5}, "dropout_p"),
    ],
)
def test_wrong_call_is_refused(change: dict[str, object], message: str) -> None:
    starts = _starts((3, 4))
    q, k, v = _packed((3, 4), (3, 4), torch.float32, kv_heads=4)
    call: dict[str, object] = {
        "query": q,
        "key": k,
        "value": v,
        "cu_seqlens_q": starts,
        "cu_seqlens_k": starts.clone(),
        "max_seqlen_q": 4,
        "max_seqlen_k": 4,
    }
    with pytest.raises(anyattn.InvalidCallError, match=message):
        anyattn.attention_varlen(**(call | change))  # type: ignore[arg-type]


def test_call_inside_compiled_code_breaks_the_graph_and_is_right() -> None:
    starts = _starts((3, 4))
    q, k, v = _packed((3, 4), (3, 4), torch.float32, kv_heads=4)

    def double(q: Tensor) -> Tensor:
        found: Tensor = anyattn.attention_varlen(q, k, v, starts, starts, 4, 4, is_causal=True)
        return found * 2

    assert torch.allclose(torch.compile(double, backend="eager")(q), double(q))


def test_what_is_not_finite_stays_in_its_sequence() -> None:
    starts = _starts((3, 4))
    q, k, v = _packed((3, 4), (3, 4), torch.float32, kv_heads=4)
    clean = anyattn.attention_varlen(q, k, v, starts, starts, 4, 4)
    v[3:] = torch.nan
    assert torch.equal(anyattn.attention_varlen(q, k, v, starts, starts, 4, 4)[:3], clean[:3])


def test_strided_cumulative_lengths_are_taken() -> None:
    starts = _starts((3, 4))
    strided = torch.stack((starts, starts), 1)[:, 0]
    q, k, v = _packed((3, 4), (3, 4), torch.bfloat16, kv_heads=4)
    with doubles.installed("flash2"):
        found = anyattn.attention_varlen(q, k, v, strided, strided, 4, 4, backend="flash2")
        assert torch.equal(found, anyattn.attention_varlen(q, k, v, starts, starts, 4, 4, backend="flash2"))


def test_fp8_gets_packed_sequences_padded() -> None:
    starts = _starts((3, 4))
    q, k, v = _packed((3, 4), (3, 4), torch.bfloat16, kv_heads=4)
    with doubles.installed("flash3_fp8"):
        found = anyattn.attention_varlen(q, k, v, starts, starts, 4, 4, backend="flash3_fp8")
    truth = _truth([q, k, v], (starts, starts), None)[0]
    assert float((found.double() - truth).norm() / truth.norm()) < 0.1


def test_record_holds_only_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = _starts((3, 4))
    q, k, v = _packed((3, 4), (3, 4), torch.bfloat16, kv_heads=4)

    def broken(*tensors: object, **options: object) -> None:
        raise RuntimeError("broken")

    with doubles.installed("flash2"):
        anyattn.attention_varlen(q, k, v, starts, starts, 4, 4, backend="flash2")
        monkeypatch.setattr(anyattn.sources.packages.FUNCTIONS["flash2"], "flash_attn_varlen_func", broken)
        with anyattn.record() as calls, pytest.warns(anyattn.AnyattnWarning, match="flash2"):
            anyattn.attention_varlen(q, k, v, starts, starts, 4, 4, backend=["flash2", "native"])
    assert [call.chosen for call in calls] == ["native"]


def test_lse_of_rows_that_a_pattern_cuts_off_is_the_sink() -> None:
    q, k, v = (torch.randn(1, n, 2, 16, dtype=torch.bfloat16) for n in (12, 6, 6))
    sinks = torch.tensor([0.5, -1.0])
    mask = masks.SlidingWindow(1, 1)
    with doubles.installed("flash4"):
        lse = anyattn.attention(q, k, v, mask, sinks=sinks, return_lse=True, backend="flash4")[1]
    truth = reference.attention(q, k, v, mask, sinks=sinks)[1]
    assert torch.allclose(lse.double(), truth, atol=1e-5)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ANYATTN_CHECKS", "1")
    anyattn.reset()
    yield
    monkeypatch.undo()
    anyattn.reset()


@pytest.mark.usefixtures("checks")
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("backend", ["native", "flex", "flash4", "xformers", "npu"])
def test_value_checks_pass_what_is_right(backend: str, kind: str) -> None:
    dtype = torch.bfloat16 if backend in DOUBLES else torch.float32
    starts = (_starts(LENGTHS_Q), _starts(LENGTHS_K))
    with _there(backend), contextlib.suppress(anyattn.UnsupportedCallError):
        for _ in range(2):
            anyattn.attention_varlen(
                *_packed(LENGTHS_Q, LENGTHS_K, dtype),
                *starts,
                5,
                max(LENGTHS_K),
                MASKS[kind],
                enable_gqa=True,
                return_lse=True,
                backend=backend,
            )


@pytest.mark.usefixtures("checks")
@pytest.mark.parametrize("which", ["out", "lse", "last"])
def test_value_checks_find_a_kernel_that_lies(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    from anyattn import varlen

    honest = varlen.run_packed

    def lying(*arguments: Any) -> Any:
        out, lse = honest(*arguments)
        if which == "lse":
            return out, lse + 0.01
        wrong = out.clone()
        wrong[slice(None) if which == "out" else slice(-1, None)] *= 1.01
        return wrong, lse

    monkeypatch.setattr(varlen, "run_packed", lying)
    starts = (_starts((3, 4)), _starts((5, 2)))
    tensors = _packed((3, 4), (5, 2), torch.float32, kv_heads=4)
    for _ in range(2):
        with pytest.raises(anyattn.KernelError, match="disagrees with the reference"):
            anyattn.attention_varlen(*tensors, *starts, 4, 5, return_lse=True)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give a list that grows by a name whenever cumulative lengths are read for a kernel that takes integers."""
    cache.forget()
    found: list[str] = []
    honest = host_lengths.check_starts

    def counted(name: str, *arguments: Any) -> None:
        found.append(name)
        honest(name, *arguments)

    monkeypatch.setattr(host_lengths, "check_starts", counted)
    return found


@pytest.mark.parametrize("backend", ["xformers", "npu"])
def test_lengths_are_read_once_per_tensor_and_again_when_written_to(backend: str, reads: list[str]) -> None:
    starts = (_starts((3, 4)), _starts((2, 5)))
    q, k, v = _packed((3, 4), (2, 5), torch.bfloat16, kv_heads=4)
    with _there(backend):
        for _ in range(3):
            anyattn.attention_varlen(q, k, v, *starts, 4, 5, backend=backend)
        assert reads == ["q", "k"]
        starts[1].copy_(_starts((4, 3)))
        found = anyattn.attention_varlen(q, k, v, *starts, 4, 5, backend=backend)
        assert reads == ["q", "k", "k"]
    assert torch.allclose(found.double(), _truth([q, k, v], starts, None)[0], atol=2e-2)


@pytest.mark.parametrize("backend", ["xformers", "npu"])
def test_one_tensor_for_both_lengths_is_read_once_strided_or_not(backend: str, reads: list[str]) -> None:
    starts = _starts((3, 4))
    strided = torch.stack((starts, starts), 1)[:, 0]
    q, k, v = _packed((3, 4), (3, 4), torch.bfloat16, kv_heads=4)
    with _there(backend):
        first = anyattn.attention_varlen(q, k, v, starts, starts, 4, 4, is_causal=True, backend=backend)
        assert reads == ["q"]
        second = anyattn.attention_varlen(q, k, v, strided, strided, 4, 4, is_causal=True, backend=backend)
        assert reads == ["q", "q"]
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["xformers", "npu"])
def test_lengths_made_in_inference_mode_are_read_at_each_call(backend: str, reads: list[str]) -> None:
    q, k, v = _packed((3, 4), (3, 4), torch.bfloat16, kv_heads=4)
    with _there(backend), torch.inference_mode():
        starts = _starts((3, 4))
        for lengths in ((3, 4), (5, 2)):
            starts.copy_(_starts(lengths))
            found = anyattn.attention_varlen(q, k, v, starts, starts, 5, 5, backend=backend)
            assert torch.allclose(found.double(), _truth([q, k, v], (starts, starts), None)[0], atol=2e-2)
    assert reads == ["q", "q"]


@pytest.mark.parametrize("lengths", [((3, 0, 2), (0, 4, 0)), ((0, 3), (5, 0))])
@pytest.mark.parametrize("backend", ["xformers", "npu"])
def test_no_sequence_with_queries_and_keys_gives_zeros_and_keeps_the_graph(
    backend: str, lengths: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    tensors = [t.requires_grad_() for t in _packed(*lengths, torch.bfloat16, kv_heads=2)]
    starts = [_starts(each) for each in lengths]
    sizes = [max(each) for each in lengths]
    with _there(backend):
        out = anyattn.attention_varlen(*tensors, *starts, *sizes, enable_gqa=True, backend=backend)
        out.sum().backward()
        _, lse = anyattn.attention_varlen(
            *(t.detach() for t in tensors), *starts, *sizes, enable_gqa=True, return_lse=True, backend=backend
        )
    assert out.shape == (sum(lengths[0]), 4, 16)
    assert not out.any()
    assert torch.isneginf(lse).all()
    assert lse.dtype == torch.float32
    for tensor in tensors:
        assert tensor.grad is not None
        assert not tensor.grad.any()


@pytest.mark.parametrize("backend", ["xformers", "npu"])
def test_sinks_of_rows_without_keys_are_their_lse(backend: str) -> None:
    starts = (_starts((3, 2)), _starts((4, 0)))
    q, k, v = _packed((3, 2), (4, 0), torch.bfloat16, kv_heads=4)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    with _there(backend):
        out, lse = anyattn.attention_varlen(q, k, v, *starts, 3, 4, sinks=sinks, return_lse=True, backend=backend)
    assert not out[3:].any()
    assert torch.equal(lse[:, 3:], sinks[:, None].expand(-1, 2))


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([1, 3, 7], "begin with 0"),
        ([0, 8, 7], "never decrease"),
        ([0, 3, 9], "number of tokens, 7"),
        ([0, 1, 7], "a sequence has 6"),
    ],
)
def test_lengths_that_would_be_read_past_the_end_never_reach_the_kernel(starts: list[int], message: str) -> None:
    # On a GPU nobody else looks at them.
    q, k, v = _packed((3, 4), (3, 4), torch.bfloat16, kv_heads=4)
    wrong = torch.tensor(starts, dtype=torch.int32)
    with _there("xformers"), anyattn.record() as calls:
        anyattn.attention_varlen(q, k, v, _starts((3, 4)), _starts((3, 4)), 4, 4, backend="xformers")

    def kernel(*arguments: Any) -> Any:
        raise AssertionError("reached")

    for _ in range(2):
        with pytest.raises(anyattn.InvalidCallError, match=message):
            host_lengths.attend(calls[0].spec, q, k, v, _starts((3, 4)), wrong, kernel, with_lse=False)


@pytest.mark.parametrize("is_causal", [False, True])
def test_meta_tensors_give_shapes(is_causal: bool) -> None:
    q = torch.randn(6, 2, 8, device="meta")
    starts = torch.tensor([0, 3, 6], device="meta", dtype=torch.int32)
    found = anyattn.attention_varlen(q, q, q, starts, starts, 3, 3, is_causal=is_causal)
    assert isinstance(found, torch.Tensor)
    assert (found.shape, found.device.type) == (q.shape, "meta")
