"""Make the tensors that a case describes: kinds of data, kinds of storage and kinds of masks, all from one seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anyattn.masks.objects import (
    Bias,
    Block,
    Boolean,
    Causal,
    KeyLengths,
    KeyPadding,
    Mask,
    SlidingWindow,
    document,
    frame_causal,
    from_function,
    prefix_lm,
)

DATA: tuple[str, ...] = ("normal", "large", "unequal", "constant", "shifted", "zeros")
"""Kinds of values: iid normal; logits so large that the softmax saturates; one half of the keys holding nearly all the
weight; every position the same; keys with a large common offset; nothing but zeros in query and key."""

STRIDES: tuple[str, ...] = (
    "plain",
    "transposed",
    "packed",
    "offset",
    "strided",
    "gapped",
    "expanded_heads",
    "expanded_batch",
)
"""Kinds of storage: contiguous; contiguous in the other layout; sliced out of one (B, S, 3, H, D); starting one element
late; every second element along head_dim; every second position; one key/value head (or batch entry) expanded."""

Tensors = tuple[Tensor, Tensor, Tensor]


def values(kind: str, query: Tensor, key: Tensor, value: Tensor) -> Tensors:
    """Change iid normals (B, S, H, D) to one of the kinds of `DATA`."""
    if kind == "large":
        return query * 5, key * 5, value
    if kind == "unequal":
        # Ten nats more for the second half of the keys, at the default scale.
        query[..., 0] = 2.0
        key[:, key.shape[1] // 2 :, :, 0] += 5.0 * math.sqrt(query.shape[-1])
        return query, key, value
    if kind == "constant":
        # Not ones: their sums are exact, and a plain computation would show no error.
        one = (query[:1, :1, :1], key[:1, :1, :1], value[:1, :1, :1])
        return one[0].expand_as(query).clone(), one[1].expand_as(key).clone(), one[2].expand_as(value).clone()
    if kind == "shifted":
        return query, key + 8.0, value
    if kind == "zeros":
        return torch.zeros_like(query), torch.zeros_like(key), value
    return query, key, value


def stored(kind: str, tensors: Tensors) -> Tensors:
    """Copy (B, S, H, D) tensors to storage of one of the kinds of `STRIDES`; only expanded ones change their values."""
    query, key, value = tensors
    if kind == "packed":
        if query.shape == key.shape == value.shape:
            packed = torch.stack(tensors, 2)
            return packed[:, :, 0], packed[:, :, 1], packed[:, :, 2]
        if key.shape == value.shape:
            pair = torch.stack((key, value), 2)
            return query, pair[:, :, 0], pair[:, :, 1]
        return tensors
    if kind == "expanded_heads":
        return query, key[:, :, :1].expand_as(key), value[:, :, :1].expand_as(value)
    if kind == "expanded_batch":
        return query, key[:1].expand_as(key), value[:1].expand_as(value)
    one = {"transposed": _transposed, "offset": _offset, "strided": _strided, "gapped": _gapped}.get(kind)
    return tensors if one is None else (one(query), one(key), one(value))


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _offset(tensor: Tensor) -> Tensor:
    storage = tensor.new_zeros(tensor.numel() + 1)
    view = storage[1:].view(tensor.shape)
    view.copy_(tensor)
    return view


def _strided(tensor: Tensor) -> Tensor:
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), 3.0)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def _gapped(tensor: Tensor) -> Tensor:
    long = tensor.new_full((tensor.shape[0], 2 * tensor.shape[1], *tensor.shape[2:]), 3.0)
    long[:, ::2] = tensor
    return long[:, ::2]


Sizes = tuple[int, int, int, int]
"""B, H, S_q, S_kv."""


def make_mask(recipe: str, sizes: Sizes, dtype: torch.dtype, device: str, generator: torch.Generator) -> Mask | None:
    """Make the mask of a recipe: parts joined with `&`, each a word and its options after colons.

    `causal[:align]` · `window:left:right[:align]` · `padding:left|right|scattered|dead` · `lengths[:dead]` ·
    `boolean:dims[:dead]` · `bias:dims:own|float32[:inf|min|dead]` · `block:causal|heads` · `document[:shared]` ·
    `prefix[:int]` · `frames:tokens` · `function:heads|dead`; dims are the letters of b, h, q, k that are full, the
    others being 1. `dead` leaves rows without a key; `inf` forbids some positions with -inf and `min` with finfo.min,
    in whole rows too.
    """
    found: Mask | None = None
    for part in recipe.split("&"):
        word, *options = part.strip().split(":")
        if word == "none":
            continue
        one = _part(word, options, sizes, dtype, device, generator)
        found = one if found is None else found & one
    return found


def _part(
    word: str, options: list[str], sizes: Sizes, dtype: torch.dtype, device: str, generator: torch.Generator
) -> Mask:
    align: Any = options[-1] if options and options[-1] in ("upper_left", "lower_right") else "upper_left"
    if word == "causal":
        return Causal(align)
    if word == "window":
        return SlidingWindow(int(options[0]), int(options[1]), align)
    if word == "padding":
        return KeyPadding(_padding(options[0], sizes, generator).to(device))
    if word == "lengths":
        return KeyLengths(_lengths("dead" in options, sizes, generator).to(device))
    if word == "boolean":
        return Boolean(_boolean(options[0], "dead" in options, sizes, generator).to(device))
    if word == "bias":
        kind = torch.float32 if options[1] == "float32" else dtype
        return Bias(_bias(options[0], kind, options[2:], sizes, generator).to(device))
    if word == "block":
        return _block(options[0], sizes, device)
    if word == "document":
        ids = _document_ids("shared" in options, sizes, generator).to(device)
        return document(ids) if sizes[2] == sizes[3] else from_function(_ids_agree(ids))
    if word == "prefix":
        lengths = _lengths(False, sizes, generator)
        return prefix_lm(int(lengths[0]) if "int" in options else lengths.to(device))
    if word == "frames":
        return frame_causal(int(options[0]))
    if word == "function":
        return from_function(_by_head if options[0] == "heads" else _nothing_at_first)
    raise ValueError(f"There is no mask recipe {word!r}.")


def _padding(kind: str, sizes: Sizes, generator: torch.Generator) -> Tensor:
    batch, _, _, seqlen = sizes
    lengths = _lengths(kind == "dead", sizes, generator)[:, None]
    columns = torch.arange(seqlen)[None, :]
    if kind == "left":
        return columns >= seqlen - lengths
    if kind == "scattered":
        allowed = torch.rand(batch, seqlen, generator=generator) < 0.6
        allowed[:, seqlen // 2] = True
        return allowed
    return columns < lengths


def _lengths(dead: bool, sizes: Sizes, generator: torch.Generator) -> Tensor:
    lengths = torch.randint(1, sizes[3] + 1, (sizes[0],), generator=generator)
    # At least one entry is shorter than the whole; with `dead` one has no keys.
    lengths[0] = 0 if dead else max(1, (sizes[3] + 1) // 2)
    return lengths


def _shape(dims: str, sizes: Sizes) -> tuple[int, int, int, int]:
    shape = [size if letter in dims else 1 for letter, size in zip("bhqk", sizes, strict=True)]
    return (shape[0], shape[1], shape[2], shape[3])


def _boolean(dims: str, dead: bool, sizes: Sizes, generator: torch.Generator) -> Tensor:
    shape = _shape(dims, sizes)
    allowed = torch.rand(shape, generator=generator) < 0.6
    # Every row keeps a key, at a place that moves from row to row.
    own = (torch.arange(shape[2]) * 7 % shape[3])[None, None, :, None]
    allowed |= torch.arange(shape[3]) == own
    if dead:
        allowed[:, :, :: max(2, shape[2] // 2)] = False
    return allowed


def _bias(dims: str, dtype: torch.dtype, options: list[str], sizes: Sizes, generator: torch.Generator) -> Tensor:
    shape = _shape(dims, sizes)
    bias = torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    if "inf" in options:
        bias = bias.masked_fill(~_boolean(dims, False, sizes, generator), -math.inf)
    if "min" in options:
        lowest = torch.finfo(dtype).min
        bias = bias.masked_fill(~_boolean(dims, False, sizes, generator), lowest)
        bias[:, :, -1] = lowest  # a whole row at finfo.min is not a row without a key
    if "dead" in options:
        bias = bias.masked_fill(~_boolean(dims, True, sizes, generator), -math.inf)
    return bias


def _document_ids(shared: bool, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Return the document number of each token; some documents have one token."""
    starts = torch.rand(1 if shared else sizes[0], max(sizes[2:]), generator=generator) < 0.3
    return starts.cumsum(-1)


def _ids_agree(ids: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the function of a document mask, for queries and keys of different lengths."""
    entries = ids.shape[0] > 1
    return lambda b, h, q, kv: ids[b if entries else b * 0, q] == ids[b if entries else b * 0, kv]


def _by_head(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return kv <= q + h * 2


def _nothing_at_first(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return (kv < q) & ((b + kv) % 3 > 0)


def _block(kind: str, sizes: Sizes, device: str) -> Mask:
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return kv <= q

    seqlen_q, seqlen_kv = sizes[2:]
    if kind == "heads":
        # Made with H=None although its function reads the head: its blocks are those of head 0.
        return Block(create_block_mask(_by_head, None, None, seqlen_q, seqlen_kv, device=device))
    return Block(create_block_mask(causal, None, None, seqlen_q, seqlen_kv, device=device))
