"""`ANYATTN_TUNE=1`: the first call of each kind that `auto` decides is measured on its own tensors, then decided."""

from __future__ import annotations

import os
import time
from typing import Any, Final

import torch
from torch import Tensor

from anyattn.environment import detect
from anyattn.errors import InvalidSettingError
from anyattn.masks.values import as_mask
from anyattn.process.bounded import Bounded
from anyattn.scopes import defaults
from anyattn.selection import registry
from anyattn.selection.decide import decision_for
from anyattn.timings import known
from anyattn.timings.keys import Key, key_of
from anyattn.tuning.inputs import Inputs
from anyattn.tuning.timer import can_measure
from anyattn.tuning.tuner import candidates, tune
from anyattn.types.names import AUTO
from anyattn.types.spec import AttentionSpec

BUDGET: Final = "ANYATTN_TUNE_BUDGET_MS"
MILLISECONDS: Final = 200.0
"""How long the first call of a kind may take to be measured, by default."""

_tried: Bounded[Key, None] = Bounded(4096)


def tune_first(
    spec: AttentionSpec,
    scope: defaults.Scope,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    sinks: Tensor | None,
) -> bool:
    """Measure a call before it is decided, unless it was measured before or can't be now; return whether it was.

    Nothing is measured while a process group exists: ranks would wait for each other, or choose differently. Backends
    whose first call takes seconds (`Backend.slow_start`), and those that may be downloaded, aren't tried.
    """
    wish = scope.preference()
    if AUTO not in wish.names or spec.dropout_p or spec.mask.block is not None or spec.captured:
        return False
    if defaults.checks_enabled() or _is_distributed() or not can_measure(query, key, value, sinks):
        return False
    stored = key_of(spec, detect())
    if stored is None or known.rows_of(stored) or not _tried.once(stored):
        return False
    seconds = budget()
    mask = as_mask(attn_mask)
    if mask is not None and not can_measure(mask.key, mask.dense):
        return False
    if "mask" in spec.requires_grad or "sinks" in spec.requires_grad:
        return False
    tensors = [tensor.detach() for tensor in (query, key, value)]
    for name, tensor in zip(("query", "key", "value"), tensors, strict=True):
        tensor.requires_grad_(name in spec.requires_grad)
    names = [name for name in _chosen_first(spec, scope) if not _starts_slowly(name, spec)]
    if len(names) < 2:
        return False
    inputs = Inputs(tensors[0], tensors[1], tensors[2], mask, sinks)
    deadline = time.perf_counter() + seconds / 2
    tune(spec, inputs, scope, seconds=seconds / 2, source="ANYATTN_TUNE", names=names, deadline=deadline)
    return True


def budget() -> float:
    """Return the budget for one kind of call in seconds.

    Raises:
        InvalidSettingError: If the variable holds no number of milliseconds.
    """
    word = os.environ.get(BUDGET, "")
    try:
        found = float(word) if word else MILLISECONDS
    except ValueError:
        found = -1.0
    if not 0 < found < float("inf"):
        raise InvalidSettingError(f"{BUDGET} is {word!r}; set it to a number of milliseconds above 0.")
    return found / 1e3


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _chosen_first(spec: AttentionSpec, scope: defaults.Scope) -> list[str]:
    names = candidates(spec, scope)
    chosen = decision_for(spec, scope, detect(), here=True).chosen
    return sorted(names, key=lambda name: name != chosen)


def _starts_slowly(name: str, spec: AttentionSpec) -> bool:
    backend = registry.get(name)
    lowering = backend.lower(spec, detect())
    compiles = lowering.compiled or any(conversion.code == "compiles_first" for conversion in lowering.conversions)
    return backend.slow_start or compiles
