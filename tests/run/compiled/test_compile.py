"""torch.compile: fullgraph from a cold process, with masks and gradients, any length, and changes of mind followed."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import anyattn
from anyattn import masks, reference
from anyattn.masks.objects import Mask
from anyattn.run import traced
from helpers import joins_inside

BACKENDS = ("native", "native_flash", "native_math", "flex")


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(seqlen: int = 9, seqlen_kv: int | None = None, **options: Any) -> list[torch.Tensor]:
    lengths = (seqlen, seqlen_kv or seqlen, seqlen_kv or seqlen)
    return [torch.randn(2, length, 2, 16, **options) for length in lengths]


def padding(seqlen: int) -> torch.Tensor:
    mask = torch.ones(2, seqlen, dtype=torch.bool)
    mask[0, : seqlen // 2] = False
    return mask


def compiled(function: Any) -> Any:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).abs().max().item() < 2e-5


@pytest.mark.parametrize("backend", ["native", "flex"])
def test_fullgraph_is_the_very_first_call_of_a_process(backend: str) -> None:
    code = f"""
import torch, anyattn
@torch.compile(fullgraph=True, backend="aot_eager")
def f(q, mask):
    return anyattn.attention(q, q, q, mask[:, None, None, :], backend={backend!r})
q = torch.randn(2, 9, 2, 16)
mask = torch.ones(2, 9, dtype=torch.bool)
mask[0, :4] = False
wanted = anyattn.reference.attention(q, q, q, anyattn.masks.KeyPadding(mask))[0]
print("error", (f(q, mask) - wanted).abs().max().item())
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", "import anyattn.reference" + code],
                            capture_output=True, text=True, check=True)  # fmt: skip
    assert float(result.stdout.split()[1]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_every_kind_are_traced(backend: str) -> None:
    bias = torch.randn(2, 9, 12)
    kinds: list[Mask] = [
        masks.Causal("lower_right") & masks.KeyPadding(padding(12)),
        masks.KeyLengths(torch.tensor([0, 7])),
        masks.SlidingWindow(2, 3) & masks.Bias(bias),
        masks.Boolean(torch.rand(9, 12) > 0.4),
    ]
    q, k, v = tensors(9, 12)
    for mask in kinds:
        run = compiled(functools.partial(anyattn.attention, attn_mask=mask, backend=backend))
        assert_close(run(q, k, v), reference.attention(q, k, v, mask)[0])


@pytest.mark.parametrize("backend", ["native", "native_flash", "native_math"])
def test_gradients_are_traced(backend: str) -> None:
    q, k, v = tensors(requires_grad=True)
    keys = padding(9)
    run = torch.compile(
        lambda q, k, v, keys: anyattn.attention(q, k, v, masks.KeyPadding(keys), is_causal=True, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    found = torch.autograd.grad(run(q, k, v, keys).sum(), (q, k, v))
    wanted = reference.attention(q, k, v, masks.KeyPadding(keys) & masks.Causal())[0]
    for one, other in zip(found, torch.autograd.grad(wanted.sum(), (q, k, v)), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("joined", [pytest.param(True, marks=joins_inside), False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamic_lengths_are_one_graph(backend: str, joined: bool) -> None:
    def call(q: Any, k: Any, v: Any, keys: Any) -> Any:
        if joined:
            return anyattn.attention(q, k, v, masks.KeyPadding(keys) & masks.Causal(), backend=backend)
        return anyattn.attention(q, k, v, masks.KeyPadding(keys), is_causal=True, backend=backend)

    counter = CompileCounter()
    run = torch.compile(
        call,
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    for seqlen in (8, 9, 24, 40, 33):
        q, k, v = tensors(seqlen)
        keys = padding(seqlen)
        wanted = reference.attention(q, k, v, masks.KeyPadding(keys) & masks.Causal())[0]
        assert_close(run(q, k, v, keys), wanted)
    assert counter.frame_count == 1


def test_lse_is_traced() -> None:
    q, k, v = tensors()
    run = torch.compile(
        lambda q, k, v: anyattn.attention(q, k, v, return_lse=True), fullgraph=True, backend="aot_eager"
    )
    out, lse = run(q, k, v)
    wanted, wanted_lse = reference.attention(q, k, v)
    assert_close(out, wanted)
    assert_close(lse, wanted_lse)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Which backends the chooser inside torch.compile took, in order."""
    seen: list[str | None] = []
    plain = traced.make_plan

    def spy(decision: anyattn.Decision) -> Any:
        seen.append(decision.chosen)
        return plain(decision)

    monkeypatch.setattr(traced, "make_plan", spy)
    return seen


def test_change_of_preference_is_followed_by_compiled_code(chosen: list[str | None]) -> None:
    q, k, v = tensors()
    run = torch.compile(lambda q, k, v: anyattn.attention(q, k, v), fullgraph=True, backend="eager")
    run(q, k, v)
    with anyattn.attention_backend("native_math"):
        run(q, k, v)
    run(q, k, v)
    anyattn.set_default_backend("native_flash")
    run(q, k, v)
    assert chosen == ["native", "native_math", "native_flash"]


def test_block_inside_compiled_code_holds_there_alone(chosen: list[str | None]) -> None:
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with anyattn.attention_backend("native_flash"):
            inner = anyattn.attention(q, k, v)
        out: torch.Tensor = inner + anyattn.attention(q, k, v)
        return out

    torch.compile(run, fullgraph=True, backend="eager")(*tensors())
    assert chosen == ["native_flash", "native"]


def test_pins_are_followed_inside_compiled_models(chosen: list[str | None]) -> None:
    class Attend(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = anyattn.attention(q, q, q)
            return out

    model = nn.Sequential(Attend(), Attend())
    anyattn.set_attention_backend(model, "native_math")
    anyattn.set_attention_backend(model[1], "flex")
    torch.compile(model, fullgraph=True, backend="eager")(tensors()[0])
    assert chosen == ["native_math", "flex"]


def test_compiled_code_in_a_thread_follows_that_threads_block(chosen: list[str | None]) -> None:
    import threading

    q, k, v = tensors()
    run = torch.compile(lambda q, k, v: anyattn.attention(q, k, v), fullgraph=True, backend="eager")
    run(q, k, v)

    def other() -> None:
        with anyattn.attention_backend("native_math"):
            run(q, k, v)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    run(q, k, v)
    assert chosen == ["native", "native_math"]


def test_wrong_call_fails_while_tracing_with_the_same_words() -> None:
    q, k, v = tensors()
    run = torch.compile(lambda q, k, v: anyattn.attention(q, k, v[:, :3]), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="same length"):
        run(q, k, v)


def test_head_dependent_block_mask_is_right_though_made_for_one_head() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    def by_head(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (kv <= q) | (h == 1)

    mask = create_block_mask(by_head, None, None, 256, 256, device="cpu")
    q, k, v = tensors(256)
    wanted = reference.attention(q, k, v, masks.Block(mask))[0]
    decision = anyattn.explain(q, k, v, mask, backend="flex")
    assert "rebuild_block_mask" in {conversion.code for conversion in decision.conversions}
    assert_close(anyattn.attention(q, k, v, mask, backend="flex"), wanted)
    block = masks.Block(mask)
    run = torch.compile(lambda q, k, v: anyattn.attention(q, k, v, block, backend="flex"), fullgraph=True,
                        backend="aot_eager")  # fmt: skip
    assert_close(run(q, k, v), wanted)


def test_blocks_without_a_function_are_honoured_by_eager_flex() -> None:
    from torch.nn.attention.flex_attention import BlockMask

    number = torch.tensor([[[1, 1]]], dtype=torch.int32)
    indices = torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(number, indices, BLOCK_SIZE=128)
    q, k, v = tensors(256)
    allowed = torch.block_diag(torch.ones(128, 128), torch.ones(128, 128)).bool()
    assert_close(anyattn.attention(q, k, v, mask, backend="flex"), reference.attention(q, k, v, Mask(dense=allowed))[0])


@pytest.mark.slow
def test_flex_compiled_for_avx2_is_right_where_inductors_tail_is_not() -> None:
    code = """
import torch
import torch._inductor.config as config
config.cpp.simdlen = 256
torch.backends.cpu.get_cpu_capability = lambda: "AVX2"
import anyattn
from anyattn import masks, reference
from anyattn.adapters import flex
flex._PAYS_ON_CPU = 0
q, k, v = torch.randn(1, 16, 2, 16), torch.randn(1, 24, 2, 16), torch.randn(1, 24, 2, 16)
decision = anyattn.explain(q, k, v, backend="flex")
assert "pad_keys" in {c.code for c in decision.conversions}, decision
print("error", (anyattn.attention(q, k, v, backend="flex") - reference.attention(q, k, v)[0]).abs().max().item())
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout.split()[1]) < 1e-5


class Attend(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = anyattn.attention(q, k, v, masks.KeyPadding(keys), is_causal=True)
        return out


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_export_gives_the_same_result_at_any_length(strict: bool, dynamic: bool) -> None:
    length = torch.export.Dim("length", min=2, max=64)
    shapes = ({1: length},) * 4 if dynamic else None
    program = torch.export.export(Attend(), (*tensors(9), padding(9)), dynamic_shapes=shapes, strict=strict).module()
    arguments = (*tensors(13), padding(13)) if dynamic else (*tensors(9), padding(9))
    assert_close(program(*arguments), Attend()(*arguments))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_traces_calls_without_dynamo(mode: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    arguments = (*tensors(9), padding(9))
    graph = make_fx(Attend(), tracing_mode=mode)(*arguments)
    assert_close(graph(*arguments), Attend()(*arguments))


def test_function_transforms_go_through() -> None:
    q = torch.randn(2, 9, 2, 16)
    mapped = torch.vmap(lambda a: anyattn.attention(a, a, a, is_causal=True))(torch.stack([q, 2 * q]))
    assert_close(mapped[1], anyattn.attention(2 * q, 2 * q, 2 * q, is_causal=True))
    found = torch.func.grad(lambda a: anyattn.attention(a, q, q).sum())(q)
    other = q.clone().requires_grad_()
    assert_close(found, torch.autograd.grad(anyattn.attention(other, q, q).sum(), other)[0])
