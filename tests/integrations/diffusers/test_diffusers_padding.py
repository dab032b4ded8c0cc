"""Models with padded prompts: their key masks reach a flash kernel's path, and no padding makes an answer wrong.

The kernel is a contract double, in bf16: it shows what the adapter is told, not how fast a kernel is.
"""

from __future__ import annotations

from typing import Any

import diffusers_classes  # noqa: F401 - adds its models to TINY
import pytest
import torch
from diffusers_tiny import in_float64, make, output

import anyattn
import doubles
from anyattn.integrations import diffusers as integration

KEY_MASKED = ("qwen", "lumina2", "hunyuan_video")
BIASED = ("ltx", "pixart")
"""Models that make a bias of -10000 of their masks themselves: what it means can't be told without reading it."""
MASKS = ("encoder_hidden_states_mask", "encoder_attention_mask")


def _padded(inputs: dict[str, Any], kind: str) -> dict[str, Any]:
    """Give the inputs with another padding of the second prompt."""
    changed = dict(inputs)
    for name in MASKS:
        if name in inputs:
            mask = inputs[name].clone()
            length = mask.shape[1]
            mask[:] = 1
            if kind == "left":
                mask[1, : length // 2] = 0
            elif kind == "right":
                mask[1, length // 2 :] = 0
            else:
                mask[1, 1::2] = 0
            changed[name] = mask
    return changed


def _in_bfloat16(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _in_bfloat16(entry) for key, entry in value.items()}
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.bfloat16()
    return value


def _error(result: torch.Tensor, truth: torch.Tensor) -> float:
    return float((result.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("kind", ["left", "right", "scattered"])
@pytest.mark.parametrize("backend", ["flash4", "flash2"])
@pytest.mark.parametrize("name", [*KEY_MASKED, *BIASED])
def test_padded_prompts_reach_the_flash_path_and_stay_right(name: str, backend: str, kind: str) -> None:
    model, inputs = make(name)
    inputs = _in_bfloat16(_padded(inputs, kind))
    model = model.bfloat16()
    plain = output(name, model, inputs)
    with doubles.installed(backend):
        integration.set_attention_backend(model, [backend, "native"])
        try:
            with anyattn.record() as calls:
                result = output(name, model, inputs)
        finally:
            integration.reset_attention_backend(model)
    truth = output(name, model.double(), in_float64(inputs))
    if name in KEY_MASKED:
        masked = [call for call in calls if call.spec.mask.key is not None]
        assert {call.chosen for call in masked} == {backend}
        codes = {conversion.code for call in masked for conversion in call.conversions}
        assert codes & {"keys_front", "keys_packed", "keys_lengths"}
    else:
        biased = {call.chosen for call in calls if call.spec.mask.dense is not None}
        assert biased == {"native"}
    # The rest of the model rounds to bf16 alike; attention adds no more than torch's own does.
    assert _error(result, truth) <= 1.5 * _error(plain, truth) + 1e-3
