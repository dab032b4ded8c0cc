"""xFormers' memory-efficient attention: FlashAttention if it takes the call, else CUTLASS.

Sources: `xformers/ops/fmha` of xformers 0.0.29 to 0.0.35 (`dispatch.py`, `flash.py`, `cutlass.py`, `common.py`);
0.0.35 on an H100. Flash takes half precision, equal head_dims and masks of lower-right alignment. CUTLASS, the kernel
of SDPA's efficient attention, takes the rest up to sm90: float32, other value dims, tensor biases, causal of upper-left
alignment; no windows.

Packed sequences (`BlockDiagonalMask` and similar) use flash only, whose lse is packed too; CUTLASS pads it.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from packaging.version import Version
from torch import Tensor

from anyattn.adapters import _flash
from anyattn.adapters._flash import bound
from anyattn.adapters.xformers import kernels
from anyattn.backend.capabilities import Capabilities, needs_dense
from anyattn.backend.patterns import KernelPattern
from anyattn.backend.protocol import Backend, Lowering, MaskedRunner, Output, Parts, Plan, Runner
from anyattn.environment import Arch, Environment
from anyattn.lowering import host_lengths
from anyattn.lowering.dense import mask_conversions
from anyattn.sources.packages import FUNCTIONS, Package
from anyattn.types.reasons import Conversion, Reason
from anyattn.types.spec import UNKNOWN, AttentionSpec, MaskSpec

_CALLS = (
    "memory_efficient_attention",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
)
_BIASES = (
    "LowerTriangularMask",
    "LowerTriangularFromBottomRightMask",
    "LocalAttentionFromBottomRightMask",
    "BlockDiagonalMask",
)

PACKAGE = Package("xformers", "xformers.ops.fmha", _CALLS, ">=0.0.29", found_by="xformers.ops")
MSLK = Package("", "mslk.attention.fmha", _CALLS)
"""The package that holds attention since xformers 0.0.36."""

_CUTLASS_LAST: Arch = (9, 0)
_LOWER_RIGHT = frozenset(("lower_right",))

_CUDA = Capabilities(
    dtypes=frozenset((torch.float16, torch.bfloat16, torch.float32)),
    arch_min=(8, 0),
    head_dim_max=256,
    head_dim_v=True,
    causal=frozenset(("upper_left", "lower_right")),
    window=frozenset(("lower_right",)),
    realigns=True,
    boolean=True,
    bias=True,
    dead_rows=True,
    gqa=True,
    # dropout_p == 1 isn't right: flash raises, CUTLASS keeps some weights (0.0.35 on an H100).
    dropout=True,
    lse=True,
    backward=True,
    exact=True,
    unit_stride=False,
    batch_max=65535,  # both kernels' launch grids hold batch and heads in their y and z
    varlen=True,
    device_guard=True,
)


class XFormers(Backend):
    """xFormers, which itself chooses FlashAttention or CUTLASS."""

    name = "xformers"
    family = "xformers"
    auto_rank = 70
    packages = (PACKAGE,)
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cuda": _CUDA}

    def availability(self, env: Environment) -> Iterator[Reason]:
        yield from super().availability(env)
        version = env.version("xformers")
        if version is None:
            return
        if version >= Version("0.0.36.dev0") and "mslk" not in env.modules:
            yield Reason("not_installed", f"mslk, to which xformers {version} moved its attention", "no module mslk")
        only_flash4 = "flash-attn-4" in env.packages and "flash_attn.flash_attn_interface" not in env.modules
        if only_flash4 and Version("0.0.31.dev0") <= version < Version("0.0.36.dev0"):
            got = f"only flash-attn-4 {env.packages['flash-attn-4']}, on whose namespace flash_attn xformers fails"
            yield Reason("broken_import", "flash-attn besides flash-attn-4", got, "install flash-attn >= 2.7.1 too")

    def capabilities(self, spec: AttentionSpec, env: Environment) -> Capabilities | None:
        caps = self.declarations.get(spec.device_type)
        if caps is not None and spec.packed:
            return caps if _packs(spec) else caps.replace(varlen=False)
        asked = spec.mask.pattern
        if caps is None or asked is None:
            return caps
        known = UNKNOWN not in (spec.seqlen_q, spec.seqlen_kv)
        if asked.is_causal and asked.align == "upper_left" and known and spec.seqlen_q < spec.seqlen_kv:
            # Without the keys that no row sees it is square, which flash takes.
            return caps.replace(causal=_LOWER_RIGHT)
        # Only flash takes windows; if it doesn't take the call, CUTLASS gets the window as a dense mask.
        return caps if _flash_takes(spec) else caps.replace(window=frozenset())

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        device = env.device(spec.device_type, spec.device_index)
        if device is None or device.arch is None:
            return
        found = f"sm{device.arch[0]}{device.arch[1]} ({device.name})"
        why = _why_cutlass(spec, self.lower(spec, env))
        if why and device.arch > _CUTLASS_LAST:
            yield Reason("arch", f"sm80 to sm90 for {why} (its CUTLASS operator)", found)
        wide = max(spec.head_dim, spec.head_dim_v) > 224
        if not why and wide and spec.dropout_p and spec.needs_grad and device.arch not in ((8, 0), (9, 0)):
            yield Reason("dropout", "head_dim <= 224 with dropout and gradients outside sm80 and sm90", found)

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        caps = self.capabilities(spec, env)
        assert caps is not None
        dense = spec.mask.dense is not None or needs_dense(caps, spec)
        plain = _flash.lower("flash", caps, spec.replace(mask=MaskSpec()) if dense else spec)
        lowering = dataclasses.replace(plain, dense=dense, pattern=_without_dead_rows(plain.pattern, spec))
        if _why_cutlass(spec, lowering):
            lowering = dataclasses.replace(lowering, entry="cutlass")
        return dataclasses.replace(lowering, conversions=tuple(_conversions(caps, spec, lowering)))

    def load(self) -> None:
        try:
            ops = importlib.import_module("xformers.ops")
        except (ImportError, AttributeError) as error:
            if "flash_attn" not in str(error) and "Flash-Attention" not in str(error):
                raise
            raise ImportError(
                f"{error} -- xformers imports any flash_attn that it finds, but supports some versions only: install "
                "another flash-attn, or uninstall it"
            ) from error
        package = PACKAGE if hasattr(ops, _CALLS[0]) else MSLK
        try:
            functions = package.load()
        except ModuleNotFoundError as error:
            where = f"{package.module}, which can't be imported ({error})"
            raise ImportError(f"xformers.ops has no {_CALLS[0]}; newer xformers import it from {where}") from error
        if not importlib.import_module(f"{package.module}.flash").FwOp.is_available():
            raise ImportError(f"{package.module} was built without its flash operator; see python -m xformers.info")
        masks = importlib.import_module(f"{package.module}.attn_bias")
        for name in _BIASES:
            setattr(functions, name, getattr(masks, name))
        FUNCTIONS[self.name] = functions

    @staticmethod
    def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        return _flash.attend(plan, query, key, value, parts, lambda plan, call: kernels.attend(plan, call, parts))

    def length_period(self, spec: AttentionSpec) -> int:
        return 1

    def bind(self, plan: Plan) -> Runner | None:
        kernel = kernels.bound_to(plan)
        return None if kernel is None else bound.bind(plan, kernel)

    def bind_masked(self, plan: Plan) -> MaskedRunner | None:
        return bound.without_mask(self.bind(plan))


def _flash_takes(spec: AttentionSpec) -> bool:
    """Whether flash takes the dtype and head_dims, padded to multiples of 8."""
    return spec.dtype.itemsize == 2 and (spec.head_dim + 7) // 8 == (spec.head_dim_v + 7) // 8


def _packs(spec: AttentionSpec) -> bool:
    """Whether flash takes packed sequences; otherwise they are padded.

    Its biases for them have one alignment, so causal needs equal lengths; their windows have no right side.
    """
    pattern = spec.mask.pattern
    full = pattern is None or pattern.left == pattern.right == -1
    causal = pattern is not None and pattern.right == 0 and spec.same_lengths
    return _flash_takes(spec) and (full or causal)


def _why_cutlass(spec: AttentionSpec, lowering: Lowering) -> str:
    """Return why flash doesn't take a call; empty if it does."""
    if lowering.dense:
        return "a mask given as a tensor"
    if spec.dtype.itemsize != 2:
        return str(spec.dtype).removeprefix("torch.")
    if not _flash_takes(spec):
        return "head_dim_v != head_dim"
    pattern = lowering.pattern
    if pattern is not None and pattern.is_causal and pattern.align == "upper_left" and not spec.same_lengths:
        return "causal in upper-left alignment with more queries than keys"
    return ""


