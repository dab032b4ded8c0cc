"""What goes wrong in Diffusers only, or also, once torch.compile has had a hand in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from doors_to_backends import assert_right, padding, tensors, triangle, truth

import anyattn
from anyattn import masks


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def through(door: str, backend: str) -> Any:
    if door == "call":
        return lambda *args, **options: anyattn.attention(*args, backend=backend, **options)
    from diffusers.models import attention_dispatch

    return lambda *args, **options: attention_dispatch.dispatch_attention_fn(*args, backend="anyattn", **options)


# Its flex drops is_causal in compiled code too, and refuses a mask of data where it packs sequences.
@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("door", ["call", "diffusers"])
def test_compiled_call_honours_causal_and_padding_in_one_graph(door: str, backend: str) -> None:
    attend = through(door, backend)
    q, k, v = tensors()
    keep = padding(2, 9, "hole")
    run = torch.compile(
        lambda q, k, v, keep: (
            attend(q, k, v, is_causal=True),
            attend(q, k, v, masks.KeyPadding(keep)),
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    with anyattn.attention_backend(backend):
        causal, padded = run(q, k, v, keep)
    assert_right(causal, truth(q, k, v, triangle(6, 9)))
    assert_right(padded, truth(q, k, v, keep[:, None, None]))


# Its flex makes the blocks of a mask from the first head's, which compiled code then skips for every head.
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_block_mask_made_for_one_head_is_right_for_every_head_in_compiled_code() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = tensors(1, 256, 256, heads=2)
    made = create_block_mask(lambda b, h, i, j: (j <= i) | (h == 1), None, None, 256, 256, device="cpu")
    block = masks.Block(made)
    by_head = torch.stack([triangle(256, 256), torch.ones(256, 256, dtype=torch.bool)])
    run = torch.compile(lambda q, k, v: anyattn.attention(q, k, v, block, backend="flex"), fullgraph=True)
    assert_right(run(q, k, v), truth(q, k, v, by_head))


# FlexAttention compiled for AVX2 is wrong at 24 and 40 keys, without any mask and under Diffusers' flex too.
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_flex_in_the_callers_compiled_code_is_right_where_inductors_tail_is_not() -> None:
    code = """
import torch
import torch._inductor.config as config
config.cpp.simdlen = 256
torch.backends.cpu.get_cpu_capability = lambda: "AVX2"
import anyattn
from anyattn import reference
q, k, v = torch.randn(3, 1, 24, 2, 16)
run = torch.compile(lambda q, k, v: anyattn.attention(q, k, v, backend="flex"), fullgraph=True)
print("error", (run(q, k, v) - reference.attention(q, k, v)[0]).abs().max().item())
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout.split()[1]) < 1e-5
