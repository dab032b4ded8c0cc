"""What the adapter of SageAttention 3 refuses, since its kernel would drop it, and that the caller's key stays."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import anyattn
import doubles
from anyattn.environment import Device, Environment, preset
from anyattn.types.spec import AttentionSpec, DenseSpec, MaskSpec, PatternSpec
from doubles.kernels import sage_blackwell

NAME = "sage_blackwell_hub"


def _machine(arch: tuple[int, int] = (12, 0)) -> Environment:
    env = preset("rtx5090", packages={"kernels": "0.17.2"})
    return dataclasses.replace(env, devices=(Device("cpu"), Device("cuda", "a supposed GPU", arch)))


def _spec(**changes: object) -> AttentionSpec:
    return AttentionSpec(2, 64, 64, 4, 4, 64, 64, torch.bfloat16, "cuda", 0.125, 0).replace(**changes)


def _codes(spec: AttentionSpec, env: Environment) -> set[str]:
    return {reason.code for reason in anyattn.explain(spec, env=env, backend=NAME).reasons(NAME)}


def test_it_is_a_kernel_of_its_own() -> None:
    decision = anyattn.explain(_spec(), env=_machine(), backend=NAME)
    assert decision.chosen == NAME
    assert decision.kernel == "sageattn3_blackwell"
    assert decision.origin.startswith("SageAttention/sage-blackwell at version 1")
    assert {row.name for row in anyattn.backends() if "sage" in row.name} >= {"sage_hub", NAME}


def test_default_scale_is_the_kernels_own() -> None:
    spec = _spec(head_dim=128, head_dim_v=128)
    assert 1 / math.sqrt(128) != 128**-0.5
    for scale in (1 / math.sqrt(128), 128**-0.5):
        assert anyattn.explain(spec.replace(scale=scale), env=_machine(), backend=NAME).chosen == NAME


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"scale": 0.1}, "scale"),
        ({"scale": -0.125}, "scale"),
        ({"mask": MaskSpec(dense=DenseSpec("boolean", torch.bool, (2, 1, 64, 64)))}, "mask"),
        ({"mask": MaskSpec(dense=DenseSpec("bias", torch.bfloat16, (2, 1, 64, 64)))}, "mask"),
        ({"mask": MaskSpec(key="padding", dead_rows=True)}, "mask"),
        ({"mask": MaskSpec(pattern=PatternSpec(8, 0, "upper_left"))}, "mask"),
        ({"seqlen_kv": 128, "same_lengths": False, "mask": MaskSpec(pattern=PatternSpec(-1, 0, "upper_left"))}, "mask"),
        (
            {"seqlen_kv": 128, "same_lengths": False, "mask": MaskSpec(pattern=PatternSpec(-1, 0, "lower_right"))},
            "mask",
        ),
        ({"num_kv_heads": 2}, "gqa"),
        ({"return_lse": True}, "lse"),
        ({"softcap": 5.0}, "softcap"),
        ({"sinks": True}, "sinks"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"requires_grad": ("query",)}, "backward"),
        ({"dtype": torch.float32}, "dtype"),
        ({"compiled": True}, "compile"),
        ({"head_dim": 96, "head_dim_v": 96, "scale": 96**-0.5}, "head_dim"),
        ({"head_dim": 256, "head_dim_v": 256, "scale": 1 / 16}, "head_dim"),
        ({"head_dim_v": 128}, "head_dim_v"),
    ],
)
def test_what_the_kernel_would_drop_is_refused(changes: dict[str, object], code: str) -> None:
    assert code in _codes(_spec(**changes), _machine())


def test_square_causal_and_both_head_dims_are_taken() -> None:
    for align in ("upper_left", "lower_right"):
        assert not _codes(_spec(mask=MaskSpec(pattern=PatternSpec(-1, 0, align))), _machine())
    assert not _codes(
        _spec(head_dim=128, head_dim_v=128, scale=128**-0.5, seqlen_kv=77, same_lengths=False), _machine()
    )


@pytest.mark.parametrize("arch", [(8, 9), (9, 0), (10, 0), (12, 1)])
def test_other_chips_are_refused(arch: tuple[int, int]) -> None:
    assert _codes(_spec(), _machine(arch)) == {"arch"}


@pytest.mark.parametrize("precision", ["exact", "int8", "fp8", "fp4"])
def test_a_list_takes_it_only_where_fp4_is_allowed(precision: anyattn.Precision) -> None:
    with anyattn.attention_backend([NAME, "native"], precision=precision):
        chosen = anyattn.explain(_spec(), env=_machine()).chosen
    assert chosen == (NAME if precision == "fp4" else "native")


def test_the_callers_key_is_not_written_to() -> None:
    q, k, v = (torch.randn(2, 9, 3, 64, dtype=torch.bfloat16) for _ in range(3))
    before = k.clone()
    for layout in (q, k, v), tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)):
        with doubles.installed(NAME):
            out = anyattn.attention(*layout, backend=NAME)
        assert torch.equal(layout[1], before)
        want, _ = anyattn.reference.attention(q, k, v)
        assert torch.allclose(out.double(), want, atol=2e-2)


def test_the_double_drops_what_the_kernel_drops() -> None:
    q, k, v = (torch.randn(1, 2, 8, 64, dtype=torch.bfloat16) for _ in range(3))
    plain = sage_blackwell.sageattn3_blackwell(q, k.clone(), v)
    masked = sage_blackwell.sageattn3_blackwell(q, k.clone(), v, attn_mask=torch.zeros(8, 8).bool(), scale=3.0)
    assert torch.equal(plain, masked)
    given = k.clone()
    sage_blackwell.sageattn3_blackwell(q.requires_grad_(), given, v)
    assert not torch.equal(given, k)
    assert not sage_blackwell.sageattn3_blackwell(q, k.clone(), v).requires_grad
    with pytest.raises(RuntimeError, match="64 or 128"):
        sage_blackwell.sageattn3_blackwell(q[..., :32].contiguous(), k[..., :32].contiguous(), v[..., :32].contiguous())
