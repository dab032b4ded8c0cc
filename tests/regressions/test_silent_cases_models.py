"""What Diffusers' arguments, setters and context manager do to models, and what they do through the integration."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from doors_to_backends import BACKENDS, Attend, assert_right, differ, tensors, truth

import anyattn

attention_dispatch = pytest.importorskip("diffusers.models.attention_dispatch")

from diffusers_tiny import chosen, in_float64, make, output, stock  # noqa: E402

from anyattn.integrations import diffusers as integration  # noqa: E402
from anyattn.process.bounded import Bounded  # noqa: E402

REGISTRY = attention_dispatch._AttentionBackendRegistry


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    active = REGISTRY._active_backend
    yield
    integration.disable()
    assert active == REGISTRY._active_backend


# Every one of its backends loses keys of attention_kwargs that it doesn't know; sixteen lose window_size.
@pytest.mark.parametrize("name", ["windw_size", "sm_scale", "causal", "return_attn_probs", "qk_quant_gran"])
def test_misspelt_or_unknown_argument_is_never_lost(dispatch: Attend, backend: str, name: str) -> None:
    inputs = tensors()
    with pytest.raises(anyattn.InvalidCallError, match=f"{name}.*known: attn_mask"):
        dispatch(*inputs, attention_kwargs={name: 1})
    with pytest.raises(TypeError, match=name):
        anyattn.attention(*inputs, backend=backend, **{name: 1})


def test_window_size_of_attention_kwargs_is_honoured(dispatch: Attend) -> None:
    q, k, v = tensors()
    rows, columns = torch.arange(6)[:, None] + 3, torch.arange(9)
    allowed = (columns >= rows - 2) & (columns <= rows + 1)
    assert differ(truth(q, k, v, allowed), truth(q, k, v))
    assert_right(dispatch(q, k, v, window_size=(2, 1)), truth(q, k, v, allowed))


# A key of attention_kwargs silently beats the argument of the same name there.
def test_argument_given_twice_is_refused(dispatch: Attend) -> None:
    q, k, v = tensors()
    for explicit, again in (({"scale": 0.5}, {"scale": 0.1}), ({"dropout_p": 0.1}, {"dropout_p": 0.5})):
        with pytest.raises(anyattn.InvalidCallError, match="passed twice"):
            dispatch(q, k, v, **explicit, attention_kwargs=again)
    assert_right(dispatch(q, k, v, attention_kwargs={"scale": 0.1}), truth(q, k, v, scale=0.1))


# Its context manager writes an attribute of the process: another thread's calls change, and two that overlap
# leave the wrong backend behind for good.
def test_overlapping_blocks_of_two_threads_neither_meet_nor_stay() -> None:
    q, k, v = tensors()
    steps = [threading.Barrier(2, timeout=20) for _ in range(3)]
    seen: dict[str, list[str | None]] = {}

    def ran() -> str | None:
        with anyattn.record() as calls:
            anyattn.attention(q, k, v)
        return calls[0].chosen

    def work(name: str, leaves_first: bool) -> None:
        with anyattn.attention_backend(name):
            steps[0].wait()
            inside = ran()
            if not leaves_first:
                steps[1].wait()
        if leaves_first:
            steps[1].wait()
        steps[2].wait()
        seen[name] = [inside, ran()]

    threads = [threading.Thread(target=work, args=case) for case in (("native_math", True), ("flex", False))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == {"native_math": ["native_math", "native"], "flex": ["flex", "native"]}
    assert ran() == "native"


# Its setter of one model switches every other model of the process too, and reset leaves that so.
@pytest.mark.parametrize("setter", ["anyattn's", "diffusers'"])
def test_setting_and_resetting_one_model_changes_no_other(setter: str) -> None:
    integration.enable()
    (one, inputs), (other, _) = make("flux"), make("flux")
    if setter == "anyattn's":
        anyattn.set_attention_backend(one, "flex")
    else:
        one.set_attention_backend("anyattn")
    assert chosen("flux", one, inputs) == {"flex" if setter == "anyattn's" else "native"}
    assert chosen("flux", other, inputs) == set()
    assert torch.equal(output("flux", other, inputs), stock("flux").output)
    if setter == "anyattn's":
        anyattn.reset_attention_backend(one)
    else:
        one.reset_attention_backend()
    assert chosen("flux", one, inputs) == chosen("flux", other, inputs) == set()
    assert torch.equal(output("flux", one, inputs), stock("flux").output)


# Its context manager does nothing at all around a model with a backend of its own, and doesn't say so.
def test_block_around_a_model_with_its_own_backend_is_said_or_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyattn.selection.decide._said", Bounded(256))
    model, inputs = make("flux")
    anyattn.set_attention_backend(model, "native_math")
    with pytest.warns(anyattn.AnyattnWarning, match="pin"), anyattn.attention_backend("flex"):
        assert chosen("flux", model, inputs) == {"native_math"}
    with anyattn.attention_backend("flex", override=True):
        assert chosen("flux", model, inputs) == {"flex"}


# Its setter takes any name for the UNets and for SD 3, whose layers never ask its dispatcher.
@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_setter_reaches_models_that_never_ask_diffusers_dispatcher(name: str) -> None:
    expected = stock(name)
    model, inputs = make(name)
    anyattn.set_attention_backend(model, "flex")
    with anyattn.record() as calls:
        result = output(name, model, inputs)
    assert [call.chosen for call in calls] == ["flex"] * expected.calls
    assert expected.calls
    assert expected.agrees(result)


def test_setter_that_would_change_nothing_raises() -> None:
    from diffusers import AutoencoderTiny

    model = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))  # fmt: skip
    with pytest.raises(anyattn.InvalidCallError, match="no attention layers"):
        anyattn.set_attention_backend(model, "native_math")


# Its switches for NPU and XLA attention turn it on where they are told False.
@pytest.mark.parametrize("switch", ["set_use_npu_flash_attention", "set_use_xla_flash_attention"])
def test_switching_another_devices_kernel_off_never_runs_it(monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    monkeypatch.setattr("anyattn.integrations.diffusers.calls.doors._said", Bounded(256))
    expected = stock("flux")
    model, inputs = make("flux")
    anyattn.set_attention_backend(model, "native_math")
    for block in model.transformer_blocks:
        with pytest.warns(anyattn.AnyattnWarning, match="waits: anyattn pinned"):
            getattr(block.attn, switch)(False)
    with anyattn.record() as calls:
        result = output("flux", model, inputs)
    assert [call.chosen for call in calls] == ["native_math"] * expected.calls
    assert expected.agrees(result)
    anyattn.reset_attention_backend(model)
    # Without the pin it is the layer's wish that counts: refused in so many words inside a block of anyattn.
    integration.enable()
    with (
        pytest.warns(anyattn.AnyattnWarning, match="more specific"),
        anyattn.attention_backend("native_math"),
        pytest.raises(anyattn.BackendUnavailableError),
    ):
        output("flux", model, inputs)


# With context parallelism set up, its backends that know nothing of it attend to their own shard alone.
def test_sharded_call_is_refused_before_it_attends_to_its_own_shard(dispatch: Attend, backend: str) -> None:
    inputs = tensors()
    with pytest.raises(anyattn.InvalidCallError, match="Context parallelism"):
        dispatch(*inputs, parallel_config=object())
    with pytest.raises(TypeError, match="parallel_config"):
        anyattn.attention(*inputs, backend=backend, parallel_config=object())


@pytest.fixture(scope="module")
def prompts() -> dict[str, Any]:
    """A batch of two prompts of 7 and 3 tokens, and what each gives alone and unpadded in float64."""
    model, inputs = make("qwen")
    model = model.double()
    alone = []
    for entry, tokens in enumerate((7, 3)):
        one = {name: value[entry : entry + 1] for name, value in inputs.items()}
        one["encoder_hidden_states"] = one["encoder_hidden_states"][:, :tokens]
        one["encoder_hidden_states_mask"] = one["encoder_hidden_states_mask"][:, :tokens]
        alone.append(output("qwen", model, in_float64(one)))
    return {"inputs": inputs, "alone": torch.cat(alone), "padded": output("qwen", model, in_float64(inputs))}


def test_padding_of_two_prompts_leaves_each_as_if_it_were_alone(prompts: dict[str, Any]) -> None:
    assert (prompts["padded"] - prompts["alone"]).abs().max() < 1e-12


# Its packing backends keep the wrong text tokens, since text comes first and padding is a hole: worse than no mask.
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_prompts_of_unequal_length_are_right_in_one_batch(prompts: dict[str, Any], backend: str) -> None:
    expected = stock("qwen")
    model, inputs = make("qwen")
    assert not expected.agrees(output("qwen", model, {**inputs, "encoder_hidden_states_mask": None}))
    anyattn.set_attention_backend(model, backend)
    with anyattn.record() as calls:
        result = output("qwen", model, inputs)
    assert {call.chosen for call in calls} == {backend}
    assert not any(call.spec.mask.is_empty for call in calls)
    assert expected.agrees(result)
    assert (result.double() - prompts["alone"]).abs().max() < 1e-4 * prompts["alone"].abs().max()
