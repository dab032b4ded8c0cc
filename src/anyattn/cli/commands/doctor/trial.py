"""The child of `anyattn doctor`: tries one backend on tiny inputs, and writes each step down before it is taken.

A kernel may abort, crash or hang, so this runs in a process of its own. What it finds it appends to a file, one JSON
object a line; the parent reads as far as the child came.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import anyattn
from anyattn import masks, reference
from anyattn.backend.protocol import Backend
from anyattn.call.arguments import describe
from anyattn.call.facts import Options
from anyattn.environment import Environment, detect
from anyattn.errors import BackendUnavailableError, UnsupportedCallError
from anyattn.reference import tolerance
from anyattn.run.plan import load
from anyattn.run.table import make_entry
from anyattn.selection import registry
from anyattn.selection.faults import one_line
from anyattn.selection.resolve import resolve
from anyattn.types.decision import Preference
from anyattn.types.reasons import Reason

Outcome = Literal["passed", "wrong", "raised", "refused", "died", "hung"]
"""`wrong`: the result leaves the error budget; `refused`: no tiny call is one that the backend admits; `died` and
`hung`: the process ended, or was ended, during the step."""

STEPS = ("forward", "padding", "backward", "gqa")
"""What is tried: a plain call, one with a key padding mask, one with gradients, and one with fewer key/value heads
(with lse if the backend returns it)."""

COMPILED = "compiled"
"""The step that only the default is tried with: tracing takes seconds, and nearly all of it is the same code."""

_BATCH, _SEQLEN_Q, _SEQLEN_KV, _HEADS = 2, 64, 96, 2
# Every kernel is made for heads of 64 or of 128. Lengths keep clear of the known-bad table.
_HEAD_DIMS = (64, 128)
_DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float16)}
_DTYPES_ELSEWHERE = (torch.float16, torch.bfloat16, torch.float32)

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of one step.

    Attributes:
        backend: Which backend ran.
        device: The type of device.
        step: One of `STEPS`, or `COMPILED`.
        outcome: What came of it.
        kernel: Which entry of the backend's kernel ran.
        dtype: What it computed in.
        error: The largest error as a multiple of what is allowed; None if nothing was compared.
        seconds: Wall time, compiling included; None if it didn't finish.
        detail: What went wrong, in words.
    """

    backend: str
    device: str
    step: str
    outcome: Outcome
    kernel: str = ""
    dtype: str = ""
    error: float | None = None
    seconds: float | None = None
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for JSON."""
        return asdict(self)


def main(path: str, name: str, run: bool, timeout: float, named: bool = False) -> None:
    """Try one backend, or the default if the name is empty, and write what happens to a file.

    Args:
        path: The file.
        name: The backend.
        run: Whether to call its kernel, or only to import and describe it.
        timeout: Seconds that a step may take; after that the process shows where it hangs, and ends.
        named: Whether the user named it: only then is a kernel downloaded.
    """
    faulthandler.enable()
    _leave_no_core()
    with open(path, "a", encoding="utf-8") as file:

        def tell(event: dict[str, Any]) -> None:
            # Its own clock, not only the parent's: it ends even if the parent was killed.
            faulthandler.dump_traceback_later(timeout, exit=True)
            file.write(json.dumps(event) + "\n")
            file.flush()

        if name:
            _try_backend(name, run, tell, named)
        else:
            _try_default(tell)
        tell({"event": "done"})


def _leave_no_core() -> None:
    with contextlib.suppress(ImportError):  # Windows has neither the module nor core files
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _try_backend(name: str, run: bool, tell: Tell, named: bool = False) -> None:
    tell({"event": "begin", "device": "", "step": "import"})
    env = detect()
    try:
        found = registry.get(name)
    except Exception as error:  # noqa: BLE001 - whatever a third party's import raises is the finding
        broken = Reason("broken_import", "a backend that can be imported", one_line(error))
        tell({"event": "described", "family": "", "exact": True, "reasons": [broken.to_dict()]})
        return
    assert found is not None
    reasons = tuple(found.availability(env))
    exact = all(caps.exact for caps in found.declarations.values())
    told = [reason.to_dict() for reason in reasons]
    tell({"event": "described", "family": found.family, "exact": exact, "reasons": told})
    if reasons or not run or (found.downloads and not named):
        return
    tell({"event": "begin", "device": "", "step": "import"})
    try:
        load(found)
    except BackendUnavailableError as error:
        told = [reason.to_dict() for reason in error.reasons]
        tell({"event": "described", "family": found.family, "exact": exact, "reasons": told})
        return
    for kind in dict.fromkeys(device.type for device in env.devices):
        if kind not in found.declarations:
            continue
        for step in STEPS:
            caps = found.declarations[kind]
            if (step == "backward" and not caps.backward) or (step == "gqa" and not caps.gqa):
                continue
            tell({"event": "begin", "device": kind, "step": step})
            tell({"event": "end", "trial": _try(found, exact, kind, step, env, lse=caps.lse).to_dict()})


def _try_default(tell: Tell) -> None:
    """Make a call as a program does: with no backend named, and the environment variables in force."""
    kind = main_device(detect())
    tell({"event": "begin", "device": kind, "step": "forward"})
    refusal = ""
    for call in _calls(kind, "forward"):
        start = time.perf_counter()
        try:
            with anyattn.record() as made:
                result = anyattn.attention(call.query, call.key, call.value)
        except UnsupportedCallError as error:
            refusal = refusal or str(error)
            continue
        except Exception as error:  # noqa: BLE001 - whatever is raised is the finding
            trial = Trial("", kind, "forward", "raised", dtype=call.dtype, detail=one_line(error))
        else:
            chosen = made[0].chosen or ""
            ran = Trial(chosen, kind, "forward", "passed", made[0].kernel, call.dtype)
            found = registry.get(chosen)
            exact = found is None or all(caps.exact for caps in found.declarations.values())
            trial = _judged(ran, call, (result,), exact, time.perf_counter() - start)
        break
    else:
        trial = Trial("", kind, "forward", "refused", detail=refusal)
    tell({"event": "end", "trial": trial.to_dict()})
    if trial.outcome == "passed":
        tell({"event": "begin", "device": kind, "step": COMPILED})
        tell({"event": "end", "trial": _try_compiled(trial, call).to_dict()})


def _try_compiled(ran: Trial, call: _Call) -> Trial:
    """Make the call that passed inside torch.compile: traced as a whole, and run without inductor."""
    found = registry.get(ran.backend)
    trial = dataclasses.replace(ran, step=COMPILED, error=None, seconds=None)
    if found is not None and not found.declarations[ran.device].compile:
        return dataclasses.replace(trial, outcome="refused", detail="the backend declares no torch.compile")
    start = time.perf_counter()
    try:
        run = torch.compile(anyattn.attention, fullgraph=True, backend="aot_eager")
        result = run(call.query, call.key, call.value)
    except Exception as error:  # noqa: BLE001 - whatever is raised is the finding
        return dataclasses.replace(trial, outcome="raised", detail=one_line(error))
    exact = found is None or all(caps.exact for caps in found.declarations.values())
    return _judged(trial, call, (result,), exact, time.perf_counter() - start)


def main_device(env: Environment) -> str:
    """Return the type of device that a program most likely uses here: the first accelerator, else the CPU."""
    return next((device.type for device in env.devices if device.type != "cpu"), "cpu")


@dataclass(frozen=True)
class _Call:
    """One tiny call; gradients flow back from `upstream`."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: masks.Mask | None
    upstream: Tensor | None
    options: Options

    @property
    def dtype(self) -> str:
        return str(self.query.dtype).removeprefix("torch.")

    def compute(self, run: Callable[..., Any]) -> tuple[Tensor, ...]:
        """Compute the output and, if requested, lse `(B, S_q, H, 1)`, or the gradients of query, key and value."""
        inputs = (self.query, self.key, self.value)
        result = run(*inputs, self.mask)
        out: Tensor = result[0] if isinstance(result, tuple) else result
        if self.options.return_lse:
            return (out, result[1].transpose(1, 2).unsqueeze(-1))
        if self.upstream is None:
            return (out,)
        return (out, *torch.autograd.grad(out, inputs, self.upstream.to(out.dtype)))