def _without_dead_rows(pattern: KernelPattern | None, spec: AttentionSpec) -> KernelPattern | None:
    """Leave out the first rows if they see no key, since the kernels differ in their lse."""
    if pattern is None or pattern.align != "lower_right" or pattern.right == -1 or pattern.rows is not None:
        return pattern
    if UNKNOWN in (spec.seqlen_q, spec.seqlen_kv):
        return pattern
    first = spec.seqlen_q - _flash.keys_left(spec, pattern) - pattern.right
    return pattern if first <= 0 else dataclasses.replace(pattern, rows=(first, spec.seqlen_q))


def _conversions(caps: Capabilities, spec: AttentionSpec, lowering: Lowering) -> Iterator[Conversion]:
    yield from lowering.conversions
    yield from mask_conversions(caps, spec)
    if spec.packed:
        yield host_lengths.READ
    if lowering.dense and (spec.mask.dense is None or spec.mask.dense.kind == "boolean"):
        yield Conversion("additive_mask", "the mask made additive, with -inf")
    cutlass = lowering.entry == "cutlass"
    if spec.is_gqa and (cutlass or spec.needs_grad):
        why = "its CUTLASS operator misreads shared heads" if cutlass else "it has no gradients for shared heads"
        yield Conversion("repeat_heads", f"key and value heads repeated in memory: {why}")
    elif cutlass and spec.storage.expanded_kv:
        yield Conversion("copy", "key and value copied: its CUTLASS operator misreads expanded heads")
    if spec.return_lse and spec.needs_grad:
        yield Conversion("second_forward", "lse from a second forward: xformers returns none together with gradients")
