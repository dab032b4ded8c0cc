"""What Diffusers' dispatcher does silently wrong with third-party kernels, on every adapter that has a contract double.

Each comment says what its dispatcher does. Each call is right or refused with a reason; where the declaration says that
the kernel can do such calls, at least one of each kind must run. A double proves the adapter, never the kernel.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator

import pytest
import torch
from doors_to_backends import padding, triangle, truth
from doors_to_kernels import DIFFUSERS_NAMES, DOORS, Kernel, behind

import anyattn
import doubles
from anyattn import masks
from anyattn.selection.registry import canonical

LENGTHS = ((6, 6), (5, 9), (9, 5), (1, 9), (9, 1), (128, 128), (128, 256))
WHERE = ("right", "left", "hole")

pytestmark = pytest.mark.filterwarnings("ignore:Inside attention_backend:anyattn.errors.AnyattnWarning")


@pytest.fixture(params=DOORS, ids=lambda door: f"{door[0]}-{door[1]}")
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    door, name = request.param
    if door == "diffusers":
        request.getfixturevalue("enabled")
    with behind(door, name) as found:
        yield found


def test_every_double_and_every_name_of_diffusers_is_tested_here() -> None:
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch", reason="needs anyattn[diffusers]")
    found = {member.value for member in dispatch.AttentionBackendName} - {"anyattn"}
    assert found == set(DIFFUSERS_NAMES)
    assert all(canonical(name) is not None for name in DIFFUSERS_NAMES)
    assert {name for door, name in DOORS if door == "call"} == set(doubles.DOUBLES)
    through = {canonical(name) for door, name in DOORS if door == "diffusers"}
    assert through == set(doubles.DOUBLES) & {canonical(name) for name in DIFFUSERS_NAMES}


# S6: dropout_p is no parameter of eleven of its backends, and is lost.
def test_dropout_is_honoured_or_refused(kernel: Kernel) -> None:
    q, k, v = kernel.plain()
    if not kernel.caps.dropout:
        with pytest.raises(anyattn.UnsupportedCallError, match="dropout"):
            kernel.attend(q, k, v, dropout_p=0.5)
        return
    assert kernel.tells_apart(kernel.attend(q, k, v, dropout_p=0.5).double(), truth(q, k, v))
    out = kernel.unless_refused(q, k, v, dropout_p=1.0)
    assert out is None or not out.any()


def _shaped() -> Iterator[torch.Tensor]:
    allowed = torch.rand(2, 4, 6, 9) > 0.4
    allowed[..., 0] = True
    yield allowed[:, :1]
    yield allowed[:1]
    yield allowed[:, :, :1]
    dead = allowed.clone()
    dead[1, :, 2] = False
    yield dead
    yield triangle(6, 9, 2)[None, None]


# S9: its packing backends take a key for allowed where any row of any head may see it: full attention, mostly.
def test_mask_of_rows_and_heads_is_never_reduced_to_one_of_keys(kernel: Kernel) -> None:
    q, k, v = kernel.inputs()
    ran = []
    for mask in _shaped():
        wanted = truth(q, k, v, mask)
        assert kernel.tells_apart(wanted, truth(q, k, v, mask.any(-2, keepdim=True).any(-3, keepdim=True)))
        ran.append(kernel.is_right(wanted, q, k, v, mask))
    assert any(ran) == kernel.caps.boolean


# S10: its packing backends count the allowed keys of an entry and take that many from the start.
def test_padding_takes_the_keys_that_are_marked(kernel: Kernel) -> None:
    ran = []
    for where, seqlen_q in itertools.product(WHERE, (6, 9)):
        q, k, v = kernel.inputs(seqlen_q)
        keep = padding(2, 9, where)
        counted = torch.arange(9) < keep.sum(-1, keepdim=True)
        wanted, of_lengths = truth(q, k, v, keep[:, None, None]), truth(q, k, v, counted[:, None, None])
        assert kernel.tells_apart(wanted, of_lengths) == (where != "right")
        ran.append(kernel.is_right(wanted, q, k, v, masks.KeyPadding(keep)))
        ran.append(kernel.is_right(wanted, q, k, v, keep[:, None, None]))
        ran.append(kernel.is_right(of_lengths, q, k, v, masks.KeyLengths(keep.sum(-1))))
    assert any(ran) == kernel.takes_padding


# S11: its xformers turns a boolean mask into the query's dtype and adds it: +1 where allowed, 0 where forbidden.
def test_boolean_mask_is_never_taken_for_numbers(kernel: Kernel) -> None:
    ran = []
    for seqlen_kv in (9, 16):
        q, k, v = kernel.inputs(6, seqlen_kv)
        mask = torch.rand(2, 1, 6, seqlen_kv) > 0.4
        mask[..., 0] = True
        wanted = truth(q, k, v, mask)
        assert kernel.tells_apart(wanted, truth(q, k, v, bias=mask))
        ran.append(kernel.is_right(wanted, q, k, v, mask))
    assert any(ran) == kernel.caps.boolean


# S12: its NPU path has no is_causal; S15: ten of its backends align causal at the end, torch at the beginning.
def test_causal_has_one_meaning_with_every_kernel(kernel: Kernel) -> None:
    ran = []
    for seqlen_q, seqlen_kv in LENGTHS:
        q, k, v = kernel.inputs(seqlen_q, seqlen_kv)
        upper = truth(q, k, v, triangle(seqlen_q, seqlen_kv))
        lower = truth(q, k, v, triangle(seqlen_q, seqlen_kv, seqlen_kv - seqlen_q))
        assert kernel.tells_apart(upper, lower) == (seqlen_q != seqlen_kv)
        ran.append(kernel.is_right(upper, q, k, v, is_causal=True))
        ran.append(kernel.is_right(upper, q, k, v, masks.Causal("upper_left")))
        ran.append(kernel.is_right(lower, q, k, v, masks.Causal("lower_right")))
    assert any(ran) == bool(kernel.caps.causal or kernel.caps.window or kernel.caps.boolean)


# S13: its NPU path turns an additive mask into booleans and inverts it; one of zeros forbids everything.
def test_additive_mask_keeps_its_sign(kernel: Kernel) -> None:
    q, k, v = kernel.inputs()
    keep = padding(2, 9, "right")[:, None, None]
    ran = []
    for low in (-1e4, float("-inf")):
        additive = torch.zeros(2, 1, 1, 9, dtype=kernel.dtype).masked_fill(~keep, low)
        ran.append(kernel.is_right(truth(q, k, v, keep), q, k, v, additive))
    ran.append(kernel.is_right(truth(q, k, v), q, k, v, torch.zeros(2, 1, 1, 9, dtype=kernel.dtype)))
    bias = torch.randn(2, 4, 6, 9).to(kernel.dtype)
    ran.append(kernel.is_right(truth(q, k, v, bias=bias), q, k, v, bias))
    # Of zeros alone a kernel without masks can be told nothing, and is right.
    assert kernel.caps.bias == (ran[0] or ran[1] or ran[3])


OF_ONE_SCALE = ("sage_blackwell_hub",)
"""Backends whose kernel has no scale: it takes 1 / sqrt(D), and another one is refused."""


# S14: its XLA path has no scale, and takes 1 / sqrt(D) whatever is asked for.
def test_scale_is_honoured_or_refused(kernel: Kernel) -> None:
    q, k, v = kernel.plain()
    if kernel.backend.name in OF_ONE_SCALE:
        kernel.assert_right(kernel.attend(q, k, v, scale=64**-0.5), truth(q, k, v))
        for scale in (0.02, 0.25, 0.0, -0.3):
            with pytest.raises(anyattn.UnsupportedCallError, match="- scale: needs scale=None"):
                kernel.attend(q, k, v, scale=scale)
        return
    # A sharper softmax makes of a quantised kernel's rounding what no tolerance can tell from a mistake.
    for scale in (0.02, 0.4, 1.0) if kernel.caps.exact else (0.02, 0.25):
        wanted = truth(q, k, v, scale=scale)
        assert kernel.tells_apart(wanted, truth(q, k, v))
        kernel.assert_right(kernel.attend(q, k, v, scale=scale), wanted)
    for scale in (0.0, -0.3):
        ran = kernel.is_right(truth(q, k, v, scale=scale), q, k, v, scale=scale)
        assert ran == kernel.caps.scale_any


# S16: its packing backends align causal to the length that is left once the padding is out.
def test_causal_beside_padding_is_aligned_to_the_whole_length(kernel: Kernel) -> None:
    for where, (align, shift) in itertools.product(WHERE, (("upper_left", 0), ("lower_right", 2))):
        q, k, v = kernel.inputs(7)
        keep = padding(2, 9, where)
        causal = triangle(7, 9, shift)
        mask = masks.KeyPadding(keep) & masks.Causal(align)  # type: ignore[arg-type]
        ran = kernel.is_right(truth(q, k, v, causal & keep[:, None, None]), q, k, v, mask)
        assert ran or not kernel.caps.boolean


# S17: flash-attn's window vanishes on sixteen of its backends.
def test_window_is_honoured_or_refused(kernel: Kernel) -> None:
    q, k, v = kernel.inputs(9)
    rows, columns = torch.arange(9)[:, None], torch.arange(9)
    ran = []
    for left, right in ((2, 1), (3, 0), (0, 2), (-1, 3)):
        allowed = (columns <= rows + right) & ((left == -1) | (columns >= rows - left))
        wanted = truth(q, k, v, allowed)
        assert kernel.tells_apart(wanted, truth(q, k, v))
        ran.append(kernel.is_right(wanted, q, k, v, window=(left, right)))
    assert any(ran) == bool(kernel.caps.window or kernel.caps.boolean)


# S18: no log-sum-exp, None, another layout, or a crash; with two entries `out, lse =` unpacks the batch.
def test_lse_has_one_layout_or_is_refused(kernel: Kernel) -> None:
    q, k, v = kernel.inputs()
    for mask, allowed in ((None, None), (masks.KeyPadding(keep := padding(2, 9, "hole")), keep[:, None, None])):
        if not kernel.caps.lse:
            with pytest.raises(anyattn.UnsupportedCallError, match="lse"):
                kernel.attend(q, k, v, mask, return_lse=True)
            continue
        result = kernel.unless_refused(q, k, v, mask, return_lse=True)
        if result is None:
            assert mask is not None
            continue
        out, lse = result
        kernel.assert_right(out, truth(q, k, v, allowed))
        scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 8
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
        assert lse.dtype == torch.float32
        kernel.assert_right(lse, scores.logsumexp(-1))


# S29: its context-parallel cuDNN adds a boolean mask as numbers; others know nothing of it, and see their shard alone.
def test_sharded_call_is_refused(kernel: Kernel) -> None:
    q, k, v = kernel.inputs()
    if kernel.door == "call":
        with pytest.raises(TypeError, match="parallel_config"):
            kernel.attend(q, k, v, parallel_config=object())
        return
    with pytest.raises(anyattn.InvalidCallError, match="Context parallelism"):
        kernel.attend(q, k, v, parallel_config=object())


# S30: forward-only kernels give an output without a gradient, and training goes on without this layer.
def test_output_has_right_gradients_or_the_call_is_refused(kernel: Kernel) -> None:
    kernel = kernel.in_training()
    q, k, v = kernel.inputs(9, requires_grad=True)
    if not kernel.caps.backward:
        with pytest.raises(anyattn.UnsupportedCallError, match="gradients"):
            kernel.attend(q, k, v)
        return
    keep = padding(2, 9, "hole")
    patterns = ((None, None), (masks.Causal(), triangle(9, 9)))
    for mask, allowed in (*patterns, (masks.KeyPadding(keep), keep[:, None, None])):
        out = kernel.unless_refused(q, k, v, mask)
        if out is None:
            assert mask is not None
            continue
        upstream = torch.randn_like(out)
        found = torch.autograd.grad(out, (q, k, v), upstream)
        wanted = torch.autograd.grad(truth(q, k, v, allowed), (q, k, v), upstream.double())
        for one, other in zip(found, wanted, strict=True):
            kernel.assert_right(one, other.double())


# S31, and a crash of its own: it caches the lengths of packed sequences for the process. Born in a CUDA graph they hold
# nothing yet; born under inference_mode they break the next backward.
def test_lengths_of_one_mask_are_never_anothers(kernel: Kernel) -> None:
    q, k, v = kernel.inputs()
    if not kernel.takes_padding:
        assert not kernel.is_right(truth(q, k, v), q, k, v, masks.KeyPadding(padding(2, 9, "hole")))
        return
    for where in (*WHERE, *reversed(WHERE)):
        keep = padding(2, 9, where)
        kernel.assert_right(kernel.attend(q, k, v, masks.KeyPadding(keep)), truth(q, k, v, keep[:, None, None]))
    keep = padding(2, 9, "right")
    mask = masks.KeyPadding(keep)
    for where in WHERE:  # as a CUDA graph's replay finds new values in the tensors that were captured
        keep.copy_(padding(2, 9, where))
        kernel.assert_right(kernel.attend(q, k, v, mask), truth(q, k, v, keep[:, None, None]))


@pytest.mark.parametrize("kept", [True, False], ids=["the same mask", "a new mask"])
def test_validation_in_inference_mode_spoils_no_training_step(kernel: Kernel, kept: bool) -> None:
    kernel = kernel.in_training()
    keep = padding(2, 9, "hole")
    mask = masks.KeyPadding(keep)
    inputs = kernel.inputs()
    if not kernel.takes_padding:
        assert not kernel.is_right(truth(*inputs), *inputs, mask)
        return
    wanted = truth(*inputs, keep[:, None, None])
    with torch.inference_mode():
        kernel.assert_right(kernel.attend(*inputs, mask), wanted)
    mask = mask if kept else masks.KeyPadding(keep.clone())
    for tensor in inputs:
        tensor.requires_grad_(kernel.caps.backward)
    out = kernel.attend(*inputs, mask)
    kernel.assert_right(out, wanted)
    if kernel.caps.backward:
        out.sum().backward()
        assert inputs[0].grad is not None


# Its packing backends end in a data-dependent guard.
def test_compiled_call_with_padding_is_one_graph_or_refused(kernel: Kernel) -> None:
    torch._dynamo.reset()
    q, k, v = kernel.inputs()
    keep = padding(2, 9, "hole")
    name = kernel.backend.name
    run = torch.compile(
        lambda q, k, v, keep: anyattn.attention(q, k, v, masks.KeyPadding(keep), backend=name),
        fullgraph=True,
        backend="aot_eager",
    )
    admits = anyattn.explain(q, k, v, masks.KeyPadding(keep), backend=name).chosen == name
    if kernel.caps.compile and admits:
        kernel.assert_right(run(q, k, v, keep), truth(q, k, v, keep[:, None, None]))
    else:
        # Refused, or a thing that torch.compile says it can't trace; never a wrong answer.
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            run(q, k, v, keep)
    torch._dynamo.reset()


# Its checks warn at every call, of arguments that nobody gave.
def test_checks_say_nothing_of_a_right_call(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERS_ATTN_CHECKS", "1")
    anyattn.reset()
    q, k, v = kernel.plain()
    kernel.attend(q, k, v)  # where a call names a backend inside a block, that is said once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel.assert_right(kernel.attend(q, k, v), truth(q, k, v))


# The variable skips its checks: a name is called as None, or lost, at the first attention.
def test_variable_reaches_the_kernel(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", kernel.name)
    anyattn.reset()
    q, k, v = kernel.plain()
    with anyattn.record() as calls:
        kernel.assert_right(anyattn.attention(q, k, v), truth(q, k, v))
    assert [decision.chosen for decision in calls] == [kernel.backend.name]
