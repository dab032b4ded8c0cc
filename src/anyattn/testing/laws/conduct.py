"""Laws about behaviour: refusals, honoured arguments, unchanged inputs, deterministic results, compiling."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from anyattn.backend.protocol import Backend
from anyattn.environment import detect
from anyattn.errors import AnyattnError, BackendUnavailableError, InvalidCallError, UnsupportedCallError
from anyattn.masks.objects import Mask
from anyattn.reference.tolerance import QUANTISED
from anyattn.run import plan
from anyattn.selection import registry
from anyattn.testing.cases.case import Case, Inputs
from anyattn.testing.laws.base import (
    TOO_COARSE,
    LawBroken,
    LawResult,
    apart,
    excesses,
    inapplicable,
    judged,
    reasons_against,
    reasons_of,
    refused,
    require,
    too_coarse,
)
from anyattn.testing.laws.measure import Bound, bounds, gradients, results
from anyattn.testing.laws.quantised import bounds_for, format_of


@contextlib.contextmanager
def _watched(backend: Backend) -> Iterator[list[str]]:
    """Record every call of `load` and `run` of a backend, which counts as not loaded meanwhile."""
    seen: list[str] = []
    before: dict[str, Any] = {name: vars(backend)[name] for name in ("load", "run") if name in vars(backend)}
    load, run = backend.load, backend.run

    def watched_load() -> None:
        seen.append("load")
        load()

    def watched_run(*args: Any) -> Any:
        seen.append("run")
        return run(*args)

    was_loaded = backend in plan._loaded
    plan._loaded.discard(backend)
    instance: dict[str, Any] = vars(backend)
    instance.update(load=watched_load, run=watched_run)
    try:
        yield seen
    finally:
        for name in ("load", "run"):
            instance.pop(name, None)
        instance.update(before)
        if was_loaded:
            plan._loaded.add(backend)


def rejected(backend: str, case: Case) -> LawResult:
    """Law 2: a refused call raises before the kernel is loaded, with every reason that the backend has."""
    inputs = case.build()
    against = reasons_against(backend, inputs)
    if not against:
        return inapplicable("rejected", backend, case, "a call that is accepted")
    found = registry.get(backend)
    assert found is not None
    with _watched(found) as seen:
        try:
            inputs.attend(backend)
        except (UnsupportedCallError, BackendUnavailableError) as error:
            raised = reasons_of(error, backend)
        except Exception as error:
            raise LawBroken("rejected", backend, case, f"raises {type(error).__name__}: {error}") from error
        else:
            raise LawBroken("rejected", backend, case, f"runs, though it has reasons: {'; '.join(map(str, against))}")
    if seen:
        raise LawBroken("rejected", backend, case, f"calls {' and '.join(seen)} before it refuses")
    missing = [reason for reason in against if reason not in raised]
    if _of_machine(against):
        missing = [reason for reason in missing if reason.code in UNAVAILABLE]
    if missing:
        raise LawBroken("rejected", backend, case, f"the error lacks reasons: {'; '.join(map(str, missing))}")
    return LawResult("rejected", backend, case, "passed", reasons=against)


UNAVAILABLE = frozenset(("not_installed", "wrong_version", "broken_import", "setting", "no_device"))


def _of_machine(reasons: tuple[Any, ...]) -> bool:
    """Whether a refusal is about the machine; then its error has only the reasons about the machine."""
    return any(reason.code in UNAVAILABLE for reason in reasons)


Change = Callable[[Inputs], Inputs]


def _optional(**changes: Any) -> Change:
    def change(inputs: Inputs) -> Inputs:
        case = inputs.case.replace(**changes)
        return case.build().detached() if {"mask", "sinks"} & set(changes) else inputs.replace(case=case)

    return change


def _swap_heads(inputs: Inputs) -> Inputs:
    axis = 2 if inputs.case.layout == "BSHD" else 1
    return inputs.replace(key=inputs.key.roll(1, axis), value=inputs.value.roll(1, axis))


def _change_mask(inputs: Inputs) -> Inputs:
    """Forbid one more key, the last that any row sees, through the mask that the call has."""
    mask = inputs.mask
    if mask is None:
        keys = torch.ones(inputs.case.batch, inputs.case.seqlen_kv, dtype=torch.bool, device=inputs.query.device)
        keys[:, -1] = False
        return inputs.replace(mask=Mask(key=keys))
    if mask.dense is not None:
        dense = mask.dense.clone()
        dense[..., -1] = False if dense.dtype == torch.bool else -3.0
        return inputs.replace(mask=Mask(pattern=mask.pattern, key=mask.key, dense=dense, block=mask.block))
    return inputs.replace(mask=Mask(pattern=(0, 0, "upper_left"), key=mask.key, block=mask.block))


def _changes(case: Case) -> dict[str, Change]:
    """Return a change of each argument, by its name."""
    found: dict[str, Change] = {
        "scale": _optional(scale=(case.scale or 0.4) * 1.7),
        "causal": _optional(mask="causal"),
        "alignment": _optional(mask="causal:lower_right"),
        "window": _optional(mask="window:1:0"),
        "softcap": _optional(softcap=0.5 if case.softcap is None else case.softcap / 4),
        "sinks": _optional(sinks=not case.sinks),
        "bias": _optional(mask="bias:bhqk:own"),
        "mask": _change_mask,
        "key padding": _optional(mask="padding:scattered"),
    }
    if case.kv_heads > 1:
        found["key/value heads"] = _swap_heads
    return found


def liveness(backend: str, case: Case) -> LawResult:
    """Law 3: no argument is dropped: changing it changes the result as the reference does, or is refused."""
    inputs = case.build().detached()
    against = reasons_against(backend, inputs)
    if against:
        return refused("liveness", backend, case, against)
    if too_coarse(backend, inputs):
        return inapplicable("liveness", backend, case, TOO_COARSE)
    before, _ = inputs.attend(backend)
    truth = inputs.refer()[0]
    # A change must be larger than the kernel's own error to be seen.
    least = 5 * QUANTISED if format_of(backend) else 64 * torch.finfo(case.torch_dtype).eps
    lively = 0
    for name, change in _changes(case).items():
        changed = change(inputs)
        should = float((changed.refer()[0] - truth).abs().max())
        try:
            after, _ = changed.attend(backend)
        except (UnsupportedCallError, InvalidCallError):
            continue
        does = float((after.double() - before.double()).abs().max())
        if should > least * float(truth.abs().max()):
            lively += 1
            if not does >= should / 2:
                what = f"{name} has no effect: the result changes by {does:.3g} and should by {should:.3g}"
                raise LawBroken("liveness", backend, case, what)
    _lse_and_dropout(backend, inputs, before)
    return (
        LawResult("liveness", backend, case, "passed")
        if lively
        else inapplicable("liveness", backend, case, "values that no argument changes")
    )


def _lse_and_dropout(backend: str, inputs: Inputs, before: Tensor) -> None:
    """Check the two arguments that the reference doesn't cover: lse is returned, and dropout drops."""
    case = inputs.case
    dropping = inputs.replace(case=case.replace(dropout_p=0.5, lse=False))
    with contextlib.suppress(UnsupportedCallError):
        after, _ = dropping.attend(backend)
        if int(before.count_nonzero()) >= 64 and torch.equal(after, before):
            raise LawBroken("liveness", backend, case, "dropout_p=0.5 has no effect")
    asking = inputs.replace(case=case.replace(lse=True))
    with contextlib.suppress(UnsupportedCallError):
        if asking.attend(backend)[1] is None:
            raise LawBroken("liveness", backend, case, "return_lse=True returns no lse")


