"""What a backend doesn't declare isn't asked of it: CUDA graphs, storage that isn't aligned, dropping everything."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import anyattn
from anyattn.backend.capabilities import Capabilities
from anyattn.backend.declared_reasons import declared_reasons
from anyattn.backend.protocol import Backend, Lowering, Output, Parts, Plan
from anyattn.environment import Environment, preset
from anyattn.process import tracing
from anyattn.run import checks
from anyattn.run.plan import make_plan
from anyattn.scopes import defaults
from anyattn.selection import registry
from anyattn.selection.registry import known, names
from anyattn.selection.resolve import resolve
from anyattn.types.decision import Preference
from anyattn.types.spec import AttentionSpec, Storage

SPEC = AttentionSpec(2, 64, 64, 4, 4, 64, 64, torch.bfloat16, "cuda", 0.1)
H100 = dataclasses.replace(
    preset("h100", packages={"xformers": "0.0.35", "flash-attn": "2.8.3", "sageattention": "2.2.0"}),
    modules=frozenset(("xformers.ops", "sageattention", "flash_attn", "flash_attn.flash_attn_interface")),
)
STARTS: list[list[bool]] = []


class Terse(Backend):
    """A third party's backend that declares as little as it can."""

    name = "terse"
    family = "terse"
    declarations: ClassVar[Any] = {
        kind: Capabilities(dtypes=frozenset((torch.float32,)), head_dim_max=64, backward=True, exact=True)
        for kind in ("cpu", "cuda")
    }

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        return Lowering("terse")

    @staticmethod
    def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        STARTS.append([tensor.data_ptr() % 16 == 0 for tensor in (query, key, value)])
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        found = torch.softmax(query @ key.transpose(-1, -2) * plan.spec.scale, -1) @ value
        return found.transpose(1, 2) if plan.spec.layout == "BSHD" else found


@pytest.fixture
def terse() -> Iterator[Terse]:
    STARTS.clear()
    backend = Terse()
    registry.register(backend)
    yield backend
    registry.unregister("terse")


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """A list that says, while it isn't empty, that a CUDA graph is being captured."""
    now: list[bool] = []
    monkeypatch.setattr(tracing, "is_captured", lambda tensor: bool(now))
    defaults.forget()
    yield now
    defaults.forget()


def tensors(**options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 6, 2, 8, **options) for _ in range(3)]


def chosen(wish: Any, *inputs: Tensor, **arguments: Any) -> str | None:
    with anyattn.record() as calls:
        anyattn.attention(*inputs, backend=wish, **arguments)
    return calls[-1].chosen


def test_call_decided_outside_of_a_graph_is_decided_anew_inside(terse: Terse, capture: list[bool]) -> None:
    inputs = tensors()
    for _ in range(2):
        assert chosen(["terse", "native"], *inputs) == "terse"
    ran = len(STARTS)
    capture.append(True)
    for _ in range(2):
        anyattn.attention(*inputs, backend=["terse", "native"])
        assert chosen(["terse", "native"], *inputs) == "native"
    assert len(STARTS) == ran
    capture.clear()
    anyattn.attention(*inputs, backend=["terse", "native"])
    assert len(STARTS) == ran + 1
    assert chosen(["terse", "native"], *inputs) == "terse"


@pytest.mark.parametrize("before", [False, True])
def test_required_backend_that_cannot_be_captured_refuses(terse: Terse, capture: list[bool], before: bool) -> None:
    inputs = tensors()
    if before:
        anyattn.attention(*inputs, backend="terse")
    ran = len(STARTS)
    capture.append(True)
    with pytest.raises(anyattn.UnsupportedCallError, match=r'cuda_graph(.|\n)*backend=\["terse", "native"\]'):
        anyattn.attention(*inputs, backend="terse")
    assert len(STARTS) == ran
    capture.clear()
    anyattn.attention(*inputs, backend="terse")
    assert len(STARTS) == ran + 1


def test_native_takes_the_same_way_inside_a_graph(capture: list[bool]) -> None:
    inputs = tensors()
    outside = anyattn.attention(*inputs)
    capture.append(True)
    assert torch.equal(anyattn.attention(*inputs), outside)
    assert chosen("native", *inputs) == "native"


def test_packed_sequences_are_decided_anew_inside(terse: Terse, capture: list[bool]) -> None:
    packed = [torch.randn(6, 2, 8) for _ in range(3)]
    starts = torch.tensor([0, 6], dtype=torch.int32)
    for inside, name in ((False, "flex"), (True, "native"), (False, "flex")):
        capture[:] = [True] * inside
        with anyattn.record() as calls:
            anyattn.attention_varlen(*packed, starts, starts, 6, 6, backend=["flex", "native"])
        assert calls[-1].chosen == name


