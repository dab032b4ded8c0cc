"""Inputs made from a description are the described call's, and wrong results don't pass the gate."""

from __future__ import annotations

import pytest
import torch

import anyattn
from anyattn import masks
from anyattn.timings.keys import mask_class, sizes_of
from anyattn.tuning import gate
from anyattn.tuning.gate import error_of
from anyattn.tuning.inputs import CanNotMakeError, Inputs, make_inputs, spec_of
from anyattn.types.spec import AttentionSpec


def spec(mask: object = None, *, kv: int = 40, heads: int = 2, grad: bool = False, **options: object) -> AttentionSpec:
    q = torch.randn(2, 24, 4, 16, requires_grad=grad)
    k, v = (torch.randn(2, kv, heads, 16, requires_grad=grad) for _ in range(2))
    return anyattn.explain(q, k, v, mask, enable_gqa=heads != 4, **options).spec  # type: ignore[arg-type]


def _padding() -> torch.Tensor:
    allowed = torch.rand(2, 40) > 0.5
    allowed[:, 0], allowed[:, 1], allowed[:, 2] = True, False, True
    return allowed


CALLS = {
    "plain": lambda: spec(),
    "causal": lambda: spec(masks.Causal("lower_right")),
    "window": lambda: spec(masks.SlidingWindow(5, 2)),
    "padding": lambda: spec(masks.KeyPadding(_padding())),
    "lengths": lambda: spec(masks.KeyLengths(torch.tensor([7, 40]))),
    "boolean": lambda: spec(torch.rand(2, 1, 24, 40) > 0.3),
    "bias": lambda: spec(torch.randn(1, 4, 24, 40)),
    "joined": lambda: spec(masks.Causal("lower_right") & masks.KeyLengths(torch.tensor([7, 40]))),
    "softcap, sinks and lse": lambda: spec(softcap=3.0, sinks=torch.randn(4), return_lse=True),
    "gradients": lambda: spec(grad=True),
    "gradients, causal": lambda: spec(masks.Causal("lower_right"), grad=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_inputs_have_the_sizes_the_mask_and_the_storage_described(name: str) -> None:
    wanted = CALLS[name]()
    made = make_inputs(wanted)
    got = made.described(wanted)
    assert (sizes_of(got), mask_class(got), got.requires_grad) == (
        sizes_of(wanted),
        mask_class(wanted),
        wanted.requires_grad,
    )
    assert got.storage == wanted.storage


@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
@pytest.mark.parametrize("by_heads", [False, True])
def test_inputs_lie_in_memory_as_the_layers_own(layout: str, by_heads: bool) -> None:
    plain = spec()
    described = plain.replace(layout=layout, storage=anyattn.explain(*[torch.randn(1, 2, 3, 8)] * 3).spec.storage)
    made = make_inputs(described.replace(storage=type(described.storage)(bhsd_contiguous=by_heads)))
    assert made.query.shape == ((2, 24, 4, 16) if layout == "BSHD" else (2, 4, 24, 16))
    assert made.query.is_contiguous() == (by_heads == (layout == "BHSD"))
    assert made.query.stride(-1) == 1


def test_inputs_leave_the_generators_alone_and_repeat() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    made = [make_inputs(spec_of(_PLAIN), seed=2) for _ in range(2)]
    assert torch.equal(torch.rand(3), wanted)
    assert torch.equal(made[0].query, made[1].query)


_PLAIN = {
    **dict.fromkeys(("batch", "num_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("seqlen_q", "seqlen_kv", "head_dim", "head_dim_v"), 16),
    "dtype": "float32",
    "device_type": "cpu",
}


@pytest.mark.parametrize("name", CALLS)
def test_spec_comes_back_from_what_a_recording_holds(name: str) -> None:
    wanted = CALLS[name]()
    back = spec_of(wanted.to_dict())
    assert set(back.requires_grad) == set(wanted.requires_grad)
    assert back.replace(requires_grad=(), device_index=None) == wanted.replace(requires_grad=(), device_index=None)


def test_calls_that_can_not_be_made_say_why() -> None:
    with pytest.raises(CanNotMakeError, match="block mask"):
        make_inputs(spec(masks.from_function(lambda b, h, q, k: q >= k)))
    with pytest.raises(CanNotMakeError, match="dropout"):
        make_inputs(spec(dropout_p=0.5))
    with pytest.raises(KeyError):
        spec_of({"batch": 2})
    with pytest.raises(ValueError, match="no dtype"):
        spec_of({**_PLAIN, "dtype": "rand"})


def call(described: AttentionSpec, inputs: Inputs, backend: str = "native_math") -> object:
    with torch.set_grad_enabled(described.needs_grad):
        return anyattn.plan(described, backend=backend)(*inputs)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("largest", [1 << 26, 0], ids=["whole", "sampled"])
def test_right_result_passes_and_a_wrong_one_does_not(name: str, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "LARGEST", largest)
    described = CALLS[name]().replace(batch=2)
    inputs = make_inputs(described)
    described = inputs.described(described)
    backend = "flex" if described.softcap is not None else "native_math"
    result = call(described, inputs, backend)
    assert error_of(described, inputs, result, quantised=False) <= 1  # type: ignore[arg-type]
    result = call(described, inputs, backend)
    out = result[0] if isinstance(result, tuple) else result
    wrong = out * 1.01
    spoilt = (wrong, result[1]) if isinstance(result, tuple) else wrong
    assert error_of(described, inputs, spoilt, quantised=False) > 1  # type: ignore[arg-type]


def test_right_output_with_a_wrong_gradient_does_not_pass() -> None:
    described = spec(grad=True)
    inputs = make_inputs(described)
    for name in ("query", "key", "value"):
        given = getattr(inputs, name)
        # The value is right, and its gradient 1 % too large.
        spoilt = inputs._replace(**{name: given.detach() + 1.01 * (given - given.detach())})
        with torch.enable_grad():
            result = anyattn.attention(spoilt.query, spoilt.key, spoilt.value, enable_gqa=True)
        assert error_of(described, inputs, result, quantised=False) > 1


def test_quantised_results_have_a_looser_budget_and_still_one() -> None:
    described = spec()
    inputs = make_inputs(described)
    result = call(described, inputs)
    assert isinstance(result, torch.Tensor)
    coarse = result + 0.03 * torch.randn_like(result) * result.abs().mean()
    assert error_of(described, inputs, coarse, quantised=False) > 1
    assert error_of(described, inputs, coarse, quantised=True) <= 1
    assert error_of(described, inputs, result * 2, quantised=True) > 1


def test_result_with_a_nan_never_passes() -> None:
    described = spec()
    inputs = make_inputs(described)
    result = call(described, inputs)
    assert isinstance(result, torch.Tensor)
    result[1, -1, -1, -1] = float("nan")
    assert error_of(described, inputs, result, quantised=True) == float("inf")
