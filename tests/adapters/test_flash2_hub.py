"""The decisions of flash2_hub on supposed machines: flash2's, with another source."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from packaging.version import Version

import anyattn
from anyattn import environment
from anyattn.adapters.flash2 import Flash2Hub
from anyattn.environment import Environment
from anyattn.types.decision import Decision
from anyattn.types.reasons import Reason
from anyattn.types.spec import AttentionSpec

SPEC = AttentionSpec(2, 128, 128, 8, 8, 64, 64, torch.bfloat16, "cuda", 0.125)


def machine(name: str = "h100", **packages: str) -> Environment:
    return environment.preset(name, packages={"kernels": "0.17.2", **packages})


def judged(spec: AttentionSpec, env: Environment) -> tuple[Reason, ...]:
    decision: Decision = anyattn.explain(spec, backend="flash2_hub", env=env)
    return decision.reasons("flash2_hub")


@pytest.mark.parametrize("name", ["a100", "rtx4090", "h100", "b200"])
def test_gpu_of_sm80_or_newer_with_kernels_admits(name: str) -> None:
    decision = anyattn.explain(SPEC, backend="flash2_hub", env=machine(name))
    assert decision.chosen == "flash2_hub"
    assert decision.origin == f"kernels-community/flash-attn2 at {Flash2Hub.hub.revision}, from the Hub"


def test_cpu_is_refused_though_the_hub_has_a_build_for_it() -> None:
    reasons = judged(SPEC.replace(device_type="cpu"), machine())
    assert [(reason.code, reason.need) for reason in reasons] == [("device_type", "tensors on cuda")]


def test_machine_without_a_gpu_is_refused() -> None:
    assert {reason.code for reason in judged(SPEC, machine("cpu"))} >= {"no_device"}


def test_older_gpu_is_refused() -> None:
    assert [reason.code for reason in judged(SPEC, machine("t4"))] == ["arch"]


def test_package_of_the_same_kernel_is_neither_needed_nor_used() -> None:
    env = environment.preset("h100", packages={"flash-attn": "2.8.3"})
    (reason,) = judged(SPEC, env)
    assert (reason.code, reason.need) == ("not_installed", "kernels >=0.12")
    old = machine("b200", **{"flash-attn": "2.6.3"})
    compiled = SPEC.replace(compiled=True)
    assert anyattn.explain(compiled, backend="flash2", env=old).chosen is None
    assert judged(compiled, old) == ()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"dtype": torch.float32}, "dtype"),
        ({"head_dim": 264, "head_dim_v": 264}, "head_dim"),
        ({"head_dim_v": 32}, "head_dim_v"),
        ({"scale": 0.0}, "scale"),
        ({"softcap": 30.0, "dropout_p": 0.1}, "softcap"),
        ({"batch": 70000}, "size"),
    ],
)
def test_flash2s_refusals_hold(change: dict[str, object], code: str) -> None:
    assert code in {reason.code for reason in judged(SPEC.replace(**change), machine())}


@pytest.mark.parametrize(("local", "refused"), [("cu128", True), ("cu130", False)])
def test_gradients_with_fewer_kv_heads_are_refused_for_cuda_12_8(local: str, refused: bool) -> None:
    env = dataclasses.replace(machine(), torch=Version(f"2.11.0+{local}"))
    spec = SPEC.replace(num_kv_heads=2, requires_grad=("query",))
    reasons = judged(spec, env)
    assert bool(reasons) is refused
    if refused:
        assert reasons[0].code == "backward"
        assert reasons[0].link.endswith("kernels-community/issues/1085")
    assert judged(spec.replace(requires_grad=()), env) == ()
    assert judged(spec.replace(num_kv_heads=8), env) == ()