def unchanged(backend: str, case: Case) -> LawResult:
    """Law 6: a call doesn't change its inputs: neither values, nor torch's count of in-place writes."""
    inputs = case.build()
    against = reasons_against(backend, inputs)
    if against:
        return refused("unchanged", backend, case, against)
    mask = inputs.mask
    given = {
        "query": inputs.query,
        "key": inputs.key,
        "value": inputs.value,
        "the key mask": None if mask is None else mask.key,
        "the mask": None if mask is None else mask.dense,
        "sinks": inputs.sinks,
    }
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    before = {name: (tensor.detach().clone(), tensor._version) for name, tensor in tensors.items()}
    results(inputs, backend)
    for name, tensor in tensors.items():
        value, version = before[name]
        if not torch.equal(tensor.detach(), value):
            raise LawBroken("unchanged", backend, case, f"{name} is written to")
        if tensor._version != version:
            raise LawBroken("unchanged", backend, case, f"{name} is written to in place, and back")
    return LawResult("unchanged", backend, case, "passed")


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    # cuBLAS reads this once, and torch refuses deterministic algorithms without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def deterministic(backend: str, case: Case) -> LawResult:
    """Law 7: with deterministic algorithms on, an accepted call returns the same bits again."""
    with _deterministic():
        inputs = case.build()
        against = reasons_against(backend, inputs)
        if against:
            return refused("deterministic", backend, case, against)
        first = results(inputs, backend)
        for _ in range(2):
            for name, result in results(inputs, backend).items():
                if not torch.equal(result, first[name]):
                    raise LawBroken("deterministic", backend, case, f"{name} differs from one call to the next")
    return LawResult("deterministic", backend, case, "passed")


