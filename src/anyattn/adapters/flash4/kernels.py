"""The call of FlashAttention-4, and the operators through which torch.compile reaches it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from anyattn.adapters._flash import KernelCall
from anyattn.backend.protocol import Plan
from anyattn.process.tracing import records
from anyattn.sources.packages import FUNCTIONS


def attend(plan: Plan, call: KernelCall, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Call the kernel for a plan; while torch.compile traces, through an operator."""
    spec = plan.spec
    with_lse = spec.return_lse or plan.rescale
    causal = call.left == -1 and call.right == 0
    sides = (-1, -1) if causal else (call.left, call.right)
    softcap = 0.0 if spec.softcap is None else spec.softcap
    if sinks is not None:
        sinks = sinks.detach()
        sinks = sinks.float() if sinks.dtype == torch.float64 else sinks
    arguments = (
        plan.backend,
        call.query,
        call.key,
        call.value,
        call.cu_seqlens_q,
        call.cu_seqlens_kv,
        call.lengths,
        sinks,
        call.max_seqlen_q,
        call.max_seqlen_kv,
        spec.scale,
        causal,
        sides[0],
        sides[1],
        softcap,
        spec.deterministic,
    )
    if torch.compiler.is_compiling() or records():
        out, lse = torch.ops.anyattn.flash4(*arguments)
    else:
        out, lse = _kernel(*arguments, with_lse=with_lse)
    return out, lse if with_lse else None


def _kernel(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    lengths: Tensor | None,
    sinks: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    deterministic: bool,
    *,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Call the package's function by keyword, since the order of its arguments changed between betas."""
    functions = FUNCTIONS[backend]
    options = _options(scale, causal, left, right, softcap, deterministic, sinks=sinks, with_lse=with_lse)
    if key is value:
        value = value.view_as(value)  # one object for both selects another formula if D_v is 512
    if lengths is None and cu_seqlens_k is None:
        result = functions.flash_attn_func(query, key, value, **options)
    else:
        result = functions.flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            seqused_k=lengths,
            **options,
        )
    return result[0], result[1] if with_lse else None


def _options(
    scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    deterministic: bool,
    *,
    sinks: Tensor | None,
    with_lse: bool,
) -> dict[str, Any]:
    return {
        "softmax_scale": scale,
        "causal": causal,
        "window_size": (None if left == -1 else left, None if right == -1 else right),
        "learnable_sink": sinks,
        "softcap": softcap,
        "deterministic": deterministic,
        "return_lse": with_lse,
    }


def bound_to(plan: Plan, *, lengths: bool) -> Callable[..., Any]:
    """Return the kernel with a plan's constants: `kernel(query, key, value)`, with `lengths` a fourth argument."""
    spec, pattern, functions = plan.spec, plan.lowering.pattern, FUNCTIONS[plan.backend]
    left, right = (-1, -1) if pattern is None else (pattern.left, pattern.right)
    causal = left == -1 and right == 0
    sides = (-1, -1) if causal else (left, right)
    softcap = 0.0 if spec.softcap is None else spec.softcap
    options = _options(spec.scale, causal, *sides, softcap, spec.deterministic, sinks=None, with_lse=spec.return_lse)
    if not lengths:
        return functools.partial(functions.flash_attn_func, **options)
    varlen = functools.partial(functions.flash_attn_varlen_func, cu_seqlens_q=None, cu_seqlens_k=None, **options)

    def with_lengths(query: Tensor, key: Tensor, value: Tensor, used: Tensor) -> Any:
        return varlen(query, key, value, max_seqlen_q=query.shape[1], max_seqlen_k=key.shape[1], seqused_k=used)

    return with_lengths


@torch.library.custom_op("anyattn::flash4", mutates_args=())
def _op(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    lengths: Tensor | None,
    sinks: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    arguments = (backend, query, key, value, cu_seqlens_q, cu_seqlens_k, lengths, sinks, max_seqlen_q, max_seqlen_k)
    out, lse = _kernel(*arguments, scale, causal, left, right, softcap, deterministic, with_lse=True)
    assert lse is not None
    return out.contiguous(), lse.contiguous()


@_op.register_fake
def _(backend: str, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    rows = (query.shape[0], query.shape[2], query.shape[1]) if query.dim() == 4 else (query.shape[1], query.shape[0])
    return out, query.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("anyattn::flash4_backward", mutates_args=())
def _backward_op(
    backend: str,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    lengths: Tensor | None,
    sinks: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients in compiled code, with a second forward, so that only the public function is used."""
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        tensors: tuple[Any, ...] = (*inputs, cu_seqlens_q, cu_seqlens_k, lengths, sinks)
        options: tuple[Any, ...] = (max_seqlen_q, max_seqlen_k, scale, causal, left, right, softcap, deterministic)
        out, _ = _kernel(backend, *tensors, *options, with_lse=False)
        grads = torch.autograd.grad(out, inputs, grad)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


@_backward_op.register_fake
def _(
    backend: str, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[1:8])
    ctx.rest = (inputs[0], inputs[8:])


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    backend, options = ctx.rest
    grads = torch.ops.anyattn.flash4_backward(backend, grad.contiguous(), *ctx.saved_tensors, *options)
    return (None, *grads, *(None,) * 12)


_op.register_autograd(_backward, setup_context=_setup_context)
