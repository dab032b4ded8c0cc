"""What Diffusers' masks and arguments mean once they come through anyattn, against float64."""

from __future__ import annotations

import pytest
import torch

import anyattn
from anyattn import masks
from anyattn.integrations import diffusers as integration
from anyattn.integrations.diffusers.calls import doors
from anyattn.integrations.diffusers.calls.arguments import to_call
from anyattn.integrations.diffusers.calls.masks import translate
from anyattn.process.bounded import Bounded

attention_dispatch = pytest.importorskip("diffusers.models.attention_dispatch")

B, SQ, SKV, H, D = 3, 5, 7, 2, 8


@pytest.fixture(autouse=True)
def _enabled(monkeypatch):
    monkeypatch.setattr(doors, "_said", Bounded(256))
    integration.enable()
    yield
    integration.disable()


def tensors(batch=B, seqlen_q=SQ, seqlen_kv=SKV, heads=H):
    torch.manual_seed(3)
    query = torch.randn(batch, seqlen_q, heads, D)
    key, value = torch.randn(2, batch, seqlen_kv, heads, D)
    return query, key, value


def dispatch(*args, **kwargs):
    return attention_dispatch.dispatch_attention_fn(*args, backend="anyattn", **kwargs)


def truth(query, key, value, allowed=None, bias=None, scale=None):
    """Attention in float64 with an allowed-or-not and an added matrix, each broadcastable to (B, H, S_q, S_kv)."""
    query, key, value = (tensor.double().transpose(1, 2) for tensor in (query, key, value))
    scores = query @ key.transpose(-1, -2) * (D**-0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.double()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return (torch.nan_to_num(scores.softmax(-1)) @ value).transpose(1, 2)


def agree(out, expected):
    return torch.allclose(out.double(), expected, atol=1e-5)


def padding():
    mask = torch.ones(B, SKV, dtype=torch.bool)
    mask[0, 5:] = False
    mask[1, :2] = False
    mask[2, 2:4] = False
    return mask


def test_boolean_two_dimensional_mask_is_key_padding():
    q, k, v = tensors()
    mask = padding()
    assert translate(mask, q, k).key is mask
    assert agree(dispatch(q, k, v, mask), truth(q, k, v, mask[:, None, None]))


def test_floating_two_dimensional_mask_is_added_per_key():
    q, k, v = tensors()
    bias = torch.randn(B, SKV)
    assert agree(dispatch(q, k, v, bias), truth(q, k, v, bias=bias[:, None, None]))


def test_two_dimensional_mask_of_rows_and_columns():
    q, k, v = tensors()
    mask = torch.rand(SQ, SKV) > 0.4
    assert agree(dispatch(q, k, v, mask), truth(q, k, v, mask[None, None]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_two_dimensional_mask_that_fits_both_readings_is_refused(dtype):
    """Diffusers takes (B, S_kv) here and (S_q, S_kv) for every other batch size."""
    q, k, v = tensors(batch=SQ)
    mask = torch.ones(SQ, SKV, dtype=dtype)
    with pytest.raises(anyattn.InvalidCallError, match=r"ambiguous.*mask\[:, None, None, :\]"):
        dispatch(q, k, v, mask)


def test_advice_for_the_ambiguous_mask_works():
    q, k, v = tensors(batch=SQ)
    mask = torch.rand(SQ, SKV) > 0.4
    assert agree(dispatch(q, k, v, mask[:, None, None, :]), truth(q, k, v, mask[:, None, None]))
    assert agree(dispatch(q, k, v, mask[None, None]), truth(q, k, v, mask[None, None]))


def test_mask_of_one_row_means_the_same_in_both_readings():
    q, k, v = tensors(batch=1, seqlen_q=1)
    mask = padding()[:1]
    assert agree(dispatch(q, k, v, mask), truth(q, k, v, mask[:, None, None]))
    q, k, v = tensors()
    assert agree(dispatch(q, k, v, mask), truth(q, k, v, mask[:, None, None]))
    assert agree(dispatch(q, k, v, mask[0]), truth(q, k, v, mask[:, None, None]))


def test_three_dimensional_mask_is_per_batch_entry():
    q, k, v = tensors()
    mask = torch.rand(B, SQ, SKV) > 0.3
    assert agree(dispatch(q, k, v, mask), truth(q, k, v, mask[:, None]))
    assert agree(dispatch(q, k, v, mask[:, :1]), truth(q, k, v, mask[:, None, :1]))
    assert agree(dispatch(q, k, v, mask[:1]), truth(q, k, v, mask[:1, None]))


def test_three_dimensional_mask_with_as_many_heads_as_batch_entries_is_refused():
    q, k, v = tensors(batch=2)
    with pytest.raises(anyattn.InvalidCallError, match=r"ambiguous.*mask\[:, None\]"):
        dispatch(q, k, v, torch.ones(2, SQ, SKV, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(B, 1, 1, SKV), (B, H, SQ, SKV), (B, 1, SQ, SKV), (1, H, 1, SKV)])
@pytest.mark.parametrize("additive", [False, True])
def test_four_dimensional_masks_pass_as_they_are(shape, additive):
    q, k, v = tensors()
    torch.manual_seed(5)
    mask = torch.randn(shape) if additive else torch.rand(shape) > 0.3
    expected = truth(q, k, v, bias=mask) if additive else truth(q, k, v, mask)
    assert agree(dispatch(q, k, v, mask), expected)


@pytest.mark.parametrize("shape", [(H, SQ, SKV), (B, SKV + 1), (B, 1), (SQ + 1, SKV), (B, SQ + 1, SKV)])
def test_mask_that_fits_no_reading_is_refused(shape):
    q, k, v = tensors(heads=4) if shape[0] == H else tensors()
    with pytest.raises(anyattn.InvalidCallError, match=f"fits no reading.*S_kv = {SKV}"):
        dispatch(q, k, v, torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("shape", [(B, SKV), (B, 1, 1, SKV)])
def test_integer_mask_is_refused_with_the_cure(shape, dtype):
    q, k, v = tensors()
    mask = torch.ones(shape, dtype=dtype)
    with pytest.raises(anyattn.InvalidCallError, match=r"mask\.bool\(\)"):
        dispatch(q, k, v, mask)
    assert agree(dispatch(q, k, v, mask.bool()), truth(q, k, v))


def test_all_true_padding_changes_nothing():
    q, k, v = tensors()
    assert agree(dispatch(q, k, v, torch.ones(B, SKV, dtype=torch.bool)), truth(q, k, v))


def test_block_mask_and_mask_objects_keep_their_meaning():
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = tensors(batch=1)
    block = create_block_mask(lambda b, h, i, j: i >= j, None, None, SQ, SKV, device="cpu")
    allowed = torch.ones(SQ, SKV, dtype=torch.bool).tril()
    with anyattn.attention_backend("flex"):
        assert agree(dispatch(q, k, v, block), truth(q, k, v, allowed))
    assert agree(dispatch(q, k, v, masks.Causal("upper_left")), truth(q, k, v, allowed))


def test_layer_that_names_flex_for_its_block_mask_runs_on_flex_or_is_refused():
    """Several models build a BlockMask and name the one backend that reads it."""
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = tensors(batch=1)
    block = create_block_mask(lambda b, h, i, j: i >= j, None, None, SQ, SKV, device="cpu")
    expected = truth(q, k, v, torch.ones(SQ, SKV, dtype=torch.bool).tril())
    door = attention_dispatch.dispatch_attention_fn
    with pytest.warns(anyattn.AnyattnWarning), anyattn.attention_backend("native_math"):
        assert agree(door(q, k, v, block, backend="flex"), expected)
    with (
        anyattn.attention_backend("native_math", override=True),
        pytest.raises(anyattn.UnsupportedCallError, match="block"),
    ):
        door(q, k, v, block, backend="flex")
    with anyattn.attention_backend(["native_math", "flex"], override=True):
        assert agree(door(q, k, v, block, backend="flex"), expected)


@pytest.mark.parametrize("backend", ["native", "native_math", "flex"])
def test_causal_is_never_dropped(backend):
    """Diffusers' flex drops is_causal without a mask, and the mask with one."""
    q, k, v = tensors()
    causal = torch.ones(SQ, SKV, dtype=torch.bool).tril()
    with anyattn.attention_backend(backend):
        assert agree(dispatch(q, k, v, is_causal=True), truth(q, k, v, causal))
        mask = padding()
        both = causal & mask[:, None, None]
        assert agree(dispatch(q, k, v, mask, is_causal=True), truth(q, k, v, both))


@pytest.mark.parametrize("key", ["windw_size", "return_attn_probs", "deterministic", "backend", "_parallel_config"])
def test_unknown_key_of_attention_kwargs_is_refused(key):
    q, k, v = tensors()
    with pytest.raises(anyattn.InvalidCallError, match=f"{key}.*known: attn_mask"):
        dispatch(q, k, v, attention_kwargs={key: None})


def test_key_given_twice_is_honoured_or_refused_never_chosen_between():
    q, k, v = tensors()
    expected = truth(q, k, v, scale=0.1)
    assert agree(dispatch(q, k, v, attention_kwargs={"scale": 0.1}), expected)
    assert agree(dispatch(q, k, v, scale=0.1, attention_kwargs={"scale": 0.1}), expected)
    assert agree(dispatch(q, k, v, scale=0.1, attention_kwargs={"scale": None}), expected)
    with pytest.raises(anyattn.InvalidCallError, match="scale is passed twice"):
        dispatch(q, k, v, scale=0.5, attention_kwargs={"scale": 0.1})
    with pytest.raises(anyattn.InvalidCallError, match="attn_mask is passed twice"):
        dispatch(q, k, v, padding(), attention_kwargs={"attn_mask": padding()})


def window(left, right, shift):
    rows, columns = torch.arange(SQ)[:, None] + shift, torch.arange(SKV)[None]
    return (columns >= rows - left) & (columns <= rows + right)


def test_window_size_means_what_it_means_in_flash_attn():
    q, k, v = tensors()
    lower_right = window(2, 1, SKV - SQ)
    assert agree(dispatch(q, k, v, attention_kwargs={"window_size": (2, 1)}), truth(q, k, v, lower_right))
    assert agree(dispatch(q, k, v, attention_kwargs={"window_size": (-1, -1)}), truth(q, k, v))
    mask = torch.rand(B, 1, SQ, SKV) > 0.3
    out = dispatch(q, k, v, mask, attention_kwargs={"window_size": (2, 1)})
    assert agree(out, truth(q, k, v, mask & lower_right))
    with pytest.raises(anyattn.InvalidCallError, match="can't be joined"):
        dispatch(q, k, v, is_causal=True, attention_kwargs={"window_size": (2, 1)})
    with pytest.raises(anyattn.InvalidCallError, match="window_size must be"):
        dispatch(q, k, v, attention_kwargs={"window_size": 2})


def test_window_size_joins_causal_where_the_lengths_agree():
    q, k, v = tensors(seqlen_q=SKV)
    rows, columns = torch.arange(SKV)[:, None], torch.arange(SKV)[None]
    allowed = (columns <= rows) & (columns >= rows - 2)
    out = dispatch(q, k, v, is_causal=True, attention_kwargs={"window_size": (2, 3)})
    assert agree(out, truth(q, k, v, allowed))


def test_return_lse_gives_output_and_lse_of_batch_heads_queries():
    q, k, v = tensors()
    out, lse = dispatch(q, k, v, attention_kwargs={"return_lse": True})
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * D**-0.5
    assert lse.shape == (B, H, SQ)
    assert torch.allclose(lse.double(), scores.logsumexp(-1), atol=1e-5)
    assert agree(out, truth(q, k, v))


def test_grouped_heads_need_the_flag_and_then_work():
    q, k, v = tensors(heads=4)
    k, v = k[:, :, :2], v[:, :, :2]
    expected = truth(q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))
    assert agree(dispatch(q, k, v, enable_gqa=True), expected)
    with pytest.raises(anyattn.InvalidCallError):
        dispatch(q, k, v)


def test_context_parallelism_is_refused():
    """A rank alone would attend to its own shard."""
    q, k, v = tensors()
    with pytest.raises(anyattn.InvalidCallError, match="Context parallelism"):
        dispatch(q, k, v, parallel_config=object())


def test_every_argument_is_passed_on():
    q, k, _ = tensors()
    explicit = {"attn_mask": None, "dropout_p": 0.25, "is_causal": True, "scale": 0.5, "enable_gqa": True}
    assert to_call(q, k, explicit, {"softcap": 3.0}, None) == {**explicit, "softcap": 3.0}
