"""Prefill, chunks and decoding with every kind of cache, beam search and assisted generation equal eager's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from transformers.cache_utils import QuantizedLayer
from transformers_families import BY_NAME
from transformers_runs import BUDGET, error, kept, switch, token_ids

import anyattn

CACHED = ["llama", "mistral", "qwen2", "gemma3", "gpt_oss", "llama4", "deepseek_v3", "cohere2", "qwen3_next"]


def dynamic(model: Any) -> Any:
    return hf.DynamicCache(config=model.config)


def static(model: Any) -> Any:
    return hf.StaticCache(config=model.config, max_cache_len=16)


class _Rounded(QuantizedLayer):
    """A quantised layer that rounds to sixteenths, with a residual of two tokens."""

    def __init__(self) -> None:
        super().__init__(residual_length=2)

    def _quantize(self, tensor: Any, axis: Any) -> Any:
        return (tensor * 16).round().to(torch.int16)

    def _dequantize(self, q_tensor: Any) -> Any:
        return q_tensor.float() / 16


def quantised(model: Any) -> Any:
    return hf.Cache(layers=[_Rounded() for _ in range(model.config.num_hidden_layers)])


def in_chunks(model: Any, cache: Any, padding: torch.Tensor | None, keep: int) -> torch.Tensor:
    """Run 4, 4 and 1 tokens with one cache, and return the logits of each step."""
    ids, out, start = token_ids(), [], 0
    for size in (4, 4, 1):
        given = {} if padding is None else {"attention_mask": padding[:, : start + size]}
        with torch.no_grad():
            step = model(ids[:, start : start + size], past_key_values=cache, logits_to_keep=keep, **given)
        out.append(step.logits)
        start += size
    return torch.cat(out, 1)


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("make", [dynamic, static])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("keep", [0, 2])
def test_chunks_and_decoding_equal_eagers(name: str, make: Any, padding: str, keep: int) -> None:
    family = BY_NAME[name]
    model = family.make()
    mask = kept(3, 0) if padding == "left" else None
    want = in_chunks(model, make(model), mask, keep)
    switch(model, family)
    got = in_chunks(model, make(model), mask, keep)
    if mask is not None:  # rows of padding mean nothing; with logits_to_keep only the entry without any is compared
        want, got = (want[mask.bool()], got[mask.bool()]) if keep == 0 else (want[1], got[1])
    assert error(got, want) <= BUDGET


def test_quantised_cache_equals_eagers() -> None:
    model = BY_NAME["llama"].make()
    want = in_chunks(model, quantised(model), kept(3, 0), 0)
    plain = in_chunks(model, dynamic(model), kept(3, 0), 0)
    model.set_attn_implementation("anyattn")
    got = in_chunks(model, quantised(model), kept(3, 0), 0)
    rows = kept(3, 0).bool()
    assert error(got[rows], want[rows]) <= BUDGET
    assert error(plain[rows], want[rows]) > 1e-4  # the cache did round


@pytest.mark.parametrize("name", [*CACHED[:-1], "t5", "bart", "gpt2"])
@pytest.mark.parametrize("how", ["static", "beams"])
def test_generate_with_other_caches_and_beams_equals_eagers(name: str, how: str) -> None:
    family = BY_NAME[name]
    model = family.make()
    given: dict[str, Any] = {"cache_implementation": "static"} if how == "static" else {"num_beams": 3}
    given |= {"max_new_tokens": 6, "do_sample": False, "attention_mask": kept(3, 0)}
    want = model.generate(token_ids(), **given)
    switch(model, family)
    assert torch.equal(model.generate(token_ids(), **given), want)


@pytest.mark.parametrize("how", ["assistant", "prompt lookup"])
def test_assisted_generation_equals_eagers(how: str) -> None:
    family = BY_NAME["mistral"]
    model, assistant = family.make(), BY_NAME["llama"].make()
    given: dict[str, Any] = {"assistant_model": assistant} if how == "assistant" else {"prompt_lookup_num_tokens": 2}
    given |= {"max_new_tokens": 6, "do_sample": False}
    want = model.generate(token_ids(1), **given)
    switch(model, family)
    switch(assistant, family)
    assert torch.equal(model.generate(token_ids(1), **given), want)


def test_decoding_sees_every_key_and_makes_no_mask() -> None:
    model = BY_NAME["llama"].make("anyattn")
    cache = dynamic(model)
    with torch.no_grad(), anyattn.record() as calls:
        model(token_ids()[:, :4], past_key_values=cache)
        model(token_ids()[:, 4:5], past_key_values=cache)
    prefill, step = calls[0].spec, calls[2].spec
    assert prefill.mask.pattern is not None
    assert (prefill.mask.dense, prefill.mask.key) == (None, None)
    assert step.mask.is_empty
    assert (step.seqlen_q, step.seqlen_kv, step.num_kv_heads) == (1, 5, 2)


def test_prefill_of_a_static_cache_leaves_empty_places_out() -> None:
    model = BY_NAME["llama"].make("anyattn")
    cache = static(model)
    with torch.no_grad(), anyattn.record() as calls:
        model(token_ids()[:, :4], past_key_values=cache)
        model(token_ids()[:, 4:5], past_key_values=cache)
    prefill, step = calls[0].spec, calls[2].spec
    assert (prefill.seqlen_q, prefill.seqlen_kv, prefill.mask.dense) == (4, 4, None)
    assert (step.seqlen_kv, step.mask.key, step.mask.dense) == (16, "lengths", None)


def test_windows_and_padding_arrive_as_objects() -> None:
    model = BY_NAME["mistral"].make("anyattn")
    with torch.no_grad(), anyattn.record() as calls:
        model(token_ids())
        model(token_ids(), attention_mask=kept(0, 3))
    alone, padded = calls[0].spec.mask, calls[2].spec.mask
    assert alone.pattern is not None
    assert (alone.pattern.left, alone.pattern.right, alone.dense) == (3, 0, None)
    assert (padded.key, padded.dense) == ("padding", None)


def test_mask_that_is_written_to_loses_its_note() -> None:
    from anyattn.integrations.transformers.calls import masks, notes

    mask = masks.mask_of(1, 9, 9, local_size=4, allow_is_causal_skip=False)
    assert mask is not None
    assert notes.read(mask) is not None
    assert notes.read(mask[:, :, -2:]) is None
    mask[..., 0] = False
    assert notes.read(mask) is None