def _calls(kind: str, step: str, lse: bool = True) -> Iterator[_Call]:
    """Make the tiny calls of a step, the likeliest first: a backend need only admit one of them."""
    for dim in _HEAD_DIMS:
        for dtype in _DTYPES.get(kind, _DTYPES_ELSEWHERE):
            generator = torch.Generator().manual_seed(0)
            shapes = ((_SEQLEN_Q,), (_SEQLEN_KV,), (_SEQLEN_KV,), (_SEQLEN_Q,))
            drawn = [torch.randn(_BATCH, length, _HEADS, dim, generator=generator) for (length,) in shapes]
            if step == "gqa":
                drawn[1:3] = (tensor[:, :, :1].contiguous() for tensor in drawn[1:3])
            query, key, value, upstream = (tensor.to(dtype).to(kind) for tensor in drawn)
            wants_grad = step == "backward"
            for tensor in (query, key, value):
                tensor.requires_grad_(wants_grad)
            kept = torch.arange(_SEQLEN_KV)[None, :] < torch.tensor([[_SEQLEN_KV], [_SEQLEN_KV - 19]])
            # Prepared, so that a kernel which wants every row to have a key knows that it has.
            mask = anyattn.prepare_mask(masks.KeyPadding(kept.to(kind))) if step == "padding" else None
            options = Options(enable_gqa=True, return_lse=lse) if step == "gqa" else Options()
            yield _Call(query, key, value, mask, upstream if wants_grad else None, options)


