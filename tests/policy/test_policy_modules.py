"""Policies on plain modules: what each selector selects, which rule wins, and what is left as it was."""

from __future__ import annotations

import contextvars
import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anyattn
from anyattn import AnyattnWarning, InvalidCallError, Policy, Rule
from anyattn.pins import covering
from anyattn.policy.report import PolicyReport


@pytest.fixture(autouse=True)
def _models_are_gone_and_torchs_function_is_back() -> Iterator[None]:
    yield
    gc.collect()
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


class Attend(nn.Module):
    """An attention layer that calls torch's function."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        keys = heads if context is None else context.unflatten(-1, (2, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, keys, keys).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1 = Attend()
        self.attn2 = Attend()

    def forward(self, x: Tensor) -> Tensor:
        return self.attn2(self.attn1(x), x[:, :3])


class Model(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


X = torch.randn(1, 5, 32)


def ran(model: Any, *args: Any) -> list[tuple[str, str | None, str]]:
    """Give layer, backend and source of each call; the layer without the model's class."""
    with torch.no_grad(), anyattn.record() as calls:
        model(*(args or (X,)))
    layers = [layer.partition(".")[2] for layer in calls.layers]
    return [(layer, call.chosen, call.preference.source) for layer, call in zip(layers, calls, strict=True)]


def decided(model: Any, *args: Any) -> dict[str, str]:
    """Give the rule, or other source, that decided for each layer."""
    return {layer: source.removeprefix("policy rule ").strip("'") for layer, _, source in ran(model, *args)}


def state(model: nn.Module) -> list[tuple[type, list[str]]]:
    return [(type(part), sorted(vars(part))) for part in model.modules()]


@pytest.mark.parametrize(
    ("selector", "layers"),
    [
        ({}, "0.1 0.2 1.1 1.2 2.1 2.2"),
        ({"role": "self"}, "0.1 1.1 2.1"),
        ({"role": "cross"}, "0.2 1.2 2.2"),
        ({"role": ["self", "cross"]}, "0.1 0.2 1.1 1.2 2.1 2.2"),
        ({"modules": "blocks.1"}, "1.1 1.2"),
        ({"modules": "blocks.*.attn2"}, "0.2 1.2 2.2"),
        ({"modules": ["blocks.0.*", "*.2.attn1"]}, "0.1 0.2 2.1"),
        ({"modules": "blocks.[!1]"}, "0.1 0.2 2.1 2.2"),
        ({"layers": "1:-1"}, "0.2 1.1 1.2 2.1"),
        ({"layers": "-1"}, "2.2"),
        ({"layers": "0.5:"}, "1.2 2.1 2.2"),
        ({"role": "self", "layers": "1:-1"}, "1.1"),
        ({"role": "self", "modules": "blocks.[01]", "layers": "-1"}, "1.1"),
    ],
)
def test_selectors_select_these_layers_and_no_others(selector: dict[str, Any], layers: str) -> None:
    model = Model()
    report = anyattn.set_attention_backend(model, Policy([Rule("chosen", "native_math", **selector)]))
    want = [f"blocks.{name.replace('.', '.attn')}" for name in layers.split()]
    assert ran(model) == [(layer, "native_math", "policy rule 'chosen'") for layer in want]
    assert report.shares[0].layers == tuple(want)
    assert dict(report.left) == ({"Model": 6 - len(want)} if len(want) < 6 else {})
    anyattn.reset_attention_backend(model)
    assert ran(model) == []


def test_first_rule_that_selects_a_layer_decides() -> None:
    model = Model()
    policy = Policy(
        [Rule("last", "native_math", layers="-1"), Rule("cross", "flex", role="cross"), Rule("rest", "auto")]
    )
    anyattn.set_attention_backend(model, policy)
    assert list(decided(model).values()) == ["rest", "cross", "rest", "cross", "rest", "last"]
    assert [backend for _, backend, _ in ran(model)] == ["native", "flex"] * 2 + ["native", "native_math"]


def test_rules_by_step_take_turns_and_leave_the_other_steps_to_later_rules() -> None:
    model = Model(1)
    policy = Policy(
        [
            Rule("middle", "native_math", role="self", steps="1:-1"),
            Rule("end", "flex", role="self", steps="-1"),
            Rule("rest", "native"),
        ]
    )
    anyattn.set_attention_backend(model, policy)
    found = []
    for step in range(4):
        with anyattn.denoising_step(step, 4):
            found.append(decided(model)["blocks.0.attn1"])
    assert found == ["rest", "middle", "middle", "end"]


