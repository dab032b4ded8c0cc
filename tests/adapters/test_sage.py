"""What the adapters of SageAttention decide on supposed machines, and what laws can't see of them."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import anyattn
import doubles
from anyattn import masks
from anyattn.adapters.sage import SageInt8Fp8, SageInt8Fp16Triton
from anyattn.adapters.sage.kernels import PARAMETERS, readable
from anyattn.environment import Device, Environment, preset
from anyattn.run import plan as plans
from anyattn.selection.registry import get
from anyattn.sources.packages import FUNCTIONS
from anyattn.types.spec import AttentionSpec, DenseSpec, MaskSpec, PatternSpec, Storage
from doubles.kernels import sage

ALL = ("sage", "sage_int8_fp16", "sage_int8_fp16_triton", "sage_int8_fp8", "sage_int8_fp8_sm90")
CAUSAL = MaskSpec(pattern=PatternSpec(-1, 0, "upper_left"))
LOWER_RIGHT = MaskSpec(pattern=PatternSpec(-1, 0, "lower_right"))


def _machine(name: str, version: str | None = "2.2.0") -> Environment:
    packages = {} if version is None else {"sageattention": version}
    return dataclasses.replace(preset(name, packages=packages), modules=frozenset(packages))


def _arch(major: int, minor: int, version: str = "2.2.0") -> Environment:
    device = Device("cuda", "a supposed GPU", (major, minor))
    return dataclasses.replace(_machine("h100", version), devices=(Device("cpu"), device))


def _spec(**changes: object) -> AttentionSpec:
    spec = AttentionSpec(2, 64, 64, 4, 4, 64, 64, torch.bfloat16, "cuda", 0.125, 0)
    return spec.replace(**changes)


def _reasons(backend: str, spec: AttentionSpec, env: Environment) -> dict[str, anyattn.Reason]:
    return {reason.code: reason for reason in anyattn.explain(spec, env=env, backend=backend).reasons(backend)}


@pytest.mark.parametrize(
    ("machine", "takes"),
    [
        ("t4", ()),
        ("a100", ("sage", "sage_int8_fp16", "sage_int8_fp16_triton")),
        ("rtx3090", ("sage", "sage_int8_fp16", "sage_int8_fp16_triton")),
        ("rtx4090", ("sage", "sage_int8_fp16", "sage_int8_fp16_triton", "sage_int8_fp8")),
        ("h100", ALL),
        ("b200", ("sage_int8_fp16", "sage_int8_fp16_triton", "sage_int8_fp8")),
        ("rtx5090", ("sage", "sage_int8_fp16", "sage_int8_fp8")),
        ("mi300", ()),
    ],
)
def test_each_kernel_runs_on_the_archs_that_upstream_says(machine: str, takes: tuple[str, ...]) -> None:
    env = _machine(machine)
    found = {name: _reasons(name, _spec(), env) for name in ALL}
    assert tuple(name for name, reasons in found.items() if not reasons) == takes
    assert all(set(found[name]) == {"arch"} for name in ALL if name not in takes)


@pytest.mark.parametrize(("major", "minor"), [(8, 7), (10, 0), (10, 3), (11, 0)])
def test_own_pick_is_refused_where_it_raises(major: int, minor: int) -> None:
    reason = _reasons("sage", _spec(), _arch(major, minor))["arch"]
    assert reason.need == "sm80, sm86, sm89, sm90, sm120, sm121"
    assert "name one of its kernels" in reason.hint


def test_own_pick_needs_2_2_on_sm121() -> None:
    assert not _reasons("sage", _spec(), _arch(12, 1))
    assert _reasons("sage", _spec(), _arch(12, 1, "2.1.1"))["arch"].need == "sageattention >= 2.2 on sm121"
    assert not _reasons("sage", _spec(), _arch(12, 0, "2.1.1"))


@pytest.mark.parametrize(
    ("machine", "kernel"),
    [
        ("a100", "sageattn (sageattn_qk_int8_pv_fp16_cuda)"),
        ("rtx3090", "sageattn (sageattn_qk_int8_pv_fp16_triton)"),
        ("rtx4090", "sageattn (sageattn_qk_int8_pv_fp8_cuda)"),
        ("h100", "sageattn (sageattn_qk_int8_pv_fp8_cuda_sm90)"),
        ("rtx5090", "sageattn (sageattn_qk_int8_pv_fp8_cuda)"),
    ],
)
def test_own_pick_says_which_kernel_it_is(machine: str, kernel: str) -> None:
    assert anyattn.explain(_spec(), env=_machine(machine), backend="sage").kernel == kernel


def test_own_pick_has_the_limits_of_the_kernel_it_picks() -> None:
    decode = _spec(seqlen_q=9, seqlen_kv=4, same_lengths=False, mask=CAUSAL)
    assert not _reasons("sage", decode, _machine("h100"))
    assert "mask" in _reasons("sage", decode, _machine("rtx3090")), "Triton: an assertion, which python -O leaves out"
    backend = get("sage")
    assert backend is not None
    declared = [backend.capabilities(_spec(), _machine(name)) for name in ("a100", "rtx3090", "h100")]
    assert [None if caps is None else (caps.quantised, caps.value_max) for caps in declared] == [
        ("int8", 65504.0),
        ("int8", 1023.5),
        ("fp8", None),
    ]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    ("version", "code"), [(None, "not_installed"), ("1.0.6", "wrong_version"), ("2.0.1", "wrong_version")]
)
def test_absent_and_old_packages_are_refused_with_the_cure(backend: str, version: str | None, code: str) -> None:
    reason = _reasons(backend, _spec(), _machine("h100", version))[code]
    assert "github.com/thu-ml/SageAttention" in reason.hint
    assert "1.0.6" in reason.hint
    assert reason.need == "sageattention >=2.1.1,<3"


@pytest.mark.parametrize("version", ["2.1.1", "2.2.0", "2.2.0+cu128torch2.8"])
def test_versions_that_serve(version: str) -> None:
    decision = anyattn.explain(_spec(), env=_machine("h100", version), backend="sage")
    assert decision.chosen == "sage"
    assert get("sage").origin(_machine("h100", version)) == f"sageattention {version}"  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"dtype": torch.float32}, "dtype"),
        ({"head_dim": 136, "head_dim_v": 136}, "head_dim"),
        ({"head_dim_v": 32}, "head_dim_v"),
        ({"scale": 0.0}, "scale"),
        ({"scale": -1.0}, "scale"),
        ({"softcap": 5.0}, "softcap"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"requires_grad": ("query",)}, "backward"),
        ({"compiled": True}, "compile"),
        ({"batch": 70000, "seqlen_q": 1, "seqlen_kv": 1}, "size"),
        ({"batch": 8, "seqlen_q": 1 << 20, "num_heads": 4, "same_lengths": False}, "size"),
        ({"mask": MaskSpec(dense=DenseSpec("boolean", torch.bool, (1, 1, 64, 64)))}, "mask"),
        ({"mask": MaskSpec(dense=DenseSpec("bias", torch.bfloat16, (1, 1, 64, 64)))}, "mask"),
        ({"mask": MaskSpec(pattern=PatternSpec(3, 0, "upper_left"))}, "mask"),
    ],
)
def test_calls_that_are_wrong_or_fatal_are_refused(backend: str, changes: dict[str, object], code: str) -> None:
    assert set(_reasons(backend, _spec(**changes), _machine("h100"))) == {code}


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize(
    "changes",
    [
        {"seqlen_q": 7, "seqlen_kv": 99, "same_lengths": False},
        {"num_kv_heads": 2},
        {"head_dim": 44, "head_dim_v": 44},
        {"return_lse": True},
        {"sinks": True},
        {"mask": CAUSAL},
        {"mask": CAUSAL, "seqlen_q": 7, "seqlen_kv": 99, "same_lengths": False},
        {"mask": LOWER_RIGHT, "seqlen_q": 99, "seqlen_kv": 7, "same_lengths": False},
        {"mask": LOWER_RIGHT, "seqlen_q": 1, "seqlen_kv": 99, "same_lengths": False},
        {"seqlen_q": 0, "same_lengths": False},
        {"seqlen_kv": 0, "same_lengths": False},
        {"deterministic": True},
    ],
)
def test_calls_that_can_be_said_exactly_are_taken(backend: str, changes: dict[str, object]) -> None:
    assert not _reasons(backend, _spec(**changes), _machine("h100"))


@pytest.mark.parametrize("backend", ALL)
def test_lower_right_causal_with_more_keys_is_refused(backend: str) -> None:
    spec = _spec(mask=LOWER_RIGHT, seqlen_q=7, seqlen_kv=99, same_lengths=False)
    assert "causal (lower_right" in _reasons(backend, spec, _machine("h100"))["mask"].got


def test_triton_kernel_is_given_as_many_queries_as_keys_for_causal() -> None:
    env, backend = _machine("h100"), SageInt8Fp16Triton()
    fewer = backend.lower(_spec(mask=CAUSAL, seqlen_q=7, seqlen_kv=99, same_lengths=False), env).pattern
    assert fewer is not None
    assert fewer.is_causal
    assert (fewer.rows, fewer.keys) == (None, (0, 7)), "keys that no row sees are left out"
    more = _spec(mask=CAUSAL, seqlen_q=99, seqlen_kv=7, same_lengths=False)
    assert "mask" in _reasons("sage_int8_fp16_triton", more, env)
    assert not _reasons("sage_int8_fp16", more, env)
    unknown = _spec(mask=CAUSAL, seqlen_q=-1, seqlen_kv=-1, same_lengths=False)
    assert "mask" in _reasons("sage_int8_fp16_triton", unknown, env)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("storage", [Storage(aligned=False), Storage(unit_stride=False)])
def test_storage_that_kernels_cannot_read_is_copied_and_recorded(backend: str, storage: Storage) -> None:
    decision = anyattn.explain(_spec(storage=storage), env=_machine("h100"), backend=backend)
    assert decision.chosen == backend
    assert [conversion.code for conversion in decision.conversions] == ["copy"]


@pytest.mark.parametrize("backend", ALL)
def test_quantised_kernels_are_chosen_by_name_or_by_precision_alone(backend: str) -> None:
    env, loosest = _machine("h100"), "int8" if "fp16" in backend else "fp8"
    for allowed, codes in (("exact", {"precision"}), (loosest, set())):
        with anyattn.attention_backend([backend, "native"], precision=allowed):  # type: ignore[arg-type]
            decision = anyattn.explain(_spec(), env=env)
        assert {reason.code for reason in decision.reasons(backend)} == codes
    assert anyattn.explain(_spec(), env=env, backend=backend).chosen == backend


@pytest.fixture(params=ALL)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with doubles.installed(request.param):
        yield request.param


def _tensors(seqlen_q: int = 6, seqlen_kv: int = 9, dim: int = 64, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, length, 2, dim, dtype=dtype) for length in (seqlen_q, seqlen_kv, seqlen_kv)]


def test_nothing_is_left_to_swallowed_keywords(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Mapping[str, Any]] = []
    anyattn.attention(*_tensors(), backend=backend)
    right = FUNCTIONS[backend].attend

    def watched(*tensors: Tensor, **options: Any) -> Any:
        seen.append(options)
        return right(*tensors, **options)

    monkeypatch.setattr(FUNCTIONS[backend], "attend", watched)
    anyattn.attention(*_tensors(), masks.Causal(), scale=0.3, return_lse=True, backend=backend)
    assert seen == [{"tensor_layout": "NHD", "is_causal": True, "sm_scale": 0.3, "return_lse": True}]
    assert set(seen[0]) == set(PARAMETERS)


def test_function_without_a_parameter_is_refused_when_it_is_loaded(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = get(backend).function  # type: ignore[union-attr]

    def old(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False, **kwargs: Any) -> Any:
        raise AssertionError("never called")

    monkeypatch.setattr(sys.modules["sageattention"], name, old)
    with pytest.raises(anyattn.BackendUnavailableError, match="no parameter sm_scale and return_lse"):
        anyattn.attention(*_tensors(), backend=backend)


def test_extension_that_was_not_built_is_told_when_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with doubles.installed("sage_int8_fp8"):
        monkeypatch.setattr(sys.modules["sageattention.core"], SageInt8Fp8.flag, False)
        with pytest.raises(anyattn.BackendUnavailableError, match="without its kernels for sm89"):
            anyattn.attention(*_tensors(), backend="sage_int8_fp8")


@pytest.mark.parametrize("asked", [False, True])
def test_tensor_in_place_of_a_tuple_is_not_unpacked(backend: str, asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    anyattn.attention(*_tensors(), backend=backend)
    right = FUNCTIONS[backend].attend
    monkeypatch.setattr(
        FUNCTIONS[backend], "attend", lambda *t, return_lse, **options: right(*t, return_lse=not return_lse, **options)
    )
    anyattn.reset()  # a decided call holds the function
    with pytest.raises(anyattn.KernelError, match="returned a"):
        anyattn.attention(*_tensors(), return_lse=asked, backend=backend)


def test_lse_of_another_layout_is_not_passed_on(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    anyattn.attention(*_tensors(), backend=backend)
    right = FUNCTIONS[backend].attend

    def turned(*tensors: Tensor, **options: Any) -> Any:
        out, lse = right(*tensors, **options)
        return out, lse.transpose(1, 2)

    monkeypatch.setattr(FUNCTIONS[backend], "attend", turned)
    with pytest.raises(anyattn.KernelError, match="returned an lse of"):
        anyattn.attention(*_tensors(), return_lse=True, backend=backend)


def test_gradients_are_refused_and_no_grad_is_not(backend: str) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in _tensors())
    with pytest.raises(anyattn.UnsupportedCallError, match="backward"):
        anyattn.attention(q, k, v, backend=backend)
    with torch.no_grad():
        assert anyattn.attention(q, k, v, backend=backend).shape == q.shape


def test_traced_call_is_refused_with_the_way_out(backend: str) -> None:
    compiled = torch.compile(
        lambda q, k, v: anyattn.attention(q, k, v, backend=backend), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match=r"compile: needs a call outside torch\.compile.*torch\.compiler\.disable"):
        compiled(*_tensors())
    torch._dynamo.reset()


def test_what_lies_beyond_32_bits_is_copied() -> None:
    far = torch.empty(2, 3, 2, 64, dtype=torch.float16).as_strided((2, 3, 2, 64), (128, 256, 64, 1))
    assert readable(far) is far
    meta = torch.empty_strided((2, 3, 2, 64), (1 << 31, 128, 64, 1), dtype=torch.float16, device="meta")
    assert readable(meta).is_contiguous()


@pytest.mark.parametrize(("name", "limit"), [("sage_int8_fp16", 65504.0), ("sage_int8_fp16_triton", 1023.5)])
def test_checks_find_values_that_overflow(name: str, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYATTN_CHECKS", "1")
    q, k, v = _tensors(dtype=torch.bfloat16)
    with doubles.installed(name):
        anyattn.attention(q, k, v, backend=name)
        v[0, 0, 0, 0] = -1.1 * limit
        with pytest.raises(anyattn.InvalidCallError, match="the chosen kernel can represent"):
            anyattn.attention(q, k, v, backend=name)
    with doubles.installed("sage_int8_fp8"):
        anyattn.attention(q, k, v, backend="sage_int8_fp8")


@pytest.mark.parametrize(("off", "wrong"), [(1.05, False), (2.0, True)])
def test_checks_give_a_quantised_kernel_its_error_and_no_more(
    backend: str, off: float, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYATTN_CHECKS", "1")
    q, k, v = _tensors(64, 64)
    anyattn.attention(q, k, v, return_lse=True, backend=backend)
    right = FUNCTIONS[backend].attend

    def coarse(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return right(q, k, v * off, **options)

    monkeypatch.setattr(FUNCTIONS[backend], "attend", coarse)
    if wrong:
        with pytest.raises(anyattn.KernelError, match="disagrees with the reference"):
            anyattn.attention(q[:, :33], k, v, backend=backend)
    else:
        anyattn.attention(q[:, :33], k, v, backend=backend)


def test_device_that_the_kernel_sets_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [3]

    def exchange(index: int) -> int:
        before, current[0] = current[0], index
        return before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    seen: list[int] = []

    def kernel(plan: Any, query: Any, *rest: Any) -> Any:
        seen.append(current[0])
        current[0] = 5  # torch.cuda.set_device
        if plan == "raises":
            raise RuntimeError("a kernel's own")
        return query

    query = types.SimpleNamespace(get_device=lambda: 1)
    guarded = plans._on_its_device(kernel)
    assert guarded("returns", query, None, None, None) is query  # type: ignore[arg-type]
    assert (seen, current) == ([1], [3])
    with pytest.raises(RuntimeError, match="own"):
        guarded("raises", query, None, None, None)  # type: ignore[arg-type]
    assert current == [3]
    current[0] = 1  # the tensors' own device: nothing to put back
    assert guarded("returns", query, None, None, None) is query  # type: ignore[arg-type]
    assert seen == [1, 1, 1]
    assert all(get(name).declarations["cuda"].device_guard for name in ALL)  # type: ignore[union-attr]


class _Stream:
    """A CUDA stream that notes what waits for what."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name, self.seen = name, seen

    def wait_stream(self, other: _Stream) -> None:
        self.seen.append(f"{self.name} waits for {other.name}")


