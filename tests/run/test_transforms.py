"""Under torch.func's transforms and forward-mode AD a call is right or refused, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import anyattn
import doubles
from anyattn import masks
from anyattn.selection import faults

_X = tuple(torch.randn(2, 6, 2, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
_T = tuple(torch.randn(2, 6, 2, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3, 6))
_FORWARD_ONLY = ("sage", "sage_hub", "aiter_hub")


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    anyattn.reset()
    yield
    anyattn.reset()


def _plain(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * query.shape[-1] ** -0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), value)


def _dual(function: Callable[..., Tensor]) -> Tensor | None:
    with forward_ad.dual_level():
        out = function(*(forward_ad.make_dual(x, t) for x, t in zip(_X, _T, strict=True)))
        tangent: Tensor | None = forward_ad.unpack_dual(out).tangent
        return tangent


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("backend", ["native", "native_math", "auto", ["flex", "native_math"]])
def test_forward_mode_gives_the_tangent(backend: Any, warm: bool) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return anyattn.attention(q, k, v, backend=backend)

    if warm:
        call(*_X)
    wanted = torch.func.jvp(_plain, _X, _T)[1]
    torch.testing.assert_close(torch.func.jvp(call, _X, _T)[1], wanted)
    torch.testing.assert_close(_dual(call), wanted)
    jacobian = torch.func.jacfwd(call)(*(x[:1, :2, :1, :4] for x in _X))
    torch.testing.assert_close(jacobian, torch.func.jacrev(_plain)(*(x[:1, :2, :1, :4] for x in _X)))


_SMALL = tuple(x[:1, :3, :1, :4].double() for x in _X)
_FORWARD_OVER_REVERSE = {
    "hessian": lambda f: torch.func.hessian(f)(_SMALL[0]),
    "jacfwd of grad": lambda f: torch.func.jacfwd(torch.func.grad(f))(_SMALL[0]),
    "jvp of grad": lambda f: torch.func.jvp(torch.func.grad(f), (_SMALL[0],), (_SMALL[1],))[1],
    "jvp of vmap of grad": lambda f: torch.func.jvp(
        torch.func.vmap(torch.func.grad(f)), (_SMALL[0][None],), (_SMALL[1][None],)
    )[1],
}


@pytest.mark.parametrize("way", _FORWARD_OVER_REVERSE)
def test_forward_mode_over_reverse_mode_is_right(way: str) -> None:
    _, key, value = _SMALL
    run: Any = _FORWARD_OVER_REVERSE[way]
    found = run(lambda query: anyattn.attention(query, key, value).square().sum())
    torch.testing.assert_close(found, run(lambda query: _plain(query, key, value).square().sum()))


@pytest.mark.parametrize("name", list(doubles.DOUBLES))
def test_forward_mode_through_a_kernel_without_it_is_refused(name: str) -> None:
    dtype = torch.bfloat16
    x, t = (tuple(torch.randn(1, 8, 2, 64).to(dtype) for _ in range(3)) for _ in range(2))

    def call(backend: Any) -> Callable[..., Tensor]:
        return lambda q, k, v: anyattn.attention(q, k, v, backend=backend)

    with doubles.installed(name):
        for required in (lambda: torch.func.jvp(call(name), x, t), lambda: _dual_of(call(name), x, t)):
            with pytest.raises(anyattn.UnsupportedCallError) as caught:
                required()
            assert "forward_ad" in {reason.code for reason in caught.value.decision.candidates[0].reasons}
        tangent = torch.func.jvp(call([name, "native_math"]), x, t)[1]
    wanted = torch.func.jvp(_plain, tuple(a.float() for a in x), tuple(a.float() for a in t))[1]
    torch.testing.assert_close(tangent.float(), wanted, atol=0.1, rtol=0.05)


def _dual_of(function: Callable[..., Tensor], x: tuple[Tensor, ...], t: tuple[Tensor, ...]) -> Tensor:
    with forward_ad.dual_level():
        return function(*(forward_ad.make_dual(a, b) for a, b in zip(x, t, strict=True)))


@pytest.mark.parametrize("name", _FORWARD_ONLY)
def test_gradients_hidden_by_vmap_are_seen(name: str) -> None:
    x = tuple(torch.randn(1, 2, 8, 2, 64).bfloat16() for _ in range(3))

    def loss(q: Tensor) -> Tensor:
        call = torch.vmap(lambda q, k, v: anyattn.attention(q, k, v, backend=name))
        return call(q, *x[1:]).float().sum()

    with doubles.installed(name), pytest.raises(anyattn.UnsupportedCallError, match="gradients"):
        torch.func.grad(loss)(x[0])


@pytest.mark.parametrize("mask", ["none", "padding", "lengths", "boolean", "document"])
def test_vmap_and_gradients_are_right(mask: str) -> None:
    ids = torch.tensor([[0, 0, 0, 1, 1, 1]])
    lengths = torch.tensor([2, 5])
    padding = torch.arange(6) < lengths[:, None]
    tril = torch.ones(6, 6, dtype=torch.bool).tril()
    made: dict[str, Any] = {
        "none": (None, None),
        "padding": (masks.KeyPadding(padding), padding[:, None, None]),
        "lengths": (masks.KeyLengths(lengths), padding[:, None, None]),
        "boolean": (tril, tril),
        "document": (masks.document(ids) & masks.Causal(), tril & (ids[0][:, None] == ids[0])),
    }
    given, allowed = made[mask]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return anyattn.attention(q, k, v, given)

    batched = tuple(torch.stack((x, 2 * x)) for x in _X)
    wanted = torch.stack([_plain(*(x[i] for x in batched), allowed) for i in range(2)])
    torch.testing.assert_close(torch.vmap(call)(*batched), wanted)
    grad = torch.func.grad(lambda q: (call(q, *_X[1:]) * _T[0]).sum())(_X[0])
    torch.testing.assert_close(grad, torch.func.grad(lambda q: (_plain(q, *_X[1:], allowed) * _T[0]).sum())(_X[0]))
    torch.testing.assert_close(torch.func.functionalize(call)(*_X), _plain(*_X, allowed))


def test_masks_that_vmap_batches_are_each_its_own() -> None:
    lengths = torch.tensor([[6, 6], [2, 3]])
    out = torch.vmap(lambda n: anyattn.attention(*_X, masks.KeyLengths(n)))(lengths)
    for row, found in zip(lengths, out, strict=True):
        torch.testing.assert_close(found, _plain(*_X, (torch.arange(6) < row[:, None])[:, None, None]))


@pytest.mark.parametrize("transform", ["jvp", "vmap", "grad", "fake"])
def test_what_fails_under_a_transform_benches_nothing(transform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from anyattn.adapters.native import kernels
    from anyattn.process import tracing

    def chosen() -> str:
        with anyattn.record() as calls:
            anyattn.attention(*_X, masks.KeyLengths(torch.tensor([2, 3])), backend="auto")
        return str(calls[0].chosen)

    before = chosen()
    entries = dict(kernels._ENTRIES)
    monkeypatch.setattr(kernels, "_ENTRIES", {name: _failing(entry, tracing) for name, entry in entries.items()})
    run: dict[str, Callable[[], object]] = {
        "jvp": lambda: torch.func.jvp(_auto, _X, _T),
        "vmap": lambda: torch.vmap(_auto)(*(x[None] for x in _X)),
        "grad": lambda: torch.func.grad(lambda q: _auto(q, *_X[1:]).sum())(_X[0]),
        "fake": _in_fake_mode,
    }
    # Whatever backend there is may run instead, or none.
    with contextlib.suppress(anyattn.AnyattnError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run[transform]()
    assert not faults.faults(None)
    assert not faults._faults
    assert chosen() == before


def _auto(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found: Tensor = anyattn.attention(q, k, v, masks.KeyLengths(torch.tensor([2, 3])), backend="auto")
    return found


def _in_fake_mode() -> None:
    with FakeTensorMode() as mode:
        lengths = mode.from_tensor(torch.tensor([2, 3]))
        anyattn.attention(*(mode.from_tensor(x) for x in _X), masks.KeyLengths(lengths), backend="auto")


def _failing(entry: Any, tracing: Any) -> Any:
    def run(*args: Any) -> Any:
        if not tracing.is_plain():
            raise RuntimeError("no rule for this transform")
        return entry(*args)

    return run


def test_an_error_of_the_caller_under_vmap_benches_nothing() -> None:
    batched = tuple(x[None] for x in _X)

    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Tensor = anyattn.attention(q, k, v, dropout_p=0.5, backend="auto")
        return found

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(dropped)(*batched)
    assert not faults._faults
    assert torch.vmap(dropped, randomness="different")(*batched).shape == batched[0].shape


def test_nothing_made_under_a_transform_is_met_outside() -> None:
    padding = torch.tensor([[True] * 3 + [False] * 3] * 2)
    mask = masks.KeyPadding(padding)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Tensor = anyattn.attention(q, k, v, mask)
        return found

    wanted = _plain(*_X, padding[:, None, None])
    torch.func.grad(lambda q: call(q, *_X[1:]).sum())(_X[0])
    torch.vmap(lambda q: call(q, *_X[1:]))(_X[0][None])
    torch.func.jvp(call, _X, _T)
    with torch.inference_mode():
        torch.testing.assert_close(call(*_X), wanted)
    query = _X[0].clone().requires_grad_()
    out = call(query, *_X[1:])
    torch.testing.assert_close(out.detach(), wanted)
    out.sum().backward()
    assert query.grad is not None
    assert mask._wide_key is None or not torch._C._functorch.is_functorch_wrapped_tensor(mask._wide_key)


def _second(call: Callable[..., Tensor]) -> Tensor:
    query = _X[0].clone().requires_grad_()
    (first,) = torch.autograd.grad((call(query, *_X[1:]) * _T[0]).sum(), query, create_graph=True)
    return torch.autograd.grad((first * _T[1]).sum(), query)[0]


def test_second_derivatives_are_right_or_raise() -> None:
    found = _second(lambda q, k, v: anyattn.attention(q, k, v, backend="native_math"))
    torch.testing.assert_close(found, _second(_plain))
    with pytest.raises(RuntimeError, match="derivative"):
        _second(lambda q, k, v: anyattn.attention(q, k, v, backend="native"))
    with pytest.raises(anyattn.UnsupportedCallError, match="gradients"):
        _second(lambda q, k, v: anyattn.attention(q, k, v, backend="flex"))


@pytest.mark.parametrize("backend", ["native_math", "native"])
def test_math_gives_lse(backend: str) -> None:
    padding = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
    for mask, allowed in (
        (None, torch.ones(6, 6, dtype=torch.bool)),
        (masks.Causal(), torch.ones(6, 6, dtype=torch.bool).tril()),
        (masks.KeyPadding(padding), padding[:, None, None].expand(2, 1, 6, 6)),
    ):
        query = _X[0].clone().requires_grad_()
        out, lse = anyattn.attention(query, *_X[1:], mask, scale=0.3, return_lse=True, backend=backend)
        scores = torch.einsum("bihd,bjhd->bhij", _X[0].double(), _X[1].double()) * 0.3
        wanted = scores.masked_fill(~allowed, float("-inf")).logsumexp(-1)
        torch.testing.assert_close(lse, wanted.float())
        assert lse.dtype == torch.float32
        assert not lse.requires_grad
        out.sum().backward()
        assert query.grad is not None
        assert bool(query.grad.isfinite().all())


_NUMBERS = [np.float32(0.25), np.float64(0.25), torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)]


@pytest.mark.parametrize("scale", _NUMBERS, ids=repr)
def test_numbers_of_other_kinds_are_numbers(scale: Any) -> None:
    wanted = anyattn.attention(*_X, scale=0.25)
    assert torch.equal(anyattn.attention(*_X, scale=scale), wanted)
    assert torch.equal(anyattn.attention(*_X, scale=scale), wanted)
    assert anyattn.explain(*_X, scale=scale).spec.scale == 0.25
    packed = anyattn.attention_varlen(
        *(x.flatten(0, 1) for x in _X), *_STARTS, np.int64(6), torch.tensor(6), scale=scale
    )
    torch.testing.assert_close(packed.view_as(wanted), wanted)
    with FlopCounterMode(display=False):
        torch.testing.assert_close(anyattn.attention(*_X, scale=scale), wanted)


_STARTS = (torch.tensor([0, 6, 12], dtype=torch.int32),) * 2


def test_flags_windows_and_caps_of_other_kinds() -> None:
    causal = anyattn.attention(*_X, is_causal=True)
    assert torch.equal(anyattn.attention(*_X, is_causal=np.bool_(True)), causal)
    window = anyattn.attention(*_X, window=(2, 0))
    assert torch.equal(anyattn.attention(*_X, window=(np.int32(2), torch.tensor(0))), window)
    assert torch.equal(anyattn.attention(*_X, masks.SlidingWindow(np.int64(2), 0)), window)
    capped = anyattn.attention(*_X, softcap=np.float32(2.0), backend="flex")
    assert torch.equal(capped, anyattn.attention(*_X, softcap=2.0, backend="flex"))


def test_a_scale_tensor_is_read_at_each_call() -> None:
    scale = torch.tensor(0.25)
    anyattn.attention(*_X, scale=scale)
    scale.fill_(0.5)
    assert torch.equal(anyattn.attention(*_X, scale=scale), anyattn.attention(*_X, scale=0.5))


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (torch.tensor(0.25, requires_grad=True), "a derivative"),
        (torch.tensor(0.25, device="meta"), "isn't known"),
        (torch.tensor([0.25]), "must be a number"),
        ("0.25", "must be a number"),
    ],
)
def test_numbers_that_are_none_are_refused(scale: Any, words: str) -> None:
    with pytest.raises(anyattn.InvalidCallError, match=words):
        anyattn.attention(*_X, scale=scale)


def test_derivatives_with_respect_to_other_arguments() -> None:
    with pytest.raises(anyattn.InvalidCallError, match="scale is a tensor with a derivative"):
        torch.func.jvp(lambda s: anyattn.attention(*_X, scale=s), (torch.tensor(0.3),), (torch.tensor(1.0),))
    with pytest.raises(anyattn.InvalidCallError, match="isn't known"):
        torch.vmap(lambda s: anyattn.attention(*_X, scale=s))(torch.rand(3))
    sinks = (torch.randn(2),)
    with pytest.raises(anyattn.UnsupportedCallError, match="forward_ad"):
        torch.func.jvp(lambda s: anyattn.attention(*_X, sinks=s), sinks, sinks)
    bias = (torch.randn(1, 1, 6, 6),)
    found = torch.func.jvp(lambda b: anyattn.attention(*_X, b), bias, bias)[1]
    torch.testing.assert_close(found, torch.func.jvp(_biased, bias, bias)[1])


def _biased(bias: Tensor) -> Tensor:
    scores = torch.einsum("bihd,bjhd->bhij", _X[0], _X[1]) * 8**-0.5 + bias
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), _X[2])


@pytest.mark.parametrize("layout", ["attention", "scaled_dot_product_attention"])
def test_a_half_precision_mask_under_the_other_autocast(layout: str) -> None:
    mask = torch.randn(2, 1, 6, 6).half()
    heads_first = tuple(x.transpose(1, 2) for x in _X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = torch.nn.functional.scaled_dot_product_attention(*heads_first, mask)
        if layout == "attention":
            found = anyattn.attention(*_X, mask).transpose(1, 2)
        else:
            found = anyattn.scaled_dot_product_attention(*heads_first, masks.Bias(mask))
    torch.testing.assert_close(found, wanted)
    with pytest.raises(anyattn.InvalidCallError, match="float16"):
        anyattn.attention(*(x.bfloat16() for x in _X), mask)


def test_value_checks_are_left_out_where_there_are_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyattn.run import checks

    monkeypatch.setenv("ANYATTN_CHECKS", "1")
    monkeypatch.setattr(checks, "_said", [])
    anyattn.reset()
    with pytest.warns(anyattn.AnyattnWarning, match="value checks") as caught:
        _call_without_values()
    assert len([warning for warning in caught if "value checks" in str(warning.message)]) == 1
    with pytest.raises(anyattn.InvalidCallError, match="NaN"):
        anyattn.attention(_X[0] * float("nan"), *_X[1:])


def _call_without_values() -> None:
    packed = (*(x.flatten(0, 1) for x in _X), *_STARTS)
    mask = masks.KeyLengths(torch.tensor([6, 2]))
    torch.vmap(lambda q: anyattn.attention(q, *_X[1:]))(_X[0][None])
    torch.vmap(lambda q: anyattn.attention(q, *_X[1:], mask))(_X[0][None])
    torch.vmap(lambda q: anyattn.attention_varlen(q, *packed[1:], 6, 6))(packed[0][None])
    with FakeTensorMode() as mode:
        anyattn.attention(*(mode.from_tensor(x) for x in _X))
        anyattn.attention_varlen(*(mode.from_tensor(x) for x in packed), 6, 6)