def test_layer_that_no_rule_selects_is_decided_as_without_the_policy() -> None:
    model = Model(1)
    anyattn.set_attention_backend(model, ["native_math"])
    anyattn.set_attention_backend(model, Policy([Rule("cross", "flex", role="cross")]))
    assert decided(model) == {"blocks.0.attn1": "model", "blocks.0.attn2": "cross"}
    anyattn.reset_attention_backend(model)
    anyattn.set_attention_backend(model, Policy([Rule("cross", "flex", role="cross")]))
    assert decided(model) == {"blocks.0.attn2": "cross"}
    with anyattn.replace_sdpa("native_math"), pytest.warns(AnyattnWarning, match=r"policy rule 'cross' to flex"):
        assert decided(model) == {"blocks.0.attn1": "replace_sdpa", "blocks.0.attn2": "cross"}
    anyattn.reset_attention_backend(model)


def test_call_and_overriding_block_beat_the_policy_and_a_block_does_not() -> None:
    class Own(nn.Module):
        backend: str | None = None

        def forward(self, x: Tensor) -> Tensor:
            return anyattn.attention(x, x, x, backend=self.backend)

    model = nn.Sequential(Own())
    x = torch.randn(1, 4, 2, 16)
    anyattn.set_attention_backend(model, Policy([Rule("all", "flex")]))
    assert ran(model, x)[0][1:] == ("flex", "policy rule 'all'")
    with pytest.warns(AnyattnWarning, match=r"attention_backend\(native\) by policy rule 'all' to flex"):  # noqa: SIM117
        with anyattn.attention_backend("native"):
            assert ran(model, x)[0][1:] == ("flex", "policy rule 'all'")
    with anyattn.attention_backend("native", override=True), anyattn.record() as calls:
        model(x)
    assert calls[0].preference.source == "context"
    assert calls[0].overruled == "policy rule 'all' to flex by attention_backend(native, override=True)"
    model[0].backend = "native_math"
    assert ran(model, x)[0][1:] == ("native_math", "backend=")


def test_explain_inside_a_layer_names_the_rule() -> None:
    class Explains(nn.Module):
        def forward(self, x: Tensor) -> anyattn.Decision:
            anyattn.attention(x, x, x)
            return anyattn.explain(x, x, x)

    model = nn.Sequential(Explains())
    anyattn.set_attention_backend(model, Policy([Rule("all of it", ["flash3", "native_math"])]))
    decision = model(torch.randn(1, 4, 2, 16))
    assert decision.preference.source == "policy rule 'all of it'"
    assert "requested: flash3, native_math (by policy rule 'all of it')" in str(decision)


def test_required_backend_that_refuses_names_rule_and_layer() -> None:
    model = Model(1)
    anyattn.set_attention_backend(model, Policy([Rule("one", "flash3", role="self")]))
    message = (
        r"flash3 \(requested by policy rule 'one'\)[\s\S]*The layer that made the call: blocks\.0\.attn1 \(Attend\)"
    )
    with pytest.raises(anyattn.BackendUnavailableError, match=message) as raised:
        model(X)
    assert 'To fall back to native, write: backend=["flash3", "native"] in policy rule \'one\'' in str(raised.value)
    anyattn.reset_attention_backend(model)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [Rule("vae", "auto", role="vae")],
            r"Policy rule 'vae' \(auto; role vae\) selects no attention layer of Model\. It has: Model: 6 layers "
            r"\(3 self, 3 cross\), named blocks\.0\.attn1, blocks\.0\.attn2, \.\.\. blocks\.2\.attn2\. "
            r"Nothing was changed\. Correct the rule, or set optional=True",
        ),
        ([Rule("one", "auto", modules="block.*")], r"selects no attention layer of Model"),
        ([Rule("one", "auto", layers="7:")], r"selects no attention layer of Model"),
        (
            [Rule("all", "auto"), Rule("late", "flex", role="cross")],
            r"'late' would never decide: earlier rules decide for every layer of Model .* Put it before them",
        ),
        ([Rule("none", "auto", role="vae", optional=True)], "This policy would change nothing: no rule selects"),
    ],
)
def test_rule_that_would_never_decide_is_refused_and_nothing_is_changed(rules: list[Rule], message: str) -> None:
    model = Model()
    before = state(model)
    with pytest.raises(InvalidCallError, match=message):
        anyattn.set_attention_backend(model, Policy([*rules]))
    assert state(model) == before
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    kept = Policy([Rule("kept", "native_math")])
    anyattn.set_attention_backend(model, kept)
    during = state(model)
    with pytest.raises(InvalidCallError, match=message):
        anyattn.set_attention_backend(model, Policy(rules))
    assert state(model) == during
    assert set(decided(model).values()) == {"kept"}


