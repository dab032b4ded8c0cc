"""What shows the choice: the list of backends, explanations, plans and records."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor

from anyattn import environment
from anyattn.backend.protocol import Output
from anyattn.call.arguments import describe
from anyattn.call.facts import Options
from anyattn.errors import InvalidCallError
from anyattn.masks.objects import Mask
from anyattn.masks.values import as_mask
from anyattn.pins.pins import live_scope
from anyattn.process.tracing import has_tangent, is_usual, needs_gradient
from anyattn.run.attempts import first_that_runs
from anyattn.run.plan import raise_kernel_error
from anyattn.run.table import Entry, make_entry, make_first
from anyattn.scopes import defaults
from anyattn.selection import faults, registry
from anyattn.selection.decide import decision_for
from anyattn.selection.faults import is_kernels
from anyattn.selection.preferences import Backends, scope_of_call
from anyattn.types.decision import Decision
from anyattn.types.reasons import Reason
from anyattn.types.spec import AttentionSpec

_current = defaults.current.get


@dataclass(frozen=True, slots=True)
class BackendRow:
    """One known backend on this machine.

    Attributes:
        name: Its name.
        family: The group that shares a kernel source.
        installed: Whether its kernel's package is there.
        version: That package's version, or the empty string.
        usable: Whether some call can run with it here.
        exact: Whether it computes in the inputs' precision.
        needs: What it needs.
        install: The command that installs that; empty where it comes with torch.
        reasons: Why it isn't usable.
        origin: Where its kernel's code comes from, and what that build leaves out; empty where it is part of torch.
    """

    name: str
    family: str
    installed: bool
    version: str
    usable: bool
    exact: bool
    needs: str
    install: str
    reasons: tuple[Reason, ...]
    origin: str = ""


def _version_in(origin: str) -> str:
    """Give the version in "distribution version, ..."; empty where there is none, as with a Hub revision."""
    words = origin.split()
    try:
        return str(Version(words[1].rstrip(",")))
    except (IndexError, InvalidVersion):
        return ""


def backends(env: environment.Environment | None = None) -> tuple[BackendRow, ...]:
    """List every known backend, usable here or not, with every reason.

    Args:
        env: The machine to ask about; None is this one.
    """
    here = environment.detect()
    env = here if env is None else env
    broken = faults.broken_loads() if env is here else {}
    rows = []
    for name, backend in registry.known(registry.names()):
        reasons = tuple(backend.availability(env))
        reasons = (*reasons, broken[name]) if name in broken else reasons
        exact = bool(backend.declarations) and all(caps.exact for caps in backend.declarations.values())
        missing = any(reason.code == "not_installed" for reason in reasons)
        origin = "" if missing else backend.origin(env)
        version = _version_in(origin) if backend.packages else str(env.torch)
        rows.append(
            BackendRow(
                name,
                backend.family,
                not missing,
                version,
                not reasons,
                exact,
                backend.needs,
                backend.install,
                reasons,
                origin,
            )
        )
    return tuple(rows)


def explain(
    query: Tensor | AttentionSpec,
    key: Tensor | None = None,
    value: Tensor | None = None,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: Backends | None = None,
    env: environment.Environment | None = None,
) -> Decision:
    """Say what `attention` would run for these arguments, and why not each other backend; runs nothing.

    Args:
        query: As for `attention`, or a spec in place of all tensors.
        key: As for `attention`.
        value: As for `attention`.
        attn_mask: As for `attention`.
        dropout_p: As for `attention`.
        is_causal: As for `attention`.
        scale: As for `attention`.
        enable_gqa: As for `attention`.
        window: As for `attention`.
        softcap: As for `attention`.
        sinks: As for `attention`.
        return_lse: As for `attention`.
        backend: As for `attention`.
        env: The machine to suppose, such as `anyattn.environment.preset("h100")`; None is this one.

    Returns:
        The decision; where nothing admits the call its `chosen` is None.

    Raises:
        InvalidCallError: If the call is wrong for any backend.
    """
    if isinstance(query, AttentionSpec):
        spec = query
    else:
        options = Options(dropout_p, is_causal, scale, enable_gqa, window, softcap, return_lse, "BSHD")
        spec = describe(query, key, value, attn_mask, sinks, options)  # type: ignore[arg-type]
    scope = live_scope(_current())
    if backend is not None:
        scope = scope_of_call(scope, backend)
    here = environment.detect()
    return decision_for(spec, scope, here if env is None else env, here=env is None or env is here)


def plan(spec: AttentionSpec, *, backend: Backends | None = None) -> PlannedCall:
    """Make the choice for a spec once, and give a callable that has it made.

    Args:
        spec: The call, such as `anyattn.explain(...).spec`.
        backend: As for `attention`.

    Returns:
        `run(query, key, value, attn_mask=None, sinks=None)`, with the choice as `run.decision`. It compares shapes and
        dtype with the spec's, and leaves all else to the caller: strides, devices and gradients must be as described.

    Raises:
        UnsupportedCallError: If nothing admits the call.
    """
    scope = live_scope(_current())
    if backend is not None:
        scope = scope_of_call(scope, backend)
    return PlannedCall(_of_any_values(spec), scope)


class PlannedCall:
    """A call with the choice made, for inputs of the plan's shapes and dtype.

    Attributes:
        decision: What was chosen and why; another one where a list or `auto` chose and the kernel failed.
    """

    __slots__ = ("_call", "_dtype", "_entry", "_forward_only", "_masked", "_scope", "_shapes", "_spec", "decision")

    def __init__(self, spec: AttentionSpec, scope: defaults.Scope) -> None:
        order = (0, 1, 2, 3) if spec.layout == "BSHD" else (0, 2, 1, 3)
        full = (
            (spec.batch, spec.seqlen_q, spec.num_heads, spec.head_dim),
            (spec.batch, spec.seqlen_kv, spec.num_kv_heads, spec.head_dim),
            (spec.batch, spec.seqlen_kv, spec.num_kv_heads, spec.head_dim_v),
        )
        self._shapes = tuple(tuple(shape[axis] for axis in order) for shape in full)
        self._dtype = spec.dtype
        self._spec = spec
        self._scope = scope
        self._masked = bool(spec.mask.key or spec.mask.dense or spec.mask.block or spec.sinks)
        self._decide({})

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, sinks: Tensor | None = None
    ) -> Output:
        """Run the call; `attn_mask` and `sinks` are of the plan's kind.

        Raises:
            AnyattnError: As for `attention`, and for inputs that the plan isn't for.
        """
        if (query.shape, key.shape, value.shape) != self._shapes or query.dtype is not self._dtype:
            raise _off_plan(self._shapes, self._dtype, query, key, value)
        if self._masked or attn_mask is not None or sinks is not None:
            _check_planned_mask(self._spec, as_mask(attn_mask) or Mask(), sinks)
        if self._forward_only:
            _refuse_gradients(self.decision, query, key, value)
        try:
            if self._masked:
                return self._entry.call_masked(query, key, value, attn_mask, sinks)
            return self._call(query, key, value)
        except Exception as error:
            if not is_kernels(error):
                raise
            return self._after(error, query, key, value, attn_mask, sinks)

    def _decide(self, failed: dict[str, Reason]) -> Entry:
        entry = make_first(self._spec, self._scope, make_entry, failed)
        self._entry, self._call, self.decision = entry, entry.call, entry.decision
        self._forward_only = not self._spec.needs_grad and not entry.gives_gradients
        return entry

    def _after(
        self, error: Exception, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, sinks: Tensor | None
    ) -> Output:
        """Choose again after a kernel's error, and run that."""
        if not is_usual(query, key, value, attn_mask, sinks):
            # What fails under a tracer or transform says nothing of plain calls.
            raise_kernel_error(error, self.decision)

        def run(entry: Entry) -> Output:
            if self._forward_only:
                _refuse_gradients(entry.decision, query, key, value)
            if self._masked:
                return entry.call_masked(query, key, value, attn_mask, sinks)
            return entry.call(query, key, value)

        try:
            return first_that_runs(self._decide, run, query, usual=True, after=(error, self.decision))
        finally:
            del error  # or it would hold itself, and the call's tensors, by way of its traceback


