"""One call of an attention layer: every argument is honoured or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers_families import BY_NAME
from transformers_runs import kept, token_ids

import anyattn
from anyattn import masks
from anyattn.integrations.transformers import versions


class Layer(nn.Module):
    """A layer that passes on whether it is causal."""

    def __init__(self, is_causal: bool | None = None) -> None:
        super().__init__()
        if is_causal is not None:
            self.is_causal = is_causal


def tensors(q_length: int = 5, kv_length: int = 7, dim_v: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = ((2, 4, q_length, 8), (2, 2, kv_length, 8), (2, 2, kv_length, dim_v))
    return tuple(torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n, shape in enumerate(shapes))  # type: ignore[return-value]


def call(layer: Any, tensors_: Any, mask: Any = None, **rest: Any) -> torch.Tensor:
    function = versions.find(versions.MAPPINGS[0])["anyattn"]
    out, weights = function(layer, *tensors_, mask, **rest)
    assert weights is None
    assert out.is_contiguous()
    return out


def plain(query: Any, key: Any, value: Any, allowed: Any = None, bias: Any = None, scale: Any = None) -> torch.Tensor:
    """Compute attention by hand."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias
    scores = scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def lower_right(q_length: int = 5, kv_length: int = 7, window: int | None = None) -> torch.Tensor:
    rows = torch.arange(q_length)[:, None] + kv_length - q_length
    columns = torch.arange(kv_length)
    allowed = columns <= rows
    return allowed if window is None else allowed & (columns > rows - window)


def test_causal_is_the_keyword_then_the_attribute_then_false() -> None:
    given = tensors()
    causal, full = plain(*given, lower_right()), plain(*given)
    for layer, rest, want in (
        (Layer(True), {}, causal),
        (Layer(False), {}, full),
        (Layer(), {}, full),
        (Layer(False), {"is_causal": True}, causal),
        (Layer(True), {"is_causal": False}, full),
        (Layer(True), {"is_causal": None}, causal),
    ):
        torch.testing.assert_close(call(layer, given, **rest), want)


def test_one_query_sees_every_key() -> None:
    given = tensors(1)
    torch.testing.assert_close(call(Layer(True), given), plain(*given))


@pytest.mark.parametrize("mask", [lower_right()[None, None].expand(2, 1, 5, 7), torch.ones(2, 1, 1, 7).bool()])
def test_mask_replaces_the_causal_flag_and_the_window(mask: torch.Tensor) -> None:
    given = tensors()
    torch.testing.assert_close(call(Layer(True), given, mask, sliding_window=2), plain(*given, mask))


@pytest.mark.parametrize("q_length", [1, 5])
def test_window_counts_the_own_position(q_length: int) -> None:
    given = tensors(q_length)
    want = plain(*given, lower_right(q_length, window=3))
    torch.testing.assert_close(call(Layer(True), given, sliding_window=3), want)


def test_window_of_a_bidirectional_layer_is_a_radius() -> None:
    given = tensors(7)
    near = (torch.arange(7)[:, None] - torch.arange(7)).abs() <= 2
    torch.testing.assert_close(call(Layer(False), given, sliding_window=3), plain(*given, near))


@pytest.mark.parametrize("scaling", [None, 1.0, 0.25])
def test_scaling_is_what_was_passed(scaling: float | None) -> None:
    given = tensors(dim_v=6)
    torch.testing.assert_close(call(Layer(), given, scaling=scaling), plain(*given, scale=scaling))


def test_additive_masks_and_biases_are_added() -> None:
    given = tensors()
    bias, mask = torch.randn(1, 4, 5, 7), torch.randn(2, 1, 5, 7)
    torch.testing.assert_close(call(Layer(), given, mask), plain(*given, bias=mask))
    torch.testing.assert_close(call(Layer(), given, position_bias=bias), plain(*given, bias=bias))
    torch.testing.assert_close(call(Layer(), given, mask, position_bias=bias), plain(*given, bias=mask + bias))
    torch.testing.assert_close(call(Layer(True), given, position_bias=bias), plain(*given, lower_right(), bias))
    allowed = lower_right()[None, None]
    torch.testing.assert_close(call(Layer(), given, allowed, position_bias=bias), plain(*given, allowed, bias))


def test_half_precision_masks_are_widened() -> None:
    given = tensors()
    mask = torch.randn(2, 1, 5, 7).bfloat16()
    torch.testing.assert_close(call(Layer(), given, mask), plain(*given, bias=mask.float()))


