"""A backend for a whole pipeline: what is pinned, what is not changed, and which preference counts."""

from __future__ import annotations

import gc

import pytest
import torch
from diffusers_tiny import flux, unet, vae

import anyattn
from anyattn.integrations import diffusers as integration

pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def _as_before():
    yield
    integration.disable()


def text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=2,
            num_hidden_layers=1,
            vocab_size=20,
            projection_dim=32,
        )
    )


def sdxl():
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(1)
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=text_encoder(),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet(),
        scheduler=EulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_pipe():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=flux(),
    )


def chosen(module, *args, **kwargs):
    with anyattn.record() as calls, torch.no_grad():
        module(*args, **kwargs)
    return {call.chosen for call in calls}


def chosen_by_vae(pipe):
    return chosen(pipe.vae, torch.randn(1, 3, 16, 16))


def chosen_by_unet(pipe):
    from diffusers_tiny import unet_inputs

    return chosen(pipe.unet, **unet_inputs())


def test_pipeline_pins_what_diffusers_computes_and_reports_the_rest():
    pipe = sdxl()
    report = integration.set_attention_backend(pipe, "native_math")
    assert report.pinned == ("vae", "unet")
    left = {component.name: component for component in report.components if not component.pinned}
    assert left.keys() == {"text_encoder_2"}
    assert "transformers" in left["text_encoder_2"].reason
    assert "text_encoder_2 (CLIPTextModel): not changed" in str(report)
    assert chosen_by_vae(pipe) == chosen_by_unet(pipe) == {"native_math"}
    assert chosen(pipe.text_encoder_2, torch.ones(1, 4, dtype=torch.long)) == set()
    assert integration.reset_attention_backend(pipe) == ("vae", "unet")
    assert chosen_by_vae(pipe) == chosen_by_unet(pipe) == set()
    assert not integration.is_enabled()


def test_pipeline_runs_end_to_end_on_the_pin_as_it_does_in_diffusers():
    pipe = sdxl()

    def image():
        torch.manual_seed(2)
        embeds = {name: torch.randn(1, 7, 16) for name in ("prompt_embeds", "negative_prompt_embeds")}
        pooled = {f"{'negative_' * n}pooled_prompt_embeds": torch.randn(1, 32) for n in (0, 1)}
        sizes = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt"}
        return pipe(**embeds, **pooled, **sizes, generator=torch.Generator().manual_seed(0)).images

    expected = image()
    report = anyattn.set_attention_backend(pipe, "auto")
    assert report.pinned == ("vae", "unet")
    with anyattn.record() as calls:
        found = image()
    assert len(calls) > 10
    assert torch.allclose(found, expected, atol=1e-4)
    anyattn.reset_attention_backend(pipe)
    assert torch.equal(image(), expected)


@pytest.mark.parametrize("model_first", [True, False])
def test_models_own_wish_beats_its_pipelines_in_either_order(model_first):
    pipe = sdxl()
    steps = [(pipe.vae, "flex"), (pipe, "native_math")]
    for target, backend in steps if model_first else reversed(steps):
        integration.set_attention_backend(target, backend)
    assert chosen_by_vae(pipe) == {"flex"}
    assert chosen_by_unet(pipe) == {"native_math"}
    integration.reset_attention_backend(pipe.vae)
    assert chosen_by_vae(pipe) == {"native_math"}
    integration.reset_attention_backend(pipe)
    assert chosen_by_vae(pipe) == chosen_by_unet(pipe) == set()


def test_reset_of_the_pipeline_keeps_the_models_own_wish():
    pipe = sdxl()
    integration.set_attention_backend(pipe.vae, "flex")
    integration.set_attention_backend(pipe, "native_math")
    assert integration.reset_attention_backend(pipe) == ("vae", "unet")
    assert chosen_by_vae(pipe) == {"flex"}
    assert chosen_by_unet(pipe) == set()


def test_model_shared_by_two_pipelines_follows_the_later_and_falls_back_to_the_other():
    first, second = sdxl(), sdxl()
    second.register_modules(unet=first.unet)
    integration.set_attention_backend(first, "native")
    integration.set_attention_backend(second, "native_math")
    assert chosen_by_unet(first) == {"native_math"}
    integration.reset_attention_backend(second)
    assert chosen_by_unet(first) == {"native"}


def test_model_of_a_pipeline_that_is_gone_can_be_reset_by_itself():
    pipe = sdxl()
    model = pipe.unet
    integration.set_attention_backend(pipe, "native_math")
    del pipe
    gc.collect()
    integration.reset_attention_backend(model)
    from diffusers_tiny import unet_inputs

    assert chosen(model, **unet_inputs()) == set()


def test_setting_twice_replaces_and_one_reset_undoes_it():
    pipe = sdxl()
    integration.set_attention_backend(pipe, "flex")
    integration.set_attention_backend(pipe, "native_math")
    assert chosen_by_unet(pipe) == {"native_math"}
    integration.reset_attention_backend(pipe)
    assert chosen_by_unet(pipe) == set()


def test_list_of_preference_and_aliases_of_diffusers():
    pipe = flux_pipe()
    report = integration.set_attention_backend(pipe, ["flash_hub", "_native_math"])
    assert report.backend == "flash2_hub, native_math"
    assert chosen_by_vae(pipe) == {"native_math"}


def test_backend_that_is_not_here_raises_with_the_cure_and_runs_nothing_else():
    pipe = flux_pipe()
    integration.set_attention_backend(pipe, "_flash_3")
    with pytest.raises(anyattn.BackendUnavailableError, match="flash3"):
        chosen_by_vae(pipe)


def test_pipeline_without_attention_is_an_error_that_names_every_component():
    from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline

    tiny = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                           num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), tiny, text_encoder(), None, None, None, None)
    with pytest.raises(anyattn.InvalidCallError, match=r"vae \(AutoencoderTiny\).*text_encoder \(CLIPTextModel\)"):
        integration.set_attention_backend(pipe, "native")
    assert not integration.is_enabled()


def test_two_components_of_one_class_are_pinned_apart():
    first, second = flux_pipe(), flux_pipe()
    integration.set_attention_backend(first, "native_math")
    assert chosen_by_vae(first) == {"native_math"}
    assert chosen_by_vae(second) == set()


def test_component_that_is_not_changed_for_its_own_code_is_warned_about():
    from diffusers.models.attention_processor import AttnProcessor

    pipe = sdxl()
    pipe.unet.set_attn_processor(AttnProcessor())
    with pytest.warns(anyattn.AnyattnWarning, match=r"unet \(UNet2DConditionModel\): not changed, AttnProcessor"):
        report = integration.set_attention_backend(pipe, "native_math")
    assert report.pinned == ("vae",)
