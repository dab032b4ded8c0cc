"""The rows of Apple GPUs on made-up machines, and the way that `native` takes round them."""

from __future__ import annotations

import pytest
import torch

import anyattn
from anyattn import masks
from anyattn.adapters.native import kernels
from anyattn.backend.known_bad import table
from anyattn.backend.protocol import Lowering, Parts, Plan
from anyattn.environment import preset
from anyattn.types.spec import UNKNOWN, AttentionSpec, DenseSpec, MaskSpec, PatternSpec, Storage

CAUSAL = MaskSpec(pattern=PatternSpec(-1, 0, "upper_left"))
BROADCAST = MaskSpec(dense=DenseSpec("boolean", torch.bool, (2, 1, 4, 64)))
FULL = MaskSpec(dense=DenseSpec("boolean", torch.bool, (2, 4, 4, 64)))
JOINED = MaskSpec(pattern=PatternSpec(-1, 0, "upper_left"), dense=DenseSpec("boolean", torch.bool, (1, 1, 64, 64)))


def _spec(**changes: object) -> AttentionSpec:
    return AttentionSpec(2, 64, 64, 4, 4, 48, 48, torch.float32, "mps", 0.125).replace(**changes)


@pytest.mark.parametrize(
    ("name", "version", "outside", "changes", "harmless", "kernel"),
    [
        ("mps-causal-half", "2.13", "2.14", {"dtype": torch.float16, "mask": CAUSAL}, {"dtype": torch.float32}, "sdpa"),
        ("mps-vector", "2.9", "2.11", {"seqlen_q": 1, "seqlen_kv": 33, "head_dim": 64, "head_dim_v": 64},
         {"seqlen_kv": 64}, "written_out"),
        ("mps-vector", "2.10", "2.7", {"seqlen_q": 1, "seqlen_kv": 1024, "head_dim": 64, "head_dim_v": 64},
         {"seqlen_q": 9}, "written_out"),
        ("mps-query-view", "2.8", "2.9", {"seqlen_q": 4, "storage": Storage(bhsd_contiguous=False)},
         {"seqlen_q": 9}, "sdpa"),
        ("mps-value-dim", "2.11", "2.12", {"head_dim_v": 64}, {"head_dim_v": 48}, "written_out"),
        ("mps-broadcast-mask", "2.12", "2.13", {"seqlen_q": 4, "mask": BROADCAST}, {"mask": FULL}, "sdpa"),
        ("mps-long-half", "2.14", "", {"seqlen_q": 4096, "dtype": torch.bfloat16}, {"seqlen_q": 2048}, "written_out"),
        ("mps-mask-and-causal", "2.12", "2.13", {"mask": JOINED}, {"mask": CAUSAL}, "sdpa"),
    ],
)  # fmt: skip
def test_row_holds_where_it_says_and_native_goes_round_it(
    name: str, version: str, outside: str, changes: dict[str, object], harmless: dict[str, object], kernel: str
) -> None:
    def names(spec: AttentionSpec, torch_version: str) -> set[str]:
        return {row.name for row in table.hits(("native",), spec, preset("mps", torch_version=torch_version))}

    spec = _spec(same_lengths=False, **changes)
    env = preset("mps", torch_version=version)
    assert name in names(spec, version)
    assert not outside or name not in names(spec, outside)
    assert name not in names(spec.replace(**harmless), version)
    decision = anyattn.explain(spec, env=env, backend="native")
    assert (decision.chosen, decision.kernel) == ("native", kernel)
    backend = anyattn.selection.registry.get("native")
    assert backend is not None
    lowering = backend.lower(spec, env)
    assert not lowering.is_causal
    assert kernel == "written_out" or lowering.copy
    refused = anyattn.explain(spec, env=env, backend="native_math").reasons("native_math")
    links = {reason.link for reason in refused if reason.code == "known_bad"}
    assert all(link.startswith("https://github.com/pytorch/pytorch/issues/") for link in links)
    assert links


def test_too_many_scores_are_refused() -> None:
    spec = _spec(batch=64, seqlen_q=8192, seqlen_kv=4096, same_lengths=False)
    env = preset("mps", torch_version="2.12")
    (reason,) = anyattn.explain(spec, env=env, backend="native").reasons("native")
    assert reason.link.endswith("/179592")
    assert not anyattn.explain(spec, env=preset("mps", torch_version="2.13"), backend="native").reasons("native")


def test_length_that_is_not_known_counts_as_bad() -> None:
    spec = _spec(seqlen_q=UNKNOWN, seqlen_kv=UNKNOWN, head_dim=64, head_dim_v=64)
    assert {row.name for row in table.hits(("native",), spec, preset("mps", torch_version="2.10"))} >= {"mps-vector"}


@pytest.mark.parametrize("masked", [False, True])
def test_written_out_is_what_the_reference_says(masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 7, 2, 16), torch.randn(2, 7, 2, 24)
    mask = torch.rand(2, 1, 5, 7) > 0.4
    mask[0, 0, 2] = False
    dense = MaskSpec(dense=DenseSpec("boolean", torch.bool, (2, 1, 5, 7)), dead_rows=True) if masked else MaskSpec()
    spec = AttentionSpec(2, 5, 7, 4, 2, 16, 24, torch.float32, "mps", 0.25, mask=dense, same_lengths=False)
    plan = Plan("native", spec, Lowering("written_out"))
    out = kernels.run(plan, q.requires_grad_(), k, v, Parts(dense=mask if masked else None))
    want, _ = anyattn.reference.attention(q, k, v, masks.Boolean(mask) if masked else None, scale=0.25)
    assert isinstance(out, torch.Tensor)
    assert torch.allclose(out.double(), want, atol=1e-5)
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.isfinite().all()
