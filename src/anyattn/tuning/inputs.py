"""Random inputs for a described call, laid out in memory as the layer's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyattn.call.arguments import describe
from anyattn.call.facts import Options
from anyattn.masks.objects import Bias, Boolean, Causal, KeyLengths, KeyPadding, Mask, SlidingWindow
from anyattn.masks.values import prepare_mask
from anyattn.timings.keys import mask_class, sizes_of
from anyattn.types.spec import AttentionSpec, BlockSpec, DenseSpec, MaskSpec, PatternSpec, Storage


class CanNotMakeError(ValueError):
    """Inputs for a call can't be made from its description; the message says why."""


class Inputs(NamedTuple):
    """A call's tensors, in its own layout."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask | None = None
    sinks: Tensor | None = None

    def described(self, spec: AttentionSpec) -> AttentionSpec:
        """Describe these tensors with a spec's other arguments."""
        options = Options(
            dropout_p=spec.dropout_p,
            scale=spec.scale,
            enable_gqa=spec.is_gqa,
            softcap=spec.softcap,
            return_lse=spec.return_lse,
            layout=spec.layout,
        )
        with torch.set_grad_enabled(spec.needs_grad):
            return describe(self.query, self.key, self.value, self.mask, self.sinks, options)


def make_inputs(spec: AttentionSpec, *, seed: int = 0) -> Inputs:
    """Make a call's tensors: normally distributed, with the spec's sizes, mask and strides.

    Key lengths are uniform in `[S_kv / 2, S_kv]`, and a boolean mask allows 70 %. torch's generators aren't touched.

    Args:
        spec: The call.
        seed: Random seed.

    Raises:
        CanNotMakeError: For block masks, mask functions, packed sequences and strides that a spec doesn't tell.
    """
    _check(spec)
    device = torch.device(spec.device_type if spec.device_index is None else f"{spec.device_type}:{spec.device_index}")
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = spec.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    def laid_out(length: int, heads: int, dim: int) -> Tensor:
        by_heads = spec.storage.bhsd_contiguous
        tensor = normal(spec.batch, heads, length, dim) if by_heads else normal(spec.batch, length, heads, dim)
        return tensor if by_heads == (spec.layout == "BHSD") else tensor.transpose(1, 2)

    query = laid_out(spec.seqlen_q, spec.num_heads, spec.head_dim)
    key = laid_out(spec.seqlen_kv, spec.num_kv_heads, spec.head_dim)
    value = laid_out(spec.seqlen_kv, spec.num_kv_heads, spec.head_dim_v)
    sinks = normal(spec.num_heads, dtype=spec.dtype) if spec.sinks else None
    mask = _mask(spec, generator, device)
    leaves = {"query": query, "key": key, "value": value, "sinks": sinks, "mask": None if mask is None else mask.dense}
    for name in spec.requires_grad:
        leaf = leaves[name]
        if leaf is not None:
            leaf.requires_grad_()
    made = Inputs(query, key, value, mask, sinks)
    got = made.described(spec)
    if sizes_of(got) != sizes_of(spec) or mask_class(got) != mask_class(spec):
        raise CanNotMakeError(f"the inputs made have the mask {mask_class(got)}, not {mask_class(spec)}")
    return made


def _check(spec: AttentionSpec) -> None:
    if spec.packed:
        raise CanNotMakeError("packed sequences aren't measured")
    if spec.mask.block is not None:
        raise CanNotMakeError("a block mask or mask function can't be made from its description")
    if min(sizes_of(spec)) <= 0:
        raise CanNotMakeError("its sizes are unknown or zero")
    storage = spec.storage
    if not storage.aligned or not storage.unit_stride or storage.expanded_kv:
        raise CanNotMakeError("its tensors have strides that the description doesn't tell")
    if spec.dropout_p:
        raise CanNotMakeError("dropout is random, so its result can't be compared with the reference")