@pytest.mark.parametrize("lse", [False, True])
def test_kernel_on_the_default_stream_is_ordered_with_the_current_one(
    monkeypatch: pytest.MonkeyPatch, lse: bool
) -> None:
    seen: list[str] = []
    default, side = _Stream("default", seen), _Stream("side", seen)
    current = [side]

    @contextlib.contextmanager
    def use(stream: _Stream) -> Iterator[None]:
        before, current[0] = current[0], stream
        yield
        current[0] = before

    monkeypatch.setattr(plans, "raw_stream", lambda index: 0 if current[0] is default else 7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: default)
    monkeypatch.setattr(torch.cuda, "stream", use)
    out, more = (
        types.SimpleNamespace(record_stream=lambda stream, name=name: seen.append(f"{stream.name} uses {name}"))
        for name in ("out", "lse")
    )

    def kernel(plan: Any, query: Any, *rest: Any) -> Any:
        seen.append(f"launched on {current[0].name}")
        return (out, more) if lse else out

    query: Any = types.SimpleNamespace(get_device=lambda: 0)
    nothing: Any = None
    run: Any = plans._on_default_stream(kernel)
    assert run(nothing, query, None, None, None) == ((out, more) if lse else out)
    wanted = ["default waits for side", "launched on default", "side waits for default", "side uses out"]
    assert seen == [*wanted, "side uses lse"] if lse else seen == wanted
    seen.clear()
    current[0] = default
    run(nothing, query, None, None, None)
    assert seen == ["launched on default"]


def test_every_kernel_that_names_no_stream_is_called_on_the_default_one() -> None:
    for name in (*ALL, "sage_hub", "sage_blackwell_hub"):
        assert get(name).declarations["cuda"].default_stream, name  # type: ignore[union-attr]
    assert not get("flash3").declarations["cuda"].default_stream  # type: ignore[union-attr]


def test_double_has_what_the_adapters_call() -> None:
    assert {get(name).function for name in ALL} == set(sage.FUNCTIONS) - {"sageattn_varlen"}  # type: ignore[union-attr]
