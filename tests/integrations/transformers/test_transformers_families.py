"""Each family computes through anyattn what it computes with eager attention."""

from __future__ import annotations

import pytest
import torch
from transformers_families import BY_NAME, FAMILIES
from transformers_runs import BUDGET, PADDING, error, gradients, inputs_of, kept, output, switch, token_ids

import anyattn

NAMES = sorted(BY_NAME)
GENERATORS = [family.name for family in FAMILIES if family.kind in ("decoder", "seq2seq")]
DECODERS = [family.name for family in FAMILIES if family.kind == "decoder"]


def test_there_are_enough_families() -> None:
    assert len(FAMILIES) >= 25


@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_eagers_and_every_layer_called_anyattn(name: str) -> None:
    family = BY_NAME[name]
    model = family.make()
    cases = (
        [inputs_of(family, padding) for padding in PADDING] if family.inputs is None else [inputs_of(family, "none")]
    )
    with torch.no_grad():
        wanted = [output(model, *case) for case in cases]
        switch(model, family)
        for case, want in zip(cases, wanted, strict=True):
            with anyattn.record() as calls:
                got = output(model, *case)
            assert len(calls) == family.calls
            assert error(got, want) <= BUDGET


@pytest.mark.parametrize("name", [name for name in NAMES if BY_NAME[name].gradients])
@pytest.mark.parametrize("padding", ["none", "right"])
def test_gradients_equal_eagers(name: str, padding: str) -> None:
    family = BY_NAME[name]
    if family.inputs is not None and padding != "none":
        padding = "none"
    model = family.make().train()
    case = inputs_of(family, padding)
    want = gradients(model, *case)
    switch(model, family)
    got = gradients(model, *case)
    assert got.keys() == want.keys()
    largest = max(float(gradient.abs().max()) for gradient in want.values())
    assert max(float((got[key] - want[key]).abs().max()) for key in want) <= 10 * BUDGET * largest


@pytest.mark.parametrize("name", [name for name in NAMES if not BY_NAME[name].gradients])
def test_gradients_that_no_backend_has_are_refused(name: str) -> None:
    family = BY_NAME[name]
    model = family.make().train()
    switch(model, family)
    with pytest.raises(anyattn.UnsupportedCallError, match=r"backward|gradient"):
        gradients(model, *inputs_of(family, "none"))


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_generated_tokens_equal_eagers(name: str, padding: str) -> None:
    family = BY_NAME[name]
    model = family.make()
    given = {"attention_mask": kept(*PADDING[padding])} if padding != "none" else {}
    how = {"max_new_tokens": 6, "do_sample": False, **given}
    want = model.generate(token_ids(), **how)
    switch(model, family)
    with anyattn.record() as calls:
        assert torch.equal(model.generate(token_ids(), **how), want)
    assert len(calls) > family.calls