def _mask(spec: AttentionSpec, generator: torch.Generator, device: torch.device) -> Mask | None:
    parts: list[Mask] = []
    pattern, dense, batch, keys = spec.mask.pattern, spec.mask.dense, spec.batch, spec.seqlen_kv
    if pattern is not None and pattern.is_causal:
        parts.append(Causal(pattern.align))
    elif pattern is not None:
        parts.append(SlidingWindow(pattern.left, pattern.right, pattern.align))
    if spec.mask.key is not None:
        lengths = torch.randint(max(1, keys // 2), keys + 1, (batch,), generator=generator, device=device)
        lengths[0] = max(1, keys // 2)  # a mask that allows every key would be dropped
        parts.append(_key_mask(spec.mask, lengths, keys))
    if dense is not None:
        values = torch.randn(dense.shape, generator=generator, device=device)
        if dense.kind == "boolean":
            allowed = values > -0.5244  # the normal distribution's 30th percentile
            allowed[..., 0] = True
            parts.append(Boolean(allowed))
        else:
            parts.append(Bias(values.to(dense.dtype)))
    found: Mask | None = None
    for part in parts:
        found = part if found is None else found & part
    return found


def _key_mask(mask: MaskSpec, lengths: Tensor, keys: int) -> Mask:
    if mask.key == "lengths":
        return KeyLengths(lengths.to(torch.int32))
    padding = torch.arange(keys, device=lengths.device)[None, :] < lengths[:, None]
    if not mask.prefix and not lengths.is_cuda:
        # On a CPU the values are read, and keys in front would be found.
        padding = padding.roll(1, 1)
        padding[:, 0] = True
        padding[:, 1] = keys < 3
    found: Mask = KeyPadding(padding)
    if mask.prefix:
        prepare_mask(found)
    return found


def spec_of(data: Mapping[str, Any], *, device_type: str | None = None) -> AttentionSpec:
    """Return the spec that `AttentionSpec.to_dict` wrote; fields that this version doesn't know are ignored.

    Args:
        data: The fields, of which the sizes are needed.
        device_type: The type of device to use instead of the recorded one.

    Raises:
        KeyError: If a size is missing.
        ValueError: If a value has no meaning.
    """
    given = dict(data)
    names = ("batch", "seqlen_q", "seqlen_kv", "num_heads", "num_kv_heads", "head_dim", "head_dim_v")
    sizes = [int(given[name]) for name in names]
    mask = dict(given.get("mask") or {})
    dense = mask.get("dense")
    if dense is not None:
        dense = DenseSpec(dense["kind"], _dtype(dense["dtype"]), tuple(dense["shape"]))
    mask_spec = MaskSpec(
        pattern=_made(PatternSpec, mask.get("pattern")),
        key=mask.get("key"),
        dense=dense,
        block=_made(BlockSpec, mask.get("block")),
        dead_rows=bool(mask.get("dead_rows", False)),
        prefix=bool(mask.get("prefix", False)),
    )
    scale = given.get("scale")
    flags = ("sinks", "return_lse", "deterministic", "packed", "compiled", "captured", "forward_ad", "vmap")
    fields: dict[str, Any] = {
        **dict(zip(names, sizes, strict=True)),
        "dtype": _dtype(given.get("dtype", "bfloat16")),
        "device_type": device_type or given.get("device_type", "cuda"),
        "scale": 1 / math.sqrt(sizes[5]) if scale is None else float(scale),
        "layout": given.get("layout", "BSHD"),
        "mask": mask_spec,
        "dropout_p": float(given.get("dropout_p", 0.0)),
        "softcap": given.get("softcap"),
        "requires_grad": tuple(given.get("requires_grad", ())),
        "same_lengths": sizes[1] == sizes[2],
        "storage": _made(Storage, given.get("storage")) or Storage(),
        "packed_pattern": _made(PatternSpec, given.get("packed_pattern")),
    }
    fields |= {name: bool(given.get(name, False)) for name in flags}
    return AttentionSpec(**fields)


def _made(kind: Any, fields: Mapping[str, Any] | None) -> Any:
    if fields is None:
        return None
    return kind(**{name: value for name, value in fields.items() if name in kind.__dataclass_fields__})


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r} is no dtype of torch's")
    return found
