"""Calls inside torch.compile: a function that Dynamo doesn't trace chooses from constants; the kernel's call is traced.

Dynamo can't trace `functools.cache` and context variables. A function marked as returning a constant runs while tracing
and installs no guard, so the preference in force must be one of its arguments (see `anyattn.scopes._in_force`).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from anyattn.backend.declared_reasons import MAX_LOWERED_MASK_BYTES
from anyattn.backend.protocol import Output, Plan, Run
from anyattn.call.facts import Facts, MaskFacts, Options, function_facts, mask_facts
from anyattn.call.readers import of_constants
from anyattn.call.storage import storage_facts
from anyattn.environment import detect
from anyattn.errors import BackendUnavailableError, InvalidCallError
from anyattn.lowering.storage import starts_aligned
from anyattn.masks.block_masks import block_at
from anyattn.masks.functions import MaskFunction
from anyattn.masks.objects import Mask
from anyattn.masks.scalars import TENSOR
from anyattn.masks.values import NOTHING, MadeFor, as_mask, autocast_mask, parts_of
from anyattn.run.plan import execute, make_plan
from anyattn.run.table import make_first
from anyattn.run.traced import _runs
from anyattn.scopes import _in_force, defaults
from anyattn.selection.preferences import scope_of_call
from anyattn.types.spec import UNKNOWN, Storage


def _size(size: int) -> int:
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return operator.index(size) if has_static_value(size) else UNKNOWN


def _number(number: Any) -> Any:
    """Make a number static: with dynamic shapes even the defaults of arguments arrive as symbols."""
    if isinstance(number, Tensor):
        return TENSOR
    if isinstance(number, float):
        return number.__float__()
    if isinstance(number, int) and not isinstance(number, bool):
        return operator.index(number)
    return number


def _flag(flag: Any) -> Any:
    """Make a flag static: one computed from sizes arrives as a symbol, and becomes a guard."""
    if isinstance(flag, bool):
        return True if flag else False  # noqa: SIM210
    return TENSOR if isinstance(flag, Tensor) else flag


def _static_options(options: Options) -> tuple[Any, ...]:
    window = options.window
    if window is not None and len(window) == 2:
        window = (_number(window[0]), _number(window[1]))
    return (
        _number(options.dropout_p),
        _flag(options.is_causal),
        _number(options.scale),
        _flag(options.enable_gqa),
        window,
        _number(options.softcap),
        _flag(options.return_lse),
        options.layout,
    )


_SINCE = Version("2.8")
"""The oldest torch in which compiled calls were run and were right."""


def _needs_torch() -> bool:
    """Refuse compiled calls if Dynamo can't trace them.

    Raises:
        BackendUnavailableError: If torch is older than 2.8.
    """
    found = detect().torch
    if found < _SINCE:
        raise BackendUnavailableError(
            f"anyattn's calls inside torch.compile need torch {_SINCE} or newer; this is torch {found}. Install a "
            "newer torch, or exclude the call from compiled code with torch.compiler.disable."
        )
    return True


def _traced_facts(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """Write a tensor's facts as plain constants."""
    if tensor is None:
        return None
    return (tuple(_size(size) for size in tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad)


def _pattern(mask: Mask) -> tuple[int, int, str] | None:
    pattern = mask.pattern
    return None if pattern is None else (_number(pattern[0]), _number(pattern[1]), pattern[2])


def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def traced_call(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, sinks: Tensor | None, options: Options, backend: Any
) -> Output:
    """Run a call inside torch.compile."""
    _needs_torch()
    kind = query.device.type
    if _has_autocast(kind) and torch.is_autocast_enabled(kind):
        # As outside: cast, and run with autocast off, which would cast the mask too.
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = (t if t.dtype == torch.float64 else t.to(dtype) for t in (query, key, value))
        mask = autocast_mask(as_mask(attn_mask), dtype)
        with torch.autocast(kind, enabled=False):
            return _traced(query, key, value, mask, sinks, options, backend)
    return _traced(query, key, value, as_mask(attn_mask), sinks, options, backend)


def _traced(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, sinks: Tensor | None, options: Options, backend: Any
) -> Output:
    axis = 1 if options.layout == "BSHD" else 2
    mask_plain: tuple[Any, ...] = (None, None, None, None)
    fits = True
    block: tuple[Any, ...] = ()
    if mask is not None:
        made_for = (mask.block.seq_lengths[0], mask.block.seq_lengths[1]) if isinstance(mask.block, MadeFor) else None
        mask_plain = (_pattern(mask), _traced_facts(mask.key), _traced_facts(mask.dense), made_for)
        block = _block_plain(mask)
        fits = _mask_fits(mask, query, key, axis)
    large = _is_large(query, key, axis, mask is not None)
    # Plain booleans, so that Dynamo guards on the comparisons.
    same = _same_lengths(query, key, axis)
    agree = True if _batches_agree(query, key, value, axis) else False  # noqa: SIM210
    plan: Plan = _choose(
        _in_force.token,
        tuple(_in_force.entered),
        backend,
        tuple(_sized(tensor, axis, large) for tensor in (query, key, value)),
        mask_plain,
        _traced_facts(sinks),
        _static_options(options),
        (torch.is_grad_enabled(), same, agree, fits, torch.are_deterministic_algorithms_enabled()),
        storage_facts(query, key, value, 3 - axis, None if mask is None else mask.dense, starts_aligned),
        block,
    )
    run: Run = getattr(_runs, plan.backend if plan.lowering.entry != "empty" else "empty")
    return execute(run, plan, query, key, value, parts_of(mask, sinks))


def _same_lengths(query: Tensor, key: Tensor, axis: int) -> bool:
    """Whether the lengths are equal; for export, which isn't compiled again, whether they always are."""
    if query.dim() != 4 or key.dim() != 4:
        return False
    if torch.compiler.is_exporting():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return True if statically_known_true(query.shape[axis] == key.shape[axis]) else False  # noqa: SIM210
    return True if query.shape[axis] == key.shape[axis] else False  # noqa: SIM210


def _block_plain(mask: Mask) -> tuple[Any, ...]:
    """Return a mask function's facts as constants; for a block mask its id, which Dynamo guards on."""
    block = mask.block
    if block is None or isinstance(block, MadeFor):
        return ()
    if isinstance(block, MaskFunction):
        sizes = block.sizes
        plain = tuple(None if size is None else _size(size) for size in (sizes[0], sizes[1], sizes[2]))
        return (block.per_batch, block.per_head, plain)
    return (id(block),)


def _block_facts(plain: tuple[Any, ...]) -> MaskFacts:
    if not plain:
        return MaskFacts()
    if len(plain) == 1:
        return mask_facts(Mask(block=block_at(plain[0])), NOTHING)
    return MaskFacts(None, None, None, *function_facts(*plain))


def _is_large(query: Tensor, key: Tensor, axis: int, masked: bool = False) -> bool:
    """Whether sizes are so large that kernels' limits may apply; then they must be static."""
    if not query.dim() == key.dim() == 4:
        return False
    # A dense mask may be made, of up to 8 bytes per position and 1 for the boolean mask.
    if masked and query.shape[0] * query.shape[axis] * key.shape[axis] * 9 > MAX_LOWERED_MASK_BYTES:
        return True
    heads = query.shape[0] * query.shape[3 - axis]
    scores = query.shape[axis] * key.shape[axis]
    return True if heads > 65535 or scores > 1 << 31 or query.numel() > 1 << 30 else False  # noqa: SIM210


def _mask_fits(mask: Mask, query: Tensor, key: Tensor, axis: int) -> bool:
    """Whether a mask's sizes match the call's; comparing symbols adds guards."""
    if query.dim() != 4 or key.dim() != 4:
        return True  # refused with its own message
    seqlen_kv = key.shape[axis]
    if mask.key is not None:
        if mask.key.shape[0] != query.shape[0] and not (mask.key.dim() == 4 and mask.key.shape[0] == 1):
            return False
        if mask.key.dim() > 1 and mask.key.shape[-1] != seqlen_kv:
            return False
    if isinstance(mask.block, MaskFunction):
        sizes = mask.block.sizes
        for size, wanted in ((sizes[0], query.shape[0]), (sizes[1], query.shape[axis]), (sizes[2], seqlen_kv)):
            if size is not None and size != wanted:
                return False
    if mask.dense is not None:
        full = (query.shape[0], query.shape[3 - axis], query.shape[axis], seqlen_kv)
        dims = mask.dense.dim()
        if dims > 4:
            return False
        for index in range(dims):
            size = mask.dense.shape[index]
            if size != 1 and size != full[4 - dims + index]:
                return False
    return True


def _sized(tensor: Tensor, axis: int, large: bool) -> tuple[Any, ...]:
    shape = tuple(
        _size(size) if dim in (0, axis) and not large else operator.index(size) for dim, size in enumerate(tensor.shape)
    )
    return (shape, tensor.dtype, tensor.device, tensor.requires_grad)


def _batches_agree(query: Tensor, key: Tensor, value: Tensor, axis: int) -> bool:
    if not query.dim() == key.dim() == value.dim() == 4:
        return True  # refused with its own message
    return query.shape[0] == key.shape[0] == value.shape[0] and key.shape[axis] == value.shape[axis]


def _choose(
    token: str,
    entered: tuple[defaults.Entered, ...],
    backend: Any,
    facts: tuple[Any, ...],
    mask_plain: tuple[Any, ...],
    sinks: tuple[Any, ...] | None,
    options_plain: tuple[Any, ...],
    flags: tuple[bool, bool, bool, bool, bool],
    storage: tuple[bool, bool, bool, bool],
    block: tuple[Any, ...],
) -> Plan:
    scope = defaults.scope_of_token(token, entered)
    if backend is not None:
        scope = scope_of_call(scope, backend)
    grad, same, agree, fits, deterministic = flags
    if not agree:
        raise InvalidCallError("query, key and value must have the same batch size, and key and value the same length.")
    if not fits:
        raise InvalidCallError(
            "The mask's sizes don't fit the call: each must be the call's own, or 1 in a dense mask."
        )
    facts_of_block = _block_facts(block)
    parts = [None if fact is None else Facts(*fact) for fact in mask_plain[1:3]]
    spec = of_constants(
        (Facts(*facts[0]), Facts(*facts[1]), Facts(*facts[2])),
        MaskFacts(mask_plain[0], parts[0], parts[1], facts_of_block.block, facts_of_block.seqlens or mask_plain[3]),
        Options(*options_plain),
        None if sinks is None else Facts(*sinks),
        (grad, deterministic),
        storage=Storage(storage[0], storage[1], storage[2], False, storage[3]),
        same_lengths=same,
    )
    plan, run = make_first(spec, scope, make_plan)
    setattr(_runs, "empty" if spec.is_empty else plan.backend, run)
    return plan


# What torch.compiler.assume_constant_result does; the decorator itself imports torch._dynamo, which takes over a second
# and would make `import anyattn` as slow (torch 2.6 to 2.13, torch/_dynamo/decorators.py).
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
# Dynamo of torch 2.11 can't trace torch.amp.is_autocast_available itself.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]
_needs_torch._dynamo_marked_constant = True  # type: ignore[attr-defined]
