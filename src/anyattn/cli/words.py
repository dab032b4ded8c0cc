"""Parse the words of a command line into a described call and a supposed machine; no tensor is made."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from packaging.version import InvalidVersion, Version

from anyattn import environment
from anyattn.call.describe import build_spec
from anyattn.call.facts import Facts, MaskFacts, Options
from anyattn.cli.reports import UsageError
from anyattn.environment import PRESET_NAMES, Environment
from anyattn.masks.objects import Align, Pattern, join_patterns
from anyattn.selection import registry
from anyattn.types.spec import AttentionSpec

DEVICE_TYPES = ("cpu", "cuda", "mps", "xpu", "npu", "xla")
"""The types of device that a call may be on."""

MASK_WORDS = (
    "causal",
    "causal-lower-right",
    "window:LEFT,RIGHT",
    "window-lower-right:LEFT,RIGHT",
    "padding",
    "lengths",
    "boolean[:B,H,Q,K]",
    "bias[:DTYPE][:B,H,Q,K]",
)
"""What `--mask` takes; -1 is an unbounded side, and a dense mask is (B, 1, S_q, S_kv) if no shape is given."""

_SHORT_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "half": torch.float16,
    "fp32": torch.float32,
    "float": torch.float32,
    "fp64": torch.float64,
    "double": torch.float64,
}


@dataclass(frozen=True, slots=True)
class CallWords:
    """A call of attention as it is written on the command line.

    Attributes:
        shape: The query's `B,S,H,D`.
        kv: S_kv; None is S.
        kv_heads: H_kv; None is H. Fewer than H is meant as `enable_gqa=True`.
        head_dim_v: D_v; None is D.
        dtype: A name such as `"bfloat16"` or `"bf16"`.
        masks: Parts of the mask, see `MASK_WORDS`; joined.
        scale: As for `anyattn.attention`.
        softcap: As for `anyattn.attention`.
        sinks: Whether there are sinks.
        lse: Whether the log-sum-exp is returned.
        grad: Whether query, key and value need gradients.
        mask_grad: Whether the additive mask needs a gradient.
        dropout: As `dropout_p` for `anyattn.attention`.
        prepared: Whether the mask is known to leave every row a key.
        compiled: Whether the call is inside `torch.compile`.
        deterministic: Whether deterministic algorithms are required.
    """

    shape: str
    kv: int | None = None
    kv_heads: int | None = None
    head_dim_v: int | None = None
    dtype: str = "bfloat16"
    masks: tuple[str, ...] = ()
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    lse: bool = False
    grad: bool = False
    mask_grad: bool = False
    dropout: float = 0.0
    prepared: bool = False
    compiled: bool = False
    deterministic: bool = False


def spec_of(words: CallWords, device_type: str) -> AttentionSpec:
    """Return the description of the call that the words mean.

    Raises:
        UsageError: If a word has no meaning.
        InvalidCallError: If the call is wrong for any backend.
    """
    batch, seqlen_q, heads, dim = _sizes("--shape", words.shape, "B,S,H,D")
    for name, given in (("--kv", words.kv), ("--kv-heads", words.kv_heads), ("--head-dim-v", words.head_dim_v)):
        if given is not None and given < 0:
            raise UsageError(f"{name} must be a whole number of 0 or more; {given} was given.")
    seqlen_kv = seqlen_q if words.kv is None else words.kv
    kv_heads = heads if words.kv_heads is None else words.kv_heads
    dim_v = dim if words.head_dim_v is None else words.head_dim_v
    dtype = _dtype(words.dtype)
    device = _device(device_type)
    query, key, value = (
        Facts(shape, dtype, device, words.grad)
        for shape in (
            (batch, seqlen_q, heads, dim),
            (batch, seqlen_kv, kv_heads, dim),
            (batch, seqlen_kv, kv_heads, dim_v),
        )
    )
    options = Options(
        dropout_p=words.dropout,
        scale=words.scale,
        enable_gqa=kv_heads != heads,
        softcap=words.softcap,
        return_lse=words.lse,
    )
    mask = _mask(words, query, seqlen_kv)
    sinks = Facts((heads,), torch.float32, device, words.grad) if words.sinks else None
    return build_spec(
        query,
        key,
        value,
        mask,
        options,
        sinks,
        grad=words.grad or words.mask_grad,
        deterministic=words.deterministic,
        compiled=words.compiled,
    )


def machine_of(preset: str | None, packages: Sequence[str], torch_version: str | None) -> Environment:
    """Return this machine or a preset, with the packages and the torch that are supposed.

    Args:
        preset: One of `anyattn.environment.PRESET_NAMES`, or None for this machine.
        packages: `name=version` of distributions to suppose installed.
        torch_version: The torch to suppose.

    Raises:
        UsageError: If a preset, package or version has no meaning.
    """
    supposed = dict(_package(text) for text in packages)
    torch_found = None if torch_version is None else _version("--torch", torch_version)
    if preset is not None:
        if preset.lower() not in PRESET_NAMES:
            raise UsageError(f"--as {preset}: no such device. {_guess(preset, PRESET_NAMES)}")
        return environment.preset(preset, packages=supposed, torch_version=torch_version)
    here = environment.detect()
    return dataclasses.replace(here.supposing(supposed), torch=here.torch if torch_found is None else torch_found)


def device_type_of(wanted: str | None, machine: Environment) -> str:
    """Return the type of device of a call: the one wanted, else the machine's first accelerator, else its CPU.

    Raises:
        UsageError: If there is no such type.
    """
    if wanted is None:
        return next((device.type for device in machine.devices if device.type != "cpu"), "cpu")
    if wanted not in DEVICE_TYPES:
        raise UsageError(f"--device {wanted}: no such type of device. {_guess(wanted, DEVICE_TYPES)}")
    return wanted


@dataclass(frozen=True)
class _Elsewhere:
    """Stands for a device of a type that this torch can't name; a description needs no more of it."""

    type: str
    index: int | None = None


