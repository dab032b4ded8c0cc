"""Packed tokens after the last sequence's end: zeros and no gradients, on every backend, whatever they hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import anyattn
import doubles
from anyattn import masks, reference
from anyattn.masks.objects import Mask
from anyattn.reference import tolerance

REAL = ("native", "native_flash", "native_math", "flex")
GRADIENTS = ("native", "native_flash", "native_math", "flash2", "flash4", "xformers", "npu", "aiter")
WITHOUT = ("ffpa", "sage_int8_fp16", "sage_int8_fp8", "sage_int8_fp8_sm90", "sage_hub", "sage_blackwell_hub")
"""Backends that take neither packed sequences nor key lengths."""
TAKE = (*REAL, *(name for name in doubles.DOUBLES if name not in WITHOUT))
LSE = ("native", "flash2", "flash3", "flash4", "xformers", "aiter", "flex", "native_flash")
CALLS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "one token left over": ((3, 4), (3, 4)),
    "empty sequences": ((3, 0, 5, 1), (4, 2, 0, 3)),
    "the last one is empty": ((3, 0), (4, 0)),
    "no sequence sees anything": ((3, 0), (0, 2)),
    "all are empty": ((0, 0), (0, 0)),
    "no sequence at all": ((), ()),
}
"""How many queries and keys each sequence has."""


@contextlib.contextmanager
def _there(backend: str) -> Iterator[torch.dtype]:
    with doubles.installed(backend) if backend in doubles.DOUBLES else contextlib.nullcontext():
        yield torch.bfloat16 if backend in doubles.DOUBLES else torch.float32


def _starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def _packed(
    lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], tails: tuple[int, int], dtype: torch.dtype
) -> list[Tensor]:
    """Draw packed tensors whose tokens after the last sequence are NaN."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for lengths, tail in ((lengths_q, tails[0]), (lengths_k, tails[1]), (lengths_k, tails[1])):
        tensor = torch.randn(sum(lengths) + tail, 2, 64, generator=generator).to(dtype)
        tensor[sum(lengths) :] = torch.nan
        found.append(tensor)
    return found