def _of_any_values(spec: AttentionSpec) -> AttentionSpec:
    """Leave out what was known of one mask's values: a plan is run with any mask of its kind."""
    mask = spec.mask
    if mask.key is None and mask.dense is None and mask.block is None:
        return spec
    return spec.replace(mask=dataclasses.replace(mask, prefix=mask.key == "lengths", dead_rows=True))


def _refuse_gradients(decision: Decision, query: Tensor, key: Tensor, value: Tensor) -> None:
    wanted = torch.is_grad_enabled() and any(needs_gradient(tensor) for tensor in (query, key, value))
    if wanted or any(has_tangent(tensor) for tensor in (query, key, value)):
        raise InvalidCallError(
            f"The plan is for a call without gradients, and {decision.chosen} gives none. Plan again with inputs that "
            "require them, or run it under torch.no_grad()."
        )


def _check_planned_mask(spec: AttentionSpec, mask: Mask, sinks: Tensor | None) -> None:
    """Refuse a mask of another kind, size or pattern than the plan was made for."""
    planned = spec.mask
    if (sinks is not None) != spec.sinks or (mask.block is not None) != (planned.block is not None):
        raise InvalidCallError("The plan was made with another kind of mask, or sinks, than this call. Plan again.")
    key = None
    if mask.key is not None:
        key = "padding" if mask.key.dtype == torch.bool else "lengths"
        size: tuple[int, ...] = (spec.batch, spec.seqlen_kv) if key == "padding" else (spec.batch,)
        if mask.key.dim() == 4:
            size = (spec.batch if mask.key.shape[0] > 1 else 1, 1, 1, spec.seqlen_kv)
        if tuple(mask.key.shape) != size:
            raise InvalidCallError(
                f"The key mask must have shape {size}; {tuple(mask.key.shape)} was given. Plan again."
            )
    dense = None
    if mask.dense is not None:
        dense = (mask.dense.dtype, (1,) * (4 - mask.dense.dim()) + tuple(mask.dense.shape))
    wanted = None if planned.dense is None else (planned.dense.dtype, planned.dense.shape)
    if key != planned.key or dense != wanted:
        raise InvalidCallError(f"The plan's mask is {planned}; this call's is {mask!r}. Plan again.")
    if mask.pattern is not None:
        pattern = planned.pattern
        same = pattern is not None and mask.pattern[:2] == (pattern.left, pattern.right)
        if not same or not (spec.same_lengths or (pattern is not None and mask.pattern[2] == pattern.align)):
            raise InvalidCallError(f"The plan's pattern is {pattern}, this mask's {mask.pattern}. Plan again.")


def _off_plan(shapes: Any, dtype: torch.dtype, query: Tensor, key: Tensor, value: Tensor) -> InvalidCallError:
    given = tuple(tuple(tensor.shape) for tensor in (query, key, value))
    return InvalidCallError(f"The plan is for {shapes} in {dtype}; {given} in {query.dtype} was given. Plan again.")