def test_optional_rule_may_select_nothing() -> None:
    policy = Policy([Rule("vae", "flex", role="vae", optional=True), Rule("rest", "auto")])
    report = anyattn.set_attention_backend(model := Model(), policy)
    assert [share.rule for share in report.shares] == ["rest"]
    assert "  vae: flex; role vae; optional\n    no layer\n" in str(report)
    anyattn.reset_attention_backend(model)


def test_wrong_objects_and_arguments_are_refused() -> None:
    policy = Policy([Rule("all", "auto")])
    with pytest.raises(InvalidCallError, match=r"A policy is set on a torch\.nn\.Module or a Diffusers pipeline; str"):
        anyattn.set_attention_backend("model", policy)
    with pytest.raises(InvalidCallError, match="leave precision out"):
        anyattn.set_attention_backend(Model(), policy, precision="int8")
    with pytest.raises(InvalidCallError, match=r"made one first: anyattn\.Policy\.from_dict\(data\)"):
        anyattn.set_attention_backend(Model(), policy.to_dict())  # type: ignore[arg-type]


def test_reset_takes_everything_away_exactly_and_once() -> None:
    model = Model()
    before = state(model)
    anyattn.set_attention_backend(model, Policy([Rule("one", "flex", role="self"), Rule("two", "native_math")]))
    assert state(model) != before
    assert F.scaled_dot_product_attention is not torch._C._nn.scaled_dot_product_attention
    anyattn.reset_attention_backend(model)
    assert state(model) == before
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    with pytest.raises(InvalidCallError, match="no backend of its own to reset"):
        anyattn.reset_attention_backend(model)


def test_policy_keeps_no_model_alive() -> None:
    model = Model()
    anyattn.set_attention_backend(model, Policy([Rule("all", "flex")]))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_state_dict_and_saved_weights_know_nothing_of_it() -> None:
    model = nn.Sequential(nn.Linear(32, 32), Model(1))
    before = model.state_dict()
    anyattn.set_attention_backend(model, Policy([Rule("all", "native_math")]))
    assert model.state_dict().keys() == before.keys()
    nn.Sequential(nn.Linear(32, 32), Model(1)).load_state_dict(model.state_dict())


def test_latest_setting_of_one_object_replaces_the_one_before() -> None:
    model = Model(1)
    anyattn.set_attention_backend(model, Policy([Rule("first", "flex")]))
    anyattn.set_attention_backend(model, Policy([Rule("second", "native_math", role="self")]))
    assert decided(model) == {"blocks.0.attn1": "second"}
    anyattn.set_attention_backend(model, "native")
    assert set(decided(model).values()) == {"model"}
    anyattn.reset_attention_backend(model)
    assert ran(model) == []


def test_policy_of_a_part_beats_that_of_the_whole_in_either_order_and_gives_it_back() -> None:
    for order in (0, 1):
        model = Model(2)
        pair = [(model, Policy([Rule("whole", "flex")])), (model.blocks[1], Policy([Rule("part", "native_math")]))]
        for target, policy in pair[:: 1 - 2 * order]:
            anyattn.set_attention_backend(target, policy)
        assert list(decided(model).values()) == ["whole", "whole", "part", "part"]
        anyattn.reset_attention_backend(model.blocks[1])
        assert set(decided(model).values()) == {"whole"}
        anyattn.set_attention_backend(model.blocks[1], pair[1][1])
        anyattn.reset_attention_backend(model)
        assert decided(model) == {"blocks.1.attn1": "part", "blocks.1.attn2": "part"}
        anyattn.reset_attention_backend(model.blocks[1])


def test_pin_set_inside_a_model_with_a_policy_waits_and_says_so() -> None:
    model = Model(2)
    anyattn.set_attention_backend(model, Policy([Rule("cross", "flex", role="cross")]))
    with pytest.warns(
        AnyattnWarning, match="waits in layers for which policy rule 'cross' decides: a policy beats pins"
    ):
        anyattn.set_attention_backend(model.blocks[0], "native_math")
    assert decided(model) == {"blocks.0.attn1": "model", "blocks.0.attn2": "cross", "blocks.1.attn2": "cross"}
    anyattn.reset_attention_backend(model)
    assert decided(model) == {"blocks.0.attn1": "model", "blocks.0.attn2": "model"}