def _truth(
    tensors: list[Tensor], starts: tuple[Tensor, Tensor], mask: Mask | None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Give each sequence's own attention, and zeros and -inf for what comes after them."""
    q, k, v = tensors
    outs = [q.to(dtype)[:0]]
    lses = [q.new_zeros(2, 0, dtype=dtype)]
    for index in range(len(starts[0]) - 1):
        rows = slice(int(starts[0][index]), int(starts[0][index + 1]))
        keys = slice(int(starts[1][index]), int(starts[1][index + 1]))
        out, lse = reference.attention(q[None, rows], k[None, keys], v[None, keys], mask, dtype=dtype)
        outs.append(out[0])
        lses.append(lse[0])
    tail = len(q) - int(starts[0][-1])
    outs.append(q.new_zeros(tail, 2, 64, dtype=dtype))
    lses.append(q.new_full((2, tail), float("-inf"), dtype=dtype))
    return torch.cat(outs), torch.cat(lses, -1)


def _excess(backend: str, out: Tensor, truth: Tensor, plain: Tensor) -> float:
    """Give the error in multiples of what is allowed."""
    if backend == "flash3_fp8":
        return tolerance.norm_excess(out, truth, tolerance.quantised_budget(truth, over=(0, 2)), over=(0, 2))
    return tolerance.excess(out, truth, 2 * tolerance.budget(truth, plain, plain.dtype, over=(0, 2)))


@pytest.mark.parametrize("tails", [(2, 2), (3, 0), (0, 3), (70, 130)], ids=str)
@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("backend", TAKE)
def test_tokens_after_the_last_sequence_get_zeros(backend: str, kind: str, tails: tuple[int, int]) -> None:
    lengths = CALLS[kind]
    with _there(backend) as dtype:
        tensors, starts = _packed(*lengths, tails, dtype), (_starts(lengths[0]), _starts(lengths[1]))
        most = (max(lengths[0], default=0), max(lengths[1], default=0))
        result = anyattn.attention_varlen(*tensors, *starts, *most, return_lse=backend in LSE, backend=backend)
    out, lse = result if isinstance(result, tuple) else (result, None)
    truth, true_lse = _truth(tensors, starts, None)
    plain, _ = _truth(tensors, starts, None, dtype)
    end = int(starts[0][-1])
    assert out.dtype == dtype
    assert out.shape == truth.shape
    assert not out[end:].any()
    assert _excess(backend, out, truth, plain) <= 1
    if lse is not None:
        assert torch.equal(torch.isneginf(lse), torch.isneginf(true_lse))
        alive = torch.isfinite(true_lse)
        assert torch.allclose(lse[alive].double(), true_lse[alive], atol=1e-5)


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("backend", TAKE)
def test_causal_sequences_before_a_tail_are_the_references(backend: str, same: bool) -> None:
    lengths = (3, 0, 5, 70)
    with _there(backend) as dtype:
        tensors = _packed(lengths, lengths, (5, 5 if same else 9), dtype)
        starts = (_starts(lengths), _starts(lengths))
        given = (starts[0], starts[0]) if same else starts
        try:
            out = anyattn.attention_varlen(*tensors, *given, 70, 70, is_causal=True, backend=backend)
        except anyattn.UnsupportedCallError:
            assert not same or backend == "flash3_fp8", "lengths that aren't known to be the same may be refused"
            return
    truth, _ = _truth(tensors, starts, masks.Causal())
    plain, _ = _truth(tensors, starts, masks.Causal(), dtype)
    assert _excess(backend, out, truth, plain) <= 1
    assert not out[78:].any()


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("backend", GRADIENTS)
def test_gradients_of_what_is_left_over_are_zeros(backend: str, kind: str) -> None:
    lengths = CALLS[kind]
    with _there(backend) as dtype:
        tensors, starts = _packed(*lengths, (3, 5), dtype), (_starts(lengths[0]), _starts(lengths[1]))
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        most = (max(lengths[0], default=0), max(lengths[1], default=0))
        out = anyattn.attention_varlen(*leaves, *starts, *most, backend=backend)
        flow = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        flow[int(starts[0][-1]) :] = torch.nan
        found = torch.autograd.grad(out, leaves, flow)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    truth = _truth(leaves, starts, None)[0]
    true = torch.autograd.grad(truth, leaves, flow.double(), allow_unused=True)
    for name, one, other, which in zip("qkv", found, true, (0, 1, 1), strict=True):
        assert not one[int(starts[which][-1]) :].any(), name
        wanted = torch.zeros_like(one) if other is None else other
        error = float((one.double() - wanted.double()).norm())
        assert error <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * float(wanted.double().norm()), name


@pytest.mark.parametrize("backend", ["native", "flash2", "flash4", "xformers", "aiter"])
def test_rows_left_over_have_the_sinks_for_lse(backend: str) -> None:
    lengths = (3, 4)
    sinks = torch.tensor([0.5, -1.0])
    with _there(backend) as dtype:
        tensors = _packed(lengths, lengths, (2, 2), dtype)
        starts = (_starts(lengths), _starts(lengths))
        out, lse = anyattn.attention_varlen(*tensors, *starts, 4, 4, sinks=sinks, return_lse=True, backend=backend)
    assert out.isfinite().all()
    assert not out[7:].any()
    assert torch.allclose(lse[:, 7:], sinks[:, None].expand(-1, 2))


def test_value_checks_look_at_sequences_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYATTN_CHECKS", "1")
    anyattn.scopes.defaults.forget()
    tensors, starts = _packed((3, 4), (3, 4), (2, 2), torch.float32), _starts((3, 4))
    assert not anyattn.attention_varlen(*tensors, starts, starts, 4, 4)[7:].any()
    tensors[1][6] = torch.nan
    with pytest.raises(anyattn.InvalidCallError, match="key holds NaN"):
        anyattn.attention_varlen(*tensors, starts, starts, 4, 4)


def test_lengths_that_end_beyond_the_tokens_are_refused() -> None:
    tensors, starts = _packed((3, 4), (3, 4), (0, 0), torch.float32), _starts((3, 5))
    with pytest.raises(anyattn.InvalidCallError, match="number of tokens, 7, or before"):
        anyattn.attention_varlen(*tensors, starts, starts, 5, 5)
