"""What the adapter of torch_xla decides on supposed machines, and what laws can't see of it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
import types
from typing import Any

import pytest
import torch

import anyattn
import doubles
from anyattn import environment, masks, reference
from anyattn.adapters import xla
from anyattn.environment import Device, Environment, preset
from anyattn.sources.packages import FUNCTIONS
from anyattn.types.spec import AttentionSpec, MaskSpec, PatternSpec

TPU = preset("tpu", packages={"torch-xla": "2.9.0"})


def _spec(**changes: Any) -> AttentionSpec:
    return AttentionSpec(2, 64, 64, 4, 4, 64, 64, torch.bfloat16, "xla", 0.125, 0).replace(**changes)


def _codes(spec: AttentionSpec, env: Environment = TPU) -> list[str]:
    return [reason.code for reason in anyattn.explain(spec, env=env, backend="xla").reasons("xla")]


def test_tpu_with_torch_xla_takes_the_call() -> None:
    assert anyattn.explain(_spec(), env=TPU, backend="xla").chosen == "xla"
    assert xla.Xla().origin(TPU) == "torch-xla 2.9.0"


@pytest.mark.parametrize("name", ["CPU", "CUDA", "NEURON", "unknown: torch_xla can't be imported (OSError: libtpu)"])
def test_xla_device_that_is_no_tpu_is_refused(name: str) -> None:
    env = dataclasses.replace(TPU, devices=(Device("cpu"), Device("xla", name)))
    (reason,) = anyattn.explain(_spec(), env=env, backend="xla").reasons("xla")
    assert (reason.code, reason.need) == ("no_device", "a TPU")
    assert name in reason.got


def test_absent_package_is_refused_with_the_command_that_installs_it() -> None:
    (reason,) = anyattn.explain(_spec(), env=preset("tpu"), backend="xla").reasons("xla")
    assert reason.code == "not_installed"
    assert "pip install 'torch_xla" in reason.hint


@pytest.mark.parametrize("version", ["2.2.0", "2.3.0", "2.4.0"])
def test_version_too_old_is_refused(version: str) -> None:
    assert _codes(_spec(), preset("tpu", packages={"torch-xla": version})) == ["wrong_version"]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"dtype": torch.float16}, "dtype"),
        ({"dtype": torch.float32, "requires_grad": ("query",)}, "dtype"),
        ({"head_dim": 264, "head_dim_v": 264}, "head_dim"),
        ({"head_dim_v": 32}, "head_dim_v"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"softcap": 3.0}, "softcap"),
        ({"sinks": True}, "sinks"),
        ({"return_lse": True}, "lse"),
        ({"scale": 0.0}, "scale"),
        ({"scale": -0.5}, "scale"),
        ({"scale": 1e-12}, "scale"),
        ({"requires_grad": ("mask",)}, "mask_grad"),
    ],
)
def test_what_the_kernel_lacks_is_refused(changes: dict[str, Any], code: str) -> None:
    assert code in _codes(_spec(**changes))


def test_what_is_done_to_a_call_is_told() -> None:
    call = _spec(num_kv_heads=2, seqlen_q=600, seqlen_kv=600, head_dim=160, head_dim_v=160, requires_grad=("query",))
    told = [conversion.code for conversion in xla.Xla().lower(call, TPU).conversions]
    assert told == ["repeat_heads", "pad_keys", "pad_rows", "pad_head_dim"]


def test_causal_of_one_query_is_told_without_the_flag() -> None:
    call = _spec(seqlen_q=1, seqlen_kv=900, same_lengths=False, mask=MaskSpec(PatternSpec(-1, 0, "upper_left")))
    lowering = xla.Xla().lower(call, TPU)
    assert not lowering.is_causal
    assert lowering.pattern is not None
    assert lowering.pattern.keys == (0, 1)


class _Told:
    """Stands for the kernel, and keeps what it was told."""

    def __init__(self, function: Any) -> None:
        self.function, self.options = function, {}

    def __call__(self, *given: Any, **options: Any) -> Any:
        self.given, self.options = given, options
        return self.function(*given, **options)


def _told(
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    keys: int,
    mask: Any = None,
    *,
    dim: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    grad: bool = False,
    **options: Any,
) -> _Told:
    """Run a call against the double, compare it with the reference, gradients too; give what the kernel was told."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, 2, dim, dtype=dtype, requires_grad=grad) for length in (rows, keys, keys))
    with doubles.installed("xla"):
        anyattn.attention(*(tensor.detach() for tensor in (q, k, v)), backend="xla")
        kernel = _Told(FUNCTIONS["xla"].flash_attention)
        monkeypatch.setattr(FUNCTIONS["xla"], "flash_attention", kernel)
        out = anyattn.attention(q, k, v, mask, backend="xla", **options)
        wide = [tensor.detach().double().requires_grad_(grad) for tensor in (q, k, v)]
        truth, _ = reference.attention(*wide, mask, scale=options.get("scale"))
        close = 1e-5 if dtype == torch.float32 else 2e-2
        assert torch.allclose(out.double(), truth, atol=close)
        if grad:
            flow = torch.randn_like(out)
            out.backward(flow)
            truth.backward(flow.double())
            for one, other in zip((q, k, v), wide, strict=True):
                assert one.grad is not None
                assert other.grad is not None
                assert torch.allclose(one.grad.double(), other.grad, atol=5e-2)
    return kernel


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("rows", "keys", "mask"),
    [
        (3, 513, None),
        (600, 700, None),
        (600, 600, masks.Causal()),
        (700, 600, masks.Causal()),
        (600, 700, masks.Causal()),
        (1, 700, masks.Causal()),
        (5, 300, masks.Causal("lower_right")),
        (530, 600, masks.SlidingWindow(40, 20)),
        (2, 600, masks.Boolean(torch.arange(600) >= torch.tensor([[520], [0]]))),
    ],
)
def test_keys_beyond_a_block_are_right(
    monkeypatch: pytest.MonkeyPatch, rows: int, keys: int, mask: Any, grad: bool
) -> None:
    kernel = _told(monkeypatch, rows, keys, mask, grad=grad)
    assert kernel.given[1].shape[2] % 512 == 0 or kernel.given[1].shape[2] <= 512