FOR_CUDA = [name for name in registry.BUILTIN if "cuda" in registry.get(name).declarations]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", FOR_CUDA)
def test_only_what_declares_it_is_captured(name: str) -> None:
    backend = registry.get(name)
    assert backend is not None
    caps = backend.capabilities(SPEC, H100)
    assert caps is not None
    codes = {reason.code for reason in backend.reasons(SPEC.replace(captured=True), H100)}
    assert ("cuda_graph" in codes) is (not caps.cuda_graph)
    assert "cuda_graph" not in {reason.code for reason in backend.reasons(SPEC, H100)}


def test_auto_passes_over_what_cannot_be_captured() -> None:
    wish = Preference(("xformers", "native"), "prefer", "test")
    assert resolve(SPEC, H100, wish, dict(known(names()))).chosen == "xformers"
    assert resolve(SPEC.replace(captured=True), H100, wish, dict(known(names()))).chosen == "native"


def test_value_checks_are_left_out_of_a_graph_and_that_is_said_once(
    capture: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYATTN_CHECKS", "1")
    monkeypatch.setattr(checks, "_said", [])
    defaults.forget()
    inputs = tensors()
    inputs[0][0, 0, 0, 0] = float("nan")
    with pytest.raises(anyattn.InvalidCallError):
        anyattn.attention(*inputs)
    capture.append(True)
    packed = [tensor[0] for tensor in inputs]
    starts = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.warns(anyattn.AnyattnWarning, match="captured in a CUDA graph"):
        anyattn.attention(*inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        anyattn.attention(*inputs)
        anyattn.attention(*inputs, torch.ones(6, 6, dtype=torch.bool).tril())
        anyattn.attention_varlen(*packed, starts, starts, 6, 6)
    capture.clear()
    with pytest.raises(anyattn.InvalidCallError):
        anyattn.attention(*inputs)


@pytest.mark.parametrize("aligned", [True, False])
def test_storage_that_is_not_aligned_is_copied_for_a_backend_that_declares_nothing(terse: Terse, aligned: bool) -> None:
    flat = [torch.randn(1 + 6 * 2 * 8) for _ in range(3)]
    inputs = [one[:-1].view(1, 6, 2, 8) if aligned else one[1:].view(1, 6, 2, 8) for one in flat]
    spec = AttentionSpec(
        1, 6, 6, 2, 2, 8, 8, torch.float32, "cuda", 8**-0.5, storage=Storage(aligned=aligned, unit_stride=True)
    )
    decision = resolve(spec, preset("h100"), Preference(("terse",), "require", "test"), {"terse": terse})
    assert [conversion.code for conversion in decision.conversions] == ([] if aligned else ["copy"])
    plan, run = make_plan(decision)
    found = run(plan, *inputs, Parts())
    assert STARTS == [[True] * 3]
    assert isinstance(found, Tensor)
    assert torch.allclose(found, anyattn.attention(*inputs, backend="native_math"), atol=1e-6)


@pytest.mark.parametrize("name", ["flash4", "xformers", "sage", "native_flash", "native_math", "native", "flex"])
def test_one_copy_at_most_is_made_of_storage_that_is_not_aligned(name: str) -> None:
    backend = registry.get(name)
    assert backend is not None
    spec = SPEC.replace(storage=Storage(aligned=False))
    decision = resolve(spec, H100, Preference((name,), "require", "test"), {name: backend})
    if decision.chosen is None:
        assert any(reason.code == "not_installed" for reason in decision.reasons(name))
    assert [conversion.code for conversion in decision.conversions].count("copy") <= 1


@pytest.mark.parametrize("name", [name for name in names() if not name.startswith("native")])
def test_dropping_everything_is_refused_where_it_is_not_declared(name: str) -> None:
    backend = registry.get(name)
    assert backend is not None
    for kind, caps in backend.declarations.items():
        spec = SPEC.replace(device_type=kind, dropout_p=1.0)
        found = [reason for reason in declared_reasons(caps, spec, None) if reason.code == "dropout"]
        assert len(found) == 1
        assert not caps.dropout_of_all


def test_native_drops_everything_on_every_device() -> None:
    inputs = tensors()
    assert not bool(anyattn.attention(*inputs, dropout_p=1.0).any())
    decision = resolve(SPEC.replace(dropout_p=1.0), H100, Preference(("native",), "require", "t"), dict(known(names())))
    assert decision.kernel == "math"
    for name in ("native_flash", "native_efficient", "native_cudnn"):
        assert [reason.code for reason in decision.reasons(name)].count("dropout") == 1