def by_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), by_file])
def test_copy_keeps_the_policy_and_is_reset_by_itself(way: Any) -> None:
    model = Model(1)
    policy = Policy([Rule("middle", "flex", role="self", steps="1:"), Rule("rest", "native_math")])
    anyattn.set_attention_backend(model, policy)
    twin = way(model)
    anyattn.reset_attention_backend(model)
    with anyattn.denoising_step(1, 2):
        assert decided(twin) == {"blocks.0.attn1": "middle", "blocks.0.attn2": "rest"}
        assert ran(model) == []
    anyattn.reset_attention_backend(twin)
    assert ran(twin) == []
    assert not [part for part in twin.modules() if covering.is_covered(part)]
    with pytest.raises(InvalidCallError, match="no backend"):
        anyattn.reset_attention_backend(twin)


def test_module_held_in_two_places_is_one_layer_with_both_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Attend()
            self.second = self.first
            self.cross_attn = Attend()

        def forward(self, x: Tensor) -> Tensor:
            return self.cross_attn(self.second(self.first(x)), x)

    model = Twice()
    report = anyattn.set_attention_backend(
        model, Policy([Rule("second", "flex", modules="second"), Rule("rest", "native_math")])
    )
    assert [share.total for share in report.shares] == [2, 2]
    assert [source for _, _, source in ran(model)] == ["policy rule 'second'"] * 2 + ["policy rule 'rest'"]
    anyattn.reset_attention_backend(model)


def test_layer_without_a_name_is_the_model_itself() -> None:
    model = Attend()
    anyattn.set_attention_backend(model, Policy([Rule("all", "native_math")]))
    assert [backend for _, backend, _ in ran(model)] == ["native_math"]
    anyattn.reset_attention_backend(model)
    assert type(model) is Attend


def test_torchs_transformer_layers_are_selected_whole_and_their_fast_path_is_left_out() -> None:
    layer = nn.TransformerEncoderLayer(32, 2, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    want = model(X)
    anyattn.set_attention_backend(model, Policy([Rule("middle", "native_math", layers="1:-1")]))
    assert ran(model) == [("layers.1.self_attn", "native_math", "policy rule 'middle'")]
    torch.testing.assert_close(model(X), want)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 2, batch_first=True), 1).eval()
    anyattn.set_attention_backend(decoder, Policy([Rule("cross", "flex", role="cross"), Rule("rest", "native")]))
    assert decided(decoder, X, X) == {"layers.0.self_attn": "rest", "layers.0.multihead_attn": "cross"}


def test_torchs_encoder_makes_no_nested_tensors_under_a_policy_and_does_so_again_after_it() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, batch_first=True), 2).eval()
    before = dict(vars(model))
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    x = torch.randn(2, 5, 32)
    want = model(x, src_key_padding_mask=padding)
    for target, name in ((model, "first"), (model.layers, "second")):
        anyattn.set_attention_backend(target, Policy([Rule(name, "native_math", layers="0")]))
        with torch.no_grad():
            got = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(got[~padding], want[~padding])
    anyattn.reset_attention_backend(model)
    with torch.no_grad(), anyattn.record() as calls:
        model(x, src_key_padding_mask=padding)
    assert [call.preference.source for call in calls] == ["policy rule 'second'"]
    anyattn.reset_attention_backend(model.layers)
    anyattn.set_attention_backend(model, Policy([Rule("all", "native")]))
    anyattn.reset_attention_backend(model)
    assert dict(vars(model)) == before


def test_module_without_attention_is_refused() -> None:
    for model in (nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())):
        before = state(model)
        with pytest.raises(InvalidCallError, match=f"selects no attention layer of {type(model).__name__}"):
            anyattn.set_attention_backend(model, Policy([Rule("all", "auto")]))
        assert state(model) == before