def _device(kind: str) -> torch.device:
    try:
        return torch.device(kind)
    except RuntimeError:
        return cast("torch.device", _Elsewhere(kind))


def _guess(word: str, known: Iterable[str]) -> str:
    names = tuple(known)
    close = difflib.get_close_matches(word.lower(), names, n=3, cutoff=0.5)
    nearest = f"Did you mean {' or '.join(close)}? " if close else ""
    return f"{nearest}There are: {', '.join(names)}."


def _sizes(option: str, text: str, wanted: str) -> tuple[int, ...]:
    pieces = text.replace("x", ",").split(",")
    names = wanted.split(",")
    if len(pieces) != len(names) or not all(piece.strip().isdecimal() for piece in pieces):
        raise UsageError(f"{option} must be {wanted}: {len(names)} whole numbers with commas; {text!r} was given.")
    return tuple(int(piece) for piece in pieces)


def _dtype(name: str) -> torch.dtype:
    word = name.lower().removeprefix("torch.")
    found = _SHORT_DTYPES.get(word, getattr(torch, word, None))
    if not isinstance(found, torch.dtype):
        raise UsageError(f"{name}: no such dtype. {_guess(word, ('bfloat16', 'float16', 'float32', 'float64'))}")
    return found


def _version(what: str, text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        raise UsageError(f"{what} must be a version such as 2.11.0; {text!r} was given.") from None


def _package(text: str) -> tuple[str, str]:
    name, equals, version = text.partition("=")
    name = name.strip().lower().replace("_", "-")
    if not equals:
        raise UsageError(f"--with must be NAME=VERSION, such as flash-attn=2.8.3; {text!r} was given.")
    if name not in registry.distributions():
        known = registry.distributions()
        raise UsageError(f"--with {name}: no package that a choice depends on. {_guess(name, known)}")
    return name, str(_version(f"--with {name}", version.lstrip("=").strip()))


def _mask(words: CallWords, query: Facts, seqlen_kv: int) -> MaskFacts:
    pattern: Pattern | None = None
    key: Facts | None = None
    dense: Facts | None = None
    for text in words.masks:
        word, *details = text.strip().lower().split(":")
        new_pattern = _pattern(word, details, text)
        if new_pattern is not None:
            pattern = new_pattern if pattern is None else join_patterns(pattern, new_pattern)
        elif word in ("padding", "lengths"):
            if key is not None or details:
                raise UsageError(
                    f"--mask {text}: a call has one key mask, padding or lengths, without further details."
                )
            shape = (query.shape[0], seqlen_kv) if word == "padding" else (query.shape[0],)
            key = Facts(shape, torch.bool if word == "padding" else torch.int32, query.device, False)
        elif word in ("boolean", "bias"):
            if dense is not None:
                raise UsageError(f"--mask {text}: a mask has at most one dense part, boolean or bias.")
            dense = _dense(word, details, words, query, seqlen_kv)
        else:
            raise UsageError(f"--mask {text}: no such mask. {_guess(word, MASK_WORDS)}")
    if words.mask_grad and (dense is None or dense.dtype == torch.bool):
        raise UsageError("--mask-grad needs --mask bias: no other mask has a gradient.")
    return MaskFacts(pattern, key, dense, live=words.prepared)


def _pattern(word: str, details: list[str], text: str) -> Pattern | None:
    kind = word.removesuffix("-lower-right")
    align: Align = "upper_left" if kind == word else "lower_right"
    if kind == "causal":
        if details:
            raise UsageError(f"--mask {text}: causal takes no details; the other alignment is causal-lower-right.")
        return (-1, 0, align)
    if kind != "window":
        return None
    sides = [piece.strip() for piece in details[0].split(",")] if len(details) == 1 else []
    if len(sides) != 2 or not all(side == "-1" or side.isdecimal() for side in sides):
        raise UsageError(f"--mask {text}: write {word}:LEFT,RIGHT with whole numbers, -1 for unbounded.")
    return (int(sides[0]), int(sides[1]), align)


def _dense(word: str, details: list[str], words: CallWords, query: Facts, seqlen_kv: int) -> Facts:
    shape: tuple[int, ...] = (query.shape[0], 1, query.shape[1], seqlen_kv)
    dtype = torch.bool if word == "boolean" else query.dtype
    for detail in details:
        if "," in detail:
            shape = _sizes(f"--mask {word}'s shape", detail, "B,H,Q,K")
        elif word == "bias":
            dtype = _dtype(detail)
        else:
            raise UsageError(f"--mask {word}:{detail}: only a shape B,H,Q,K may follow {word}, and nothing else.")
    return Facts(shape, dtype, query.device, words.mask_grad)


def checked_device(name: str | None) -> str:
    """Return a device that tensors can be made on; None is the CUDA device if there is one, else the CPU.

    Raises:
        UsageError: If there is no such device here.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"--device {name}: no such device here ({first}).") from None
    return name
