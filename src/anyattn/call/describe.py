"""From a call to its spec: every check that needs no values, with errors that say what to do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anyattn.call.facts import Facts, MaskFacts, Options, agree, shape_text
from anyattn.errors import InvalidCallError
from anyattn.masks import scalars
from anyattn.masks.objects import Align, Pattern, join_patterns
from anyattn.types.spec import (
    UNKNOWN,
    AttentionSpec,
    BlockSpec,
    DenseKind,
    DenseSpec,
    KeyKind,
    MaskSpec,
    PatternSpec,
    Storage,
)


def check_tensors(query: object, key: object, value: object) -> None:
    """Refuse what isn't a plain tensor.

    Raises:
        InvalidCallError: For another type, and for nested tensors.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise InvalidCallError(f"{name} must be a tensor; {type(tensor).__name__} was given.")
        if tensor.is_nested:
            raise InvalidCallError(
                f"{name} is a nested tensor, which attention does not take. Pad it "
                "(torch.nested.to_padded_tensor) and say with anyattn.masks.KeyLengths which keys are real."
            )
        if tensor.layout != torch.strided:
            raise InvalidCallError(f"{name} must be a dense tensor; its layout is {tensor.layout}.")


def build_spec(
    query: Facts,
    key: Facts,
    value: Facts,
    mask: MaskFacts,
    options: Options,
    sinks: Facts | None = None,
    *,
    grad: bool = False,
    storage: Storage = Storage(),  # noqa: B008
    same_lengths: bool | None = None,
    deterministic: bool = False,
    compiled: bool = False,
    forward_ad: bool = False,
    vmap: bool = False,
) -> AttentionSpec:
    """Check a call and describe it.

    Raises:
        InvalidCallError: If it is wrong for any backend.
    """
    sizes = _sizes(query, key, value, options)
    batch, seqlen_q, seqlen_kv, heads, kv_heads, dim, dim_v = sizes
    _check_types(query, key, value)
    _check_options(options)
    scale = options.scale if options.scale is not None else 1.0 / math.sqrt(dim)
    same = seqlen_q == seqlen_kv if same_lengths is None else same_lengths
    mask_spec = _mask_spec(mask, options, query, sizes, same)
    _check_sinks(sinks, heads, query)
    inputs = {"query": query, "key": key, "value": value, "mask": mask.dense, "sinks": sinks}
    needs = tuple(name for name, facts in inputs.items() if facts is not None and facts.requires_grad)
    return AttentionSpec(
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_kv=seqlen_kv,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        head_dim_v=dim_v,
        dtype=query.dtype,
        device_type=query.device.type,
        device_index=query.device.index,
        layout=options.layout,
        mask=mask_spec,
        dropout_p=float(options.dropout_p),
        scale=float(scale),
        softcap=None if options.softcap is None else float(options.softcap),
        sinks=sinks is not None,
        return_lse=bool(options.return_lse),
        requires_grad=needs if grad else (),
        same_lengths=same,
        storage=storage,
        deterministic=deterministic,
        compiled=compiled,
        forward_ad=forward_ad,
        vmap=vmap,
    )


def _sizes(query: Facts, key: Facts, value: Facts, options: Options) -> tuple[int, ...]:
    for name, facts in (("query", query), ("key", key), ("value", value)):
        if len(facts.shape) != 4:
            order = (
                "(batch, seqlen, heads, head_dim)" if options.layout == "BSHD" else "(batch, heads, seqlen, head_dim)"
            )
            raise InvalidCallError(
                f"{name} must have four dimensions {order}; its shape is {shape_text(facts)}. "
                "Add the missing ones with unsqueeze."
            )
    s, h = (1, 2) if options.layout == "BSHD" else (2, 1)
    batch, seqlen_q, heads, dim = query.shape[0], query.shape[s], query.shape[h], query.shape[3]
    seqlen_kv, kv_heads, dim_v = key.shape[s], key.shape[h], value.shape[3]

    def given() -> str:
        return f"query {shape_text(query)}, key {shape_text(key)}, value {shape_text(value)} ({options.layout})"

    if not (agree(batch, key.shape[0]) and agree(batch, value.shape[0])):
        raise InvalidCallError(
            f"query, key and value need the same batch size; given {given()}. A batch of 1 isn't broadcast: "
            "expand key and value yourself."
        )
    if not agree(seqlen_kv, value.shape[s]):
        raise InvalidCallError(f"key and value need the same length; given {given()}.")
    if not agree(kv_heads, value.shape[h]):
        raise InvalidCallError(f"key and value need the same number of heads; given {given()}.")
    if dim != key.shape[3]:
        raise InvalidCallError(f"query and key need the same head_dim; given {given()}.")
    if 0 in (heads, kv_heads, dim, dim_v):
        raise InvalidCallError(f"heads and head_dim must not be 0; given {given()}.")
    if heads != kv_heads:
        _check_gqa(heads, kv_heads, options)
    return (batch, seqlen_q, seqlen_kv, heads, kv_heads, dim, dim_v)


