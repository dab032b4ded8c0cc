"""torch's FlexAttention: compiled where that pays, eager otherwise, and the decision says which.

Sources: torch 2.13 `torch/nn/attention/flex_attention.py` and `torch/_higher_order_ops/flex_attention.py`, run on a
CPU; an H100 with torch 2.11. Compiled code accepts mismatched lengths and heads, so the call is checked before.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from anyattn.backend import Backend, Lowering, Output, Parts, Plan
from anyattn.capabilities import BOTH, Capabilities
from anyattn.environment import Environment
from anyattn.known_bad import hits
from anyattn.lowering import key_mask
from anyattn.reasons import Conversion, Reason
from anyattn.spec import UNKNOWN, AttentionSpec

_CPU = Capabilities(
    dtypes=frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64)),
    head_dim_max=1 << 20,
    head_dim_v=True,
    causal=BOTH,
    window=BOTH,
    key_mask=True,
    boolean=True,
    bias=True,
    bias_float32=True,
    block=True,
    dead_rows=True,
    gqa=True,
    softcap=True,
    scale_any=True,
    lse=True,
    exact=True,
    unit_stride=False,
    compile=True,
)

_CUDA = _CPU.replace(
    dtypes=frozenset((torch.float16, torch.bfloat16, torch.float32)),
    arch_min=(7, 5),
    head_dim_max=256,
    backward=True,
    deterministic=False,
    cuda_graph=True,
)

_PAYS_ON_CPU = 1 << 22
"""Scores (batch * heads * seqlen_q * seqlen_kv) from which compiling for the CPU is worth its seconds."""


class Flex(Backend):
    """FlexAttention: every mask, bias and softcap in one kernel."""

    name = "flex"
    family = "flex"
    declarations: ClassVar[Mapping[str, Capabilities]] = {"cpu": _CPU, "cuda": _CUDA}

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        if spec.device_type == "cuda" and min(spec.head_dim, spec.head_dim_v) < 16:
            yield Reason("head_dim", "head_dim >= 16 on CUDA", str(min(spec.head_dim, spec.head_dim_v)))
        if spec.return_lse and spec.needs_grad and spec.compiled:
            yield Reason("lse", "lse without gradients under torch.compile", "both")
        if spec.device_type == "cpu" and spec.compiled and (spec.return_lse or spec.sinks):
            yield Reason("lse", "no lse under torch.compile on a CPU (inductor has none)", "return_lse or sinks")
        if spec.compiled:
            for row in hits(("flex (compiled)",), spec, env):
                if spec.seqlen_kv != UNKNOWN:
                    yield row.reason()

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        compiled, why = _compiles(spec, env)
        entry = "flex_attention (compiled)" if compiled else "flex_attention (eager)"
        notes = [Conversion("compiled" if compiled else "eager", why)]
        if spec.mask.block is not None and spec.mask.block.is_partial:
            text = "block mask made again with every head and batch entry: its blocks were those of the first alone"
            notes.append(Conversion("rebuild_block_mask", text))
        return Lowering(entry, compiled=compiled, conversions=tuple(notes))

    def load(self) -> None:
        import torch.nn.attention.flex_attention  # noqa: F401

    @staticmethod
    def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        from torch.nn.attention.flex_attention import flex_attention

        spec = plan.spec
        call: Callable[..., Any] = flex_attention
        if spec.layout == "BSHD":
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if not spec.needs_grad and spec.device_type == "cpu":
            # The CPU refuses inputs that require a gradient even under no_grad.
            query, key, value = query.detach(), key.detach(), value.detach()
        with_lse = spec.return_lse or spec.sinks
        if plan.lowering.compiled and not torch.compiler.is_compiling():
            call = _compiled(plan)
        arguments: dict[str, Any] = {
            "score_mod": _score_mod(spec, parts),
            "block_mask": _block_mask(plan, parts, query, key),
            "scale": spec.scale,
            "enable_gqa": spec.is_gqa,
            "return_lse": with_lse,
        }
        if plan.lowering.compiled or _warned:
            result = call(query, key, value, **arguments)
        else:
            result = _first_eager(call, query, key, value, arguments)
        out, lse = result if with_lse else (result, None)
        if spec.layout == "BSHD":
            out = out.transpose(1, 2)
        return out if lse is None else (out, lse.detach().float())


_warned: list[bool] = []


def _first_eager(call: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> Any:
    """Run the process's first eager call without torch's one warning that it is eager: the decision says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        result = call(query, key, value, **arguments)
    _warned.append(True)
    return result