def test_parts_of_a_persons_own_model_have_the_roles_that_their_names_say() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text_encoder, self.denoiser, self.vae = Model(1), Model(1), Model(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.vae(self.denoiser(self.text_encoder(x)))

    model = Whole()
    policy = Policy(
        [
            Rule("text", "flex", role="text_encoder"),
            Rule("vae", "native_math", role="vae"),
            Rule("self", "native", role="self"),
        ]
    )
    anyattn.set_attention_backend(model, policy)
    assert list(decided(model).values()) == ["text", "text", "self", "vae", "vae"]
    anyattn.reset_attention_backend(model)


def test_model_outside_of_counted_steps_is_warned_of_once() -> None:
    model = Model(1)
    anyattn.set_attention_backend(model, Policy([Rule("middle", "flex", steps="1:-1"), Rule("rest", "native")]))
    with pytest.warns(AnyattnWarning, match=r"policy rule 'middle' can't apply\.[\s\S]*with anyattn\.denoising_step"):
        assert set(decided(model).values()) == {"rest"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(decided(model).values()) == {"rest"}


@pytest.mark.parametrize("step", [(-1, 4), (4, 4), (0, 0), (1.0, 4), (True, 4), ("0", 1)])
def test_step_that_is_none_is_refused(step: Any) -> None:
    with pytest.raises(InvalidCallError, match="denoising_step takes a step counted from 0"):
        anyattn.denoising_step(*step)


def test_steps_are_those_of_the_thread_and_context_and_end_with_the_block() -> None:
    model = Model(1)
    anyattn.set_attention_backend(model, Policy([Rule("first", "flex", steps="0"), Rule("rest", "native_math")]))
    found: dict[str, set[str]] = {}
    barrier = threading.Barrier(2)

    def loop(name: str, step: int) -> None:
        with anyattn.denoising_step(step, 2):
            barrier.wait()
            found[name] = set(decided(model).values())
            barrier.wait()

    threads = [threading.Thread(target=loop, args=(f"step {step}", step)) for step in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"step 0": {"first"}, "step 1": {"rest"}}
    block = anyattn.denoising_step(0, 2)
    with anyattn.denoising_step(1, 2), block:
        with block:
            assert set(decided(model).values()) == {"first"}
        context = contextvars.copy_context()
    with anyattn.denoising_step(1, 2):
        assert set(decided(model).values()) == {"rest"}
        assert set(context.run(decided, model).values()) == {"first"}
    with pytest.raises(ValueError, match="inside"), anyattn.denoising_step(0, 2):
        raise ValueError("inside")
    with pytest.warns(AnyattnWarning, match="outside of every denoising step"):
        assert set(decided(model).values()) == {"rest"}


def test_compiled_model_follows_the_steps_and_is_compiled_once_for_each_rule() -> None:
    model = Model(1)
    policy = Policy([Rule("middle", "flex", role="self", steps="2:-2"), Rule("rest", "native_math")])
    anyattn.set_attention_backend(model, policy)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(str(graph.code))
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    counts = []
    with torch.no_grad():
        for _ in range(2):
            for step in range(6):
                with anyattn.denoising_step(step, 6):
                    out = compiled(X)
                counts.append(len(graphs))
                torch.testing.assert_close(out, Model(1)(X))
    assert counts == [1, 1, 2, 2, 2, 2] + [2] * 6
    assert "flex" not in graphs[0]
    assert "flex" in graphs[1]
    anyattn.reset_attention_backend(model)
    with torch.no_grad():
        compiled(X)
    assert len(graphs) == 3
    anyattn.set_attention_backend(model, policy)
    with torch.no_grad(), anyattn.denoising_step(3, 6):
        compiled(X)
    assert len(graphs) == 3
    anyattn.reset_attention_backend(model)


def test_compiled_model_outside_of_counted_steps_is_warned_of() -> None:
    model = Model(1)
    anyattn.set_attention_backend(model, Policy([Rule("middle", "flex", steps="1:-1"), Rule("rest", "native_math")]))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        with pytest.warns(AnyattnWarning, match=r"policy rule 'middle' can't apply\."):
            compiled(X)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compiled(X)
            with anyattn.denoising_step(1, 3):
                compiled(X)
    anyattn.reset_attention_backend(model)


def test_report_is_a_value_with_the_policy() -> None:
    model, policy = Model(), Policy([Rule("self", "auto", role="self")], "own")
    report = anyattn.set_attention_backend(model, policy)
    assert isinstance(report, PolicyReport)
    assert report.policy == policy
    assert str(report) == (
        "policy 'own':\n  self: auto; role self\n    3 of 6 attention layers (Model)\n"
        "  no rule: 3 attention layers (Model)"
    )


def test_policies_on_a_whole_and_its_part_are_joined_step_by_step() -> None:
    model = Model(1)
    anyattn.set_attention_backend(
        model, Policy([Rule("whole", "flex", role="self"), Rule("late", "native", steps="2:")])
    )
    anyattn.set_attention_backend(model.blocks, Policy([Rule("part", "native_math", steps="1")]))
    found = []
    for step in range(3):
        with anyattn.denoising_step(step, 3):
            found.append(tuple(decided(model).values()))
    assert found == [("whole",), ("part", "part"), ("whole", "late")]
    other = Model(1)
    anyattn.set_attention_backend(other, Policy([Rule("other", "flex")]))
    anyattn.reset_attention_backend(other)
    anyattn.reset_attention_backend(model)
    with anyattn.denoising_step(1, 3):
        assert set(decided(model).values()) == {"part"}
    anyattn.reset_attention_backend(model.blocks)
    assert not [part for part in model.modules() if covering.is_covered(part)]
