"""From facts to a spec, for a call's tensors and for the constants of a traced call.

Both add what else a spec depends on: gradients, determinism, tracers and transforms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anyattn.call.describe import build_spec
from anyattn.call.facts import Facts, MaskFacts, Options, plain_options
from anyattn.process import tracing
from anyattn.types.spec import AttentionSpec, Storage

Three = tuple[Facts, Facts, Facts]
"""The facts of query, key and value."""


def of_tensors(
    facts: Three,
    mask: MaskFacts,
    options: Options,
    sinks: Facts | None,
    tensors: Sequence[Tensor | None],
    *,
    storage: Storage,
    same_lengths: bool | None,
    compiled: bool,
) -> AttentionSpec:
    """Return the spec of a call of tensors.

    Args:
        facts: Of query, key and value.
        mask: Of the mask.
        options: The other arguments, as plain Python values.
        sinks: Of the sinks.
        tensors: Every tensor of the call; a transform may have wrapped some.
        storage: How the tensors lie in memory.
        same_lengths: Whether S_q and S_kv are always equal; None compares them.
        compiled: Whether a graph is recorded.

    Raises:
        InvalidCallError: If no backend can take the call.
    """
    return build_spec(
        *facts,
        mask,
        options,
        sinks,
        grad=torch.is_grad_enabled(),
        storage=storage,
        same_lengths=same_lengths,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        compiled=compiled,
        forward_ad=tracing.has_tangent(*tensors),
        vmap=tracing.is_batched(*tensors),
    )


def of_constants(
    facts: Three,
    mask: MaskFacts,
    options: Options,
    sinks: Facts | None,
    flags: tuple[bool, bool],
    *,
    storage: Storage = Storage(),  # noqa: B008
    same_lengths: bool = False,
) -> AttentionSpec:
    """Return the spec of a traced call.

    Args:
        facts: Of query, key and value.
        mask: Of the mask.
        options: The other arguments.
        sinks: Of the sinks.
        flags: Whether gradients are on, and whether deterministic algorithms are.
        storage: How the tensors lie in memory.
        same_lengths: Whether S_q and S_kv are known to be equal.

    Raises:
        InvalidCallError: If no backend can take the call.
    """
    levels = tracing.transforms()
    if "Grad" in levels:
        # Compiled code can't see that torch.func's grad wraps a tensor, so all three count as requiring a gradient.
        query, key, value = (fact._replace(requires_grad=True) for fact in facts)
        facts = (query, key, value)
    return build_spec(
        *facts,
        mask,
        plain_options(options),
        sinks,
        grad=flags[0],
        storage=storage,
        same_lengths=same_lengths,
        deterministic=flags[1],
        compiled=True,
        forward_ad="Jvp" in levels,
        vmap="Vmap" in levels,
    )
