"""Model classes of every kind: no attention of theirs stays behind when a backend is set."""

from __future__ import annotations

import pytest
from diffusers_classes import CLASSES
from diffusers_tiny import make, output, stock

import anyattn
from anyattn.integrations import diffusers as integration


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_attention_of_the_class_runs_on_the_pin_and_agrees_with_float64(name):
    expected = stock(name)
    model, inputs = make(name)
    report = integration.set_attention_backend(model, "native_math")
    try:
        with anyattn.record() as made:
            result = output(name, model, inputs)
    finally:
        integration.reset_attention_backend(model)
    assert expected.calls > 0
    assert [call.chosen for call in made] == ["native_math"] * expected.calls
    assert [component.left for component in report.components] == [()]
    assert expected.agrees(result)
