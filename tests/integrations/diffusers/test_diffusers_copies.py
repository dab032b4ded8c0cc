"""Copies, pickles, parts, exchanged components and exchanged processors: the pin goes along, or is gone and says so."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from diffusers_classes import CLASSES
from diffusers_tiny import MAIN, chosen, flux_inputs, make, output, unet_inputs
from test_diffusers_pipelines import chosen_by_unet, chosen_by_vae, flux_pipe, sdxl

import anyattn
from anyattn.integrations import diffusers as integration
from anyattn.pins import covering, pins


@pytest.fixture(autouse=True)
def _as_before():
    yield
    integration.disable()


def by_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_file,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["flux", "unet"])
def test_copy_stays_pinned_when_the_original_is_reset_and_is_reset_by_itself(name, way):
    model, inputs = make(name)
    anyattn.set_attention_backend(model, "native_math")
    twin = WAYS[way](model)
    anyattn.reset_attention_backend(model)
    assert chosen(name, model, inputs) == set()
    assert chosen(name, twin, inputs) == {"native_math"}
    assert pins.pin_of(twin).names == ("native_math",)
    anyattn.set_attention_backend(twin, "native")
    assert chosen(name, twin, inputs) == {"native"}
    anyattn.reset_attention_backend(twin)
    assert chosen(name, twin, inputs) == set()
    assert pins.pin_of(twin) is None
    assert not integration.is_enabled()


@pytest.mark.parametrize("way", WAYS)
def test_copy_of_a_routed_model_stays_routed_when_the_integration_was_only_needed_for_it(way):
    model, inputs = make("flux")
    anyattn.set_attention_backend(model, "native_math")
    model.set_attention_backend("anyattn")
    twin = WAYS[way](model)
    model.reset_attention_backend()
    anyattn.reset_attention_backend(model)
    assert chosen("flux", twin, inputs) == {"native_math"}
    anyattn.reset_attention_backend(twin)
    assert chosen("flux", twin, inputs) == {"native"}
    twin.reset_attention_backend()
    assert chosen("flux", twin, inputs) == set()


def test_shallow_copy_is_pinned_or_says_that_it_is_not():
    model, inputs = make("flux")
    anyattn.set_attention_backend(model, "native_math")
    twin = copy.copy(model)
    assert chosen("flux", twin, inputs) == {"native_math"}
    anyattn.reset_attention_backend(model)
    assert chosen("flux", twin, inputs) == set()
    assert pins.pin_of(twin) is None


@pytest.mark.parametrize("way", WAYS)
def test_copied_part_keeps_its_pin_without_the_whole_and_is_reset_by_itself(way):
    model, _ = make("flux")
    anyattn.set_attention_backend(model, "native_math")
    part = WAYS[way](model.single_transformer_blocks[0])
    anyattn.reset_attention_backend(model)
    hidden, text, temb = torch.randn(1, 4, 32), torch.randn(1, 3, 32), torch.randn(1, 32)

    def ran():
        with anyattn.record() as calls, torch.no_grad():
            part(hidden, text, temb)
        return {call.chosen for call in calls}

    assert ran() == {"native_math"}
    assert pins.pin_of(part.attn).names == ("native_math",)
    anyattn.reset_attention_backend(part)
    assert ran() == set()
    assert pins.pin_of(part.attn) is None
    assert not integration.is_enabled()


def test_copied_pipeline_is_reset_by_itself():
    pipe = sdxl()
    anyattn.set_attention_backend(pipe, "native_math")
    twin = copy.deepcopy(pipe)
    anyattn.reset_attention_backend(pipe)
    assert chosen_by_unet(twin) == chosen_by_vae(twin) == {"native_math"}
    assert integration.reset_attention_backend(twin) == ("vae", "unet")
    assert chosen_by_unet(twin) == chosen_by_vae(twin) == set()


def test_component_exchanged_after_the_pin_says_that_it_is_not_pinned_and_reset_frees_the_old_one():
    pipe, other = flux_pipe(), flux_pipe()
    old = pipe.vae
    anyattn.set_attention_backend(pipe, "native_math")
    pipe.vae = other.vae
    assert chosen_by_vae(pipe) == set()
    assert pins.pin_of(pipe.vae) is None
    anyattn.reset_attention_backend(pipe)
    assert pins.pin_of(old) is None
    assert not integration.is_enabled()


def test_saved_model_is_pinned_in_another_process(tmp_path: Path):
    model, _ = make("flux")
    anyattn.set_attention_backend(model, "native_math")
    torch.save((model, flux_inputs()), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, inputs = torch.load(sys.argv[1], weights_only=False)\n"
        "import anyattn\n"
        "with anyattn.record() as calls, torch.no_grad(): model(**inputs)\n"
        "print({call.chosen for call in calls})\n"
        "anyattn.reset_attention_backend(model)\n"
        "from anyattn.integrations import diffusers\n"
        "print(diffusers.is_enabled())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True, check=True
    )
    assert result.stdout.split("\n")[:2] == ["{'native_math'}", "False"]


@pytest.mark.parametrize("name", [*MAIN, *sorted(CLASSES)])
def test_attention_layers_are_covered_and_nothing_else_is_touched(name):
    model, _ = make(name)
    before = {path: (type(part), set(vars(part))) for path, part in model.named_modules()}
    integration.set_attention_backend(model, "native_math")
    layers = {layer.path for layer in integration.attention_layers(model)}
    covered = {path for path, part in model.named_modules() if covering.is_covered(part)}
    assert layers <= covered
    assert len(covered) <= 2 * len(layers) + 1
    for path, part in model.named_modules():
        assert not part._forward_pre_hooks
        assert not part._forward_hooks
        if path not in covered:
            assert (type(part), set(vars(part))) == before[path]
    integration.reset_attention_backend(model)
    assert {path: (type(part), set(vars(part))) for path, part in model.named_modules()} == before


def quiet(name, model, inputs):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = chosen(name, model, inputs)
    return found, [str(one.message) for one in said if issubclass(one.category, anyattn.AnyattnWarning)]


def set_plain(model):
    from diffusers.models.attention_processor import AttnProcessor

    model.set_attn_processor(AttnProcessor())


HOW = {
    "slicing": lambda model: model.set_attention_slice("auto"),
    "set_attn_processor": set_plain,
    "set_default_attn_processor": lambda model: model.set_default_attn_processor(),
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("way", ["pin", "route"])
def test_processor_that_is_not_reached_is_warned_of_at_the_first_call_and_the_original_works_again(how, way):
    model, inputs = make("unet")
    integration.enable()
    if way == "pin":
        anyattn.set_attention_backend(model, "native")
    else:
        model.set_attention_backend("anyattn")
    layer = model.mid_block.attentions[0].transformer_blocks[0].attn1
    assert quiet("unet", model, inputs) == ({"native"}, [])
    originals = model.attn_processors
    how(model)
    found, said = quiet("unet", model, inputs)
    assert found == set()
    assert len(said) == 1
    assert "whole matrix" in said[0]
    assert pins.pin_of(layer) is None
    model.set_attn_processor(originals)
    assert quiet("unet", model, inputs) == ({"native"}, [])
    if way == "pin":
        assert pins.pin_of(layer).names == ("native",)


@pytest.mark.parametrize("name", ["unet", "flux"])
def test_processors_that_reach_anyattn_are_followed_without_a_word(name):
    model, inputs = make(name)
    anyattn.set_attention_backend(model, "native")
    model.fuse_qkv_projections()
    assert quiet(name, model, inputs) == ({"native"}, [])
    model.unfuse_qkv_projections()
    assert quiet(name, model, inputs) == ({"native"}, [])


def test_ip_adapter_processors_are_followed():
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

    model, inputs = make("unet")
    expected = output("unet", model, inputs)
    anyattn.set_attention_backend(model, "native")
    made = {}
    for path in model.attn_processors:
        part = model.get_submodule(path.removesuffix(".processor"))
        cross = path.endswith("attn2.processor")
        made[path] = (
            IPAdapterAttnProcessor2_0(part.inner_dim, part.cross_attention_dim, num_tokens=(2,))
            if cross
            else AttnProcessor2_0()
        )
    model.set_attn_processor(made)
    inputs = unet_inputs()
    given = {**inputs, "encoder_hidden_states": (inputs["encoder_hidden_states"], [torch.randn(2, 1, 2, 16)])}
    found, said = quiet("unet", model, given)
    assert found == {"native"}
    assert said == []
    assert expected.shape == output("unet", model, given).shape


def test_layer_replaced_after_the_pin_is_followed_in_the_forward_and_in_checkpointed_training():
    model, inputs = make("flux")
    anyattn.set_attention_backend(model, "native_math")
    fresh, _ = make("flux")
    model.single_transformer_blocks[0].attn = fresh.single_transformer_blocks[0].attn
    assert chosen("flux", model, inputs) == {"native_math"}
    model.train()
    model.enable_gradient_checkpointing()
    with anyattn.record() as calls:
        model(**inputs, return_dict=False)[0].sum().backward()
    assert {call.chosen for call in calls} == {"native_math"}
    assert len(calls) == 6
    anyattn.reset_attention_backend(model)
    assert not any(covering.is_covered(part) for part in model.modules())


def test_refusal_names_the_layer_that_asked():
    model, inputs = make("flux")
    anyattn.set_attention_backend(model, "flash3")
    with pytest.raises(anyattn.BackendUnavailableError, match=r"transformer_blocks\.0\.attn \(FluxAttention\) of Flux"):
        output("flux", model, inputs)
    model, inputs = make("qwen")
    anyattn.set_attention_backend(model, "native_flash")
    try:
        output("qwen", model, inputs)
    except anyattn.UnsupportedCallError as error:
        assert "transformer_blocks.0.attn" in str(error)  # noqa: PT017 - only where it refuses


def test_dropped_copy_lets_the_integration_go():
    model, _ = make("flux")
    anyattn.set_attention_backend(model, "native_math")
    twin = copy.deepcopy(model)
    del twin
    gc.collect()
    anyattn.reset_attention_backend(model)
    assert not integration.is_enabled()


def test_signatures_that_layers_ask_for_are_cached_while_pinned_and_the_same() -> None:
    model, _ = make("unet")
    kinds = {type(part.processor) for part in model.modules() if hasattr(part, "processor")}
    before = {kind: inspect.signature(kind.__call__) for kind in kinds}
    assert kinds
    anyattn.set_attention_backend(model, "native")
    try:
        assert all(kind.__call__.__signature__ == before[kind] for kind in kinds)
    finally:
        anyattn.reset_attention_backend(model)
    assert all(not hasattr(kind.__call__, "__signature__") for kind in kinds)
