"""Calls inside torch.compile: an opaque chooser sees constants alone, and the kernel's call is traced.

Dynamo refuses `functools.cache` and context variables. A function marked as giving a constant runs while tracing and
installs no guard, so that the preference in force has to be among its arguments (see `anyattn._in_force`).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from anyattn import _in_force, _runs, policy
from anyattn.backend import Output, Plan, Run
from anyattn.describe import Facts, MaskFacts, Options, build_spec
from anyattn.dispatch import decide, scope_of_call
from anyattn.errors import InvalidCallError
from anyattn.masks import Mask
from anyattn.prepare import NOTHING, as_mask, mask_facts, parts_of
from anyattn.running import execute, make_plan
from anyattn.spec import UNKNOWN, Storage


def _size(size: int) -> int:
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return operator.index(size) if has_static_value(size) else UNKNOWN


def _number(number: Any) -> Any:
    """Make a number static: with dynamic shapes even the defaults of arguments arrive as symbols."""
    if isinstance(number, float):
        return number.__float__()
    if isinstance(number, int) and not isinstance(number, bool):
        return operator.index(number)
    return number


def _static_options(options: Options) -> tuple[Any, ...]:
    window = options.window
    if window is not None and len(window) == 2:
        window = (_number(window[0]), _number(window[1]))
    return (
        _number(options.dropout_p),
        options.is_causal,
        _number(options.scale),
        options.enable_gqa,
        window,
        _number(options.softcap),
        options.return_lse,
        options.layout,
    )


def _traced_facts(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """Write a tensor's facts as plain constants."""
    if tensor is None:
        return None
    return (tuple(_size(size) for size in tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad)


def _pattern(mask: Mask) -> tuple[int, int, str] | None:
    pattern = mask.pattern
    return None if pattern is None else (_number(pattern[0]), _number(pattern[1]), pattern[2])


def traced_call(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, sinks: Tensor | None, options: Options, backend: Any
) -> Output:
    """Make a call inside torch.compile: an opaque chooser sees constants alone, the kernel's call is traced."""
    mask = as_mask(attn_mask)
    axis = 1 if options.layout == "BSHD" else 2
    facts = tuple(_sized(tensor, axis) for tensor in (query, key, value))
    same = True if query.shape[axis] == key.shape[axis] else False  # noqa: SIM210 - makes a guard, not a symbol
    agree = True if _batches_agree(query, key, value, axis) else False  # noqa: SIM210
    mask_plain: tuple[Any, ...] = (None, None, None)
    if mask is not None:
        mask_plain = (_pattern(mask), _traced_facts(mask.key), _traced_facts(mask.dense))
    plan: Plan = _choose(
        _in_force.token,
        tuple(policy.traced),
        backend,
        facts,
        mask_plain,
        _traced_facts(sinks),
        _static_options(options),
        (torch.is_grad_enabled(), same, agree, torch.are_deterministic_algorithms_enabled()),
        _traced_storage(query, key, value, axis),
        None if mask is None else mask.block,
    )
    run: Run = getattr(_runs, plan.backend if plan.lowering.entry != "empty" else "empty")
    return execute(run, plan, query, key, value, parts_of(mask, sinks))


def _sized(tensor: Tensor, axis: int) -> tuple[Any, ...]:
    shape = tuple(_size(size) if dim in (0, axis) else operator.index(size) for dim, size in enumerate(tensor.shape))
    return (shape, tensor.dtype, tensor.device, tensor.requires_grad)


def _batches_agree(query: Tensor, key: Tensor, value: Tensor, axis: int) -> bool:
    if not query.dim() == key.dim() == value.dim() == 4:
        return True  # refused with its own message
    return query.shape[0] == key.shape[0] == value.shape[0] and key.shape[axis] == value.shape[axis]


def _traced_storage(query: Tensor, key: Tensor, value: Tensor, axis: int) -> tuple[bool, bool, bool]:
    if query.device.type == "cpu":
        return (True, True, False)
    size = query.element_size()
    aligned, unit, expanded = True, True, False
    for tensor in (query, key, value):
        if tensor.storage_offset() * size % 16:
            aligned = False
        if tensor.stride(-1) != 1:
            unit = False
        if tensor.shape[-1] * size % 16 == 0:
            for dim in (0, 1, 2):
                if tensor.shape[dim] > 1 and tensor.stride(dim) * size % 16:
                    aligned = False
        if tensor is not query and tensor.shape[3 - axis] > 1 and tensor.stride(3 - axis) == 0:
            expanded = True
    return (aligned, unit, expanded)


def _choose(
    token: str,
    entered: tuple[policy.Entered, ...],
    backend: Any,
    facts: tuple[Any, ...],
    mask_plain: tuple[Any, ...],
    sinks: tuple[Any, ...] | None,
    options_plain: tuple[Any, ...],
    flags: tuple[bool, bool, bool, bool],
    storage: tuple[bool, bool, bool],
    block_mask: Any,
) -> Plan:
    options = Options(*options_plain)
    scope = policy.scope_of_token(token, entered)
    if backend is not None:
        scope = scope_of_call(scope, backend)
    grad, same, agree, deterministic = flags
    query, key, value = (Facts(*fact) for fact in facts)
    if not agree:
        raise InvalidCallError("query, key and value need the same batch size, and key and value the same length.")
    facts_of_block = mask_facts(None if block_mask is None else Mask(block=block_mask), NOTHING)
    parts = [None if fact is None else Facts(*fact) for fact in mask_plain[1:3]]
    spec = build_spec(
        query,
        key,
        value,
        MaskFacts(mask_plain[0], parts[0], parts[1], facts_of_block.block, facts_of_block.seqlens),
        options,
        None if sinks is None else Facts(*sinks),
        grad=grad,
        storage=Storage(*storage),
        same_lengths=same,
        deterministic=deterministic,
        compiled=True,
    )
    plan, run = make_plan(decide(spec, scope))
    setattr(_runs, "empty" if spec.is_empty else plan.backend, run)
    return plan


# What torch.compiler.assume_constant_result does; the decorator itself imports torch._dynamo, which takes over a second
# and would make `import anyattn` as slow (torch 2.6 to 2.13, torch/_dynamo/decorators.py).
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
