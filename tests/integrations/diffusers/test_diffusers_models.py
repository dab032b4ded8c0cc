"""Real model classes of Diffusers, tiny and with random weights, against Diffusers alone."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers_tiny import MAIN, TINY, make, output, stock

import anyattn
from anyattn.integrations import diffusers as integration

NAMES = MAIN
BACKENDS = ["native", "_native_math", "flex"]


@pytest.fixture(autouse=True)
def _as_before():
    yield
    integration.disable()
    assert not integration.is_enabled()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_pinned_model_computes_every_attention_with_the_pin_and_agrees_with_float64(name, backend):
    expected = stock(name)
    model, inputs = make(name)
    integration.set_attention_backend(model, backend)
    with anyattn.record() as made:
        result = output(name, model, inputs)
    assert [call.chosen for call in made] == [backend.removeprefix("_")] * expected.calls
    assert expected.agrees(result)


@pytest.mark.parametrize("name", NAMES)
def test_reset_gives_the_model_back_to_diffusers_bit_for_bit(name):
    expected = stock(name)
    model, inputs = make(name)
    integration.set_attention_backend(model, "native_math")
    integration.reset_attention_backend(model)
    assert not integration.is_enabled()
    with anyattn.record() as made:
        result = output(name, model, inputs)
    assert made == []
    assert torch.equal(result, expected.output)


@pytest.mark.parametrize("name", NAMES)
def test_enabling_alone_diverts_no_call(name):
    expected = stock(name)
    integration.enable()
    model, inputs = make(name)
    with anyattn.record() as made:
        result = output(name, model, inputs)
    assert made == []
    assert torch.equal(result, expected.output)


@pytest.mark.parametrize("name", NAMES)
def test_context_reaches_every_attention(name):
    expected = stock(name)
    integration.enable()
    model, inputs = make(name)
    with anyattn.attention_backend("native_math"), anyattn.record() as made:
        result = output(name, model, inputs)
    assert [call.chosen for call in made] == ["native_math"] * expected.calls
    assert expected.agrees(result)


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_setter_leaves_the_choice_to_anyattns_settings(name):
    calls = stock(name).calls
    integration.enable()
    model, inputs = make(name)
    model.set_attention_backend("anyattn")
    with anyattn.record() as made:
        output(name, model, inputs)
        with anyattn.attention_backend("native_math"):
            output(name, model, inputs)
    assert [call.chosen for call in made] == ["native"] * calls + ["native_math"] * calls
    model.reset_attention_backend()
    with anyattn.record() as made:
        output(name, model, inputs)
    assert made == []


def gradients(name, model, inputs):
    model.zero_grad()
    TINY[name].call(model, inputs).square().mean().backward()
    return {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_diffusers(name):
    model, inputs = make(name)
    expected = gradients(name, model, inputs)
    integration.set_attention_backend(model, "native_math")
    with anyattn.record() as made:
        found = gradients(name, model, inputs)
    assert {call.chosen for call in made} == {"native_math"}
    assert found.keys() == expected.keys()
    size = max(grad.abs().amax().item() for grad in expected.values())
    assert all(torch.allclose(found[path], expected[path], rtol=1e-3, atol=1e-5 * max(size, 1.0)) for path in expected)


@pytest.mark.parametrize("name", ["flux", "sd3", "unet", "wan"])
def test_checkpointed_backward_runs_on_the_pin_too(name):
    model, inputs = make(name)
    model.train()
    expected = gradients(name, model, inputs)
    integration.set_attention_backend(model, "native_math")
    with anyattn.record() as plain:
        gradients(name, model, inputs)
    model.enable_gradient_checkpointing()
    with anyattn.record() as made:
        found = gradients(name, model, inputs)
    assert {call.chosen for call in made} == {"native_math"}
    assert len(made) > len(plain), "the backward computes attention again"
    assert all(torch.allclose(found[path], expected[path], rtol=1e-3, atol=1e-4) for path in expected)


class Graphs:
    """A compiler that runs the graph as it is, and notes which kernels are in it."""

    def __init__(self) -> None:
        self.kernels: list[set[str]] = []

    def __call__(self, graph, example_inputs):
        targets = {getattr(node.target, "__name__", str(node.target)) for node in graph.graph.nodes}
        self.kernels.append({target for target in targets if "scaled_dot_product" in target})
        return graph


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("name", ["sd3", "qwen"])
def test_compiled_model_follows_pin_reset_context_and_setter(name):
    in_diffusers = stock(name).output
    integration.enable()
    model, inputs = make(name)
    with anyattn.attention_backend("native_math"):
        by_math = output(name, model, inputs)
    assert not torch.equal(by_math, in_diffusers), "the two kernels must be told apart by their last bits"
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)

    integration.set_attention_backend(model, "native_math")
    assert torch.equal(output(name, compiled, inputs), by_math)
    integration.reset_attention_backend(model)
    assert torch.equal(output(name, compiled, inputs), in_diffusers)
    assert graphs.kernels == [{"_scaled_dot_product_attention_math"}, {"scaled_dot_product_attention"}]
    with anyattn.attention_backend("native_math"):
        assert torch.equal(output(name, compiled, inputs), by_math)
    assert torch.equal(output(name, compiled, inputs), in_diffusers)
    model.set_attention_backend("anyattn")
    with anyattn.attention_backend("native_math"):
        assert torch.equal(output(name, compiled, inputs), by_math)
    model.reset_attention_backend()
    assert torch.equal(output(name, compiled, inputs), in_diffusers)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_training_step_under_a_pin_has_diffusers_gradients():
    model, inputs = make("flux")
    expected = gradients("flux", model, inputs)
    integration.set_attention_backend(model, "native_math")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    compiled(**inputs, return_dict=False)[0].square().mean().backward()
    assert all(
        torch.allclose(parameter.grad, expected[path], rtol=1e-3, atol=1e-4)
        for path, parameter in model.named_parameters()
        if path in expected
    )


def test_two_dimensional_padding_of_qwen_masks_keys_not_rows():
    expected = stock("qwen")
    model, inputs = make("qwen")
    unmasked = output("qwen", model, {**inputs, "encoder_hidden_states_mask": None})
    assert not expected.agrees(unmasked), "the case must be able to fail"
    changed = copy.deepcopy(inputs)
    changed["encoder_hidden_states"][1, 3:] = torch.randn(4, 16)
    integration.set_attention_backend(model, "native_math")
    assert expected.agrees(output("qwen", model, changed))
