"""Mistakes that Diffusers lets through, to fail somewhere else: each is told where it is made, or works."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from doors_to_backends import BACKENDS, Attend, assert_right, padding, tensors, truth

import anyattn
from anyattn import environment


# An unknown name in the variable kills the import of every model there; a known one without its package is
# called as None at the first attention.
@pytest.mark.parametrize("variable", ["DIFFUSERS_ATTN_BACKEND", "ANYATTN_BACKEND"])
@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("Flash", anyattn.BackendUnavailableError, "flash2"),
        ("sage", anyattn.BackendUnavailableError, "sage"),
        ("flash_hub", anyattn.BackendUnavailableError, "flash2_hub"),
        ("sdpa", anyattn.UnknownBackendError, "sdpa"),
        ("flahs", anyattn.UnknownBackendError, "'flash'"),
    ],
)
def test_variable_that_names_no_usable_backend_is_told_at_the_first_call(
    monkeypatch: pytest.MonkeyPatch, variable: str, name: str, error: type[Exception], says: str
) -> None:
    monkeypatch.setenv(variable, name)
    anyattn.reset()
    with pytest.raises(error, match=says) as caught:
        anyattn.attention(*tensors())
    assert variable in str(caught.value)
    assert_right(anyattn.attention(*(inputs := tensors()), backend="native"), truth(*inputs))


@pytest.mark.parametrize("empty", ["", " ", ","])
def test_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch, empty: str) -> None:
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", empty)
    anyattn.reset()
    with anyattn.record() as calls:
        anyattn.attention(*tensors())
    assert calls[0].chosen == "native"


NOT_HERE = ("flash_hub", "flash_varlen", "_flash_3_hub", "sage", "xformers", "_native_npu", "_native_xla", "aiter")


# Named at a call or on a layer, a backend without its package is `'NoneType' object is not callable` there. On the
# devices it was made for, _native_npu has no is_causal and _native_xla no scale.
@pytest.mark.parametrize("name", NOT_HERE)
def test_backend_that_is_not_here_says_how_to_get_it(name: str) -> None:
    # Supposed, since the package `kernels`, which brings those of the Hub, is one that tests install.
    bare = dataclasses.replace(environment.detect(), packages={}, modules=frozenset())
    with environment.supposed(bare), pytest.raises(anyattn.BackendUnavailableError) as caught:
        anyattn.attention(*tensors(), is_causal=True, scale=0.1, backend=name)
    assert caught.value.reasons
    assert any(reason.hint for reason in caught.value.reasons)


# With `kernels` installed nothing is missing but the device: nothing is fetched to find that out.
@pytest.mark.parametrize("name", ["flash_hub", "_flash_3_hub", "sage_hub"])
def test_backend_whose_package_is_here_and_device_is_not_says_which_device(name: str) -> None:
    env = dataclasses.replace(environment.preset("cpu"), packages={"kernels": "0.17.2"})
    with environment.supposed(env), pytest.raises(anyattn.BackendUnavailableError, match="cuda") as caught:
        anyattn.attention(*tensors(), is_causal=True, scale=0.1, backend=name)
    assert [reason.code for reason in caught.value.reasons] == ["no_device"]


@pytest.mark.parametrize("name", ["flash_hub", "_native_npu"])
def test_layer_set_to_a_backend_that_is_not_here_is_refused_with_the_cure(enabled: None, name: str) -> None:
    from diffusers_tiny import make, output

    model, inputs = make("flux")
    layer = model.transformer_blocks[0].attn
    anyattn.set_attention_backend(layer, name)
    with pytest.raises(anyattn.BackendUnavailableError):
        output("flux", model, inputs)


@pytest.mark.filterwarnings("ignore::anyattn.errors.AnyattnWarning")
@pytest.mark.parametrize("name", ["flash_hub", "sage"])
def test_call_of_diffusers_that_names_a_missing_backend_is_refused_with_the_cure(enabled: None, name: str) -> None:
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    inputs, wish = tensors(), AttentionBackendName(name)
    with pytest.raises(anyattn.BackendUnavailableError), anyattn.attention_backend("native_math"):
        dispatch_attention_fn(*inputs, backend=wish)


# return_lse ends in an AttributeError on its one-kernel backends and on flex.
@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("_native_flash", ""),
        ("flex", ""),
        ("_native_math", ""),
        ("_native_cudnn", "cuda|cpu"),
        ("_native_efficient", "cuda|cpu"),
    ],
)
def test_lse_is_given_or_refused_in_words_under_every_name_of_diffusers(name: str, refusal: str) -> None:
    q, k, v = tensors()
    if refusal:
        # Without a GPU the last two are unavailable; with one, they don't take tensors of the CPU.
        with pytest.raises((anyattn.UnsupportedCallError, anyattn.BackendUnavailableError), match=refusal):
            anyattn.attention(q, k, v, return_lse=True, backend=name)
        return
    out, lse = anyattn.attention(q, k, v, return_lse=True, backend=name)
    assert_right(out, truth(q, k, v))
    assert lse.shape == (2, 4, 6)


# Only its native reshapes a (B, S_kv) mask; its math, cuDNN and efficient kernels fail on the shape.
def test_two_dimensional_padding_works_under_every_backend(dispatch: Attend) -> None:
    q, k, v = tensors()
    keep = padding(2, 9, "right")
    assert_right(dispatch(q, k, v, keep), truth(q, k, v, keep[:, None, None]))


VARIABLES = ("DIFFUSERS_ATTN_CHECKS", "ANYATTN_CHECKS")


# Any word but four means "no checks" there.
@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("word", ["enabled", "y", "2", "oui"])
def test_word_that_is_neither_yes_nor_no_is_an_error(monkeypatch: pytest.MonkeyPatch, variable: str, word: str) -> None:
    monkeypatch.setenv(variable, word)
    anyattn.reset()
    with pytest.raises(ValueError, match=f"{variable}.*{word}"):
        anyattn.attention(*tensors())


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("word", ["1", "yes", "TRUE", " on "])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checks_that_are_on_find_nan_and_say_nothing_of_right_calls(
    monkeypatch: pytest.MonkeyPatch, variable: str, word: str, backend: str
) -> None:
    monkeypatch.setenv(variable, word)
    anyattn.reset()
    q, k, v = tensors()
    # Its checks warn at every call, of arguments that nobody gave.
    with warnings.catch_warnings():
        warnings.simplefilter("error", anyattn.AnyattnWarning)
        warnings.simplefilter("error", UserWarning)
        for _ in range(2):
            assert_right(anyattn.attention(q, k, v, backend=backend), truth(q, k, v))
    k[0, 0, 0, 0] = torch.nan
    with pytest.raises(anyattn.InvalidCallError, match="key holds NaN"):
        anyattn.attention(q, k, v, backend=backend)
