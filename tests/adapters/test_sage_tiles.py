"""SageAttention's fp16 kernels at lengths where they take in memory that nobody wrote: they are never called there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
import doubles
from anyattn import masks, reference
from anyattn.adapters.sage import tiles
from anyattn.environment import Device, preset
from anyattn.reference import tolerance
from anyattn.sources.packages import FUNCTIONS
from anyattn.testing import Case
from anyattn.testing.laws import LawBroken, check
from anyattn.types.spec import AttentionSpec, MaskSpec, PatternSpec

Sizes = tuple[int, int, int, int, int, int]
SIZES: tuple[Sizes, ...] = (
    (2, 33, 40, 1, 1, 96),
    (3, 33, 129, 4, 4, 128),
    (2, 7, 40, 1, 1, 40),
    (2, 1, 1, 2, 1, 64),
    (1, 40, 7, 4, 2, 80),
    (1, 129, 33, 4, 1, 64),
    (2, 129, 129, 2, 2, 64),
    (1, 65, 64, 2, 2, 64),
    (1, 70, 65, 2, 2, 64),
    (2, 193, 193, 2, 1, 40),
    (1, 63, 63, 2, 2, 64),
)
"""B, S_q, S_kv, H, H_kv, D."""


@pytest.fixture(params=["sage_int8_fp16", "sage_int8_fp16_triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with doubles.installed(request.param):
        yield request.param


def _inputs(sizes: Sizes, shift: float = 0.0) -> list[Tensor]:
    batch, seqlen_q, seqlen_kv, heads, kv_heads, dim = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, seqlen_q, heads, dim), (batch, seqlen_kv, kv_heads, dim), (batch, seqlen_kv, kv_heads, dim))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return [tensor.to(torch.bfloat16) for tensor in (query, key + shift, value)]


@pytest.mark.parametrize("causal", ["", "upper_left", "lower_right"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_results_are_the_references(backend: str, sizes: Sizes, causal: str) -> None:
    tensors = _inputs(sizes)
    mask = masks.Causal(causal) if causal else None  # type: ignore[arg-type]
    gqa = sizes[3] != sizes[4]
    longer = sizes[1] > sizes[2]
    refused = (causal == "lower_right" and sizes[1] < sizes[2]) or (causal == "upper_left" and longer)
    if refused and (backend.endswith("triton") or not longer):
        with pytest.raises(anyattn.UnsupportedCallError):
            anyattn.attention(*tensors, mask, enable_gqa=gqa, backend=backend)
        return
    out, lse = anyattn.attention(*tensors, mask, enable_gqa=gqa, return_lse=True, backend=backend)
    truth, true_lse = reference.attention(*tensors, mask)
    plain, _ = reference.attention(*tensors, mask, dtype=torch.bfloat16)
    assert tolerance.excess(out, truth, tolerance.budget(truth, plain, torch.bfloat16, over=(1, 3))) <= 1
    alive = torch.isfinite(true_lse)
    assert torch.equal(torch.isneginf(lse), ~alive)
    assert torch.allclose(lse[alive].double(), true_lse[alive], atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kernel_is_given_whole_tiles_and_the_keys_mean_stays(
    backend: str, sizes: Sizes, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []
    sizes = (*sizes[:2], sizes[1], *sizes[3:]) if causal else sizes
    tensors = _inputs(sizes, shift=8.0)
    anyattn.attention(*tensors, is_causal=causal, enable_gqa=sizes[3] != sizes[4], backend=backend)
    attend = FUNCTIONS[backend].attend

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        seen.append((query, key, value, options))
        return attend(query, key, value, **options)

    monkeypatch.setattr(FUNCTIONS[backend], "attend", spy)
    anyattn.reset()  # a decided call holds the function
    anyattn.attention(*tensors, is_causal=causal, enable_gqa=sizes[3] != sizes[4], backend=backend)
    assert len(seen) == 1, "once per call"
    query, key, value, options = seen[0]
    if backend == "sage_int8_fp16":
        assert key.shape[1] >= tiles.KEYS
    elif options["is_causal"]:
        assert not 0 < query.shape[1] % tiles.ROWS <= tiles.KEYS
    mean, true = key.double().mean(1), tensors[1].double().mean(1)
    assert float((mean - true).abs().max()) < 0.05, "what the function subtracts from the keys"
    assert value.isfinite().all()
    whole = sizes[2] >= tiles.KEYS if backend == "sage_int8_fp16" else not causal or not 0 < sizes[1] % 128 <= 64
    if whole:
        assert (query.shape[1], key.shape[1]) == (sizes[1], sizes[2]), "nothing is added where nothing has to be"


@pytest.mark.parametrize("mask", ["none", "causal"])
def test_law_about_unwritten_memory_catches_calls_that_are_not_made_whole(
    backend: str, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(seqlen_q=33, seqlen_kv=33, head_dim=96, dtype="bfloat16", mask=mask)
    assert check("unwritten_memory", backend, case).status == "passed"
    monkeypatch.setattr(tiles, "note", lambda *sizes, **options: None)
    if backend == "sage_int8_fp16" or mask == "causal":
        with pytest.raises(LawBroken, match="unwritten_memory"):
            check("unwritten_memory", backend, case)


def _spec(**changes: object) -> AttentionSpec:
    spec = AttentionSpec(2, 40, 40, 4, 4, 64, 64, torch.bfloat16, "cuda", 0.125, 0)
    return spec.replace(**changes)


CAUSAL = MaskSpec(pattern=PatternSpec(-1, 0, "upper_left"))
LONGER = {"mask": CAUSAL, "seqlen_q": 33, "seqlen_kv": 129, "same_lengths": False}
"""Of whose keys the Triton kernel, which wants as many as queries, is given 33."""


@pytest.mark.parametrize(
    ("backend", "arch", "changes", "noted"),
    [
        ("sage_int8_fp16", (9, 0), {}, True),
        ("sage_int8_fp16", (9, 0), {"seqlen_kv": 64}, False),
        ("sage_int8_fp16", (9, 0), LONGER, False),
        ("sage_int8_fp16_triton", (9, 0), LONGER, True),
        ("sage_int8_fp16_triton", (9, 0), {}, False),
        ("sage_int8_fp16_triton", (9, 0), {"mask": CAUSAL}, True),
        ("sage_int8_fp16_triton", (9, 0), {"mask": CAUSAL, "seqlen_q": 65, "seqlen_kv": 65}, False),
        ("sage", (8, 0), {}, True),
        ("sage", (8, 6), {"mask": CAUSAL}, True),
        ("sage", (8, 6), {}, False),
        ("sage", (9, 0), {"mask": CAUSAL}, False),
        ("sage_hub", (8, 0), {}, True),
        ("sage_int8_fp8", (9, 0), {}, False),
        ("sage_int8_fp8_sm90", (9, 0), {"mask": CAUSAL}, False),
    ],
)
def test_decision_says_that_tiles_are_made_whole(
    backend: str, arch: tuple[int, int], changes: dict[str, Any], noted: bool
) -> None:
    env = preset("h100", packages={"sageattention": "2.2.0", "kernels": "0.17.2"})
    devices = (Device("cpu"), Device("cuda", "a supposed GPU", arch))
    env = dataclasses.replace(env, modules=frozenset(("sageattention", "kernels")), devices=devices)
    decision = anyattn.explain(_spec(**changes), env=env, backend=backend)
    assert decision.chosen == backend
    assert ("whole_tiles" in {note.code for note in decision.conversions}) == noted
