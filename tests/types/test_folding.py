"""Folding: each reason once with every backend that has it, and no fact said by two codes."""

from __future__ import annotations

import torch

from anyattn.environment import PRESET_NAMES, preset
from anyattn.selection import registry
from anyattn.types.folding import Shared, distinct, folded
from anyattn.types.reasons import Reason
from anyattn.types.spec import AttentionSpec

NO_DEVICE = Reason("no_device", "a cuda device", "cpu")
ELSEWHERE = Reason("device_type", "tensors on cuda", "cpu")
MISSING = Reason("not_installed", "flash-attn", "no distribution flash-attn")


def test_no_device_stands_for_device_type() -> None:
    assert distinct([ELSEWHERE, NO_DEVICE, MISSING, MISSING]) == (NO_DEVICE, MISSING)
    assert distinct([ELSEWHERE, MISSING]) == (ELSEWHERE, MISSING)


def test_shared_reason_is_said_once_with_all_that_have_it() -> None:
    found = folded([("a", [NO_DEVICE]), ("b", [NO_DEVICE, MISSING]), ("c", []), ("d", [NO_DEVICE, MISSING])])
    assert found == (Shared(("a", "b", "d"), (NO_DEVICE,)), Shared(("b", "d"), (MISSING,)))


def test_folding_loses_nothing_but_repeats_on_any_machine() -> None:
    for name in PRESET_NAMES:
        env = preset(name)
        kind = env.devices[-1].type
        spec = AttentionSpec(1, 8, 8, 2, 2, 64, 64, torch.float16, kind, 0.125)
        given = {backend: found.reasons(spec, env) for backend, found in registry.known(registry.BUILTIN)}
        groups = folded(given.items())
        said = [reason for group in groups for reason in group.reasons]
        assert len(said) == len(set(said))
        for backend, reasons in given.items():
            mine = {reason for group in groups if backend in group.names for reason in group.reasons}
            assert mine == set(distinct(reasons)), (name, backend)
