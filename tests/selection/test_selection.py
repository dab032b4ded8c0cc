"""Selection on machines that aren't here: pure, so that an H100, a T4 or a Mac is tried on a laptop."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref
from typing import Any, ClassVar

import pytest
import torch

import anyattn
from anyattn.backend.known_bad import table
from anyattn.backend.protocol import Backend, Lowering
from anyattn.environment import Environment, preset
from anyattn.selection import registry
from anyattn.selection.choice import choice_of
from anyattn.selection.faults import add_fault
from anyattn.selection.registry import get, known, names, substituted
from anyattn.selection.resolve import resolve
from anyattn.types.decision import Candidate, Preference
from anyattn.types.reasons import Reason
from anyattn.types.spec import UNKNOWN, AttentionSpec, BlockSpec, DenseSpec, MaskSpec, PatternSpec, Storage

H100 = preset("h100", torch_version="2.11.0")


def spec(**changes: Any) -> AttentionSpec:
    fields: dict[str, Any] = {
        "batch": 2,
        "seqlen_q": 1024,
        "seqlen_kv": 1024,
        "num_heads": 16,
        "num_kv_heads": 16,
        "head_dim": 128,
        "head_dim_v": 128,
        "dtype": torch.bfloat16,
        "device_type": "cuda",
        "scale": 0.1,
    }
    fields.update(changes)
    if "same_lengths" not in fields:
        fields["same_lengths"] = fields["seqlen_q"] == fields["seqlen_kv"]
    return AttentionSpec(**fields)


def decide(call: AttentionSpec, wish: str = "native", env: Environment = H100) -> anyattn.Decision:
    mode: Any = "prefer" if wish == "auto" else "require"
    return resolve(call, env, Preference((wish,), mode, "test"), dict(known(names())))


BOOLEAN = MaskSpec(dense=DenseSpec("boolean", torch.bool, (2, 1, 1024, 1024)), dead_rows=True)
FLOAT32 = MaskSpec(dense=DenseSpec("bias", torch.float32, (1, 16, 1024, 1024)), dead_rows=True)


def test_plain_call_on_h100_is_torchs_own_pick() -> None:
    decision = decide(spec())
    assert (decision.chosen, decision.kernel, decision.conversions) == ("native", "sdpa", ())


@pytest.mark.parametrize(
    ("call", "kernel", "why"),
    [
        (spec(scale=0.0), "efficient", "NaN"),
        (spec(scale=-1.0), "efficient", "NaN"),
        (spec(mask=BOOLEAN, dtype=torch.float32), "efficient", "attends to every key"),
        (spec(mask=BOOLEAN, seqlen_q=192, requires_grad=("query",)), "efficient", "NaN in the query's gradient"),
        (spec(dropout_p=1.0), "math", "silently keeps some weights"),
        (spec(mask=FLOAT32), "efficient", "bits are read"),
        (spec(mask=FLOAT32, head_dim=66, head_dim_v=66), "math", "bits are read"),
        (spec(storage=Storage(aligned=False)), "cudnn", "not aligned"),
        (spec(batch=1024, num_heads=128, num_kv_heads=128), "cudnn", "loses the context"),
    ],
    ids=[
        "scale 0",
        "scale -1",
        "boolean, float32 query",
        "boolean, gradients",
        "dropout of everything",
        "float32 mask",
        "float32 mask, odd head_dim",
        "misaligned",
        "many heads",
    ],
)
def test_native_is_steered_away_from_what_an_h100_gets_wrong(call: AttentionSpec, kernel: str, why: str) -> None:
    decision = decide(call)
    assert decision.kernel == kernel
    steered = [conversion for conversion in decision.conversions if conversion.code == "steered"]
    assert len(steered) == 1
    assert why in steered[0].text


LOWER_RIGHT = MaskSpec(pattern=PatternSpec(-1, 0, "lower_right"), dead_rows=True)
WINDOW = MaskSpec(pattern=PatternSpec(0, 0, "upper_left"), dead_rows=True)


@pytest.mark.parametrize(
    "call",
    [
        spec(mask=BOOLEAN),
        spec(mask=MaskSpec(key="padding", dead_rows=True)),
        spec(mask=LOWER_RIGHT, seqlen_kv=512),
        spec(mask=WINDOW, seqlen_kv=512),
    ],
    ids=["boolean", "padding", "lower right", "window"],
)
def test_mask_with_dead_rows_reaches_cudnn_as_minus_infinity(call: AttentionSpec) -> None:
    decision = decide(call)
    assert decision.kernel == "sdpa_additive"
    assert "additive_mask" in {conversion.code for conversion in decision.conversions}
    assert decide(call, "native_cudnn").kernel == "cudnn"
    # torch 2.12 does so itself; cuDNN before 9.10 can't take it; an A100's SDPA doesn't pick cuDNN.
    assert decide(call, env=preset("h100", torch_version="2.12.0")).kernel == "sdpa"
    old = dataclasses.replace(H100, cudnn=(9, 5, 1))
    assert decide(call, env=old).kernel in ("efficient", "flash")
    assert decide(call, "native_cudnn", old).chosen is None
    assert decide(call, env=preset("a100", torch_version="2.11.0")).kernel in ("efficient", "flash")


def test_misaligned_storage_is_copied_before_a_fused_kernel() -> None:
    call = spec(storage=Storage(aligned=False))
    for name in ("native", "native_flash", "native_efficient", "native_cudnn"):
        assert "copy" in {conversion.code for conversion in decide(call, name).conversions}, name


def test_mask_prepared_and_found_alive_keeps_torchs_pick() -> None:
    alive = MaskSpec(dense=DenseSpec("boolean", torch.bool, (2, 1, 1024, 1024)), dead_rows=False)
    assert decide(spec(mask=alive)).kernel == "sdpa"


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (spec(scale=0.0), "native_flash"),
        (spec(scale=-2.0), "native_cudnn"),
        (spec(mask=BOOLEAN), "native_flash"),
        (spec(dropout_p=1.0), "native_flash"),
        (spec(dropout_p=1.0), "native_efficient"),
        (spec(dropout_p=1.0), "native_cudnn"),
        (spec(batch=700, num_heads=100, num_kv_heads=100), "flex"),
        (spec(mask=FLOAT32), "native_cudnn"),
        (spec(mask=FLOAT32), "native_efficient"),
        (spec(batch=1024, num_heads=128, num_kv_heads=128), "native_flash"),
        (spec(seqlen_kv=1), "native_cudnn"),
        (spec(dtype=torch.float32), "native_flash"),
        (spec(dtype=torch.float64), "native_efficient"),
        (spec(head_dim=44, head_dim_v=44), "native_cudnn"),
        (spec(head_dim=512, head_dim_v=512), "native_flash"),
        (spec(head_dim_v=64), "native_flash"),
        (spec(mask=MaskSpec(pattern=PatternSpec(-1, 0, "upper_left")), seqlen_kv=512), "native_flash"),
        (spec(seqlen_q=192, requires_grad=("query",), mask=BOOLEAN), "native_cudnn"),
        (spec(dropout_p=0.1), "native_cudnn"),
        (spec(softcap=1.0), "native"),
        (spec(dtype=torch.float32), "native_cudnn"),
        (spec(requires_grad=("query",), deterministic=True), "native_efficient"),
    ],
)
def test_single_kernel_refuses_what_it_gets_wrong(call: AttentionSpec, name: str) -> None:
    decision = decide(call, name)
    assert decision.chosen is None
    assert decision.reasons(name)


def test_unknown_lengths_count_as_if_the_bad_condition_held() -> None:
    masked = MaskSpec(dense=DenseSpec("bias", torch.bfloat16, (1, 1, UNKNOWN, UNKNOWN)))
    call = spec(seqlen_q=UNKNOWN, seqlen_kv=UNKNOWN, same_lengths=True, requires_grad=("query",), mask=masked)
    rows = table.hits(("native_cudnn",), call, H100)
    assert "cudnn-backward-nan-mask" in {row.name for row in rows}
    assert decide(call).kernel != "sdpa"


@pytest.mark.parametrize(("version", "bad"), [("2.11.0", True), ("2.12.0", False), ("2.13.0+cu130", False)])
def test_known_bad_rows_end_with_the_version_that_mended_them(version: str, bad: bool) -> None:
    env = preset("h100", torch_version=version)
    rows = table.hits(("native_cudnn",), spec(mask=BOOLEAN), env)
    assert ("cudnn-dead-rows" in {row.name for row in rows}) is bad


def test_mps_views_are_copied() -> None:
    decision = decide(spec(device_type="mps", dtype=torch.float32), env=preset("mps"))
    assert "copy" in {conversion.code for conversion in decision.conversions}
    flat = spec(device_type="mps", dtype=torch.float32, storage=Storage(bhsd_contiguous=True))
    assert decide(flat, env=preset("mps")).conversions == ()


def test_t4_has_no_flash_and_says_so() -> None:
    reasons = decide(spec(dtype=torch.float16), "native_flash", preset("t4")).reasons("native_flash")
    assert [reason.code for reason in reasons] == ["arch"]
    assert decide(spec(dtype=torch.float16), "native_efficient", preset("t4")).chosen == "native_efficient"


def test_amd_gpu_gets_math_and_native_not_nvidias_kernels() -> None:
    env = preset("mi300")
    assert decide(spec(), env=env).chosen == "native"
    assert decide(spec(), "native_flash", env).chosen is None


def test_lse_on_h100_comes_from_a_kernel_that_gives_it() -> None:
    decision = decide(spec(return_lse=True))
    assert decision.kernel in ("cudnn", "flash", "efficient")
    assert decide(spec(return_lse=True, scale=-1.0)).kernel == "efficient"
    in_float64 = decide(spec(return_lse=True, dtype=torch.float64))
    assert (in_float64.chosen, in_float64.kernel) == ("native", "math")


def test_a_huge_mask_is_never_made_behind_the_callers_back() -> None:
    window = MaskSpec(pattern=PatternSpec(512, 0, "upper_left"))
    call = spec(seqlen_q=65536, seqlen_kv=65536, mask=window)
    decision = decide(call)
    assert decision.chosen is None
    assert [reason.code for reason in decision.reasons("native")] == ["memory"]
    assert decide(call, "auto").chosen == "flex"


def test_autos_choice_names_the_fixed_order() -> None:
    assert decide(spec(), "auto").basis == "fixed order"


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_kv", "first"),
    [(1, 2000, "native_flash"), (16, 17, "native_flash"), (17, 2000, "native"), (1, 1, "native"), (16, 16, "native")],
)
def test_few_queries_on_more_keys_go_to_a_kernel_that_needs_no_preparation(
    seqlen_q: int, seqlen_kv: int, first: str
) -> None:
    call = spec(seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, same_lengths=seqlen_q == seqlen_kv)
    assert decide(call, "auto").chosen == first
    assert decide(call.replace(return_lse=True), "auto").chosen == first
    assert decide(call.replace(dtype=torch.float32), "auto").chosen == "native"
    assert decide(call).chosen == "native"


def test_decision_lists_every_known_backend_with_reasons() -> None:
    decision = decide(spec())
    assert {candidate.name for candidate in decision.candidates} == set(names())
    for candidate in decision.candidates:
        assert candidate.admits or all(reason.need and reason.got for reason in candidate.reasons)


def test_resolve_is_pure_and_hashable() -> None:
    one, other = decide(spec()), decide(spec())
    assert one == other
    assert hash(one) == hash(other)
    assert hash(H100) == hash(preset("h100", torch_version="2.11.0"))


class Judged(Backend):
    """Counts what it is asked."""

    name = "judged"
    declarations: ClassVar[Any] = {"cuda": get("native").declarations["cuda"]}

    def __init__(self) -> None:
        self.asked: list[str] = []

    def reasons(self, spec: AttentionSpec, env: Environment) -> tuple[Reason, ...]:
        self.asked.append("reasons")
        return super().reasons(spec, env)

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        self.asked.append("lower")
        return Lowering(f"torch {env.torch}")


def test_only_the_wanted_backends_are_judged_until_somebody_looks() -> None:
    wanted, beside = Judged(), Judged()
    both = {"judged": wanted, "beside": beside}
    decision = resolve(spec(), H100, Preference(("judged",), "require", "test"), both)
    assert decision.chosen == "judged"
    assert (wanted.asked, beside.asked) == (["reasons", "lower"], [])
    assert decision.reasons("beside") == ()
    assert str(decision)
    assert (wanted.asked, beside.asked) == (["reasons", "lower"], ["reasons"])


def test_list_is_judged_up_to_the_first_that_admits() -> None:
    first, second = Judged(), Judged()
    wish = Preference(("first", "second"), "prefer", "test")
    fault = Reason("fault", "a kernel", "none")
    decision = resolve(spec(), H100, wish, {"first": first, "second": second}, faults={"first": fault})
    assert decision.chosen == "second"
    assert [candidate.name for candidate in choice_of(decision).refused] == ["first"]
    assert decision.candidates == (Candidate("first", (fault,)), Candidate("second"))
    other = resolve(spec(), H100, wish, {"first": first, "second": second})
    second.asked.clear()
    assert other.chosen == "first"
    assert second.asked == []
    assert other.candidates == (Candidate("first"), Candidate("second"))


def test_late_look_sees_the_faults_and_stand_ins_of_the_choice() -> None:
    q = torch.randn(1, 4, 1, 8)
    anyattn.reset()
    before = anyattn.explain(q, q, q)
    add_fault("flex", None, Reason("broken_import", "an importable kernel", "nothing"))
    try:
        assert "broken_import" in {reason.code for reason in anyattn.explain(q, q, q).reasons("flex")}
        assert "broken_import" not in {reason.code for reason in before.reasons("flex")}
    finally:
        anyattn.reset()
    wrong = Judged()
    wrong.name = "flex"  # type: ignore[misc]
    with substituted(wrong):
        inside = anyattn.explain(q, q, q)
    inside.reasons("flex")
    assert wrong.asked == ["reasons"]


def test_what_explain_says_is_what_the_plan_runs() -> None:
    decision = decide(spec(scale=0.0))
    plan = choice_of(decision).plan
    assert (plan.backend, plan.lowering.entry) == (decision.chosen, decision.kernel) == ("native", "efficient")
    assert plan.lowering.conversions == decision.conversions


def test_copies_of_decisions_are_equal_and_carry_nothing_to_run() -> None:
    decision = decide(spec())
    for copied in (copy.copy(decision), copy.deepcopy(decision), pickle.loads(pickle.dumps(decision))):
        assert copied == decision
        assert hash(copied) == hash(decision)
        assert copied.to_dict() == decision.to_dict()
        with pytest.raises(TypeError, match="copy"):
            choice_of(copied)
    assert dataclasses.replace(decision, origin="x").origin == "x"
    assert "choice" not in repr(decision)
    with pytest.raises(AttributeError):
        decision.nothing  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(TypeError, match="Nothing to run"):
        choice_of(decide(spec(dtype=torch.int8)))


def test_recorded_decision_keeps_no_tensor_alive() -> None:
    query, mask = torch.randn(2, 4, 1, 8), torch.ones(2, 4, dtype=torch.bool)
    mask[:, 2:] = False
    with anyattn.record() as calls:
        anyattn.attention(query, query, query, anyattn.masks.KeyPadding(mask), backend=["flex", "native"])
    seen = [weakref.ref(tensor) for tensor in (query, mask)]
    del query, mask
    gc.collect()
    assert [reference() for reference in seen] == [None, None]
    assert calls[0].candidates


def test_every_alias_of_diffusers_enumeration_is_known() -> None:
    diffusers = pytest.importorskip("diffusers.models.attention_dispatch")
    for name in diffusers.AttentionBackendName:
        assert registry.canonical(name.value) in registry.BUILTIN, name


def test_names_and_aliases_are_unambiguous() -> None:
    backends = dict(registry.known(registry.BUILTIN))
    assert all(name == backend.name for name, backend in backends.items())
    aliases = [alias for backend in backends.values() for alias in backend.aliases]
    assert len(set(aliases)) == len(aliases) > 20
    assert not set(aliases) & set(registry.BUILTIN)
    assert {registry.canonical(alias) for alias in aliases} <= set(registry.BUILTIN)


def test_every_known_bad_row_is_documented_and_pure() -> None:
    calls = [
        spec(),
        spec(mask=BOOLEAN),
        spec(device_type="cpu", mask=MaskSpec(block=BlockSpec(1, 1, True, True, True))),
    ]
    for row in table.TABLE:
        assert row.what and row.when and row.instead and row.link, row.name  # noqa: PT018
        for call in calls:
            assert row.holds(call) is row.holds(call)


def test_unknown_preset_says_which_exist() -> None:
    with pytest.raises(ValueError, match="h100"):
        preset("h1000")


def biased(shape: tuple[int, int, int, int], needs: tuple[str, ...], dtype: torch.dtype, **sizes: Any) -> AttentionSpec:
    return spec(mask=MaskSpec(dense=DenseSpec("bias", dtype, shape), dead_rows=True), requires_grad=needs, **sizes)


@pytest.mark.parametrize("machine", ["h100", "b200", "a100", "rtx5090", "t4", "mi300"])
@pytest.mark.parametrize("length", [100, 128, UNKNOWN])
@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 4}, {"head_dim": 64}])
def test_gradient_of_a_bias_is_never_left_to_sdpas_own_pick(machine: str, length: int, changes: dict[str, Any]) -> None:
    # SDPA asks a fused kernel for no log-sum-exp where the mask alone needs a gradient, and cuDNN gives a mask none.
    env = preset(machine, torch_version="2.11.0")
    for shape in ((2, 16, length, length), (1, 1, length, length), (2, 1, 1, length)):
        for needs in (("mask",), ("query", "mask")):
            for dtype in (torch.bfloat16, torch.float32):
                call = biased(shape, needs, dtype, seqlen_q=length, seqlen_kv=length, same_lengths=True, **changes)
                decision = decide(call, env=env)
                assert decision.kernel in ("efficient", "math"), (decision.kernel, call)
                assert any(reason.code == "mask_grad" for reason in decision.reasons("native_cudnn"))


def test_lse_beside_the_gradient_of_a_bias_comes_from_the_efficient_kernel() -> None:
    assert decide(biased((1, 1, 1024, 1024), ("mask",), torch.bfloat16, return_lse=True)).kernel == "efficient"


@pytest.mark.parametrize("needs", [("query",), ("key", "query", "value")])
def test_bias_that_needs_no_gradient_is_left_to_sdpa(needs: tuple[str, ...]) -> None:
    assert decide(biased((1, 16, 1024, 1024), needs, torch.bfloat16)).kernel in ("sdpa", "sdpa_additive")
