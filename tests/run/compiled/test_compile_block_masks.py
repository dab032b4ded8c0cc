"""Block masks and mask functions inside torch.compile: eager and compiled agree, whatever the torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch.nn.attention.flex_attention import create_block_mask

import anyattn
from anyattn import masks, reference
from anyattn.errors import InvalidCallError
from anyattn.masks.block_masks import block_at
from helpers import TORCH, joins_inside, needs_torch


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(seqlen: int = 20) -> list[torch.Tensor]:
    return [torch.randn(2, seqlen, 2, 16) for _ in range(3)]


def ids(seqlen: int = 20) -> torch.Tensor:
    return torch.stack([torch.arange(seqlen) // 7, torch.arange(seqlen) // 3])


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).abs().max().item() < 2e-5


def by_table() -> masks.Mask:
    table = ids()
    return masks.from_function(lambda b, h, q, kv: table[b, q] >= table[b, kv])


MAKERS: dict[str, Any] = {
    "document": lambda: masks.document(ids()) & masks.Causal(),
    "prefix": lambda: masks.prefix_lm(torch.tensor([3, 8])),
    "frames": lambda: masks.frame_causal(4) & masks.KeyLengths(torch.tensor([20, 7])),
    "heads": lambda: masks.from_function(lambda b, h, q, kv: kv <= q + 3 * h),
    "captured": by_table,
}


@pytest.mark.parametrize("backend", ["native", "native_flash", "flex"])
@pytest.mark.parametrize("kind", MAKERS)
def test_function_masks_made_outside_are_traced(backend: str, kind: str) -> None:
    mask, (q, k, v) = MAKERS[kind](), tensors()

    def call(q: Any, k: Any, v: Any) -> Any:
        return anyattn.attention(q, k, v, mask, backend=backend)

    eager = call(q, k, v)
    assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), eager)
    assert_close(eager, reference.attention(q, k, v, mask)[0])


@pytest.mark.parametrize("joined", [pytest.param(True, marks=joins_inside), False])
@pytest.mark.parametrize("backend", ["native", "flex"])
@pytest.mark.parametrize("dynamic", [True, False])
def test_document_masks_may_be_made_inside(backend: str, dynamic: bool, joined: bool) -> None:
    def call(q: Any, k: Any, v: Any, ids: Any) -> Any:
        if joined:
            return anyattn.attention(q, k, v, masks.document(ids) & masks.Causal(), backend=backend)
        return anyattn.attention(q, k, v, masks.document(ids), is_causal=True, backend=backend)

    run = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlen in (20, 33):
        q, k, v = tensors(seqlen)
        assert_close(
            run(q, k, v, ids(seqlen)), reference.attention(q, k, v, masks.document(ids(seqlen)) & masks.Causal())[0]
        )
    with pytest.raises(Exception, match=r"fit the call|made for"):
        run(*tensors(20), ids(12))


def test_from_function_inside_is_refused_with_the_cure() -> None:
    def call(q: Any) -> Any:
        return anyattn.attention(q, q, q, masks.from_function(lambda b, h, q, kv: kv <= q))

    # Dynamo of torch 2.8 tells the name of an error raised in traced code, and not its text.
    said = "outside the compiled function" if Version("2.9") <= TORCH else "InvalidCallError"
    with pytest.raises(Exception, match=said):
        torch.compile(call, fullgraph=True, backend="eager")(tensors()[0])


def test_block_masks_given_as_arguments_are_told_apart() -> None:
    first = create_block_mask(lambda b, h, q, kv: kv <= q, None, None, 20, 20, device="cpu")
    second = create_block_mask(lambda b, h, q, kv: (kv >= q) | (h == 1), None, None, 20, 20, device="cpu")
    run = torch.compile(lambda q, k, v, mask: anyattn.attention(q, k, v, mask, backend="flex"), fullgraph=True,
                        backend="aot_eager")  # fmt: skip
    q, k, v = tensors()
    for mask in (first, second, first):
        assert_close(run(q, k, v, mask), reference.attention(q, k, v, masks.Block(mask))[0])


@needs_torch("2.10", "dynamo traces create_block_mask")
def test_block_mask_made_inside_is_refused_with_the_cure() -> None:
    def call(q: Any) -> Any:
        mask = create_block_mask(lambda b, h, q, kv: kv <= q, None, None, 20, 20, device="cpu")
        return anyattn.attention(q, q, q, mask, backend="flex")

    with pytest.raises(Exception, match="outside the compiled function"):
        torch.compile(call, fullgraph=True, backend="eager")(tensors()[0])


def test_address_of_anything_else_is_refused() -> None:
    thing = [1]
    for address in (id(thing), 1):
        with pytest.raises(InvalidCallError, match="outside the compiled function"):
            block_at(address)