COMPILER = "aot_eager"
"""Which backend of torch.compile law 9 uses; `"inductor"` is the real one, and takes seconds a case on a CPU."""


def compiled(backend: str, case: Case, *, compiler: str | None = None) -> LawResult:
    """Law 9: torch.compile(fullgraph=True) returns the eager results and gradients, if the backend declares it."""
    inputs = case.build()
    found = registry.get(backend)
    spec = inputs.spec()
    caps = None if found is None else found.capabilities(spec, detect())
    if caps is not None and not caps.compile:
        return inapplicable("compiled", backend, case, "a backend that declares that it doesn't compile")
    against = reasons_against(backend, inputs) or reasons_against(backend, inputs, compiled=True)
    if against:
        return refused("compiled", backend, case, against)
    if too_coarse(backend, inputs):
        return inapplicable("compiled", backend, case, TOO_COARSE)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Any:
        return inputs.replace(query=query, key=key, value=value).attend(backend)

    torch._dynamo.reset()
    try:
        answer = torch.compile(call, fullgraph=True, backend=compiler or COMPILER)(
            inputs.query, inputs.key, inputs.value
        )
    except AnyattnError:
        raise
    except Exception as error:
        raise LawBroken("compiled", backend, case, f"doesn't compile: {type(error).__name__}: {error}") from error
    finally:
        torch._dynamo.reset()
    out, lse = answer
    after = {"out": out.detach()} | ({} if lse is None else {"lse": lse})
    if inputs.leaves():
        after |= gradients(inputs, out)
    before = {name: result for name, result in results(inputs, backend).items() if name in after}

    def known(orders: int) -> dict[str, Bound]:
        return bounds_for(backend, inputs, gradients=bool(inputs.leaves()), orders=orders)

    judged("compiled", backend, case, lambda orders: excesses(known(orders), after))
    worst = judged("compiled", backend, case, lambda orders: apart(known(orders), after, before))
    return LawResult("compiled", backend, case, "passed", worst)


def dropout(backend: str, case: Case) -> LawResult:
    """Law 11: dropout drops each weight with its probability and rescales the rest; p = 1 leaves zeros."""
    # With an identity for values the output is the weights themselves.
    size = case.seqlen_kv
    case = case.replace(head_dim=size, head_dim_v=0, strides="plain", data="normal", lse=False, sinks=False, grad="")
    inputs = case.build().detached()
    eye = torch.eye(size, dtype=case.torch_dtype, device=case.device)[None, :, None, :]
    value = eye.expand(case.batch, size, case.kv_heads, size).contiguous()
    inputs = inputs.replace(value=value if case.layout == "BSHD" else value.transpose(1, 2).contiguous())
    against = reasons_against(backend, inputs)
    if against:
        return refused("dropout", backend, case, against)
    torch.manual_seed(case.seed)
    dropped, _ = inputs.attend(backend)
    if case.dropout_p == 1:
        if bool(dropped.any()):
            raise LawBroken("dropout", backend, case, "dropout_p=1 leaves something")
        return LawResult("dropout", backend, case, "passed")
    known = bounds(inputs.replace(case=case.replace(dropout_p=0.0)))["out"]
    keep = 1 - case.dropout_p
    live = known.truth > 4 * known.allowed
    kept = dropped.double() * keep
    survives = live & (dropped != 0)
    # Dividing by 1 - p rounds once more.
    allowed = known.allowed + torch.finfo(case.torch_dtype).eps * known.truth.abs()
    error = torch.where(survives, (kept - known.truth).abs() / allowed, 0.0)
    worst = require("dropout", backend, case, {"surviving weights": float(error.max())})
    count = int(live.sum())
    fraction = 1 - int(survives.sum()) / max(count, 1)
    spread = 5 * (case.dropout_p * keep / max(count, 1)) ** 0.5
    if abs(fraction - case.dropout_p) > spread + 1 / max(count, 1):
        what = f"drops {fraction:.3f} of {count} weights, asked for {case.dropout_p} (five deviations are {spread:.3f})"
        raise LawBroken("dropout", backend, case, what)
    return LawResult("dropout", backend, case, "passed", worst)
