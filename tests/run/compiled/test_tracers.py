"""What a tracer records holds for other masks and lengths: nothing known from values or equal lengths is baked in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import anyattn
from anyattn import masks

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")

Arguments = tuple[Tensor, ...]
Call = Callable[..., Tensor]


class _Module(torch.nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.call(*arguments)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    torch._dynamo.reset()
    anyattn.reset()
    yield
    anyattn.reset()


def _jit(call: Call, arguments: Arguments) -> Any:
    return torch.jit.trace(call, arguments, check_trace=False)


def _fx(mode: str, **options: Any) -> Callable[[Call, Arguments], Any]:
    return lambda call, arguments: make_fx(call, tracing_mode=mode, **options)(*arguments)


def _export(strict: bool) -> Callable[[Call, Arguments], Any]:
    return lambda call, arguments: torch.export.export(_Module(call), arguments, strict=strict).module()


TRACERS: dict[str, Callable[[Call, Arguments], Any]] = {
    "jit": _jit,
    "make_fx": _fx("real"),
    "make_fx before dispatch": _fx("real", pre_dispatch=True),
    "make_fx fake": _fx("fake"),
    "make_fx symbolic": _fx("symbolic"),
    "export": _export(False),
    "export strict": _export(True),
    "functionalize": lambda call, arguments: torch.func.functionalize(call),
}


def _qkv(batch: int, seqlen_q: int, seqlen_kv: int) -> Arguments:
    make = torch.Generator().manual_seed(batch * 100 + seqlen_q * 10 + seqlen_kv)
    return tuple(torch.randn(batch, n, 4, 8, generator=make) for n in (seqlen_q, seqlen_kv, seqlen_kv))


def _padding(batch: int, seqlen: int, all_true: bool) -> Tensor:
    return (torch.arange(seqlen) < (seqlen if all_true else 2)).expand(batch, seqlen).clone()


def _tril(batch: int, seqlen: int, all_true: bool) -> Tensor:
    ones = torch.ones(batch, 1, seqlen, seqlen, dtype=torch.bool)
    return ones if all_true else ones.tril()


def _ids(batch: int, seqlen: int, all_true: bool) -> Tensor:
    return (torch.arange(seqlen) // (seqlen if all_true else 2)).expand(batch, seqlen).clone()


def _bias(batch: int, seqlen: int, all_true: bool) -> Tensor:
    return torch.zeros(batch, 1, seqlen, seqlen) if all_true else torch.randn(batch, 1, seqlen, seqlen)


MASKS: dict[str, tuple[Call, Callable[[int, int, bool], Tensor]]] = {
    "padding": (lambda q, k, v, m: anyattn.attention(q, k, v, masks.KeyPadding(m)), _padding),
    "prepared": (lambda q, k, v, m: anyattn.attention(q, k, v, anyattn.prepare_mask(masks.KeyPadding(m))), _padding),
    "padding and causal": (
        lambda q, k, v, m: anyattn.attention(q, k, v, masks.KeyPadding(m), is_causal=True),
        _padding,
    ),
    "lse": (lambda q, k, v, m: anyattn.attention(q, k, v, masks.KeyPadding(m), return_lse=True)[1], _padding),
    "lengths": (
        lambda q, k, v, m: anyattn.attention(q, k, v, masks.KeyLengths(m)),
        lambda batch, seqlen, all_true: torch.full((batch,), seqlen if all_true else 2),
    ),
    "boolean": (lambda q, k, v, m: anyattn.attention(q, k, v, masks.Boolean(m)), _tril),
    "tensor": (lambda q, k, v, m: anyattn.attention(q, k, v, m), _tril),
    "bias": (lambda q, k, v, m: anyattn.attention(q, k, v, masks.Bias(m)), _bias),
    "document": (lambda q, k, v, m: anyattn.attention(q, k, v, masks.document(m) & masks.Causal()), _ids),
    "sinks": (
        lambda q, k, v, m: anyattn.attention(q, k, v, sinks=m),
        lambda batch, seqlen, all_true: torch.full((4,), 0.0 if all_true else 2.0),
    ),
}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_that_allows_everything_is_not_baked_in(mask: str, tracer: str) -> None:
    call, make = MASKS[mask]
    traced = TRACERS[tracer](call, (*_qkv(2, 6, 6), make(2, 6, True)))
    other = (*_qkv(2, 6, 6), make(2, 6, False))
    wanted = call(*other)
    assert not torch.allclose(wanted, call(*other[:3], make(2, 6, True)))
    torch.testing.assert_close(traced(*other), wanted)


PATTERNS: dict[str, Call] = {
    "causal": lambda q, k, v: anyattn.attention(q, k, v, is_causal=True),
    "lower right": lambda q, k, v: anyattn.attention(q, k, v, masks.Causal("lower_right")),
    "window": lambda q, k, v: anyattn.attention(q, k, v, masks.SlidingWindow(2, 1, "lower_right")),
    "heads first": lambda q, k, v: anyattn.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), masks.Causal("lower_right")
    ),
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("tracer", ["jit", "make_fx before dispatch", "make_fx symbolic"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equal_lengths_are_not_taken_for_one(pattern: str, tracer: str, warm: bool) -> None:
    call = PATTERNS[pattern]
    if warm:
        call(*_qkv(2, 6, 6))
    traced = TRACERS[tracer](call, _qkv(2, 6, 6))
    for sizes in ((2, 4, 6), (2, 4, 9), (3, 5, 5)):
        torch.testing.assert_close(traced(*_qkv(*sizes)), call(*_qkv(*sizes)))


def test_exported_lengths_that_are_equal_stay_two() -> None:
    first, second = torch.export.Dim("S_q", min=2, max=64), torch.export.Dim("S_kv", min=2, max=64)
    shapes = (({1: first}, {1: second}, {1: second}),)
    call = PATTERNS["lower right"]
    for strict in (False, True):
        program = torch.export.export(_Module(call), _qkv(2, 6, 6), strict=strict, dynamic_shapes=shapes)
        torch.testing.assert_close(program.module()(*_qkv(2, 4, 9)), call(*_qkv(2, 4, 9)))


SYMBOLS: dict[str, Call] = {
    "is_causal": lambda q, k, v: anyattn.attention(q, k, v, is_causal=q.shape[1] > 1),
    "scale": lambda q, k, v: anyattn.attention(q, k, v, scale=q.shape[-1] ** -0.5),
    "enable_gqa": lambda q, k, v: anyattn.attention(q, k[:, :, :2], v[:, :, :2], enable_gqa=q.shape[2] != 2),
    "dropout_p": lambda q, k, v: anyattn.attention(q, k, v, dropout_p=(q.shape[1] - q.shape[1]) * 0.5),
    "return_lse": lambda q, k, v: anyattn.attention(q, k, v, return_lse=q.shape[1] > 1)[1],
    "prefix": lambda q, k, v: anyattn.attention(q, k, v, masks.prefix_lm(q.shape[1] // 2)),
    "window": lambda q, k, v: anyattn.attention(q, k, v, window=(q.shape[1] // 2, 0)),
    "mask window": lambda q, k, v: anyattn.attention(q, k, v, masks.SlidingWindow(q.shape[1] // 2, 0)),
    "length scale": lambda q, k, v: anyattn.attention(q, k, v, scale=1 / q.shape[1]),
}
_ONE_LENGTH = ("window", "mask window", "length scale")


@pytest.mark.parametrize("how", ["compile", "jit", "make_fx symbolic"])
@pytest.mark.parametrize("name", SYMBOLS)
def test_numbers_that_follow_from_sizes_are_numbers(name: str, how: str) -> None:
    call = SYMBOLS[name]
    arguments = _qkv(2, 6, 6)
    if how == "compile":
        traced: Any = torch.compile(call, fullgraph=True, dynamic=True, backend="eager")
        torch.testing.assert_close(traced(*_qkv(2, 9, 9)), call(*_qkv(2, 9, 9)))
    else:
        traced = TRACERS[how](call, arguments)
    torch.testing.assert_close(traced(*arguments), call(*arguments))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", [name for name in SYMBOLS if name not in _ONE_LENGTH])
def test_numbers_that_follow_from_sizes_are_exported(name: str, strict: bool) -> None:
    call = SYMBOLS[name]
    shapes = (({1: torch.export.Dim("S", min=2, max=64)},) * 3,)
    program = torch.export.export(_Module(call), _qkv(2, 6, 6), strict=strict, dynamic_shapes=shapes).module()
    torch.testing.assert_close(program(*_qkv(2, 9, 9)), call(*_qkv(2, 9, 9)))


PACKED: dict[str, Call] = {
    "plain": lambda q, k, v, a, b: anyattn.attention_varlen(q, k, v, a, b, 9, 9),
    "causal": lambda q, k, v, a, b: anyattn.attention_varlen(q, k, v, a, b, 9, 9, is_causal=True),
    "lower right": lambda q, k, v, a, b: anyattn.attention_varlen(q, k, v, a, b, 9, 9, masks.Causal("lower_right")),
    "lengths from shapes": lambda q, k, v, a, b: anyattn.attention_varlen(
        q, k, v, a, b, q.shape[0], k.shape[0], return_lse=True
    )[1],
}


def _packed(first: list[int], second: list[int]) -> Arguments:
    make = torch.Generator().manual_seed(1)
    tensors = tuple(torch.randn(starts[-1], 2, 8, generator=make) for starts in (first, second, second))
    return (*tensors, torch.tensor(first, dtype=torch.int32), torch.tensor(second, dtype=torch.int32))


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("name", PACKED)
def test_cumulative_lengths_are_an_input(name: str, tracer: str) -> None:
    call = PACKED[name]
    traced = TRACERS[tracer](call, _packed([0, 3, 9], [0, 3, 9]))
    other = _packed([0, 7, 9], [0, 2, 9])
    torch.testing.assert_close(traced(*other), call(*other))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_packed_sequences_of_any_number_and_length(strict: bool) -> None:
    tokens, starts = torch.export.Dim("T", min=2, max=64), torch.export.Dim("B", min=3, max=64)
    shapes = ((*({0: tokens},) * 3, {0: starts}, {0: starts}),)
    call = PACKED["lower right"]
    arguments = _packed([0, 3, 9], [0, 3, 9])
    program = torch.export.export(_Module(call), arguments, strict=strict, dynamic_shapes=shapes).module()
    other = _packed([0, 1, 4, 8], [0, 3, 5, 8])
    torch.testing.assert_close(program(*other), call(*other))


def test_fake_tensors_are_taken_everywhere() -> None:
    with FakeTensorMode() as mode:
        fakes = tuple(mode.from_tensor(x) for x in _packed([0, 3, 9], [0, 3, 9]))
        assert PACKED["causal"](*fakes).shape == (9, 2, 8)
        query, key, value = (mode.from_tensor(x) for x in _qkv(2, 6, 6))
        padding = mode.from_tensor(_padding(2, 6, True))
        for mask in (None, masks.KeyPadding(padding), anyattn.prepare_mask(masks.KeyPadding(padding))):
            assert anyattn.attention(query, key, value, mask).shape == (2, 6, 4, 8)
    assert anyattn.attention(query, key, value).shape == (2, 6, 4, 8)


def test_what_was_traced_leaves_plain_calls_alone() -> None:
    mask = masks.KeyPadding(_padding(2, 6, False))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Tensor = anyattn.attention(q, k, v, mask)
        return found

    for tracer in ("jit", "make_fx", "export"):
        TRACERS[tracer](call, _qkv(2, 6, 6))
        wanted = anyattn.attention(*_qkv(2, 6, 6), _padding(2, 6, False)[:, None, None])
        torch.testing.assert_close(call(*_qkv(2, 6, 6)), wanted)
    assert all(type(size) is int for size in mask.signature[1][0])


def test_a_bad_call_says_what_is_wrong_under_every_tracer() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Tensor = anyattn.attention(q, k[:, :, :3], v[:, :, :3], is_causal=q.shape[1] > 1)
        return found

    for tracer in ("jit", "make_fx", "make_fx fake", "make_fx symbolic", "export"):
        with pytest.raises(anyattn.InvalidCallError, match="enable_gqa"):
            TRACERS[tracer](call, _qkv(2, 6, 6))
