"""torch.compile honours what eager calls honour: autocast, mask sizes, torch's own causal bias, errors' words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import anyattn
from anyattn import masks, reference
from helpers import joins_inside


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(seqlen: int = 9, seqlen_kv: int | None = None) -> list[torch.Tensor]:
    return [torch.randn(2, length, 2, 16) for length in (seqlen, seqlen_kv or seqlen, seqlen_kv or seqlen)]


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tol: float = 2e-5) -> None:
    assert (found - wanted).abs().max().item() < tol


@pytest.mark.parametrize("backend", ["native", "native_flash", "native_math", "flex"])
@pytest.mark.parametrize("biased", [True, False])
def test_autocast_is_followed_as_outside(backend: str, biased: bool) -> None:
    q, k, v = tensors()
    bias = torch.randn(9, 9) if biased else None

    def call(q: Any, k: Any, v: Any) -> Any:
        return anyattn.attention(q, k, v, bias, backend=backend)

    with torch.autocast("cpu", torch.bfloat16):
        eager = call(q, k, v)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v)
    assert compiled.dtype == eager.dtype == torch.bfloat16
    assert_close(compiled.float(), eager.float(), 1e-2)
    mask = None if bias is None else masks.Bias(bias)
    assert_close(compiled.double(), reference.attention(q, k, v, mask)[0], 2e-2)


@pytest.mark.parametrize("kind", ["padding", "boolean", "lengths"])
def test_mask_of_the_wrong_size_is_refused_at_dynamic_lengths_too(kind: str) -> None:
    def call(q: Any, k: Any, v: Any, mask: Any) -> Any:
        if kind == "boolean":
            return anyattn.attention(q, k, v, mask[:, None, None], backend="flex")
        wrapped = masks.KeyPadding(mask) if kind == "padding" else masks.KeyLengths(mask)
        return anyattn.attention(q, k, v, wrapped, backend="flex")

    run = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    q, k, v = tensors(32)
    if kind == "lengths":
        run(q, k, v, torch.tensor([3, 32]))
        wrong = [torch.tensor([3, 32, length]) for length in (30, 40)]
    else:
        run(q, k, v, torch.ones(2, 32, dtype=torch.bool))
        wrong = [torch.ones(2, length, dtype=torch.bool) for length in (30, 40)]
    for mask in wrong:
        with pytest.raises(Exception, match="sizes don't fit"):
            run(q, k, v, mask)


def test_causal_bias_of_torch_is_traced_and_its_lengths_checked() -> None:
    from torch.nn.attention.bias import causal_lower_right

    def call(q: Any, k: Any, v: Any) -> Any:
        return anyattn.attention(q, k, v, masks.Causal("lower_right"))

    q, k, v = tensors(5, 9)
    wanted = reference.attention(q, k, v, masks.Causal("lower_right"))[0]
    assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), wanted)
    bias = causal_lower_right(5, 9)
    run = torch.compile(lambda q, k, v: anyattn.attention(q, k, v, bias), backend="aot_eager")
    assert_close(run(q, k, v), wanted)


def test_large_calls_are_decided_by_their_exact_sizes() -> None:
    from anyattn.run.traced import _is_large

    small, many = torch.empty(2, 9, 2, 16, device="meta"), torch.empty(700, 9, 100, 16, device="meta")
    long = torch.empty(1, 65536, 1, 16, device="meta")
    assert [_is_large(q, q, 1) for q in (small, many, long)] == [False, True, True]


@pytest.mark.slow
def test_flex_with_a_bias_at_dynamic_lengths_compiles_with_inductor() -> None:
    def call(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return anyattn.attention(q, k, v, bias, backend="flex")

    run = torch.compile(call, fullgraph=True, dynamic=True)
    for seqlen in (33, 48):
        q, k, v = tensors(seqlen)
        bias = torch.randn(seqlen, seqlen)
        assert_close(run(q, k, v, bias), reference.attention(q, k, v, masks.Bias(bias))[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["boolean", "bias", "lengths", "padding", "document", pytest.param("padding & causal", marks=joins_inside)]
)
def test_flex_takes_every_mask_at_dynamic_lengths_with_inductor(kind: str) -> None:
    def mask_of(allowed: Any, lengths: Any, keep: Any, documents: Any) -> Any:
        if kind == "boolean":
            return masks.Boolean(allowed)
        if kind == "bias":
            return masks.Bias(torch.where(allowed, 0.5, -torch.inf))
        if kind == "lengths":
            return masks.KeyLengths(lengths)
        if kind == "document":
            return masks.document(documents)
        return masks.KeyPadding(keep) & masks.Causal() if "causal" in kind else masks.KeyPadding(keep)

    def call(q: Any, k: Any, v: Any, *told: Any) -> Any:
        return anyattn.attention(q, k, v, mask_of(*told), softcap=3.0, backend="flex")

    run = torch.compile(call, fullgraph=True, dynamic=True)
    for seqlen in (33, 48, 140):
        q, k, v = tensors(seqlen)
        lengths = torch.tensor([0, seqlen - 9])
        allowed = torch.rand(2, 1, seqlen, seqlen) < 0.7
        allowed[1, 0, 5] = False
        documents = (torch.arange(seqlen) // 10).expand(2, -1)
        told = (allowed, lengths, torch.arange(seqlen).flip(0) < lengths[:, None], documents)
        assert_close(run(q, k, v, *told), reference.attention(q, k, v, mask_of(*told), softcap=3.0)[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lengths", "padding", pytest.param("padding & causal", marks=joins_inside)])
def test_flex_with_key_masks_compiles_with_inductor(kind: str) -> None:
    def mask_of(lengths: Any, keep: Any) -> Any:
        found = masks.KeyLengths(lengths) if kind == "lengths" else masks.KeyPadding(keep)
        return found & masks.Causal() if "causal" in kind else found

    def call(q: Any, k: Any, v: Any, lengths: Any, keep: Any) -> Any:
        return anyattn.attention(q, k, v, mask_of(lengths, keep), backend="flex")

    run = torch.compile(call, fullgraph=True, dynamic=False)
    q, k, v = tensors(140)
    lengths = torch.tensor([9, 140])
    keep = torch.arange(140).flip(0) < lengths[:, None]
    assert_close(run(q, k, v, lengths, keep), reference.attention(q, k, v, mask_of(lengths, keep))[0])


def test_blocks_made_outside_of_traced_code_are_those_made_within() -> None:
    from anyattn.adapters.flex import traced
    from anyattn.masks.block_masks import make_band_block_mask

    keep = torch.rand(2, 300) < 0.05
    keep[:, 128:256] = True
    keys = torch.ops.anyattn.flex_keys(keep, 300, 300)
    assert torch.equal(keys, keep)
    made = traced.band_block_mask(None, keys, None, 0, 200)
    same = make_band_block_mask(None, 200, 300, keep.device, high=0, keys=keep)  # type: ignore[arg-type]
    for name in ("kv", "full_kv", "q", "full_q"):
        assert torch.equal(getattr(made, f"{name}_num_blocks"), getattr(same, f"{name}_num_blocks")), name
    assert torch.equal(made.to_dense(), same.to_dense())
    torch.library.opcheck(torch.ops.anyattn.flex_keys, (torch.tensor([3, 9]), 20, 32))
    torch.library.opcheck(torch.ops.anyattn.flex_blocks, (keys, -60, 3, 200))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["padding", "lengths", "window"])
def test_compiled_flex_takes_one_length_after_another(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    from anyattn.adapters import flex

    monkeypatch.setattr(flex, "_PAYS_ON_CPU", 0)
    anyattn.reset()
    for seqlen in (64, 72, 100):
        q, k, v = tensors(seqlen)
        keep = torch.rand(len(q), seqlen) < 0.5
        mask = {
            "padding": masks.KeyPadding(keep),
            "lengths": masks.KeyLengths(keep.sum(-1)),
            "window": masks.SlidingWindow(30, 2, "lower_right"),
        }[kind]
        assert "compiled" in anyattn.explain(q, k, v, mask, backend="flex").kernel
        assert_close(anyattn.attention(q, k, v, mask, backend="flex"), reference.attention(q, k, v, mask)[0])
    anyattn.reset()


def test_lengths_are_compiled_one_by_one_where_dynamic_code_is_no_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyattn.adapters.flex import kernels

    made: list[Any] = []

    def compiled(kind: Any, block_mask: Any, lengths: Any) -> Any:
        def run(*tensors: Any, **arguments: Any) -> Any:
            made.append(lengths)
            if lengths is None:
                raise RuntimeError("InductorError: CppCompileError: C++ compile error")
            return lengths

        return run

    monkeypatch.setattr(kernels, "_compiled", compiled)
    monkeypatch.setattr(kernels, "_not_dynamic", set())
    kind: Any = "kind"
    assert kernels._in_turn(kind, None, (1, 2, 3))() == (1, 2, 3)
    assert kernels._in_turn(kind, None, (1, 2, 4))() == (1, 2, 4)
    assert made == [None, (1, 2, 3), (1, 2, 4)]


def test_other_errors_of_compiled_flex_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyattn.adapters.flex import kernels

    def compiled(kind: Any, block_mask: Any, lengths: Any) -> Any:
        def run(*tensors: Any, **arguments: Any) -> Any:
            assert lengths is None
            raise RuntimeError("out of resource")

        return run

    monkeypatch.setattr(kernels, "_compiled", compiled)
    kind: Any = "another kind"
    with pytest.raises(RuntimeError, match="out of resource"):
        kernels._in_turn(kind, None, (1, 2, 3))()
