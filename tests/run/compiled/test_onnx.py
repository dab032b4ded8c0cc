"""Both ONNX exporters: what ONNX Runtime computes from the file is what anyattn computes, for other lengths too.

ONNX has no kernel that gives an lse, and its attention gives a row without a key the mean of all values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anyattn
from anyattn import masks

ort = pytest.importorskip("onnxruntime", exc_type=ModuleNotFoundError)
pytest.importorskip("onnxscript", exc_type=ModuleNotFoundError)

Call = Callable[[Tensor, Tensor, Tensor, Tensor], Any]

CALLS: dict[str, Call] = {
    "plain": lambda q, k, v, keep: anyattn.attention(q, k, v),
    "causal": lambda q, k, v, keep: anyattn.attention(q, k, v, is_causal=True),
    "causal, lower right, padding, lse": lambda q, k, v, keep: anyattn.attention(
        q, k, v, masks.Causal("lower_right") & masks.KeyPadding(keep), return_lse=True
    ),
    "window": lambda q, k, v, keep: anyattn.attention(q, k, v, window=(2, 1)),
    "boolean": lambda q, k, v, keep: anyattn.attention(q, k, v, keep[:, None, None, :]),
    "bias": lambda q, k, v, keep: anyattn.attention(q, k, v, torch.where(keep, 0.0, -torch.inf)[:, None, None, :]),
    "lengths": lambda q, k, v, keep: anyattn.attention(q, k, v, masks.KeyLengths(keep.sum(-1))),
    "sinks": lambda q, k, v, keep: anyattn.attention(q, k, v, masks.KeyPadding(keep), sinks=torch.ones(2)),
    "shared heads, lse": lambda q, k, v, keep: anyattn.attention(
        q, k[:, :, :1], v[:, :, :1], enable_gqa=True, is_causal=True, return_lse=True
    ),
}
BY_DYNAMO = ("causal, lower right, padding, lse", "window", "shared heads, lse")
"""torch.export takes seconds for each: those that went wrong, and one of each kind."""


class Model(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
        return self.call(q, k, v, keep)


def _inputs(seqlen_q: int, seqlen_kv: int) -> tuple[Tensor, ...]:
    """Draw a call whose second batch entry has no key that counts."""
    sizes = (seqlen_q, seqlen_kv, seqlen_kv)
    keep = torch.arange(seqlen_kv) < torch.tensor([[seqlen_kv - 1], [0]])
    return (*(torch.randn(2, size, 2, 8) for size in sizes), keep)


def _compare(path: Path, call: Call) -> None:
    session = ort.InferenceSession(str(path))
    names = [one.name for one in session.get_inputs()]
    for lengths in ((5, 5), (4, 9), (9, 4)):
        inputs = _inputs(*lengths)
        given = {name: tensor.numpy() for name, tensor in zip("qkv", inputs, strict=False) if name in names}
        given |= {"keep": inputs[3].numpy()} if "keep" in names else {}
        found, wanted = session.run(None, given), call(*inputs)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_exporter_by_tracing(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    axes = {one: {1: f"{one}_length"} for one in ("q", "k", "v", "keep")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Model(CALLS[name]), _inputs(5, 5), path, dynamo=False, input_names=list(axes), dynamic_axes=axes
        )
    _compare(path, CALLS[name])


@pytest.mark.parametrize("name", BY_DYNAMO)
def test_exporter_by_torch_export(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    shapes = tuple({1: torch.export.Dim.DYNAMIC} for _ in range(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Model(CALLS[name]), _inputs(5, 5), dynamo=True, verbose=False, dynamic_shapes=shapes
        )
    assert program is not None
    program.save(path)
    _compare(path, CALLS[name])


def test_calls_after_an_export_are_decided_as_before(tmp_path: Path) -> None:
    call = CALLS["boolean"]
    inputs = _inputs(5, 5)
    before = call(*inputs)
    test_exporter_by_tracing("boolean", tmp_path)
    with anyattn.record() as calls:
        after = call(*inputs)
    assert torch.equal(before, after)
    assert [one.kernel for one in calls] == ["sdpa"]
    traced = torch.jit.trace(Model(call), inputs, check_trace=False)
    assert "scaled_dot_product_attention" in str(traced.inlined_graph), "what an export stores is the export's alone"