def test_padding_is_masked_by_the_causal_flag_alone_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    square = _told(monkeypatch, 600, 600, masks.Causal()).options
    assert square["ab"] is None
    assert square["causal"] is True
    tall = _told(monkeypatch, 700, 600, masks.Causal()).options
    assert tall["ab"] is not None
    assert tall["causal"] is False


def test_no_bias_is_made_where_nothing_is_padded_or_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _told(monkeypatch, 4, 300).options["ab"] is None
    assert _told(monkeypatch, 4, 1024).options["ab"] is None


def test_scale_is_always_told_and_the_bias_divided_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _told(monkeypatch, 4, 4, dim=16).options["sm_scale"] == 0.25
    bias = torch.randn(4, 5, dtype=torch.bfloat16)
    told = _told(monkeypatch, 4, 5, masks.Bias(bias), scale=0.5).options
    assert told["sm_scale"] == 0.5
    assert told["ab"].shape == (1, 2, 4, 5)
    assert torch.equal(told["ab"][0, 1], bias.float() / 0.5)


@pytest.mark.parametrize("scale", [1e-6, 0.1, 1.0, 40.0])
def test_biases_of_any_size_stay_finite_and_in_order(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    least = torch.finfo(torch.float32).min
    bias = torch.tensor([[0.0, least, float("-inf")], [least, least, float("-inf")], [-2e38, -3e38, -3.4e38]])
    told = _told(monkeypatch, 3, 3, masks.Bias(bias), dtype=torch.float32, scale=scale).options["ab"]
    assert bool(told.isfinite().all())
    assert bool((told[0, 0, 2, :-1] > told[0, 0, 2, 1:]).all())
    assert bool((told[0, 0, 1, 2] < told[0, 0, 1, :2]).all())


def test_row_without_a_key_is_zeros_though_the_kernel_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = torch.ones(4, 3, dtype=torch.bool)
    allowed[2] = False
    _told(monkeypatch, 4, 3, masks.Boolean(allowed), grad=True)
    kernel = _told(monkeypatch, 4, 3, masks.Boolean(allowed))
    assert bool(kernel.function(*kernel.given, **kernel.options)[:, :, 2].any())


def test_float32_is_asked_for_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _told(monkeypatch, 4, 6, dtype=torch.float32).given[0].dtype == torch.float32


def test_large_heads_are_padded_to_whole_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _told(monkeypatch, 4, 600, dim=160).given[0].shape[-1] == 256


def _see(monkeypatch: pytest.MonkeyPatch, device_type: Any) -> list[Device]:
    """Look at a machine with a torch_xla whose runtime says that."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        return "2.9.0" if name == "torch-xla" else real(name)

    runtime = types.ModuleType("torch_xla.runtime")
    runtime.device_type = device_type  # type: ignore[attr-defined]
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setitem(sys.modules, "torch_xla", types.ModuleType("torch_xla"))
    monkeypatch.setitem(sys.modules, "torch_xla.runtime", runtime)
    return [device for device in environment._devices() if device.type == "xla"]


def test_machine_tells_what_torch_xla_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _see(monkeypatch, lambda: "TPU") == [Device("xla", "TPU")]


def test_machine_tells_why_torch_xla_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise OSError("libtpu.so is missing")

    (device,) = _see(monkeypatch, broken)
    assert "libtpu.so is missing" in device.name


def test_machine_without_torch_xla_has_no_xla_device() -> None:
    assert all(device.type != "xla" for device in environment._devices())
