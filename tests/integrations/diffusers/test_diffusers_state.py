"""What the integration changes, for whom, and that every bit of it is undone."""

from __future__ import annotations

import copy
import gc
import sys
import weakref

import pytest
import torch
from diffusers_tiny import chosen, make, output, stock

import anyattn
from anyattn.integrations import diffusers as integration

attention_dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
REGISTRY = attention_dispatch._AttentionBackendRegistry
NAMES = attention_dispatch.AttentionBackendName


@pytest.fixture(autouse=True)
def _as_before():
    active = REGISTRY._active_backend
    yield
    integration.disable()
    REGISTRY.set_active_backend(active)


def snapshot():
    """Everything of Diffusers and torch that the integration may touch."""
    modules = {
        name: {key: id(value) for key, value in vars(module).items() if key in ("F", "nn", "dispatch_attention_fn")}
        for name, module in list(sys.modules.items())
        if name.startswith("diffusers.") and hasattr(module, "__file__")
    }
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.modeling_utils import ModelMixin

    return (
        modules,
        [id(vars(ModelMixin)[name]) for name in ("set_attention_backend", "reset_attention_backend")],
        id(vars(AttentionModuleMixin)["set_attention_backend"]),
        list(NAMES),
        dict(NAMES._value2member_map_),
        dict(NAMES._member_map_),
        sorted(vars(NAMES)),
        dict(REGISTRY._backends),
        dict(REGISTRY._constraints),
        dict(REGISTRY._supported_arg_names),
        REGISTRY._active_backend,
        list(sys.meta_path),
        id(torch.nn.functional.scaled_dot_product_attention),
    )


def hooks(model):
    return [
        (path, type(module), len(module._forward_pre_hooks), len(module._forward_hooks), sorted(vars(module)))
        for path, module in model.named_modules()
    ]


def test_disable_restores_everything_exactly():
    model, _ = make("sd3")
    before, hooks_before = snapshot(), hooks(model)
    integration.enable()
    assert snapshot() != before
    integration.set_attention_backend(model, "native_math")
    model.set_attention_backend("anyattn")
    assert hooks(model) != hooks_before
    integration.disable()
    assert snapshot() == before
    assert hooks(model) == hooks_before
    # Not left over from before either, where another test ran first.
    tables = (REGISTRY._backends, REGISTRY._constraints, REGISTRY._supported_arg_names, NAMES._value2member_map_)
    assert not any("anyattn" in table for table in tables)
    assert not any("anyattn" in type(finder).__module__ for finder in sys.meta_path)


def test_enable_and_disable_are_idempotent():
    before = snapshot()
    integration.enable()
    once = snapshot()
    integration.enable()
    assert snapshot() == once
    integration.disable()
    integration.disable()
    assert snapshot() == before


def test_torch_itself_is_never_patched():
    sdpa = torch.nn.functional.scaled_dot_product_attention
    integration.enable()
    model, _ = make("unet")
    integration.set_attention_backend(model, "native_math")
    assert torch.nn.functional.scaled_dot_product_attention is sdpa


def test_reset_of_the_last_pin_disables_what_the_setter_enabled():
    model, _ = make("flux")
    before = snapshot()
    integration.set_attention_backend(model, "native_math")
    assert integration.is_enabled()
    integration.reset_attention_backend(model)
    assert snapshot() == before


def test_reset_of_the_last_pin_keeps_what_diffusers_setter_rests_on():
    model, inputs = make("flux")
    integration.set_attention_backend(model, "native_math")
    model.set_attention_backend("anyattn")
    integration.reset_attention_backend(model)
    assert chosen("flux", model, inputs) == {"native"}


def test_reset_keeps_what_enable_enabled():
    model, _ = make("flux")
    integration.enable()
    integration.set_attention_backend(model, "native_math")
    integration.reset_attention_backend(model)
    assert integration.is_enabled()


def test_setting_one_model_changes_no_other():
    """Diffusers' setter switches the whole process (its issue 14249)."""
    integration.enable()
    (one, inputs), (other, _) = make("flux"), make("flux")
    one.set_attention_backend("anyattn")
    assert chosen("flux", one, inputs) == {"native"}
    assert chosen("flux", other, inputs) == set()
    one.reset_attention_backend()
    integration.set_attention_backend(one, "native_math")
    assert chosen("flux", one, inputs) == {"native_math"}
    assert chosen("flux", other, inputs) == set()
    assert REGISTRY._active_backend == "native"


def test_reset_really_resets():
    integration.enable()
    model, inputs = make("sd3")
    model.set_attention_backend("anyattn")
    model.reset_attention_backend()
    assert chosen("sd3", model, inputs) == set()
    integration.set_attention_backend(model, "native_math")
    integration.reset_attention_backend(model)
    assert chosen("sd3", model, inputs) == set()


def test_diffusers_own_names_still_run_in_diffusers():
    integration.enable()
    model, inputs = make("flux")
    expected = stock("flux")
    model.set_attention_backend("_native_math")
    assert chosen("flux", model, inputs) == set()
    assert expected.agrees(output("flux", model, inputs))
    assert REGISTRY._active_backend == "_native_math"
    model.reset_attention_backend()
    REGISTRY.set_active_backend(NAMES.NATIVE)
    with attention_dispatch.attention_backend("_native_math"):
        assert chosen("flux", model, inputs) == set()


def test_diffusers_setter_replaces_what_it_set_before():
    integration.enable()
    model, inputs = make("flux")
    model.set_attention_backend("_native_math")
    model.set_attention_backend("anyattn")
    assert chosen("flux", model, inputs) == {"native"}
    model.set_attention_backend("_native_math")
    assert chosen("flux", model, inputs) == set()