def _compiles(spec: AttentionSpec, env: Environment) -> tuple[bool, str]:
    """Decide whether this backend compiles the call itself, and say why."""
    if spec.compiled:
        return True, "traced into the caller's torch.compile"
    if spec.device_type == "cuda":
        return True, "compiled by torch.compile at the first call of this kind"
    scores = spec.batch * spec.num_heads * spec.seqlen_q * spec.seqlen_kv
    if scores < _PAYS_ON_CPU:
        return False, "eager: too small for compiling to pay (all scores are held in memory)"
    if not env.cxx:
        return False, "eager: there is no C++ compiler for torch.compile (all scores are held in memory)"
    if spec.return_lse or spec.sinks:
        return False, "eager: compiled code gives no lse on a CPU (all scores are held in memory)"
    if spec.mask.block is not None:
        return False, "eager: a given BlockMask is run as its function says (all scores are held in memory)"
    rows = hits(("flex (compiled)",), spec, env)
    if rows:
        return False, f"eager: {rows[0].what} when compiled and {rows[0].when} ({rows[0].link})"
    if spec.dtype == torch.float64:
        return False, "eager: float64 isn't compiled (all scores are held in memory)"
    return True, "compiled by torch.compile at the first call of this kind"


@functools.lru_cache(maxsize=128)
def _compiled(plan: Plan) -> Callable[..., Any]:
    """Compile a copy of flex_attention for one kind of call.

    torch.compile counts recompilations per code object and beyond its limit silently runs the slow eager
    path, so every kind of call gets a code object of its own.
    """
    from torch.nn.attention.flex_attention import flex_attention

    function: Any = flex_attention
    code = function.__code__.replace(co_name=f"flex_attention_{abs(hash(plan.spec)):x}")
    copy = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    compiled: Callable[..., Any] = torch.compile(copy, fullgraph=True)
    return compiled


def _score_mod(spec: AttentionSpec, parts: Parts) -> Callable[..., Tensor] | None:
    """Make the function that changes scores: softcap, then a dense mask."""
    cap, dense = spec.softcap, parts.dense
    if dense is None:
        if cap is None:
            return None
        return lambda score, b, h, q, kv: cap * torch.tanh(score / cap)
    full = [size > 1 for size in dense.shape]
    boolean = dense.dtype == torch.bool

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        index = [i if whole else i * 0 for i, whole in zip((b, h, q, kv), full, strict=True)]
        found = dense[index[0], index[1], index[2], index[3]]
        return torch.where(found, score, float("-inf")) if boolean else score + found

    return score_mod


def _block_mask(plan: Plan, parts: Parts, query: Tensor, key: Tensor) -> Any:
    """Make the block mask of a pattern and a key mask, joined with the caller's."""
    from torch.nn.attention.flex_attention import create_block_mask

    spec, given = plan.spec, parts.block
    mask_mod = _mask_mod(spec, parts, query.shape[2], key.shape[2])
    block = spec.mask.block
    if given is None and mask_mod is None:
        return None
    if given is not None and block is not None:
        if mask_mod is None and plan.lowering.compiled and not block.is_partial:
            return given
        theirs = given.mask_mod if block.is_partial else _with_blocks(given)
        mask_mod = theirs if mask_mod is None else _both(mask_mod, theirs)
    assert mask_mod is not None
    per_batch = parts.key is not None or (block is not None and (block.per_batch or block.batch > 1))
    per_head = block is not None and (block.per_head or block.heads > 1)
    return create_block_mask(
        mask_mod,
        query.shape[0] if per_batch else None,
        query.shape[1] if per_head else None,
        query.shape[2],
        key.shape[2],
        device=query.device,
    )


def _with_blocks(block_mask: Any) -> Callable[..., Tensor]:
    """Join a block mask's function with its blocks, which eager FlexAttention ignores."""
    blocks = block_mask.to_dense() != 0
    rows, columns = block_mask.BLOCK_SIZE
    batch, heads = blocks.shape[0] > 1, blocks.shape[1] > 1
    function = block_mask.mask_mod

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        found = blocks[b if batch else b * 0, h if heads else h * 0, q // rows, kv // columns]
        inside: Tensor = found & function(b, h, q, kv)
        return inside

    return mask_mod


def _mask_mod(spec: AttentionSpec, parts: Parts, seqlen_q: int, seqlen_kv: int) -> Callable[..., Tensor] | None:
    pattern = spec.mask.pattern
    keys = None if parts.key is None else key_mask(parts.key, seqlen_kv)[:, 0, 0]
    if pattern is None and keys is None:
        return None
    left = right = -1
    offset = 0
    if pattern is not None:
        left, right = pattern.left, pattern.right
        offset = seqlen_kv - seqlen_q if pattern.align == "lower_right" else 0

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        allowed = kv >= 0
        if right != -1:
            allowed = allowed & (kv <= q + offset + right)
        if left != -1:
            allowed = allowed & (kv >= q + offset - left)
        if keys is not None:
            allowed = allowed & keys[b, kv]
        return allowed

    return mask_mod


def _both(first: Callable[..., Tensor], second: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda b, h, q, kv: first(b, h, q, kv) & second(b, h, q, kv)