def test_indices_are_the_keys_that_a_row_sees() -> None:
    given = tensors()
    indices = torch.tensor([0, 2, 3]).expand(2, 5, 3)
    allowed = torch.zeros(7).bool().index_fill(0, torch.tensor([0, 2, 3]), True) & lower_right()
    torch.testing.assert_close(call(Layer(True), given, indices=indices), plain(*given, allowed))
    with pytest.raises(anyattn.InvalidCallError, match="indices"):
        call(Layer(True), given, indices=indices[:1])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_sinks_are_logits_beside_the_keys(grad: bool, per_row: bool) -> None:
    given = tensors()
    sinks = torch.randn(2, 4, 5, 1) if per_row else torch.randn(4)
    sinks.requires_grad_(grad)
    wide = (sinks if per_row else sinks[:, None, None]).expand(2, 4, 5, 1)
    key = given[1].repeat_interleave(2, 1)
    scores = (given[0] @ key.mT * 8**-0.5).masked_fill(~lower_right(), float("-inf"))
    weights = torch.cat((scores, wide), -1).softmax(-1)[..., :-1]
    want = (weights @ given[2].repeat_interleave(2, 1)).transpose(1, 2)
    got = call(Layer(True), given, **{"sinks" if per_row else "s_aux": sinks})
    torch.testing.assert_close(got, want)
    if grad:
        (expected,) = torch.autograd.grad(want.square().sum(), sinks)
        torch.testing.assert_close(torch.autograd.grad(got.square().sum(), sinks)[0], expected)


def test_softcap_needs_a_backend_that_has_it() -> None:
    given = tensors()
    with pytest.raises(anyattn.UnsupportedCallError, match="softcap"):
        call(Layer(), given, softcap=2.0)
    with anyattn.attention_backend("flex"):
        got = call(Layer(), given, softcap=2.0)
    scores = given[0] @ given[1].repeat_interleave(2, 1).mT * 8**-0.5
    want = ((scores / 2).tanh() * 2).softmax(-1) @ given[2].repeat_interleave(2, 1)
    torch.testing.assert_close(got, want.transpose(1, 2))


def test_a_query_of_one_entry_is_shared() -> None:
    query, key, value = tensors()
    want = plain(query[:1].expand(2, -1, -1, -1), key, value)
    torch.testing.assert_close(call(Layer(), (query[:1], key, value)), want)


def test_block_masks_and_objects_keep_their_meaning() -> None:
    given = tensors(7)
    block = create_block_mask(lambda b, h, i, j: (i + j) % 2 == 0, None, None, 7, 7, device="cpu")
    allowed = (torch.arange(7)[:, None] + torch.arange(7)) % 2 == 0
    with anyattn.attention_backend("flex"):
        torch.testing.assert_close(call(Layer(), given, block), plain(*given, allowed))
    keys = torch.tensor([7, 4])
    allowed = torch.arange(7) < keys[:, None, None, None]
    torch.testing.assert_close(call(Layer(True), given, masks.KeyLengths(keys)), plain(*given, allowed))


def test_grouped_keys_are_not_repeated() -> None:
    with anyattn.record() as calls:
        call(Layer(), tensors())
    assert (calls[0].spec.num_heads, calls[0].spec.num_kv_heads) == (4, 2)


@pytest.mark.parametrize("mask", [torch.ones(2, 7).bool(), torch.ones(5, 7).bool(), torch.ones(2, 1, 5, 7).long()])
def test_masks_of_two_meanings_are_refused(mask: torch.Tensor) -> None:
    with pytest.raises(anyattn.InvalidCallError, match=r"two dimensions|either"):
        call(Layer(), tensors(), mask)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_attentions", True),
        ("cache", object()),
        ("head_mask", torch.ones(4)),
        ("block_table", torch.ones(1)),
        ("block_indices", torch.ones(1)),
        ("deterministic", True),
        ("alibi", torch.ones(4)),
        ("temperature", 2.0),
    ],
)
def test_keywords_that_arent_honoured_are_refused(name: str, value: Any) -> None:
    with pytest.raises(anyattn.InvalidCallError, match=name):
        call(Layer(), tensors(), **{name: value})


def test_keywords_without_a_meaning_change_nothing() -> None:
    want = call(Layer(), tensors())
    rest = {"use_cache": True, "position_embeddings": (1, 2), "output_attentions": False, "alibi": None, "cache": None}
    assert torch.equal(call(Layer(), tensors(), **rest), want)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_models_refuse_to_output_attentions(name: str) -> None:
    model = BY_NAME[name].make("anyattn")
    given = {"decoder_input_ids": token_ids()} if name == "t5" else {}
    with pytest.raises(anyattn.InvalidCallError, match=r"output_attentions.*eager"):
        model(token_ids(), output_attentions=True, **given)


def test_models_refuse_keywords_that_nobody_knows() -> None:
    model = BY_NAME["llama"].make("anyattn")
    with pytest.raises(anyattn.InvalidCallError, match="frobnicate"):
        model(token_ids(), frobnicate=1)


def test_padded_rows_of_half_precision_are_finite() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        model = BY_NAME["llama"].make().to(dtype)
        with torch.no_grad():
            want = model(token_ids(), attention_mask=kept(3, 0)).logits.float()
            model.set_attn_implementation("anyattn")
            got = model(token_ids(), attention_mask=kept(3, 0)).logits.float()
        rows = kept(3, 0).bool()
        assert got.isfinite().all()
        assert (got - want)[rows].abs().max() < 0.1 * want[rows].abs().max()
