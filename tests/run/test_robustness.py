"""Ways in which a decision, a cache or a pin could go stale or leak, each shown not to."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import anyattn
from anyattn import masks, reference
from anyattn.adapters.native import NativeMath
from anyattn.backend.capabilities import Capabilities
from anyattn.backend.protocol import Backend
from anyattn.environment import preset
from anyattn.masks.values import _learn, _prepared
from anyattn.scopes import defaults
from anyattn.selection import registry
from anyattn.types.spec import AttentionSpec, DenseSpec, MaskSpec, Storage
from helpers import needs_torch


def tensors(seqlen_q: int = 6, seqlen_kv: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, seqlen_q, 2, 16), torch.randn(2, seqlen_kv, 2, 16), torch.randn(2, seqlen_kv, 2, 16)


class Attend(nn.Module):
    def __init__(self, mask: Any = None) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = anyattn.attention(q, k, v, self.mask)
        return out


def chosen(module: nn.Module | None = None) -> str | None:
    with anyattn.record() as calls:
        (module or Attend())(*tensors())
    return calls[0].chosen


def _is_right_outside(mask: masks.Mask) -> None:
    q, k, v = tensors(8)
    out = Attend(mask)(q, k, v)
    assert type(out) is torch.Tensor
    assert (out - reference.attention(q, k, v, mask)[0]).abs().max() < 1e-5


def _masks() -> tuple[masks.Mask, ...]:
    padding = torch.rand(2, 8) > 0.4
    padding[:, 0] = True
    return masks.KeyPadding(padding), masks.Causal()


@pytest.mark.parametrize("backend", ["native", "flex"])
def test_calls_with_fake_tensors_leave_nothing_fake_behind(backend: str) -> None:
    with anyattn.attention_backend(backend):
        for mask in _masks():
            with FakeTensorMode(allow_non_fake_inputs=True):
                anyattn.attention(*tensors(8), mask)
            _is_right_outside(mask)


@pytest.mark.parametrize(
    "backend", ["native", pytest.param("flex", marks=needs_torch("2.11", "torch.export takes FlexAttention"))]
)
def test_exported_calls_leave_nothing_fake_behind(backend: str) -> None:
    with anyattn.attention_backend(backend):
        for mask in _masks():
            torch.export.export(Attend(mask), tuple(tensors(8)), strict=False)
            _is_right_outside(mask)


def test_mask_whose_storage_was_swapped_is_followed() -> None:
    q, k, v = tensors()
    mask = masks.KeyPadding(torch.arange(8).expand(2, 8) < 4)
    for _ in range(3):
        anyattn.attention(q, k, v, mask)
    assert mask.key is not None
    mask.key.data = torch.arange(8).expand(2, 8) >= 4
    assert (anyattn.attention(q, k, v, mask) - reference.attention(q, k, v, mask)[0]).abs().max() < 1e-5


def test_lse_of_rows_that_only_a_block_mask_kills_is_minus_infinity() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    block = create_block_mask(lambda b, h, i, j: (i > 2) & (i >= j), None, None, 128, 128, device="cpu")
    q, k, v = tensors(128, 128)
    mask = masks.Block(block) & masks.Bias(torch.randn(128, 128))
    out, lse = anyattn.attention(q, k, v, mask, return_lse=True, backend="flex")
    truth, true_lse = reference.attention(q, k, v, mask)
    assert torch.equal(torch.isneginf(lse), torch.isneginf(true_lse))
    assert (out - truth).abs().max() < 1e-5


def test_sink_of_minus_infinity_in_a_dead_row_gives_zeros() -> None:
    q, k, v = tensors()
    sinks = torch.tensor([float("-inf"), 0.0])
    mask = masks.KeyLengths(torch.tensor([0, 8]))
    out = anyattn.attention(q, k, v, mask, sinks=sinks)
    assert torch.isfinite(out).all()
    assert (out - reference.attention(q, k, v, mask, sinks=sinks)[0]).abs().max() < 1e-5


def test_pin_is_taken_back_after_ctrl_c() -> None:
    class Broken(Attend):
        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    model = nn.ModuleList([Broken(), Attend()])
    broken = model[0]
    anyattn.set_attention_backend(broken, "native_math")
    before = defaults.current.get()
    with pytest.raises(KeyboardInterrupt):
        broken(*tensors())
    assert chosen() == "native"
    assert defaults.current.get() is before


def test_pin_holds_below_a_graph_break_and_in_its_thread_alone() -> None:
    inside, done = threading.Event(), threading.Event()
    seen: list[str | None] = []

    class Core(nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return self.attend(q)

        @torch._dynamo.disable
        def attend(self, q: torch.Tensor) -> torch.Tensor:
            with anyattn.record() as calls:
                out: torch.Tensor = anyattn.attention(q, q, q)
            seen.append(calls[0].chosen)
            inside.set()
            done.wait(20)
            return out

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = Core()

        def forward(self, q: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.core(q * 1.0) + 1.0
            return out

    model = Outer()
    anyattn.set_attention_backend(model, "native_math")
    compiled = torch.compile(model, backend="eager")
    thread = threading.Thread(target=lambda: compiled(torch.randn(1, 4, 2, 8)))
    thread.start()
    assert inside.wait(60)
    assert chosen() == "native"
    done.set()
    thread.join()
    assert seen == ["native_math"]
    torch._dynamo.reset()


def test_unpinning_one_model_leaves_a_part_shared_with_another_pinned() -> None:
    shared = Attend()
    one, two = nn.ModuleList([shared]), nn.ModuleList([shared])
    anyattn.set_attention_backend(one, "native_math")
    anyattn.set_attention_backend(two, "native_math")
    anyattn.reset_attention_backend(two)
    assert chosen(shared) == "native_math"
    anyattn.reset_attention_backend(one)
    assert chosen(shared) == "native"


def test_one_block_object_serves_two_threads_at_once() -> None:
    block = anyattn.attention_backend("native_math")
    failures: list[BaseException] = []
    barrier = threading.Barrier(2)

    def work() -> None:
        try:
            with block:
                barrier.wait(10)
                assert chosen() == "native_math"
                barrier.wait(10)
            assert chosen() == "native"
        except BaseException as error:  # noqa: BLE001 - told to the main thread
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class Constant(Backend):
    """Gives one number everywhere: shows which object ran."""

    name = "constant"
    family = "constant"
    declarations = {"cpu": Capabilities(dtypes=frozenset((torch.float32,)), head_dim_max=64, exact=True)}

    def __init__(self, number: float) -> None:
        self.number = number
        self.loads = 0
        self.strides: list[int] = []

    def load(self) -> None:
        self.loads += 1

    def lower(self, spec: Any, env: Any) -> Any:
        from anyattn.backend.protocol import Lowering

        return Lowering("constant")

    def run(self, plan: Any, query: Any, key: Any, value: Any, parts: Any) -> Any:  # type: ignore[override]
        self.strides.append(query.stride(-1))
        return torch.full_like(query, self.number)


def test_backend_registered_anew_replaces_the_old_one_and_unregistered_is_gone() -> None:
    q, k, v = tensors(8)
    first, second = Constant(1.0), Constant(2.0)
    try:
        registry.register(first)
        assert anyattn.attention(q, k, v, backend="constant")[0, 0, 0, 0] == 1.0
        registry.register(second)
        assert anyattn.attention(q, k, v, backend="constant")[0, 0, 0, 0] == 2.0
        assert (first.loads, second.loads) == (1, 1)
    finally:
        registry.unregister("constant")
    with pytest.raises(anyattn.UnknownBackendError):
        anyattn.attention(q, k, v, backend="constant")


def test_declared_unit_stride_is_kept_on_a_cpu() -> None:
    q, k, v = tensors(8)
    backend = Constant(1.0)
    try:
        registry.register(backend)
        anyattn.attention(q, k, v, backend="constant")
        strided = q.transpose(1, 3).contiguous().transpose(1, 3)
        anyattn.attention(strided, k, v, backend="constant")
    finally:
        registry.unregister("constant")
    assert backend.strides == [1, 1]


def test_decision_made_while_the_default_changed_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyattn.run import table

    plain = table.make_entry

    def slow(*args: Any) -> Any:
        entry = plain(*args)
        anyattn.set_default_backend("native_math")
        return entry

    monkeypatch.setattr(table, "make_entry", slow)
    chosen()
    monkeypatch.undo()
    assert chosen() == "native_math"


def test_flags_are_booleans() -> None:
    for flag in (torch.tensor(True), 1, None):
        with pytest.raises(anyattn.InvalidCallError, match="is_causal"):
            anyattn.attention(*tensors(), is_causal=flag)  # type: ignore[arg-type]


def test_key_lengths_prepared_at_one_length_say_nothing_of_another() -> None:
    lengths = torch.tensor([8, 9])
    _learn(lengths, 8)
    assert _prepared(lengths, 8).all_true
    assert not _prepared(lengths, 16).all_true


def test_window_as_a_list_and_parameter_as_a_mask_are_remembered() -> None:
    q, k, v = tensors()
    bias = nn.Parameter(torch.randn(6, 8), requires_grad=False)
    table = anyattn.scopes.defaults.current.get().table
    for _ in range(3):
        anyattn.attention(q, k, v, bias)
        anyattn.attention(q, k, v, window=[2, 0])  # type: ignore[arg-type]
    decided = [key for key in table if key[0] != "lengths"]
    assert len(decided) == 2


def test_vmap_over_masks_goes_through() -> None:
    q, k, v = tensors()
    many = torch.rand(3, 6, 8) > 0.3
    found = torch.vmap(lambda mask: anyattn.attention(q, k, v, mask, backend="native_math"))(many)
    for index in range(3):
        assert (found[index] - anyattn.attention(q, k, v, many[index])).abs().max() < 1e-5


def test_plan_takes_sinks_with_a_pattern_and_refuses_what_it_was_not_made_for() -> None:
    q, k, v = tensors()
    sinks = torch.randn(2)
    run = anyattn.plan(anyattn.explain(q, k, v, is_causal=True, sinks=sinks).spec)
    assert torch.equal(run(q, k, v, sinks=sinks), anyattn.attention(q, k, v, is_causal=True, sinks=sinks))
    dense = torch.rand(6, 8) > 0.3
    run = anyattn.plan(anyattn.explain(q, k, v, dense).spec)
    with pytest.raises(anyattn.InvalidCallError, match="pattern"):
        run(q, k, v, masks.Boolean(dense) & masks.Causal())
    run = anyattn.plan(anyattn.explain(q, k, v, backend="flex").spec, backend="flex")
    with pytest.raises(anyattn.InvalidCallError, match="gradients"):
        run(q.requires_grad_(), k, v)


def cuda(**changes: Any) -> AttentionSpec:
    fields: dict[str, Any] = {"batch": 2, "seqlen_q": 512, "seqlen_kv": 512, "num_heads": 8, "num_kv_heads": 8,
                              "head_dim": 64, "head_dim_v": 64, "dtype": torch.bfloat16, "device_type": "cuda",
                              "scale": 0.125}  # fmt: skip
    return AttentionSpec(**(fields | changes))


def test_float64_query_is_never_computed_in_its_masks_float32() -> None:
    mask = MaskSpec(dense=DenseSpec("bias", torch.float32, (1, 1, 512, 512)))
    decision = anyattn.explain(cuda(dtype=torch.float64, mask=mask), env=preset("h100", torch_version="2.11"))
    assert decision.kernel == "sdpa"
    assert decision.conversions == ()


def test_misaligned_bias_on_a_gpu_is_steered_and_realigned() -> None:
    mask = MaskSpec(dense=DenseSpec("bias", torch.bfloat16, (1, 1, 512, 512)))
    env = preset("h100", torch_version="2.11")
    assert anyattn.explain(cuda(mask=mask), env=env).kernel == "sdpa"
    decision = anyattn.explain(cuda(mask=mask, storage=Storage(mask_aligned=False)), env=env)
    assert [conversion.code for conversion in decision.conversions] == ["steered"]


@pytest.mark.parametrize("make", [
    lambda: torch.randn(1, 1, 48, 49)[..., :48],
    lambda: torch.randn(1, 1, 48, 64)[..., 1:49],
    lambda: torch.randn(1, 1, 48, 48).transpose(-1, -2),
    lambda: torch.randn(1, 1, 1, 48),
    lambda: torch.randn(1, 1, 48, 1),
    lambda: torch.randn(2, 1, 48, 47)[..., :47],
])  # fmt: skip
def test_bias_for_fused_kernels_has_aligned_rows_and_the_same_values(make: Any) -> None:
    from anyattn.adapters.native.kernels import aligned_bias

    mask = make()
    length = max(mask.shape[-1], 47 if mask.shape[-1] == 47 else 48)
    query, key = torch.empty(2, 3, 48, 8), torch.empty(2, 3, length, 8)
    bias = aligned_bias(mask, query, key)
    assert bias.stride(-1) == 1
    assert all(stride % 16 == 0 for stride in bias.stride()[:-1])
    assert torch.equal(bias, mask.expand(2, 3, 48, length))


def test_subclass_with_another_run_does_not_inherit_shortcuts() -> None:
    from anyattn.adapters.native import Native

    class Twice(Native):
        name = "twice"

        @staticmethod
        def run(plan: Any, query: Any, key: Any, value: Any, parts: Any) -> Any:
            return 2 * Native.run(plan, query, key, value, parts)

    q, k, v = tensors()
    registry.register(Twice())
    try:
        for mask in (None, masks.KeyPadding(torch.rand(2, 8) > 0.2), torch.randn(6, 8)):
            for _ in range(2):
                out = anyattn.attention(q, k, v, mask, backend="twice")
                assert (out - 2 * anyattn.attention(q, k, v, mask)).abs().max() < 1e-5
    finally:
        registry.unregister("twice")
    assert NativeMath().bind is not None


def test_prepare_mask_refuses_integers_as_attention_does() -> None:
    tokens = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    for mask in (tokens[:, None, None], torch.eye(6, 9).long(), torch.zeros(6, 9, dtype=torch.uint8)):
        with pytest.raises(anyattn.InvalidCallError, match="bool"):
            anyattn.prepare_mask(mask)


@pytest.mark.parametrize("backend", ["native", "native_math", "flex"])
def test_plan_refuses_another_alignment_kind_or_size_of_mask(backend: str) -> None:
    q, k, v = tensors()
    keep = torch.rand(2, 8) > 0.3
    keep[0, 0] = False
    mask = masks.KeyPadding(keep)
    run = anyattn.plan(anyattn.explain(q, k, v, mask & masks.Causal("lower_right")).spec, backend=backend)
    run(q, k, v, mask & masks.Causal("lower_right"))
    others = [
        mask & masks.Causal("upper_left"),
        masks.KeyLengths(torch.tensor([3, 4])) & masks.Causal("lower_right"),
        masks.KeyPadding(keep[:1]) & masks.Causal("lower_right"),
        masks.KeyPadding(keep[:, :5]) & masks.Causal("lower_right"),
        masks.Boolean(keep[:, None, None].expand(-1, 2, -1, -1)) & masks.Causal("lower_right"),
    ]
    for other in others:
        with pytest.raises(anyattn.InvalidCallError, match="Plan again"):
            run(q, k, v, other)


def test_backend_that_gives_no_lse_where_sinks_need_it_is_told_so() -> None:
    class Alone(Constant):
        name = "alone"
        declarations = {"cpu": Constant.declarations["cpu"].replace(lse=True, scale_any=True)}

    q, k, v = tensors(8)
    registry.register(Alone(1.0))
    try:
        with pytest.raises(anyattn.KernelError, match=r"\(out, lse\)"):
            anyattn.attention(q, k, v, sinks=torch.zeros(2), backend="alone")
    finally:
        registry.unregister("alone")


def test_precision_is_one_of_three_words() -> None:
    with pytest.raises(anyattn.InvalidCallError, match="fp8"):
        anyattn.attention_backend("auto", precision="fp_8")  # type: ignore[arg-type]


def test_diffusers_integration_is_an_attribute_of_the_package() -> None:
    import subprocess
    import sys

    code = "import anyattn; print(anyattn.integrations.diffusers.SUPPORTED)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
