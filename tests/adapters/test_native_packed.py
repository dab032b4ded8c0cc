"""Packed sequences on torch's own entry for CUDA: which calls reach it, and how, against a double of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from anyattn import masks, reference
from anyattn.adapters.native import packed
from anyattn.backend.protocol import Parts, Plan
from anyattn.environment import preset
from anyattn.selection import registry
from anyattn.selection.resolve import resolve
from anyattn.types.decision import Preference
from anyattn.types.spec import AttentionSpec, MaskSpec, PatternSpec
from doubles.kernels import flash2
from helpers import needs_torch

STARTS_Q, STARTS_K = (torch.tensor(starts, dtype=torch.int32) for starts in ((0, 3, 3, 8), (0, 4, 6, 9)))


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Any:
    """Do what torch 2.11's does on an H100: FlashAttention-2, its alignment, no shared heads, lse `(H, T_q)`."""
    assert query.shape[1] == key.shape[1]
    assert query.shape[2] % 8 == 0
    causal = window_size == (-1, 0)
    found = flash2.flash_attn_varlen_func(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, 0.0, scale, causal, return_attn_probs=True
    )
    return (found[0], found[1]) if return_aux else found[0]


def spec_of(**changes: Any) -> AttentionSpec:
    fields: dict[str, Any] = {
        "batch": 3,
        "seqlen_q": 5,
        "seqlen_kv": 4,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 16,
        "head_dim_v": 16,
        "dtype": torch.bfloat16,
        "device_type": "cuda",
        "device_index": 0,
        "scale": 0.25,
        "same_lengths": False,
        "packed": True,
    }
    return AttentionSpec(**(fields | changes))


CAUSAL = MaskSpec(PatternSpec(-1, 0, "upper_left"))
LOWER_RIGHT = MaskSpec(PatternSpec(-1, 0, "lower_right"))
WINDOW = MaskSpec(PatternSpec(2, 0, "lower_right"))


@pytest.mark.parametrize(
    ("changes", "version", "taken"),
    [
        ({}, "2.11.0", True),
        ({"mask": LOWER_RIGHT, "return_lse": True, "requires_grad": ("query",)}, "2.11.0", True),
        ({"mask": CAUSAL, "same_lengths": True}, "2.11.0", True),
        ({"num_kv_heads": 2, "head_dim": 44, "head_dim_v": 44}, "2.11.0", True),
        ({}, "2.10.0", False),
        ({"mask": CAUSAL}, "2.11.0", False),
        ({"mask": WINDOW, "same_lengths": True}, "2.11.0", False),
        ({"dropout_p": 0.1}, "2.11.0", False),
        ({"scale": -0.5}, "2.11.0", False),
        ({"dtype": torch.float32}, "2.11.0", False),
        ({"head_dim_v": 32}, "2.11.0", False),
        ({"deterministic": True}, "2.11.0", False),
    ],
)
def test_entry_is_for_what_it_can_say(changes: dict[str, Any], version: str, taken: bool) -> None:
    env = preset("h100", torch_version=version)
    backend = registry.get("native")
    assert backend is not None
    wish = Preference(("native",), "require", "backend=")
    decision = resolve(spec_of(**changes), env, wish, {"native": backend})
    assert decision.chosen == "native", decision
    assert (decision.kernel == packed.ENTRY) == taken
    assert ("unpacked" in {note.code for note in decision.conversions}) != taken


@pytest.mark.parametrize(
    ("arch", "head_dim", "grad", "taken"),
    [
        ((8, 9), 256, (), True),
        ((8, 9), 256, ("query",), False),
        ((8, 9), 128, ("query",), True),
        ((9, 0), 256, ("query",), True),
        ((7, 5), 64, (), False),
        ((13, 0), 64, (), False),
    ],
)
def test_entry_is_for_chips_that_have_its_kernel(
    arch: tuple[int, int], head_dim: int, grad: tuple[str, ...], taken: bool
) -> None:
    env = preset("h100", torch_version="2.11.0")
    devices = [dataclasses.replace(one, arch=arch) if one.type == "cuda" else one for one in env.devices]
    env = dataclasses.replace(env, devices=tuple(devices))
    spec = spec_of(head_dim=head_dim, head_dim_v=head_dim, requires_grad=grad)
    assert packed.takes(spec, env) == taken


@pytest.mark.parametrize("mask", [None, masks.Causal("lower_right")])
@pytest.mark.parametrize(("dim", "kv_heads"), [(16, 4), (12, 2)])
def test_call_gives_what_each_sequence_gives(
    monkeypatch: pytest.MonkeyPatch, mask: Any, dim: int, kv_heads: int
) -> None:
    monkeypatch.setattr(packed, "_functions", lambda: (varlen_attn, True))
    torch.manual_seed(0)
    shapes = ((8, 4, dim), (9, kv_heads, dim), (9, kv_heads, dim))
    tensors = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    spec = spec_of(
        head_dim=dim,
        head_dim_v=dim,
        num_kv_heads=kv_heads,
        mask=LOWER_RIGHT if mask else MaskSpec(),
        return_lse=True,
    )
    parts = Parts(cu_seqlens_q=STARTS_Q, cu_seqlens_k=STARTS_K)
    out, lse = packed.run(Plan("native", spec, packed.lower(spec)), *tensors, parts)
    each = [
        reference.attention(*(t[None, s] for t, s in zip(tensors, rows, strict=True)), mask, scale=0.25)
        for rows in ((slice(0, 3), *[slice(0, 4)] * 2), (slice(3, 8), *[slice(6, 9)] * 2))
    ]
    truth, true_lse = torch.cat([o[0] for o, _ in each]), torch.cat([found[0] for _, found in each], -1)
    assert out.shape == (8, 4, dim)
    assert float(((out.double() - truth).norm() / truth.norm()).detach()) < 1e-2
    assert torch.allclose(lse.double(), true_lse, atol=1e-4)
    flow = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad(o, tensors, flow.to(o.dtype)) for o in (out, truth))
    for one, other in zip(ours, theirs, strict=True):
        assert float((one.double() - other.double()).norm() / other.double().norm()) < 2e-2


@needs_torch("2.11", "torch.nn.attention.varlen takes return_aux and window_size")
def test_the_entry_has_the_parameters_that_are_used() -> None:
    import inspect

    attend, with_lse = packed._functions()
    known = inspect.signature(attend).parameters
    assert {"return_aux", "scale", "window_size"} <= set(known)
    assert with_lse.lse
