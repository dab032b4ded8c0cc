"""What the adapters of FlashAttention 2, 3 and 4 decide on supposed machines, and what laws can't see of them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import anyattn
import doubles
from anyattn import masks
from anyattn.adapters.flash4 import Flash4
from anyattn.backend.declared_reasons import declared_reasons
from anyattn.backend.known_bad import table
from anyattn.environment import Environment, preset
from anyattn.process import installed
from anyattn.types.spec import AttentionSpec, MaskSpec, PatternSpec, Storage
from doubles.kernels import flash3

FLASH2 = {"flash-attn": "2.8.3"}
FLASH3 = {"flash-attn-3": "3.0.0"}
FLASH4 = {"flash-attn-4": "4.0.0b36"}


def _machine(name: str, packages: dict[str, str], modules: tuple[str, ...] = ()) -> Environment:
    return dataclasses.replace(preset(name, packages=packages), modules=frozenset(modules))


def _spec(**changes: object) -> AttentionSpec:
    spec = AttentionSpec(2, 64, 64, 4, 4, 64, 64, torch.bfloat16, "cuda", 0.125, 0)
    return spec.replace(**changes)


def _codes(backend: str, spec: AttentionSpec, env: Environment) -> set[str]:
    return {reason.code for reason in anyattn.explain(spec, env=env, backend=backend).reasons(backend)}


@pytest.mark.parametrize(
    ("backend", "packages", "modules"),
    [
        ("flash2", FLASH2, ()),
        ("flash3", {}, ("flash_attn_interface",)),
        ("flash3", FLASH3, ("flash_attn_interface",)),
        ("flash3", {"fa3-fwd": "0.0.3"}, ()),
        ("flash4", FLASH4, ()),
    ],
)
def test_installed_kernel_takes_the_call_on_an_h100(
    backend: str, packages: dict[str, str], modules: tuple[str, ...]
) -> None:
    assert anyattn.explain(_spec(), env=_machine("h100", packages, modules), backend=backend).chosen == backend


@pytest.mark.parametrize("backend", ["flash2", "flash3", "flash4"])
def test_absent_kernel_is_refused_with_the_command_that_installs_it(backend: str) -> None:
    reasons = anyattn.explain(_spec(), env=_machine("h100", {}), backend=backend).reasons(backend)
    assert reasons[0].code == "not_installed"
    assert any("pip install" in reason.hint for reason in reasons)


def test_namespace_left_by_flash4_is_not_taken_for_flash2() -> None:
    reasons = anyattn.explain(_spec(), env=_machine("h100", FLASH4), backend="flash2").reasons("flash2")
    assert "flash-attn-4" in reasons[0].hint


@pytest.mark.parametrize("version", ["2.5.9", "2.0.0", "1.0.9", "3.0.0"])
def test_version_outside_the_range_is_refused(version: str) -> None:
    assert _codes("flash2", _spec(), _machine("h100", {"flash-attn": version})) == {"wrong_version"}


@pytest.mark.parametrize(
    ("backend", "machine", "packages", "modules"),
    [
        ("flash2", "t4", FLASH2, ()),
        ("flash3", "a100", {}, ("flash_attn_interface",)),
        ("flash3", "b200", {}, ("flash_attn_interface",)),
        ("flash4", "a100", FLASH4, ()),
        ("flash4", "rtx5090", FLASH4, ()),
        ("flash2", "mi300", FLASH2, ()),
    ],
)
def test_arch_without_a_kernel_is_refused(
    backend: str, machine: str, packages: dict[str, str], modules: tuple[str, ...]
) -> None:
    assert _codes(backend, _spec(), _machine(machine, packages, modules)) == {"arch"}


@pytest.mark.parametrize(
    ("backend", "changes", "code"),
    [
        ("flash2", {"dtype": torch.float32}, "dtype"),
        ("flash2", {"scale": 0.0}, "scale"),
        ("flash3", {"scale": -0.5}, "scale"),
        ("flash4", {"scale": 0.0}, "scale"),
        ("flash2", {"head_dim": 264, "head_dim_v": 264}, "head_dim"),
        ("flash2", {"head_dim_v": 32}, "head_dim_v"),
        ("flash3", {"head_dim": 264, "head_dim_v": 264}, "head_dim"),
        ("flash3", {"head_dim": 128, "head_dim_v": 64}, "head_dim_v"),
        ("flash4", {"head_dim": 512, "head_dim_v": 512}, "head_dim"),
        ("flash3", {"dropout_p": 0.1}, "dropout"),
        ("flash4", {"dropout_p": 0.1}, "dropout"),
        ("flash2", {"softcap": 5.0, "dropout_p": 0.1}, "softcap"),
        ("flash2", {"batch": 70000}, "size"),
        ("flash4", {"sinks": True, "requires_grad": ("sinks",)}, "backward"),
    ],
)
def test_call_without_a_kernel_is_refused(backend: str, changes: dict[str, object], code: str) -> None:
    env = _machine("h100", FLASH2 | FLASH3 | FLASH4, ("flash_attn_interface",))
    assert code in _codes(backend, _spec(**changes), env)


@pytest.mark.parametrize(
    ("machine", "dims", "grads", "said"),
    [
        ("h100", (40, 40), True, ["head_dim padded to 64, with zeros"]),
        ("h100", (40, 40), False, []),
        ("h100", (44, 44), False, ["head_dim padded to 48, with zeros"]),
        ("h100", (44, 20), False, ["head_dim and head_dim_v padded to 48 and 24, with zeros"]),
        ("h100", (96, 96), True, []),
        ("h100", (64, 128), True, ["head_dim padded to 128, with zeros"]),
        ("b200", (40, 40), True, []),
        ("b200", (192, 128), True, []),
    ],
)
def test_flash4_pads_head_dims_further_for_gradients_on_hopper(
    machine: str, dims: tuple[int, int], grads: bool, said: list[str]
) -> None:
    spec = _spec(head_dim=dims[0], head_dim_v=dims[1], requires_grad=("query",) if grads else ())
    decision = anyattn.explain(spec, env=_machine(machine, FLASH4), backend="flash4")
    assert decision.chosen == "flash4"
    assert [note.text for note in decision.conversions if note.code == "pad_head_dim"] == said
    known = table.hits(("flash4 (backward)",), spec, _machine(machine, FLASH4))
    assert bool(known) == bool(said and grads), "padded for gradients where the table says so, and nowhere else"


def test_fa3_fwd_refuses_what_its_build_lacks() -> None:
    env = _machine("h100", {"fa3-fwd": "0.0.3"})
    window = MaskSpec(pattern=PatternSpec(4, 0, "upper_left"))
    assert _codes("flash3", _spec(requires_grad=("query",)), env) == {"backward"}
    assert _codes("flash3", _spec(dtype=torch.float16), env) == {"dtype"}
    assert _codes("flash3", _spec(mask=window), env) == {"mask"}
    whole = _machine("h100", FLASH3, ("flash_attn_interface",))
    for changes in ({"requires_grad": ("query",)}, {"dtype": torch.float16}, {"mask": window}):
        assert not _codes("flash3", _spec(**changes), whole)


FULL = flash3.without()
WINDOW = MaskSpec(pattern=PatternSpec(4, 0, "upper_left"))
KEYS = MaskSpec(key="lengths", dead_rows=True, prefix=True)


def _built(builds: Mapping[str, Mapping[str, bool]], packages: dict[str, str] | None = None) -> Environment:
    env = _machine("h100", {} if packages is None else packages, ("flash_attn_interface",))
    return dataclasses.replace(env, builds=builds)


@pytest.mark.parametrize(
    ("flag", "changes", "code"),
    [
        ("BACKWARD", {"requires_grad": ("query",)}, "backward"),
        ("SOFTCAP", {"softcap": 5.0}, "softcap"),
        ("LOCAL", {"mask": WINDOW}, "mask"),
        ("FP16", {"dtype": torch.float16}, "dtype"),
        ("VARLEN", {"mask": KEYS}, "mask"),
        ("HDIM256", {"head_dim": 256, "head_dim_v": 256}, "head_dim"),
        ("HDIMDIFF64", {"head_dim_v": 128}, "head_dim_v"),
    ],
)
def test_what_a_build_of_flash3_leaves_out_is_refused(flag: str, changes: dict[str, object], code: str) -> None:
    assert not _codes("flash3", _spec(**changes), _built(FULL))
    assert _codes("flash3", _spec(**changes), _built(flash3.without(flag))) == {code}
    assert code in _codes("flash3", _spec(**changes), _built({})) or flag == "HDIM256", "it doesn't say"


@pytest.mark.parametrize("flag", ["HDIM64", "HDIM96", "HDIM128", "HDIM192", "HDIMDIFF192", "SPLIT", "PACKGQA", "SM8x"])
def test_what_is_rounded_up_or_never_used_may_be_left_out(flag: str) -> None:
    for dim in (64, 96, 128, 192, 256):
        assert not _codes("flash3", _spec(head_dim=dim, head_dim_v=dim), _built(flash3.without(flag)))
    assert not _codes("flash3", _spec(head_dim=192, head_dim_v=128), _built(flash3.without(flag)))
    assert not _codes("flash3", _spec(head_dim_v=32), _built(flash3.without(flag)))


def test_own_distribution_counts_as_whole_but_for_what_would_be_silent() -> None:
    env = _built({}, FLASH3)
    assert not _codes("flash3", _spec(requires_grad=("query",)), env)
    assert _codes("flash3", _spec(head_dim_v=128), env) == {"head_dim_v"}
    both = _built({}, FLASH3 | {"tokenspeed-fa3": "3.0.0"})
    assert _codes("flash3", _spec(requires_grad=("query",)), both) == {"backward"}


def test_hub_build_is_not_told_by_the_package_beside_it() -> None:
    env = _built(flash3.without("BACKWARD"), {"kernels": "0.17.2"})
    assert not _codes("flash3_hub", _spec(requires_grad=("query",)), env)
    assert _codes("flash3_hub", _spec(head_dim_v=128), env) == {"head_dim_v"}


def test_fp8_needs_a_build_with_it() -> None:
    assert not _codes("flash3_fp8", _spec(), _built(flash3.without("FP16")))
    assert _codes("flash3_fp8", _spec(), _built(flash3.without("FP8"))) == {"not_installed"}
    assert _codes("flash3_fp8", _spec(), _built({})) == {"not_installed"}


def test_tokenspeed_fa3_is_named_with_what_it_leaves_out() -> None:
    env = _built(flash3.TOKENSPEED.builds, dict(flash3.TOKENSPEED.packages))
    row = next(row for row in anyattn.backends(env) if row.name == "flash3")
    assert row.usable
    assert row.version == "3.0.0.post20260810"
    assert row.origin.startswith("tokenspeed-fa3 3.0.0.post20260810, built without BACKWARD, HDIM96")
    assert anyattn.explain(_spec(), env=env, backend="flash3").origin == row.origin


def test_tokenspeed_fa3_refuses_before_it_runs_what_it_would_get_wrong() -> None:
    q, k, v = (torch.randn(1, 8, 2, 64, dtype=torch.bfloat16) for _ in range(3))
    with doubles.installed("flash3", flash3.TOKENSPEED):
        out = anyattn.attention(q, k, v, backend="flash3")
        want, _ = anyattn.reference.attention(q, k, v)
        assert torch.allclose(out.double(), want, atol=2e-2)
        for refused in ({"softcap": 5.0}, {"value": torch.randn(1, 8, 2, 128, dtype=torch.bfloat16)}):
            arguments: dict[str, Any] = {"query": q, "key": k, "value": v} | refused
            with pytest.raises(anyattn.UnsupportedCallError):
                anyattn.attention(**arguments, backend="flash3")
        with pytest.raises(anyattn.UnsupportedCallError, match="gradients"):
            anyattn.attention(q.requires_grad_(), k, v, backend="flash3")


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (
            "CONFIG = {'build_flags': {'FLASHATTENTION_DISABLE_BACKWARD': True, "
            "'FLASH_ATTENTION_DISABLE_HDIMDIFF64': False, 'OTHER': True}}",
            {"BACKWARD": True, "HDIMDIFF64": False},
        ),
        ("CONFIG = {}", None),
        ("CONFIG = None", None),
        ("raise ImportError('torn')", None),
        (None, None),
    ],
)
def test_flags_are_read_in_both_spellings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, flags: dict[str, bool] | None
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_config", raising=False)
    if text is not None:
        (tmp_path / "flash_attn_config.py").write_text(text)
    assert installed.build_flags("flash_attn_config") == flags
    sys.modules.pop("flash_attn_config", None)


def test_a_whole_build_comes_before_fa3_fwd() -> None:
    from anyattn.adapters.flash3 import Flash3

    both = _machine("h100", {"fa3-fwd": "0.0.3"}, ("flash_attn_interface",))
    assert Flash3().origin(both).startswith("flash_attn_interface")


@pytest.mark.parametrize("backend", ["flash2", "flash3", "flash4"])
@pytest.mark.parametrize("storage", [Storage(aligned=False), Storage(unit_stride=False)])
def test_misaligned_storage_is_copied_before_it_costs_the_context(backend: str, storage: Storage) -> None:
    env = _machine("h100", FLASH2 | FLASH3 | FLASH4, ("flash_attn_interface",))
    decision = anyattn.explain(_spec(storage=storage), env=env, backend=backend)
    assert decision.chosen == backend
    assert "copy" in {conversion.code for conversion in decision.conversions}


@pytest.mark.parametrize("backend", ["flash2", "flash3", "flash4"])
def test_pattern_with_a_key_mask_is_refused_since_it_would_be_aligned_by_the_used_keys(backend: str) -> None:
    env = _machine("h100", FLASH2 | FLASH3 | FLASH4, ("flash_attn_interface",))
    mask = MaskSpec(pattern=PatternSpec(-1, 0, "upper_left"), key="padding", dead_rows=True)
    assert _codes(backend, _spec(mask=mask), env) == {"mask"}


def test_right_window_that_flash2_would_drop_is_refused() -> None:
    env = _machine("h100", FLASH2)
    corner = MaskSpec(pattern=PatternSpec(-1, 20, "lower_right"))
    spec = _spec(seqlen_q=64, seqlen_kv=16, same_lengths=False, mask=corner)
    assert _codes("flash2", spec, env) == {"mask"}
    inside = MaskSpec(pattern=PatternSpec(-1, 10, "lower_right"))
    assert not _codes("flash2", spec.replace(mask=inside), env)


def test_key_masks_move_only_where_they_must() -> None:
    env = _machine("h100", FLASH2 | FLASH3 | FLASH4, ("flash_attn_interface",))
    for backend, prefix, code in (
        ("flash4", True, "keys_lengths"),
        ("flash4", False, "keys_front"),
        ("flash3", True, "keys_lengths"),
        ("flash2", True, "keys_packed"),
    ):
        spec = _spec(mask=MaskSpec(key="padding", dead_rows=True, prefix=prefix))
        decision = anyattn.explain(spec, env=env, backend=backend)
        assert code in {conversion.code for conversion in decision.conversions}


@pytest.mark.parametrize("double", [flash3.DOUBLE, flash3.FORWARD, flash3.ALWAYS_LSE])
def test_every_build_of_flash3_gives_lse(double: doubles.Double) -> None:
    q, k, v = torch.randn(3, 1, 8, 2, 16, dtype=torch.bfloat16).unbind(0)
    with doubles.installed("flash3", double):
        out, lse = anyattn.attention(q, k, v, return_lse=True, backend="flash3")
    want, true_lse = anyattn.reference.attention(q, k, v)
    assert torch.allclose(out.double(), want, atol=2e-2)
    assert torch.allclose(lse.double(), true_lse, atol=1e-5)


def test_build_of_flash3_without_lse_says_so() -> None:
    q, k, v = torch.randn(3, 1, 8, 2, 16, dtype=torch.bfloat16).unbind(0)
    with doubles.installed("flash3", flash3.NEVER_LSE):
        anyattn.attention(q, k, v, backend="flash3")
        with pytest.raises(anyattn.KernelError, match="install a newer one"):
            anyattn.attention(q, k, v, return_lse=True, backend="flash3")


def test_fp8_is_only_taken_where_that_precision_is_allowed() -> None:
    env = _machine("h100", {"fa3-fwd": "0.0.3"})
    spec = _spec()
    refused = anyattn.explain(spec, env=env, backend=["flash3_fp8", "native"])
    assert refused.chosen == "native"
    assert {reason.code for reason in refused.reasons("flash3_fp8")} == {"precision"}
    with anyattn.attention_backend(["flash3_fp8", "native"], precision="fp8"):
        assert anyattn.explain(spec, env=env).chosen == "flash3_fp8"
    with anyattn.attention_backend(["flash3_fp8", "native"], precision="int8"):
        assert anyattn.explain(spec, env=env).chosen == "native"


def test_fp8_is_near_the_truth_and_refuses_gradients() -> None:
    q, k, v = torch.randn(3, 2, 24, 4, 32, dtype=torch.bfloat16).unbind(0)
    with doubles.installed("flash3_fp8"):
        out = anyattn.attention(q, k, v, backend="flash3_fp8")
        truth = anyattn.reference.attention(q, k, v)[0]
        assert float((out.double() - truth).norm() / truth.norm()) < 0.08
        with pytest.raises(anyattn.UnsupportedCallError, match="gradients"):
            anyattn.attention(q.requires_grad_(), k, v, backend="flash3_fp8")


def test_gradients_of_masked_keys_are_zero_whatever_flash4_leaves_there() -> None:
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 8, 2, 16, dtype=torch.bfloat16).unbind(0))
    keep = torch.rand(2, 8) > 0.4
    with doubles.installed("flash4"):
        anyattn.attention(q, k, v, masks.KeyPadding(keep), backend="flash4").sum().backward()
    assert k.grad is not None
    assert v.grad is not None
    assert not k.grad[~keep].any()
    assert not v.grad[~keep].any()


@pytest.mark.parametrize(
    ("machine", "dims", "changes", "taken"),
    [
        ("h100", (256, 256), {}, True),
        ("h100", (256, 64), {}, True),
        ("h100", (264, 264), {}, False),
        ("b200", (128, 128), {}, True),
        ("b200", (192, 128), {}, True),
        ("b200", (128, 192), {}, False),
        ("b200", (192, 192), {}, False),
        ("b200", (256, 256), {}, True),
        ("b200", (256, 256), {"softcap": 2.0}, False),
        ("b200", (256, 256), {"sinks": True}, False),
        ("b200", (256, 256), {"mask": MaskSpec(key="padding", prefix=True)}, False),
    ],
)
def test_flash4_declares_the_head_dims_of_each_architecture(
    machine: str, dims: tuple[int, int], changes: dict[str, object], taken: bool
) -> None:
    spec = _spec(head_dim=dims[0], head_dim_v=dims[1], **changes)
    caps = Flash4.declarations["cuda"]
    device = preset(machine).device("cuda")
    declared = [reason for reason in declared_reasons(caps, spec, device) if reason.code == "head_dim"]
    assert (not declared) is taken
    found = Flash4().reasons(spec, _machine(machine, FLASH4))
    assert ("head_dim" in {reason.code for reason in found}) is not taken
    assert len(declared) <= 1


def test_flash4s_largest_head_dim_is_the_largest_of_any_architecture() -> None:
    caps = Flash4.declarations["cuda"]
    pairs = [pair for dims in caps.head_dims for pair in (*dims.pairs, *dims.plain_pairs)]
    assert caps.head_dim_max == max(*(dims.largest for dims in caps.head_dims), *(max(pair) for pair in pairs))
