"""What the adapter of AITER decides on supposed machines, and what laws can't see of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import anyattn
import doubles
from anyattn import masks, reference
from anyattn.adapters import aiter
from anyattn.adapters.aiter import AMD_AITER
from anyattn.environment import Device, Environment, preset
from anyattn.sources.packages import FUNCTIONS
from anyattn.types.reasons import Reason
from anyattn.types.spec import AttentionSpec, MaskSpec, PatternSpec, Storage

AMD = {"amd-aiter": "0.1.9"}


def _machine(name: str, packages: dict[str, str], modules: tuple[str, ...] = ("aiter.ops.mha",)) -> Environment:
    return dataclasses.replace(preset(name, packages=packages), modules=frozenset(modules))


MI300 = _machine("mi300", AMD)


def _spec(**changes: Any) -> AttentionSpec:
    return AttentionSpec(2, 64, 64, 4, 4, 64, 64, torch.bfloat16, "cuda", 0.125, 0).replace(**changes)


def _pattern(left: int, right: int, align: Any = "lower_right", **changes: Any) -> AttentionSpec:
    lengths = {"seqlen_q": 64, "seqlen_kv": 64, **changes}
    same = lengths["seqlen_q"] == lengths["seqlen_kv"]
    return _spec(mask=MaskSpec(PatternSpec(left, right, align)), same_lengths=same, **lengths)


def _reasons(spec: AttentionSpec, env: Environment = MI300) -> tuple[Reason, ...]:
    return anyattn.explain(spec, env=env, backend="aiter").reasons("aiter")


def _codes(spec: AttentionSpec, env: Environment = MI300) -> list[str]:
    return [reason.code for reason in _reasons(spec, env)]


def test_amd_gpu_with_amd_aiter_takes_the_call() -> None:
    assert anyattn.explain(_spec(), env=MI300, backend="aiter").chosen == "aiter"


def test_nvidia_gpu_is_refused_whatever_is_installed() -> None:
    (reason,) = _reasons(_spec(), _machine("h100", AMD))
    assert reason.code == "arch"
    assert "H100" in reason.got


def test_machine_without_a_gpu_is_refused() -> None:
    assert "no_device" in _codes(_spec(), _machine("cpu", AMD))


def test_pypis_aiter_is_said_to_be_another_package() -> None:
    (reason,) = _reasons(_spec(), _machine("mi300", {"aiter": "0.13.20191203"}, ()))
    assert reason.code == "not_installed"
    assert "another package" in reason.got
    assert "amd-aiter" in reason.hint


def test_absent_package_is_refused_with_the_command_that_installs_it() -> None:
    (reason,) = _reasons(_spec(), _machine("mi300", {}, ()))
    assert (reason.code, reason.hint) == ("not_installed", f"{AMD_AITER.command}; {AMD_AITER.note}")


@pytest.mark.parametrize("packages", [{"amd-aiter": "0.1.4"}, {"aiter": "0.1.4"}])
def test_version_too_old_is_refused(packages: dict[str, str]) -> None:
    assert _codes(_spec(), _machine("mi300", packages)) == ["wrong_version"]


@pytest.mark.parametrize("packages", [{}, {"aiter": "0.1.7"}, {"amd-aiter": "0.1.5"}])
def test_amds_own_wheels_and_builds_without_metadata_serve(packages: dict[str, str]) -> None:
    assert _codes(_spec(), _machine("mi300", packages)) == []


def test_origin_names_the_distribution_and_its_version() -> None:
    assert aiter.Aiter().origin(MI300) == "amd-aiter 0.1.9"
    assert aiter.Aiter().origin(_machine("mi300", {})) == "aiter.ops.mha"
    assert aiter.Aiter().origin(_machine("mi300", {}, ())) == ""


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"dtype": torch.float32}, "dtype"),
        ({"head_dim": 264, "head_dim_v": 264}, "head_dim"),
        ({"softcap": 3.0}, "softcap"),
        ({"sinks": True, "requires_grad": ("query",)}, "sinks"),
        ({"scale": 0.0}, "scale"),
        ({"scale": -1.0}, "scale"),
        ({"mask": MaskSpec(PatternSpec(-1, 0, "upper_left"), key="padding", dead_rows=True)}, "mask"),
        ({"batch": 70000}, "size"),
    ],
)
def test_what_the_kernel_lacks_is_refused(changes: dict[str, Any], code: str) -> None:
    assert code in _codes(_spec(**changes))


def test_dropout_determinism_and_another_value_dim_are_taken() -> None:
    assert _codes(_spec(dropout_p=0.1, deterministic=True, head_dim_v=32, requires_grad=("query",))) == []


@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, -1)])
def test_window_that_counts_as_none_is_refused(left: int, right: int) -> None:
    (reason,) = _reasons(_pattern(left, right))
    assert reason.code == "mask"
    assert "side above 0" in reason.need


def test_right_side_that_is_taken_for_unbounded_is_refused() -> None:
    (reason,) = _reasons(_pattern(-1, 20, seqlen_kv=16))
    assert "unbounded" in reason.need
    assert _codes(_pattern(-1, 15, seqlen_kv=16)) == []


def test_causal_with_more_keys_than_queries_is_refused_where_gradients_are_needed() -> None:
    longer = _pattern(-1, 0, seqlen_q=32)
    assert _codes(longer) == []
    (reason,) = _reasons(longer.replace(requires_grad=("value",)))
    assert "equal lengths" in reason.need
    assert _codes(_pattern(-1, 0, requires_grad=("value",))) == []


def test_causal_with_fewer_keys_leaves_the_rows_without_one_out() -> None:
    call = _pattern(-1, 0, seqlen_kv=16, requires_grad=("value",))
    decision = anyattn.explain(call, env=MI300, backend="aiter")
    assert decision.chosen == "aiter"
    assert any(conversion.code == "trimmed" for conversion in decision.conversions)
    pattern = aiter.Aiter().lower(call, MI300).pattern
    assert pattern is not None
    assert pattern.rows == (48, 64)


def test_misaligned_storage_is_copied() -> None:
    assert aiter.Aiter().lower(_spec(storage=Storage(aligned=False)), MI300).copy
    assert not aiter.Aiter().lower(_spec(), MI300).copy


class _Told:
    """Stands for the kernel, and keeps what it was told."""

    def __init__(self, function: Any) -> None:
        self.function, self.options = function, {}

    def __call__(self, *tensors: Any, **options: Any) -> Any:
        self.options = options
        return self.function(*tensors, **options)


def _told(monkeypatch: pytest.MonkeyPatch, length: int = 8, grad: bool = False, **options: Any) -> dict[str, Any]:
    q, k, v = (torch.randn(1, length, 2, 16, dtype=torch.bfloat16, requires_grad=grad) for _ in range(3))
    with doubles.installed("aiter"):
        anyattn.attention(q, k, v, backend="aiter")
        kernel = _Told(FUNCTIONS["aiter"].flash_attn_func)
        monkeypatch.setattr(FUNCTIONS["aiter"], "flash_attn_func", kernel)
        anyattn.attention(q, k, v, backend="aiter", **options)
    return kernel.options


@pytest.mark.parametrize(
    "mask", [masks.Causal(), masks.SlidingWindow(7, 0), masks.SlidingWindow(8, 0), masks.SlidingWindow(20, 0)]
)
def test_causality_is_told_by_the_flag_and_never_as_a_window(monkeypatch: pytest.MonkeyPatch, mask: masks.Mask) -> None:
    told = _told(monkeypatch, attn_mask=mask)
    assert told["causal"] is True
    assert told["window_size"] == (-1, -1, 0)


def test_window_is_told_with_the_entries_that_the_signature_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _told(monkeypatch, attn_mask=masks.SlidingWindow(3, 0))["window_size"] == (3, 0, 0)


def test_window_has_two_entries_where_the_signature_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from doubles.kernels import aiter as double

    seen = []

    def older(q: Any, k: Any, v: Any, window_size: tuple[int, int] = (-1, -1), **options: Any) -> Any:
        seen.append(window_size)
        return double.flash_attn_func(q, k, v, window_size=(*window_size, 0), **options)

    def modules() -> Any:
        made = dict(double.DOUBLE.modules())
        made["aiter.ops.mha"].flash_attn_func = older  # type: ignore[attr-defined]
        return made

    q = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16)
    with doubles.installed("aiter", dataclasses.replace(double.DOUBLE, modules=modules)):
        out = anyattn.attention(q, q, q, backend="aiter", window=(3, 0))
    assert seen == [(3, 0)]
    truth, _ = reference.attention(q, q, q, masks.SlidingWindow(3, 0))
    assert torch.allclose(out.double(), truth, atol=2e-2)


@pytest.mark.parametrize("grad", [True, False])
def test_lse_is_asked_for_where_gradients_are_needed_and_probabilities_never(
    monkeypatch: pytest.MonkeyPatch, grad: bool
) -> None:
    told = _told(monkeypatch, grad=grad)
    assert told["return_lse"] is grad
    assert "return_attn_probs" not in told
    assert told["deterministic"] is False
    assert told["softmax_scale"] == 0.25


def test_entry_without_keys_gives_zeros_and_finite_gradients_though_the_kernel_writes_none() -> None:
    q, k, v = (torch.randn(2, 4, 2, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with doubles.installed("aiter"):
        out, lse = anyattn.attention(q, k, v, masks.KeyLengths(torch.tensor([0, 3])), backend="aiter", return_lse=True)
        out.sum().backward()
    assert not out[0].any()
    assert bool((lse[0] == float("-inf")).all())
    for tensor in (q, k, v):
        assert tensor.grad is not None
        assert bool(tensor.grad.isfinite().all())
        assert not tensor.grad[0].any()


def test_gpu_that_is_not_known_to_be_nvidias_is_not_refused_for_it() -> None:
    env = dataclasses.replace(MI300, devices=(Device("cpu"), Device("cuda", "AMD Instinct MI355X", None, 0, True)))
    assert _codes(_spec(), env) == []
