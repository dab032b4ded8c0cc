"""The comparisons of these tests fail where an argument is dropped, or a mask is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_transformers_caches import dynamic, in_chunks, static
from transformers import masking_utils
from transformers_families import BY_NAME
from transformers_runs import BUDGET, error, inputs_of, kept, output, switch, token_ids

from anyattn.integrations.transformers import versions

TABLE, MASKS = (versions.find(path) for path in versions.MAPPINGS)
SEEN = 100 * BUDGET


def without(*names: str) -> Callable[[Any], Any]:
    """Drop keywords of a call."""

    def broken(right: Any) -> Any:
        return lambda *args, **kw: right(*args, **{key: value for key, value in kw.items() if key not in names})

    return broken


def with_(**changed: Any) -> Callable[[Any], Any]:
    """Replace keywords of a call."""
    return lambda right: lambda *args, **kw: right(*args, **{**kw, **changed})


def maskless(right: Any) -> Any:
    return lambda module, query, key, value, mask, **kw: right(module, query, key, value, None, **kw)


def upper_left(right: Any) -> Any:
    """Align a causal layer without a mask as torch's flag does."""

    def broken(module: Any, query: Any, key: Any, value: Any, mask: Any, **kw: Any) -> Any:
        if mask is None and getattr(module, "is_causal", False):
            places = torch.arange(query.shape[2])[:, None] >= torch.arange(key.shape[2])
            mask = places[None, None]
        return right(module, query, key, value, mask, **kw)

    return broken


def padded(model: Any, family: Any) -> torch.Tensor:
    rows = None if family.kind == "seq2seq" else kept(3, 0).bool()
    return output(model, inputs_of(family, "left")[0], rows)


def prefill(model: Any, family: Any) -> torch.Tensor:
    return output(model, *inputs_of(family, "none"))


def decoding(model: Any, family: Any) -> torch.Tensor:
    return in_chunks(model, dynamic(model), None, 0)


def of_static_cache(model: Any, family: Any) -> torch.Tensor:
    return in_chunks(model, static(model), None, 0)


CALLS = {
    "scale dropped: t5": ("t5", prefill, without("scaling")),
    "scale dropped: granite": ("granite", prefill, without("scaling")),
    "scale dropped: whisper": ("whisper", prefill, without("scaling")),
    "bias dropped: t5": ("t5", prefill, without("position_bias")),
    "sinks dropped: gpt_oss": ("gpt_oss", prefill, without("s_aux")),
    "softcap dropped: gemma2": ("gemma2", prefill, without("softcap")),
    "indices dropped: deepseek_v32": ("deepseek_v32", prefill, without("indices")),
    "causal keyword dropped: clip_text": ("clip_text", prefill, without("is_causal")),
    "causal by default: bert": ("bert", prefill, with_(is_causal=True)),
    "mask dropped: mistral": ("mistral", prefill, lambda right: without("sliding_window")(maskless(right))),
    "mask dropped: llama4": ("llama4", prefill, maskless),
    "mask dropped: bert": ("bert", padded, maskless),
    "mask dropped: bart": ("bart", padded, maskless),
    "mask dropped: llama": ("llama", padded, maskless),
    "mask dropped: modernbert": ("modernbert", prefill, lambda right: without("sliding_window")(maskless(right))),
    "upper left: llama": ("llama", decoding, upper_left),
    "upper left: gpt2": ("gpt2", decoding, upper_left),
}


@pytest.mark.parametrize("case", CALLS)
def test_broken_call_is_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, run, broken = CALLS[case]
    family = BY_NAME[name]
    model = family.make()
    with torch.no_grad():
        want = run(model, family)
        switch(model, family)
        assert error(run(model, family), want) <= BUDGET
        with monkeypatch.context() as inside:
            inside.setitem(TABLE, "anyattn", broken(TABLE["anyattn"]))
            assert error(run(model, family), want) > SEEN


def flash_like(right: Any) -> Any:
    return masking_utils.flash_attention_mask


def sdpa_like(right: Any) -> Any:
    return masking_utils.sdpa_mask


def forgets_padding(right: Any) -> Any:
    return lambda *args, **kw: right(*args, **{**kw, "attention_mask": None})


MASK_CASES = {
    "no mask function's chunks: llama4": ("llama4", prefill, flash_like),
    "sdpa's None over a static cache: llama": ("llama", of_static_cache, sdpa_like),
    "no padding: llama": ("llama", padded, forgets_padding),
    "no padding: bert": ("bert", padded, forgets_padding),
    "no padding: t5": ("t5", padded, forgets_padding),
}


@pytest.mark.parametrize("case", MASK_CASES)
def test_broken_mask_is_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, run, broken = MASK_CASES[case]
    family = BY_NAME[name]
    model = family.make()
    with torch.no_grad():
        want = run(model, family)
        switch(model, family)
        assert error(run(model, family), want) <= BUDGET
        with monkeypatch.context() as inside:
            inside.setitem(MASKS, "anyattn", broken(MASKS["anyattn"]))
            assert error(run(model, family), want) > SEEN


@pytest.mark.parametrize("change", [-1, 1])
def test_window_that_is_one_off_is_seen(change: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from anyattn.integrations.transformers.calls import notes
    from anyattn.masks.objects import Mask

    family = BY_NAME["mistral"]
    model = family.make()
    write = notes.write

    def off(tensor: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        left, right, align = mask.pattern
        return write(tensor, Mask(pattern=(left + change, right, align), key=mask.key), *rest, **named)

    with torch.no_grad():
        want = prefill(model, family)
        model.set_attn_implementation("anyattn")
        assert error(prefill(model, family), want) <= BUDGET
        monkeypatch.setattr(notes, "write", off)
        assert error(prefill(model, family), want) > SEEN


def test_missing_mask_function_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = BY_NAME["llama"].make()
    given = {"input_ids": token_ids(), "attention_mask": kept(3, 0)}
    with torch.no_grad():
        want = output(model, given, kept(3, 0).bool())
        model.set_attn_implementation("anyattn")
        with monkeypatch.context() as inside:
            inside.delitem(MASKS, "anyattn")
            assert error(output(model, given, kept(3, 0).bool()), want) > SEEN