def _try(backend: Backend, exact: bool, kind: str, step: str, env: Environment, *, lse: bool) -> Trial:
    """Run one step with only one backend: nothing else that is installed is imported or chosen."""
    refused: tuple[Reason, ...] = ()
    for call in _calls(kind, step, lse):
        try:
            spec = describe(call.query, call.key, call.value, call.mask, None, call.options)
            wish = Preference((backend.name,), "require", "doctor")
            decision = resolve(spec, env, wish, {backend.name: backend})
            if decision.chosen is None:
                refused = refused or decision.candidates[0].reasons
                continue
            start = time.perf_counter()
            entry = make_entry(decision)
            results = call.compute(lambda q, k, v, mask: entry.call_masked(q, k, v, mask, None))  # noqa: B023
            results = tuple(result.detach().cpu() for result in results)
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises is the finding
            return Trial(backend.name, kind, step, "raised", dtype=call.dtype, detail=one_line(error))
        ran = Trial(backend.name, kind, step, "passed", decision.kernel, call.dtype)
        return _judged(ran, call, results, exact, time.perf_counter() - start)
    return Trial(backend.name, kind, step, "refused", detail="; ".join(map(str, refused)))


def _judged(ran: Trial, call: _Call, results: tuple[Tensor, ...], exact: bool, seconds: float) -> Trial:
    """Compare the results of a step with the reference."""
    error = _worst(call, results, exact)
    detail = "" if error <= 1 else f"its error is {error:.3g} times what is allowed"
    outcome: Outcome = "passed" if error <= 1 else "wrong"
    return Trial(ran.backend, ran.device, ran.step, outcome, ran.kernel, ran.dtype, error, seconds, detail)


def _worst(call: _Call, results: tuple[Tensor, ...], exact: bool) -> float:
    query, key, value = (
        tensor.detach().cpu().requires_grad_(tensor.requires_grad) for tensor in (call.query, call.key, call.value)
    )
    mask = None if call.mask is None or call.mask.key is None else masks.KeyPadding(call.mask.key.cpu())
    upstream = None if call.upstream is None else call.upstream.cpu()
    same = _Call(query, key, value, mask, upstream, call.options)
    truths = same.compute(reference.attention)
    dtype = call.query.dtype
    plains = same.compute(lambda q, k, v, mask: reference.attention(q, k, v, mask, dtype=dtype))
    worst = 0.0
    for result, truth, plain in zip(results, truths, plains, strict=True):
        result, truth, plain = result.detach().cpu(), truth.detach().double(), plain.detach()
        if exact or result.shape != truth.shape:
            allowed = tolerance.budget(truth, plain, dtype, over=(1, 3))
            error = tolerance.excess(result, truth, allowed)
        else:
            error = float((result.double() - truth).norm() / truth.norm()) / tolerance.QUANTISED
        worst = max(worst, float("inf") if error != error else error)
    return worst