def _check_gqa(heads: int, kv_heads: int, options: Options) -> None:
    if not options.enable_gqa:
        raise InvalidCallError(
            f"query has {heads} heads, key and value {kv_heads}. If several query heads are to share one "
            "key/value head, say so with enable_gqa=True."
        )
    if heads % kv_heads:
        raise InvalidCallError(
            f"With enable_gqa=True query's heads must be a multiple of key's; given {heads} and {kv_heads}."
        )


def _check_types(query: Facts, key: Facts, value: Facts) -> None:
    if not query.dtype == key.dtype == value.dtype:
        raise InvalidCallError(
            f"query, key and value need one dtype; given {query.dtype}, {key.dtype} and {value.dtype}. "
            "Cast them to the one you want to compute in."
        )
    if not query.dtype.is_floating_point:
        raise InvalidCallError(f"query, key and value must be floating-point; {query.dtype} was given.")
    if not query.device == key.device == value.device:
        raise InvalidCallError(
            f"query, key and value must be on one device; given {query.device}, {key.device} and {value.device}."
        )


def _check_number(name: str, number: object) -> None:
    if number == scalars.TENSOR:
        raise InvalidCallError(
            f"{name} is a tensor whose value can't be had in compiled code. Give a number, or multiply query by it."
        )
    if not isinstance(number, int | float):
        raise InvalidCallError(f"{name} must be a number; {type(number).__name__} was given.")
    if not math.isfinite(number):
        raise InvalidCallError(f"{name} must be finite; {number} was given.")


def _check_options(options: Options) -> None:
    _check_number("dropout_p", options.dropout_p)
    if not 0.0 <= options.dropout_p <= 1.0:
        raise InvalidCallError(f"dropout_p must be in [0, 1]; {options.dropout_p} was given.")
    if options.scale is not None:
        _check_number("scale", options.scale)
    if options.softcap is not None:
        _check_number("softcap", options.softcap)
        if options.softcap <= 0:
            raise InvalidCallError(f"softcap must be > 0, or None for none; {options.softcap} was given.")
    for name, flag in (
        ("is_causal", options.is_causal),
        ("enable_gqa", options.enable_gqa),
        ("return_lse", options.return_lse),
    ):
        if str(flag) == scalars.TENSOR:
            raise InvalidCallError(f"{name} is a tensor whose value can't be had in compiled code. Give True or False.")
        if type(flag) is not bool:
            raise InvalidCallError(f"{name} must be True or False; {flag!r} was given.")


def _check_sinks(sinks: Facts | None, heads: int, query: Facts) -> None:
    if sinks is None:
        return
    if sinks.shape != (heads,) or not sinks.dtype.is_floating_point or sinks.device != query.device:
        raise InvalidCallError(
            f"sinks must be a floating-point tensor ({heads},), one logit per query head, on {query.device}; "
            f"{sinks.dtype} of shape {shape_text(sinks)} on {sinks.device} was given."
        )


def _mask_spec(mask: MaskFacts, options: Options, query: Facts, sizes: tuple[int, ...], same_lengths: bool) -> MaskSpec:
    batch, seqlen_q, seqlen_kv, heads = sizes[:4]
    pattern = _pattern(mask, options, same_lengths)
    key: KeyKind | None = None
    if mask.key is not None:
        key = _check_key(mask.key, batch, seqlen_kv, query)
    dense = None if mask.dense is None else _check_dense(mask.dense, (batch, heads, seqlen_q, seqlen_kv), query)
    if mask.block is not None:
        _check_block(mask.block, batch, heads)
    if mask.seqlens is not None:
        _check_seqlens(mask.seqlens, (seqlen_q, seqlen_kv))
    dead = not mask.live and (key is not None or dense is not None or mask.block is not None)
    dead = dead or _pattern_may_be_dead(pattern, seqlen_q, seqlen_kv, same_lengths)
    parts = (key is not None or dense is not None) + (mask.block is not None) + (pattern is not None)
    if mask.live and parts > 1:
        dead = True  # each leaves every row a key, but both together may not
    return MaskSpec(pattern, key, dense, mask.block, dead, key == "lengths" or (key is not None and mask.prefix))


def _pattern(mask: MaskFacts, options: Options, same_lengths: bool) -> PatternSpec | None:
    found = mask.pattern
    if options.window is not None:
        window = options.window
        if not isinstance(window, tuple | list) or len(window) != 2:
            raise InvalidCallError(f"window must be (left, right), -1 for unbounded; {window!r} was given.")
        for name, side in zip(("left", "right"), window, strict=True):
            if isinstance(side, bool) or not isinstance(side, int) or side < -1:
                raise InvalidCallError(f"window's {name} side must be an int >= 0, or -1; {side!r} was given.")
        if found is not None and found[:2] != (-1, 0):
            raise InvalidCallError("Give the window once: as window= or as masks.SlidingWindow.")
        align: Align = "upper_left" if found is None else found[2]
        given: Pattern = (window[0], window[1], align)
        found = given if found is None else join_patterns(found, given)
    if options.is_causal:
        causal: Pattern = (-1, 0, "upper_left")
        if found is not None and found[2] != "upper_left":
            if not same_lengths:
                raise InvalidCallError(
                    "is_causal=True means upper-left alignment, and the mask's pattern is lower-right. "
                    "Leave is_causal out and write masks.Causal('lower_right')."
                )
            found = (found[0], found[1], "upper_left")
        found = causal if found is None else join_patterns(found, causal)
    if found is None or found[:2] == (-1, -1):
        return None
    return PatternSpec(found[0], found[1], "upper_left" if same_lengths else found[2])


