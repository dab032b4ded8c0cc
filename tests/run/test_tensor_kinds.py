"""Fake tensors and tensor subclasses: what a call meets with them says nothing of calls with plain tensors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import anyattn
from anyattn import masks

_X = tuple(torch.randn(2, 6, 2, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    anyattn.reset()
    yield
    anyattn.reset()


def _of_heads_first(query: Tensor, key: Tensor, value: Tensor, *mask: Any, **options: Any) -> Any:
    tensors = (tensor.transpose(1, 2) for tensor in (query, key, value))
    result = anyattn.scaled_dot_product_attention(*tensors, *mask, **options)
    return (result[0].transpose(1, 2), result[1]) if isinstance(result, tuple) else result.transpose(1, 2)


_USES: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "padding": lambda mask: {"attn_mask": masks.KeyPadding(mask)},
    "boolean": lambda mask: {"attn_mask": mask[:, None, None, :]},
    "causal": lambda mask: {"is_causal": True},
    "softcap": lambda mask: {"softcap": 2.0},
    "lse": lambda mask: {"attn_mask": masks.KeyPadding(mask), "return_lse": True},
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize(
    ("backend", "use"),
    [
        (backend, use)
        for backend in ("auto", "flex", ["native", "flex"])
        for use in _USES
        if (backend, use) != ("flex", "lse")  # refused: fake tensors are taken for torch.compile's
    ],
)
def test_fake_tensors_in_and_outside_of_their_mode(backend: Any, use: str, within: bool, warm: bool) -> None:
    """Fake tensors are often passed on after their mode was left: what the call makes has to be fake too."""
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])

    def call(function: Callable[..., Any], tensors: Any, padding: Tensor) -> Any:
        result = function(*tensors, backend=backend, **_USES[use](padding))
        return result[0] if isinstance(result, tuple) else result

    for function in (anyattn.attention, _of_heads_first):
        if warm:
            call(function, _X, mask)
        chosen = anyattn.explain(*_X, backend=backend, **_USES[use](mask)).chosen
        mode = FakeTensorMode()
        fakes, padding = [mode.from_tensor(x) for x in _X], mode.from_tensor(mask)
        with mode if within else contextlib.nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("error", anyattn.AnyattnWarning)
            assert call(function, fakes, padding).shape == _X[0].shape
        assert anyattn.explain(*_X, backend=backend, **_USES[use](mask)).chosen == chosen
        assert torch.isfinite(call(function, _X, mask)).all()


def test_fake_packed_tokens_outside_of_their_mode() -> None:
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    packed = [x[0] for x in _X]
    mode = FakeTensorMode()
    fakes, fake_starts = [mode.from_tensor(x) for x in packed], mode.from_tensor(starts)
    out = anyattn.attention_varlen(*fakes, fake_starts, fake_starts, 3, 3, backend="auto")
    assert out.shape == packed[0].shape
    with anyattn.record() as calls:
        anyattn.attention_varlen(*packed, starts, starts, 3, 3, backend="auto")
    assert not any(reason.code == "fault" for one in calls[0].candidates for reason in one.reasons)


class _Refusing(Tensor):
    """A subclass that one kernel can't take."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            raise NotImplementedError("not for this subclass")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_what_fails_for_a_tensor_subclass_benches_nothing(masked: bool, warm: bool) -> None:
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])[:, None, None] if masked else None
    wanted = anyattn.attention(*_X, mask)
    before = anyattn.explain(*_X, mask, backend="auto").chosen
    if warm:
        anyattn.attention(*_X, mask, backend="auto")
    for function in (anyattn.attention, _of_heads_first):
        with contextlib.suppress(anyattn.AnyattnError), warnings.catch_warnings():
            warnings.simplefilter("ignore", anyattn.AnyattnWarning)
            function(*(x.as_subclass(_Refusing) for x in _X), mask, backend="auto")
    assert anyattn.explain(*_X, mask, backend="auto").chosen == before
    with anyattn.record() as calls:
        torch.testing.assert_close(anyattn.attention(*_X, mask, backend="auto"), wanted)
    assert calls[0].chosen == before
