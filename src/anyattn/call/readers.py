"""From facts to a spec: one reader for a call's tensors and one for the constants that stand for traced ones.

Both say in one place what else a spec depends on: gradients, determinism, tracers and transforms.
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
"""What is known of query, key and value."""


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
    """Describe a call of tensors.

    Args:
        facts: Of query, key and value.
        mask: Of the mask.
        options: The other arguments, already plain.
        sinks: Of the sinks.
        tensors: Every tensor of the call, which a transform may have wrapped.
        storage: How the tensors lie in memory.
        same_lengths: Whether the lengths are one; None compares them.
        compiled: Whether sizes are those of a graph that is recorded.

    Raises:
        InvalidCallError: If it is wrong for any backend.
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
    """Describe a call that is traced, by the constants that were read of it.

    Args:
        facts: Of query, key and value.
        mask: Of the mask.
        options: The other arguments.
        sinks: Of the sinks.
        flags: Whether gradients are on, and whether deterministic algorithms are asked for.
        storage: How the tensors lie in memory.
        same_lengths: Whether the lengths are known to be one.

    Raises:
        InvalidCallError: If it is wrong for any backend.
    """
    levels = tracing.transforms()
    if "Grad" in levels:
        # Of tensors inside torch.func's transforms compiled code says nothing: what runs around the call counts.
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
