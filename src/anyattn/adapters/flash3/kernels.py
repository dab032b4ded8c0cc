"""The calls of FlashAttention-3: by the package's functions, and by its operator alone where no gradient is needed.

The functions are an autograd function around a custom operator around the operator `fwd` of the package's library; on a
slow host the two wrappers take longer than `fwd` does. The operator's arguments are found by name in its schema, which
differs between builds (`hopper/flash_api.cpp`; fa3-fwd 0.0.3, tokenspeed-fa3 3.0.0). A schema with an argument that is
neither known nor optional isn't used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anyattn.adapters._flash import KernelCall
from anyattn.backend.protocol import Plan
from anyattn.sources.packages import FUNCTIONS

_TENSORS = ("q", "k", "v")
_LENGTHS = ("seqused_k", "max_seqlen_q", "max_seqlen_k")
_CONSTANTS = ("softmax_scale", "is_causal", "window_size_left", "window_size_right", "softcap")


def options_of(plan: Plan, left: int, right: int) -> dict[str, Any]:
    """Return the arguments of the package's functions besides tensors and lengths."""
    spec = plan.spec
    causal = left == -1 and right == 0
    options: dict[str, Any] = {
        "softmax_scale": spec.scale,
        "causal": causal,
        "window_size": (-1, -1) if causal else (left, right),
        "softcap": 0.0 if spec.softcap is None else spec.softcap,
        "deterministic": spec.deterministic,
    }
    if FUNCTIONS[plan.backend].asks_for_lse:
        options["return_attn_probs"] = spec.return_lse or plan.rescale
    return options


def call(plan: Plan, call: KernelCall, **descale: Tensor) -> tuple[Tensor, Tensor | None]:
    """Call the package's functions."""
    functions = FUNCTIONS[plan.backend]
    with_lse = plan.spec.return_lse or plan.rescale
    options = {**options_of(plan, call.left, call.right), **descale}
    if call.lengths is None and call.cu_seqlens_kv is None:
        result = functions.flash_attn_func(call.query, call.key, call.value, **options)
    else:
        result = functions.flash_attn_varlen_func(
            call.query,
            call.key,
            call.value,
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=call.cu_seqlens_kv,
            max_seqlen_q=call.max_seqlen_q,
            max_seqlen_k=call.max_seqlen_kv,
            seqused_k=call.lengths,
            **options,
        )
    if not isinstance(result, tuple):
        if with_lse:
            raise RuntimeError(
                "this build of FlashAttention-3 can't return the log-sum-exp (builds of July and August 2025 can't); "
                "install a newer one"
            )
        return result, None
    return result[0], result[1] if with_lse else None


def operator_of(module: Any) -> Any:
    """Return the operator `fwd` that a package's module calls, or None if it isn't one that can be called alone."""
    for found in vars(module).values():
        if not isinstance(found, torch._ops._OpNamespace):
            continue
        operator = getattr(getattr(found, "fwd", None), "default", None)
        if operator is not None and _is_known(operator._schema):
            return operator
    return None


def _is_known(schema: Any) -> bool:
    arguments = {argument.name: argument for argument in schema.arguments}
    known = {*_TENSORS, *_LENGTHS, *_CONSTANTS}
    first = [argument.name for argument in schema.arguments[:3]]
    return (
        first == list(_TENSORS)
        and known <= arguments.keys()
        and len(schema.returns) >= 2
        and all(argument.has_default_value() for name, argument in arguments.items() if name not in known)
    )


def bound_to(plan: Plan, *, lengths: bool) -> Callable[..., Any]:
    """Return the kernel with a plan's constants: `kernel(query, key, value)`, with `lengths` a fourth argument.

    It returns the output, or a sequence of the output, lse and more.
    """
    functions, pattern = FUNCTIONS[plan.backend], plan.lowering.pattern
    sides = (-1, -1) if pattern is None else (pattern.left, pattern.right)
    if functions.operator is not None and not plan.spec.needs_grad:
        return _bound_operator(plan, functions.operator, *sides, lengths=lengths)
    options = options_of(plan, *sides)
    if not lengths:
        return functools.partial(functions.flash_attn_func, **options)
    varlen = functools.partial(functions.flash_attn_varlen_func, cu_seqlens_q=None, cu_seqlens_k=None, **options)

    def with_lengths(query: Tensor, key: Tensor, value: Tensor, used: Tensor) -> Any:
        return varlen(query, key, value, max_seqlen_q=query.shape[1], max_seqlen_k=key.shape[1], seqused_k=used)

    return with_lengths


_FEW_ROWS = 64


def _splits(plan: Plan) -> int:
    """Return over how many blocks of threads the keys of one tile are split: 1, or 0 to let the kernel choose.

    The package's functions pass 1. With few queries, as in decoding, one tile for each key head leaves most of the GPU
    idle; the kernel's own number is what its function for caches uses.
    """
    spec = plan.spec
    rows = spec.seqlen_q * (spec.num_heads // spec.num_kv_heads)
    return 0 if rows <= _FEW_ROWS and not spec.deterministic else 1


def _bound_operator(plan: Plan, operator: Any, left: int, right: int, *, lengths: bool) -> Callable[..., Any]:
    options = options_of(plan, left, right)
    given = {
        "softmax_scale": options["softmax_scale"],
        "is_causal": options["causal"],
        "window_size_left": options["window_size"][0],
        "window_size_right": options["window_size"][1],
        "softcap": options["softcap"],
        "num_splits": _splits(plan),
    }
    arguments = operator._schema.arguments
    rest = [given.get(argument.name, argument.default_value) for argument in arguments[3:]]
    names = [argument.name for argument in arguments[3:]]
    last = max(index for index, name in enumerate(names) if name in given)
    rest = rest[: last + 1]
    raw = operator._op if hasattr(operator, "_op") else operator
    if not lengths:
        constants = tuple(rest)
        return lambda query, key, value: raw(query, key, value, *constants)
    at, at_q, at_k = (names.index(name) for name in _LENGTHS)

    def with_lengths(query: Tensor, key: Tensor, value: Tensor, used: Tensor) -> Any:
        passed = rest.copy()
        passed[at], passed[at_q], passed[at_k] = used, query.shape[1], key.shape[1]
        return raw(query, key, value, *passed)

    return with_lengths
