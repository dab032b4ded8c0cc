"""What a measurement holds for: a machine, and calls that are alike enough to take the same time."""

from __future__ import annotations

from typing import Literal, NamedTuple

from anyattn.environment import Environment
from anyattn.types.spec import AttentionSpec, MaskSpec, PatternSpec

Direction = Literal["forward", "forward+backward"]
Mode = Literal["eager", "graph"]


class Key(NamedTuple):
    """The calls that one measurement stands for.

    Attributes:
        machine: From `fingerprint`.
        shape: From `shape_bucket`.
        mask: From `mask_class`.
        dtype: The dtype of query, key and value, such as `"bfloat16"`.
        direction: `"forward"`, or `"forward+backward"` if an input needs a gradient.
        mode: `"eager"`, or `"graph"` for calls that a CUDA graph or compiled code launches.
    """

    machine: str
    shape: str
    mask: str
    dtype: str
    direction: Direction
    mode: Mode


def key_of(spec: AttentionSpec, env: Environment) -> Key | None:
    """Return what a call's measurements are stored under; None for calls that aren't measured.

    Those are calls of unknown or empty sizes, packed sequences, and calls under forward-mode AD or vmap.
    """
    sizes = sizes_of(spec)
    if spec.packed or spec.forward_ad or spec.vmap or min(sizes) <= 0:
        return None
    device = env.device(spec.device_type, spec.device_index)
    if device is None or device.type == "meta":
        return None
    return Key(
        fingerprint(env, device.type, device.index),
        shape_bucket(spec),
        mask_class(spec),
        str(spec.dtype).removeprefix("torch."),
        "forward+backward" if spec.needs_grad else "forward",
        mode_of(spec),
    )


def mode_of(spec: AttentionSpec) -> Mode:
    """Return how a call is launched: compiled and captured calls cost the host next to nothing."""
    return "graph" if spec.device_type == "cuda" and (spec.captured or spec.compiled) else "eager"


def fingerprint(env: Environment, device_type: str, index: int | None = None) -> str:
    """Return in words everything about a machine that changes how long a kernel takes, but for kernels' versions.

    Those stand beside each measurement, so that a new version of one kernel leaves the others' measurements valid.
    """
    device = env.device(device_type, index)
    parts = [device_type if device is None else device.name or device_type]
    if device is not None and device.arch is not None:
        parts.append("sm{}{}".format(*device.arch))
    if device_type == "cpu":
        parts += [env.processor, env.cpu]
    if device_type == "cuda":
        parts.append(f"driver {env.driver}" if env.driver else "")
        parts.append("cuDNN " + ".".join(map(str, env.cudnn)) if env.cudnn else "")
        parts += [f"{kernel} is {by}" for kernel, by in sorted(env.overrides.items())]
    parts.append(f"torch {env.torch}")
    return ", ".join(part for part in parts if part)


def rounded(length: int) -> int:
    """Round a length up to three significant bits: four buckets between a power of two and the next."""
    step = 1 << max(0, length.bit_length() - 3)
    return -(-length // step) * step


def bucket_ends(length: int) -> tuple[int, ...]:
    """Return the first and the last length of each bucket of a length's power of two."""
    low = 1 << (length.bit_length() - 1)
    tops = sorted({rounded(low + part * low // 4) for part in range(4)} | {2 * low})
    firsts = [low, *(top + 1 for top in tops[:-1])]
    lasts = [*tops[:-1], 2 * low - 1]
    return tuple(sorted({length for length in (*firsts, *lasts) if low <= length < 2 * low}))


def shape_bucket(spec: AttentionSpec) -> str:
    """Return a call's sizes, with batch and lengths rounded up to three significant bits."""
    return bucket(sizes_of(spec))


def bucket(sizes: tuple[int, ...]) -> str:
    """Return the same of `(B, S_q, S_kv, H, H_kv, D, D_v)`."""
    batch, seqlen_q, seqlen_kv = map(rounded, sizes[:3])
    return f"B{batch} Q{seqlen_q} K{seqlen_kv} H{sizes[3]}/{sizes[4]} D{sizes[5]}/{sizes[6]}"


def sizes_of(spec: AttentionSpec) -> tuple[int, ...]:
    """Return `(B, S_q, S_kv, H, H_kv, D, D_v)`."""
    lengths = (spec.batch, spec.seqlen_q, spec.seqlen_kv)
    return (*lengths, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.head_dim_v)


def mask_class(spec: AttentionSpec) -> str:
    """Return the kind of a call's mask, and what else changes which code of a kernel runs."""
    parts = _mask(spec.mask, same_lengths=spec.same_lengths)
    if spec.softcap is not None:
        parts.append("softcap")
    if spec.dropout_p:
        parts.append("dropout")
    flags = {"sinks": spec.sinks, "lse": spec.return_lse, "deterministic": spec.deterministic}
    storage = spec.storage
    flags |= {"unaligned": not storage.aligned, "strided": not storage.unit_stride, "expanded": storage.expanded_kv}
    parts += [name for name, holds in flags.items() if holds]
    return " & ".join(parts) or "none"


def _mask(mask: MaskSpec, *, same_lengths: bool) -> list[str]:
    parts = []
    if mask.pattern is not None:
        parts.append(_pattern(mask.pattern, same_lengths=same_lengths))
    if mask.key is not None:
        parts.append(f"{mask.key} in front" if mask.prefix else mask.key)
    if mask.dense is not None:
        shape = ",".join("1" if size == 1 else letter for size, letter in zip(mask.dense.shape, "BHQK", strict=True))
        dtype = "" if mask.dense.kind == "boolean" else f" {str(mask.dense.dtype).removeprefix('torch.')}"
        parts.append(f"{mask.dense.kind} ({shape}){dtype}")
    if mask.block is not None:
        parts.append("function" if mask.block.is_function else "block")
    return parts


def _pattern(pattern: PatternSpec, *, same_lengths: bool) -> str:
    align = "" if same_lengths else f" {pattern.align}"
    if pattern.is_causal:
        return f"causal{align}"
    left, right = (side if side < 0 else rounded(side) for side in (pattern.left, pattern.right))
    return f"window {left},{right}{align}"
