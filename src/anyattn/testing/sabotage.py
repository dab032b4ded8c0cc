"""Wrong backends, one or more for every law: a law that doesn't catch them proves nothing.

Each is a right backend (torch's plain computation, or FlexAttention if softcap and lse are needed) with one thing
broken. `SABOTAGED` lists which law must catch which backend.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyattn.adapters.flex import Flex
from anyattn.adapters.native import NativeFlash, NativeMath
from anyattn.backend.protocol import Backend, Output, Parts, Plan, Run
from anyattn.masks.functions import MaskFunction
from anyattn.scopes import defaults
from anyattn.selection import registry
from anyattn.testing.cases.case import Case
from anyattn.testing.wrong_backends import NAME, Coarse, Forgetful, Hasty, Overflowing, Sinkless

Wrap = Callable[[Run, Plan, Tensor, Tensor, Tensor, Parts], Output]


def broken(base: type[Backend], wrap: Wrap) -> Backend:
    """Make a backend whose calls go through `wrap(run, plan, query, key, value, parts)`."""
    right = base.run

    def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        return wrap(right, plan, query, key, value, parts)

    made: type[Backend] = type("Sabotaged", (base,), {"name": NAME, "run": staticmethod(run)})
    return made()


@contextlib.contextmanager
def registered(backend: Backend) -> Iterator[str]:
    """Register a backend for a while, with every decision forgotten before and after."""
    registry.register(backend)
    defaults.forget()
    try:
        yield backend.name
    finally:
        registry.unregister(backend.name)
        defaults.forget()


def _with(plan: Plan, **changes: Any) -> Plan:
    spec = plan.spec.replace(**changes)
    return Plan(plan.backend, spec, plan.lowering, plan.rescale)


def _first(result: Output) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _mapped(result: Output, change: Callable[[Tensor], Tensor]) -> Output:
    return (change(result[0]), result[1]) if isinstance(result, tuple) else change(result)


def _no_scale(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    return run(_with(plan, scale=plan.spec.head_dim**-0.5), q, k, v, parts)


def _no_softcap(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    return run(_with(plan, softcap=None), q, k, v, parts)


def _no_mask(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    return run(plan, q, k, v, parts._replace(key=None))


def _last_key(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    key = parts.key
    if key is not None and key.dtype == torch.bool:
        key = key.clone()
        key[:, -1] = True
    return run(plan, q, k, v, parts._replace(key=key))


def _other_alignment(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    axis = 1 if plan.spec.layout == "BSHD" else 2
    if plan.spec.mask.pattern is None or q.shape[axis] == k.shape[axis]:
        return run(plan, q, k, v, parts)
    other = "upper_left" if plan.spec.mask.pattern.align == "lower_right" else "lower_right"
    pattern = dataclasses.replace(plan.spec.mask.pattern, align=other)  # type: ignore[arg-type]
    return run(_with(plan, mask=dataclasses.replace(plan.spec.mask, pattern=pattern)), q, k, v, parts)


def _first_entry_of_function(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    if isinstance(parts.block, MaskFunction):
        first = parts.block
        block = MaskFunction(lambda b, h, q, kv: first.mask_mod(b * 0, h * 0, q, kv), False, False)
        parts = parts._replace(block=block)
    return run(plan, q, k, v, parts)


def _no_function(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    return run(plan, q, k, v, parts if not isinstance(parts.block, MaskFunction) else parts._replace(block=None))


def _lse_off(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    result = run(plan, q, k, v, parts)
    return (result[0], result[1] + 1e-3) if isinstance(result, tuple) else result


def _lse_base_2(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    result = run(plan, q, k, v, parts)
    return (result[0], result[1] * 1.4426950408889634) if isinstance(result, tuple) else result


def _writes(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    result = run(plan, q, k, v, parts)
    with torch.no_grad():
        k.detach().add_(1e-3)
    return result


def _writes_back(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    with torch.no_grad():
        q.detach().mul_(2).div_(2)
    return run(plan, q, k, v, parts)


def _random(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    ulp = torch.finfo(q.dtype).eps
    return _mapped(run(plan, q, k, v, parts), lambda out: out + out.detach() * torch.randn_like(out) * ulp)


def _ignores_strides(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    if k.stride(-1) != 1:
        k = torch.as_strided(k, k.shape, (*k.stride()[:-1], 1), k.storage_offset())
    if k.stride(0) == 0 or k.stride(1) < k.stride(2):
        k = k.flip(3)
    return run(plan, q, k, v, parts)


def _dead_nan(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    return _mapped(run(plan, q, k, v, parts), lambda out: torch.where((out == 0).all(-1, keepdim=True), torch.nan, out))


def _dead_mean(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    return _mapped(run(plan, q, k, v, parts), lambda out: torch.where((out == 0).all(-1, keepdim=True), 0.1, out))


def _odd_lengths(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    wrong = plan.spec.seqlen_kv % 16 == 8
    return _mapped(run(plan, q, k, v, parts), lambda out: out * 1.001 if wrong else out)


def _first_batch(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    if plan.spec.batch > 1:
        v = torch.cat([v[:-1], v[:1]])  # the last entry reads the first one's values
    return run(plan, q, k, v, parts)


def _wrong_heads(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    axis = 2 if plan.spec.layout == "BSHD" else 1
    if plan.spec.is_gqa:
        group = plan.spec.num_heads // plan.spec.num_kv_heads
        order = torch.arange(plan.spec.num_heads).reshape(group, -1).t().flatten()
        back = torch.argsort(order)
        return _mapped(run(plan, q.index_select(axis, order), k, v, parts), lambda out: out.index_select(axis, back))
    return run(plan, q, k, v, parts)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.01


def _gradient(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    if k.requires_grad:
        k = _Scaled.apply(k)  # type: ignore[no-untyped-call]
    return run(plan, q, k, v, parts)


def _no_dropout(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    return run(_with(plan, dropout_p=0.0), q, k, v, parts)


def _half_dropout(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    return run(_with(plan, dropout_p=plan.spec.dropout_p / 2), q, k, v, parts)


def _unscaled_dropout(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    keep = 1 - plan.spec.dropout_p
    return _mapped(run(plan, q, k, v, parts), lambda out: out * keep if plan.spec.dropout_p else out)


def _reads_on(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    # As a kernel that loads whole tiles of values: what lies behind the last one, times a weight of zero.
    last = v.storage_offset() + sum((size - 1) * stride for size, stride in zip(v.shape, v.stride(), strict=True))
    count = v.untyped_storage().nbytes() // v.element_size() - last - 1
    behind = v.detach().as_strided((max(0, min(count, 64)),), (1,), last + 1)
    return _mapped(run(plan, q, k, v, parts), lambda out: out + 0 * behind.sum().to(out.dtype))


def _partly_written(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    def some_rows(out: Tensor) -> Tensor:
        written = torch.empty_like(out)
        return torch.cat((out[:, :-1], written[:, -1:]), 1)

    return _mapped(run(plan, q, k, v, parts), some_rows)


class _LastRowLeft(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        written = torch.empty_like(grad, memory_format=torch.contiguous_format)
        written[:, :-1] = grad[:, :-1]
        return written


def _gradient_partly_written(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    if k.requires_grad:
        k = _LastRowLeft.apply(k)  # type: ignore[no-untyped-call]
    return run(plan, q, k, v, parts)


def _no_lse(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    result = run(plan, q, k, v, parts)
    return result if plan.spec.sinks else _first(result)


def _compiled_wrong(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    wrong = torch.compiler.is_compiling()
    result = run(plan, q, k, v, parts)
    return result * 1.01 if wrong and isinstance(result, Tensor) else result


def _compiled_gradients_wrong(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    # The same value, and a key that gets a hundredth less of its gradient.
    wrong = torch.compiler.is_compiling()
    return run(plan, q, k * 0.99 + k.detach() * 0.01 if wrong else k, v, parts)


def _graph_break(run: Run, plan: Plan, q: Tensor, k: Tensor, v: Tensor, parts: Parts) -> Output:
    torch._dynamo.graph_break()
    return run(plan, q, k, v, parts)


@dataclass(frozen=True)
class Sabotage:
    """A wrong backend, and the law that must catch it.

    Attributes:
        law: The law's name.
        make: Makes the backend.
        cases: Cases of which at least one must break the law; if empty, the drawn cases.
    """

    law: str
    make: Callable[[], Backend]
    cases: tuple[Case, ...] = ()


def _of(base: type[Backend], wrap: Wrap) -> Callable[[], Backend]:
    return lambda: broken(base, wrap)


SABOTAGED: Mapping[str, Sabotage] = {
    "ignores scale": Sabotage("right", _of(NativeMath, _no_scale)),
    "drops the key mask": Sabotage("right", _of(NativeMath, _no_mask)),
    "drops mask functions": Sabotage("right", _of(NativeMath, _no_function)),
    "takes a mask function's first entry for all": Sabotage("right", _of(Flex, _first_entry_of_function)),
    "lets the last key through": Sabotage("right", _of(NativeMath, _last_key)),
    "aligns causal to the other corner": Sabotage("right", _of(Flex, _other_alignment)),
    "adds 0.001 to lse": Sabotage("right", _of(NativeFlash, _lse_off)),
    "gives lse in base 2": Sabotage("right", _of(NativeFlash, _lse_base_2)),
    "0.1 % off where S_kv % 16 == 8": Sabotage("right", _of(NativeMath, _odd_lengths)),
    "key's gradient 1 % off": Sabotage("right", _of(NativeMath, _gradient)),
    "maps heads by remainder": Sabotage("right", _of(NativeMath, _wrong_heads)),
    "drops sinks": Sabotage("right", Sinkless),
    "loads before it refuses": Sabotage("rejected", Hasty),
    "forgets its reasons": Sabotage("rejected", Forgetful),
    "ignores softcap": Sabotage("liveness", _of(Flex, _no_softcap)),
    "ignores a new scale": Sabotage("liveness", _of(NativeMath, _no_scale)),
    "ignores a new key mask": Sabotage("liveness", _of(NativeMath, _no_mask)),
    "ignores new sinks": Sabotage("liveness", Sinkless),
    "ignores dropout_p": Sabotage("liveness", _of(NativeMath, _no_dropout)),
    "ignores return_lse": Sabotage("liveness", _of(NativeFlash, _no_lse)),
    "mixes batch entries": Sabotage("permutation", _of(NativeMath, _first_batch)),
    "maps permuted heads by remainder": Sabotage("permutation", _of(NativeMath, _wrong_heads)),
    "ignores strides": Sabotage("strides", _of(NativeMath, _ignores_strides)),
    "writes to key": Sabotage("unchanged", _of(NativeMath, _writes)),
    "writes to query and back": Sabotage("unchanged", _of(NativeMath, _writes_back)),
    "rounds at random": Sabotage("deterministic", _of(NativeMath, _random)),
    "NaN in dead rows": Sabotage("dead_rows", _of(NativeMath, _dead_nan)),
    "a mean in dead rows": Sabotage("dead_rows", _of(NativeMath, _dead_mean)),
    "wrong when compiled": Sabotage("compiled", _of(NativeMath, _compiled_wrong)),
    "loses gradient when compiled": Sabotage("compiled", _of(NativeMath, _compiled_gradients_wrong)),
    "breaks the graph": Sabotage("compiled", _of(NativeMath, _graph_break)),
    "halves that don't merge": Sabotage("halves", _of(NativeFlash, _lse_base_2)),
    "quantised, and ignores scale": Sabotage("right", _of(Coarse, _no_scale)),
    "quantised, and drops the key mask": Sabotage("right", _of(Coarse, _no_mask)),
    "quantised, and lets the last key through": Sabotage("right", _of(Coarse, _last_key)),
    "quantised, and aligns causal to the other corner": Sabotage("right", _of(Coarse, _other_alignment)),
    "quantised, and gives lse in base 2": Sabotage("right", _of(Coarse, _lse_base_2)),
    "quantised, and maps heads by remainder": Sabotage("right", _of(Coarse, _wrong_heads)),
    "quantised, and ignores a new scale": Sabotage("liveness", _of(Coarse, _no_scale)),
    "quantised, and mixes batch entries": Sabotage("permutation", _of(Coarse, _first_batch)),
    "quantised, and ignores strides": Sabotage("strides", _of(Coarse, _ignores_strides)),
    "quantised halves that don't merge": Sabotage("halves", _of(Coarse, _lse_base_2)),
    "reads behind the last value": Sabotage("unwritten_memory", _of(NativeMath, _reads_on)),
    "leaves a row of its output unwritten": Sabotage("unwritten_memory", _of(NativeMath, _partly_written)),
    "leaves a row of a gradient unwritten": Sabotage("unwritten_memory", _of(NativeMath, _gradient_partly_written)),
    "quantised, and reads behind the last value": Sabotage("unwritten_memory", _of(Coarse, _reads_on)),
    "writes after the last packed token": Sabotage("packed_tails", Overflowing),
    "drops nothing": Sabotage("dropout", _of(NativeMath, _no_dropout)),
    "drops half as often": Sabotage("dropout", _of(NativeMath, _half_dropout)),
    "doesn't rescale": Sabotage("dropout", _of(NativeMath, _unscaled_dropout)),
}
"""What is broken, and which law must catch it."""
