"""The calls of SageAttention's functions that take `(B, S, H, D)`, and the check of their parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from anyattn.adapters._flash import KernelCall
from anyattn.adapters.sage import tiles
from anyattn.backend.protocol import Plan
from anyattn.sources.packages import FUNCTIONS, Package

PARAMETERS = ("tensor_layout", "is_causal", "sm_scale", "return_lse")
"""The keywords that are passed; nothing is left to `**kwargs`."""

SAGEATTENTION = Package(
    "sageattention",
    "sageattention",
    (),
    ">=2.1.1,<3",
    # PyPI's 1.0.6 returns no lse, and writes to the user's key.
    "build SageAttention {versions} from its sources (github.com/thu-ml/SageAttention); PyPI only has 1.0.6",
    found_by="sageattention",
)

REACH = 1 << 31
"""How many elements 32-bit offsets reach (`triton/quant_per_thread.py`: a block's index times a stride)."""


def what_lacks(function: Any, name: str, parameters: Sequence[str]) -> str:
    """Return an error text with the parameters that a function lacks; empty if it has them all."""
    known = inspect.signature(function).parameters
    missing = [parameter for parameter in parameters if parameter not in known]
    if not missing:
        return ""
    return f"{name} has no parameter {' and '.join(missing)}, and would ignore it. {SAGEATTENTION.command}"


def that_knows_its_parameters(function: Any, name: str) -> Any:
    """Return a function unchanged.

    Raises:
        ImportError: If it would ignore a keyword that is passed to it.
    """
    text = what_lacks(function, name, PARAMETERS)
    if text:
        raise ImportError(text)
    return function


def call_dense(plan: Plan, call: KernelCall) -> tuple[Tensor, Tensor | None]:
    """Call a backend's function, at lengths at which it reads no uninitialised memory."""
    return tiles.attend(plan.lowering.entry, call, functools.partial(_call, plan))


def _call(plan: Plan, call: KernelCall) -> tuple[Tensor, Tensor | None]:
    with_lse = plan.spec.return_lse or plan.rescale
    result: Any = FUNCTIONS[plan.backend].attend(
        readable(call.query),
        readable(call.key),
        readable(call.value),
        tensor_layout="NHD",
        is_causal=call.left == -1 and call.right == 0,
        sm_scale=plan.spec.scale,
        return_lse=with_lse,
    )
    _of_kind(result, plan, with_lse=with_lse)
    if not with_lse:
        return result, None
    out, lse = result
    batch, seqlen_q, heads = call.query.shape[:3]
    if lse.shape != (batch, heads, seqlen_q):
        raise RuntimeError(f"{plan.lowering.entry} returned an lse of {tuple(lse.shape)}, not (B, H, S_q)")
    return out, lse


def _of_kind(result: Any, plan: Plan, *, with_lse: bool) -> Any:
    if isinstance(result, tuple) != with_lse:
        raise TypeError(f"{plan.lowering.entry} returned a {type(result).__name__} for return_lse={with_lse}")
    return result


def bound_dense(plan: Plan) -> Callable[[Tensor, Tensor, Tensor], Any]:
    """Return the backend's function with a plan's constants, for lengths at which it reads no uninitialised memory."""
    pattern = plan.lowering.pattern
    causal = pattern is not None and (pattern.left, pattern.right) == (-1, 0)
    options = {"tensor_layout": "NHD", "is_causal": causal, "sm_scale": plan.spec.scale, "return_lse": False}
    kernel = functools.partial(FUNCTIONS[plan.backend].attend, **options)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return _of_kind(kernel(readable(query), readable(key), readable(value)), plan, with_lse=False)

    return attend


def readable(tensor: Tensor) -> Tensor:
    """Copy a tensor whose end the kernels' offsets don't reach, or whose head_dim isn't contiguous (on a CPU)."""
    if tensor.is_contiguous() and tensor.numel() <= REACH:
        return tensor
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor if last < REACH and tensor.stride(-1) == 1 else tensor.contiguous()
