"""The adapter of FFPA: which calls reach its operator, and how."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import pytest
import torch

import anyattn
import doubles
from anyattn import masks
from anyattn.adapters.ffpa import Ffpa
from anyattn.environment import Environment, preset
from anyattn.types.spec import AttentionSpec, MaskSpec, PatternSpec
from doubles.kernels import ffpa as double


def _machine(version: str = "0.2.4") -> Environment:
    installed = {"ffpa-attn": version}
    env = preset("h100", torch_version="2.11.0", packages=installed)
    return dataclasses.replace(env, modules=frozenset(("ffpa_attn",)))


def _spec(**changes: Any) -> AttentionSpec:
    return AttentionSpec(1, 4096, 4096, 1, 1, 512, 512, torch.bfloat16, "cuda", 512**-0.5, 0).replace(**changes)


def _causal(align: str = "lower_right", **changes: Any) -> AttentionSpec:
    return _spec(mask=MaskSpec(pattern=PatternSpec(-1, 0, align)), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        (_spec(head_dim=1032, head_dim_v=1032), "head_dim"),
        (_spec(head_dim_v=256), "head_dim_v"),
        (_spec(dtype=torch.float32), "dtype"),
        (_spec(scale=0.0), "scale"),
        (_spec(dropout_p=0.5), "dropout"),
        (_spec(requires_grad=("query",)), "backward"),
        (_spec(softcap=20.0), "softcap"),
        (_spec(mask=MaskSpec(key="padding")), "mask"),
        (_spec(mask=MaskSpec(pattern=PatternSpec(64, 0, "lower_right"))), "mask"),
        (_causal(seqlen_kv=4000, same_lengths=False), "mask"),
        (_causal("upper_left", seqlen_kv=4000, same_lengths=False), "mask"),
    ],
)
def test_what_its_operator_would_get_wrong_is_refused(spec: AttentionSpec, code: str) -> None:
    assert code in {reason.code for reason in anyattn.explain(spec, env=_machine(), backend="ffpa").reasons("ffpa")}


def test_auto_takes_it_only_after_sdpa_which_was_as_fast() -> None:
    assert anyattn.explain(_spec(), env=_machine(), backend="auto").chosen == "native"
    assert anyattn.explain(_spec(), env=_machine(), backend=["ffpa", "native"]).chosen == "ffpa"


def test_install_command_leaves_out_dependencies_that_clash() -> None:
    assert Ffpa().install == "pip install --no-deps 'ffpa-attn>=0.2.4,<0.3'"
    (reason,) = anyattn.explain(_spec(), env=_machine("0.3.0"), backend="ffpa").reasons("ffpa")
    assert reason.code == "wrong_version"


@pytest.mark.parametrize("mask", [None, masks.Causal(), masks.Causal("lower_right")], ids=str)
def test_lse_is_cut_to_the_queries_and_heads_are_shared(mask: Any) -> None:
    query = torch.randn(2, 70, 4, 320, dtype=torch.bfloat16)
    key, value = (torch.randn(2, 90, 2, 320, dtype=torch.bfloat16) for _ in range(2))
    with doubles.installed("ffpa"):
        for _ in range(2):
            out, lse = anyattn.attention(query, key, value, mask, enable_gqa=True, return_lse=True, backend="ffpa")
    expected, truth = anyattn.attention(
        query, key, value, mask, enable_gqa=True, return_lse=True, backend="native_math"
    )
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, truth, atol=1e-4, rtol=1e-4)


def test_operator_with_other_arguments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyattn.adapters.ffpa._ARGUMENTS", ("q", "k", "v"))
    query = torch.randn(1, 8, 1, 320, dtype=torch.bfloat16)
    with (
        doubles.installed("ffpa"),
        pytest.raises(anyattn.BackendUnavailableError, match="with the arguments of"),
    ):
        anyattn.attention(query, query, query, backend="ffpa")


def test_double_does_what_was_read() -> None:
    q = torch.randn(1, 2, 3, 320, dtype=torch.float16)
    out, lse = double.fwd_triton(q, q, q, None, 0.0, 0, 0, 0, 0.0, 0, 0, 0, 0)
    again, _ = double.fwd_triton(q, q, q, None, 320**-0.5, 0, 0, 0, 0.0, 0, 0, 0, 0)
    assert torch.equal(out, again), "0 is the default scale"
    assert lse.shape == (1, 2, 128)
    with pytest.raises(AssertionError, match="fp16"):
        double.fwd_triton(*(3 * [q.float()]), None, 1.0, 0, 0, 0, 0.0, 0, 0, 0, 0)
    wide = torch.randn(1, 1, 1, 1032, dtype=torch.float16)
    with pytest.raises(ValueError, match="1024"):
        double.fwd_triton(wide, wide, wide, None, 1.0, 0, 0, 0, 0.0, 0, 0, 0, 0)
    assert isinstance(double.DOUBLE.modules()["ffpa_attn.triton"], types.ModuleType)