@pytest.mark.parametrize("name", ["flux", "sd3", "unet"])
def test_diffusers_context_manager_reaches_anyattn(name):
    integration.enable()
    model, inputs = make(name)
    with attention_dispatch.attention_backend("anyattn"):
        assert chosen(name, model, inputs) == {"native"}
        with anyattn.attention_backend("native_math"):
            assert chosen(name, model, inputs) == {"native_math"}
    assert chosen(name, model, inputs) == set()


def test_setter_of_an_attention_layer_reaches_anyattn():
    integration.enable()
    model, inputs = make("flux")
    model.transformer_blocks[0].attn.set_attention_backend("anyattn")
    with anyattn.record() as calls:
        output("flux", model, inputs)
    assert len(calls) == 1


def test_unknown_name_is_refused_by_both_and_changes_nothing():
    integration.enable()
    model, _ = make("flux")
    before = hooks(model)
    with pytest.raises(ValueError, match="must be one of"):
        model.set_attention_backend("anyatn")
    with pytest.raises(anyattn.UnknownBackendError, match="native_math"):
        integration.set_attention_backend(model, "nativ_math")
    assert hooks(model) == before


def test_setter_that_would_change_nothing_is_an_error_and_changes_nothing():
    from diffusers import AutoencoderTiny

    model = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    before = snapshot()
    with pytest.raises(anyattn.InvalidCallError, match="no attention layers"):
        integration.set_attention_backend(model, "native_math")
    assert snapshot() == before
    integration.enable()
    before = hooks(model)
    with pytest.raises(anyattn.InvalidCallError, match="change nothing"):
        model.set_attention_backend("anyattn")
    assert hooks(model) == before


def test_model_that_computes_attention_by_hand_is_an_error_with_the_reason():
    from diffusers.models.attention_processor import AttnProcessor

    model, _ = make("unet")
    model.set_attn_processor(AttnProcessor())
    with pytest.raises(anyattn.InvalidCallError, match=r"AttnProcessor: .*matrix of weights"):
        integration.set_attention_backend(model, "native_math")
    assert not integration.is_enabled()


def test_layers_that_are_not_reached_are_said():
    from diffusers.models.attention_processor import AttnProcessor

    model, _ = make("unet")
    model.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(AttnProcessor())
    with pytest.warns(anyattn.AnyattnWarning, match="AttnProcessor"):
        report = integration.set_attention_backend(model, "native_math")
    (component,) = report.components
    assert [layer.path for layer in component.left] == ["mid_block.attentions.0.transformer_blocks.0.attn1"]
    assert component.layers > 0


def test_reset_without_a_pin_is_an_error():
    model, _ = make("flux")
    with pytest.raises(anyattn.InvalidCallError, match="nothing to reset"):
        integration.reset_attention_backend(model)


def test_objects_of_others_are_not_handled():
    assert not integration.handles(torch.nn.Linear(2, 2))
    assert not integration.handles("flux")
    with pytest.raises(anyattn.InvalidCallError, match="pipeline or model"):
        integration.set_attention_backend(torch.nn.Linear(2, 2), "native")


def test_no_model_is_kept_alive():
    model, inputs = make("flux")
    integration.enable()
    model.set_attention_backend("anyattn")
    integration.set_attention_backend(model, "native_math")
    output("flux", model, inputs)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_failing_forward_leaves_no_pin_in_force():
    model, inputs = make("flux")
    other, _ = make("flux")
    integration.enable()
    model.set_attention_backend("anyattn")
    integration.set_attention_backend(model, "native_math")
    with pytest.raises(RuntimeError):
        output("flux", model, {**inputs, "hidden_states": torch.randn(2, 16, 5)})
    assert chosen("flux", other, inputs) == set()


def test_dispatcher_taken_before_enabling_still_knows_the_name_and_drops_nothing():
    taken = attention_dispatch.dispatch_attention_fn
    query = torch.randn(1, 4, 2, 8)
    integration.enable()
    assert taken is not attention_dispatch.dispatch_attention_fn
    with anyattn.record() as calls:
        taken(query, query, query, backend="anyattn")
    assert len(calls) == 1
    with pytest.raises(anyattn.InvalidCallError, match="windw"):
        taken(query, query, query, attention_kwargs={"windw": 3}, backend="anyattn")


def test_layer_skip_guidance_still_skips_the_scores():
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode

    expected = {}
    for name in ("flux", "sd3"):
        model, inputs = make(name)
        with AttentionScoreSkipFunctionMode():
            expected[name] = output(name, model, inputs)
        integration.set_attention_backend(model, "flex")
        with AttentionScoreSkipFunctionMode():
            assert torch.equal(output(name, model, inputs), expected[name])
        assert not stock(name).agrees(expected[name]), "skipping must make a difference"
        assert stock(name).agrees(output(name, model, inputs))


def test_copy_of_a_model_keeps_its_wishes_and_can_be_reset_by_itself():
    integration.enable()
    model, inputs = make("flux")
    model.set_attention_backend("anyattn")
    twin = copy.deepcopy(model)
    assert chosen("flux", twin, inputs) == {"native"}
    twin.reset_attention_backend()
    assert chosen("flux", twin, inputs) == set()
    assert chosen("flux", model, inputs) == {"native"}
    integration.set_attention_backend(model, "native_math")
    twin = copy.deepcopy(model)
    assert chosen("flux", twin, inputs) == {"native_math"}
    integration.reset_attention_backend(twin)
    twin.reset_attention_backend()
    assert chosen("flux", twin, inputs) == set()
    assert chosen("flux", model, inputs) == {"native_math"}
