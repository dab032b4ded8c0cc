"""What replaces torch's kernels for the whole process is seen, named, and refused where it would be wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from packaging.version import Version

import anyattn
from anyattn.environment import Environment, detect, preset
from anyattn.process import installed
from anyattn.types.spec import AttentionSpec, MaskSpec, PatternSpec

LOWER_RIGHT = MaskSpec(pattern=PatternSpec(-1, 0, "lower_right"))


def _spec(**changes: object) -> AttentionSpec:
    return AttentionSpec(2, 256, 256, 4, 4, 64, 64, torch.bfloat16, "cuda", 0.125, 0).replace(**changes)


def _env(machine: str = "h100", version: str = "2.13.0", **overrides: str) -> Environment:
    return dataclasses.replace(preset(machine, torch_version=version), overrides=overrides)


def _codes(backend: str, spec: AttentionSpec, env: Environment) -> set[str]:
    return {reason.code for reason in anyattn.explain(spec, env=env, backend=backend).reasons(backend)}


@pytest.fixture
def library() -> Iterator[Any]:
    made = torch.library.Library("aten", "IMPL", "CUDA")
    yield made
    made._destroy()
    anyattn.reset()


@pytest.fixture
def activated() -> Iterator[None]:
    class Handle:
        def remove(self) -> None:
            pass

    attention: Any = torch.nn.attention
    attention.register_flash_attention_impl("FA4-test", register_fn=Handle)
    attention.activate_flash_attention_impl("FA4-test")
    yield
    attention.restore_flash_attention_impl()
    from torch.nn.attention import _registry

    _registry._FLASH_ATTENTION_IMPLS.pop("FA4-test")


needs_registry = pytest.mark.skipif(
    not hasattr(torch.nn.attention, "activate_flash_attention_impl"), reason="this torch has no such registry"
)


def test_this_process_replaces_nothing() -> None:
    assert not detect().overrides
    assert detect() is detect()


def test_kernel_that_python_registered_is_named_by_its_file(library: Any) -> None:
    library.impl("_scaled_dot_product_cudnn_attention", lambda *args, **options: None, "CUDA")
    assert detect().overrides["native_cudnn"].endswith("test_replaced.py")
    row = next(row for row in anyattn.backends() if row.name == "native_cudnn")
    assert "test_replaced.py in place of torch's own native_cudnn" in row.origin


@needs_registry
def test_activation_is_seen_and_what_was_decided_before_is_forgotten(activated: None) -> None:
    assert detect().overrides == {"native_flash": "FA4-test"}
    torch.nn.attention.restore_flash_attention_impl()  # type: ignore[attr-defined]
    q = torch.randn(1, 5, 2, 8)
    anyattn.attention(q, q, q)
    before = anyattn.scopes.defaults.generation()
    torch.nn.attention.activate_flash_attention_impl("FA4-test")  # type: ignore[attr-defined]
    anyattn.attention(q, q, q)
    assert anyattn.scopes.defaults.generation() == before, "a hit of the table looks at nothing"
    other = torch.randn(1, 6, 2, 8)
    anyattn.attention(other, other, other)
    assert anyattn.scopes.defaults.generation() > before


def test_old_torch_without_the_functions_replaces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.attention, "current_flash_attention_impl", raising=False)
    assert installed.overrides() == {}


@pytest.mark.parametrize(
    ("by", "machine", "changes", "code"),
    [
        ("FA3", "h100", {"dropout_p": 0.25}, "dropout"),
        ("FA3", "a100", {}, "arch"),
        ("FA3", "b200", {}, "arch"),
        ("FA4", "a100", {}, "arch"),
        ("FA4", "rtx5090", {}, "arch"),
        ("FA4", "b200", {"head_dim": 192, "head_dim_v": 192}, "head_dim"),
        ("FA4", "h100", {"head_dim": 80, "head_dim_v": 80, "requires_grad": ("query",)}, "head_dim"),
        ("/somewhere/theirs.py", "h100", {}, "setting"),
    ],
)
def test_native_flash_has_the_bounds_of_what_replaces_it(
    by: str, machine: str, changes: dict[str, object], code: str
) -> None:
    assert not _codes("native_flash", _spec(**changes), _env(machine))
    assert _codes("native_flash", _spec(**changes), _env(machine, native_flash=by)) == {code}
    decision = anyattn.explain(_spec(**changes), env=_env(machine, native_flash=by), backend="native")
    assert decision.chosen == "native"
    assert decision.kernel not in ("sdpa", "flash"), "SDPA would raise, and not go on"
    assert by in decision.origin


def test_fa3_without_backward_refuses_gradients() -> None:
    env = dataclasses.replace(_env(native_flash="FA3"), builds={"flash_attn_config": {"BACKWARD": True}})
    assert _codes("native_flash", _spec(requires_grad=("query",)), env) == {"backward"}
    assert not _codes("native_flash", _spec(), env)
    assert anyattn.explain(_spec(), env=env, backend="native_flash").origin.startswith("FA3 in place of torch's own")


def test_packed_causal_with_unequal_lengths_is_kept_from_cudnns_provider() -> None:
    env = _env(varlen_attn="/site-packages/cudnn/torch.py")
    unequal = _spec(packed=True, layout="THD", seqlen_q=64, same_lengths=False, mask=LOWER_RIGHT)
    assert anyattn.explain(unequal, env=_env(), backend="native_flash").kernel == "varlen_attn"
    assert "mask" in _codes("native_flash", unequal, env)
    assert anyattn.explain(unequal, env=env, backend="native").kernel != "varlen_attn"
    equal = _spec(packed=True, layout="THD", mask=LOWER_RIGHT)
    assert anyattn.explain(equal, env=env, backend="native_flash").kernel == "varlen_attn"


@pytest.mark.parametrize(
    ("machine", "version", "changes", "cudnn"),
    [
        ("h100", "2.14.0", {}, True),
        ("b200", "2.14.1", {}, True),
        ("h100", "2.13.0", {}, False),
        ("a100", "2.14.0", {}, False),
        ("h100", "2.14.0", {"seqlen_q": 128}, False),
        ("h100", "2.14.0", {"mask": LOWER_RIGHT}, False),
    ],
)
def test_native_flash_refuses_packed_calls_that_torch_hands_to_cudnn(
    machine: str, version: str, changes: dict[str, object], cudnn: bool
) -> None:
    spec, env = _spec(packed=True, layout="THD").replace(**changes), _env(machine, version)
    assert _codes("native_flash", spec, env) == ({"setting"} if cudnn else set())
    decision = anyattn.explain(spec, env=env, backend="native")
    assert decision.kernel == "varlen_attn"
    said = next(note.text for note in decision.conversions if note.code == "packed")
    assert ("cuDNN" in said) == cudnn
    old = dataclasses.replace(env, cudnn=(9, 17, 0))
    assert not _codes("native_flash", spec, old)


def test_environments_differ_by_what_is_replaced() -> None:
    assert _env(native_flash="FA3") != _env()
    assert hash(_env(native_flash="FA3")) != hash(_env())
    assert _env(native_flash="FA3").to_dict()["overrides"] == {"native_flash": "FA3"}
    assert Version("2.13.0") == _env().torch


def test_torchs_own_boxed_kernels_replace_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "CUDA: registered at {} :: (Tensor _0, Tensor _1) -> (Tensor _0) [ boxed ]\n"
    torchs = line.format("/pytorch/build/aten/src/ATen/RegisterCUDA_0.cpp:25551")
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda operator, key: True)
    monkeypatch.setattr(torch._C, "_dispatch_dump", lambda operator: torchs)
    assert installed.overrides() == {}
    monkeypatch.setattr(torch._C, "_dispatch_dump", lambda operator: line.format("/site/cudnn/torch/sdpa.py:12"))
    assert installed.overrides()["native_cudnn"] == "/site/cudnn/torch/sdpa.py"