def _pattern_may_be_dead(pattern: PatternSpec | None, seqlen_q: int, seqlen_kv: int, same_lengths: bool) -> bool:
    """Whether some row's window lies outside the keys."""
    if pattern is None or same_lengths:
        return False
    if UNKNOWN in (seqlen_q, seqlen_kv):
        return pattern.align == "lower_right" or pattern.left != -1
    offset = seqlen_kv - seqlen_q if pattern.align == "lower_right" else 0
    first_end = seqlen_kv if pattern.right == -1 else offset + pattern.right
    last_start = 0 if pattern.left == -1 else seqlen_q - 1 + offset - pattern.left
    return first_end < 0 or last_start > seqlen_kv - 1


def _check_key(key: Facts, batch: int, seqlen_kv: int, query: Facts) -> KeyKind:
    if key.device != query.device:
        raise InvalidCallError(f"The key mask is on {key.device}, query on {query.device}; move it there once.")
    if len(key.shape) == 1:
        if not agree(key.shape[0], batch):
            raise InvalidCallError(f"KeyLengths needs one length per batch entry, ({batch},); given {shape_text(key)}.")
        return "lengths"
    if len(key.shape) == 4:
        if not ((key.shape[0] == 1 or agree(key.shape[0], batch)) and agree(key.shape[3], seqlen_kv)):
            raise InvalidCallError(
                f"A mask must broadcast to (B, H, S_q, S_kv), with B = {batch} and S_kv = {seqlen_kv}; its shape is "
                f"{shape_text(key)}. Make every dimension full or 1."
            )
        return "padding"
    if not (agree(key.shape[0], batch) and agree(key.shape[1], seqlen_kv)):
        raise InvalidCallError(f"KeyPadding needs shape (B, S_kv) = ({batch}, {seqlen_kv}); given {shape_text(key)}.")
    return "padding"


def _check_dense(dense: Facts, full: tuple[int, int, int, int], query: Facts) -> DenseSpec:
    if dense.dtype != torch.bool and dense.dtype not in (torch.float32, query.dtype):
        hint = (
            "an integer 0/1 mask means nothing by itself: use mask.bool() for True = attend, and "
            "anyattn.masks.KeyPadding for a tokenizer's (B, S_kv) mask"
            if not dense.dtype.is_floating_point
            else "cast it"
        )
        raise InvalidCallError(
            f"A mask tensor must be bool, float32 or query's dtype {query.dtype}; {dense.dtype} was given: {hint}."
        )
    if dense.device != query.device:
        raise InvalidCallError(f"The mask is on {dense.device}, query on {query.device}; move it there once.")
    batch, heads, seqlen_q, seqlen_kv = full
    shape = (1,) * (4 - len(dense.shape)) + tuple(dense.shape)
    fits = len(shape) == 4 and all(size == 1 or agree(size, want) for size, want in zip(shape, full, strict=True))
    if not fits:
        hint = "Make every dimension full or 1."
        if len(dense.shape) == 2 and dense.shape[0] == batch and dense.shape[1] == seqlen_kv:
            hint = (
                "A 2-D mask is (S_q, S_kv). For a padding mask (B, S_kv) write "
                "anyattn.masks.KeyPadding(mask), or mask[:, None, None, :]."
            )
        elif len(dense.shape) == 3 and dense.shape[0] == batch:
            hint = "A 3-D mask is (H, S_q, S_kv). For (B, S_q, S_kv) write mask[:, None]."
        raise InvalidCallError(
            f"A mask must broadcast to (B, H, S_q, S_kv) = ({batch}, {heads}, {seqlen_q}, {seqlen_kv}); "
            f"its shape is {shape_text(dense)}. {hint}"
        )
    kind: DenseKind = "boolean" if dense.dtype == torch.bool else "bias"
    return DenseSpec(kind, dense.dtype, (shape[0], shape[1], shape[2], shape[3]))


def _check_block(block: BlockSpec, batch: int, heads: int) -> None:
    if not (block.batch in (1, batch) or batch == UNKNOWN) or block.heads not in (1, heads):
        raise InvalidCallError(
            f"The block mask was made for batch {block.batch} and {block.heads} heads; the call has {batch} and "
            f"{heads}. Make it with those, or with None where nothing depends on them."
        )


def _check_seqlens(made: tuple[int, int], lengths: tuple[int, int]) -> None:
    if not (agree(made[0], lengths[0]) and agree(made[1], lengths[1])):
        raise InvalidCallError(
            f"The mask was made for lengths (S_q, S_kv) = {made}; the call has {lengths}. Make it again for those."
        )
