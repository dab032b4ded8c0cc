"""The calls that are silently wrong or fatal in plain torch on a GPU, each through anyattn.

A trap is passed when the call is right against the float64 reference, or refused by an error of anyattn, and the device
still answers afterwards. `python tools/gpu/traps.py BACKEND DEVICE NAME...` prints a line of JSON for each.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

import anyattn
from anyattn import masks, reference
from anyattn.reference import tolerance
from anyattn.testing.laws.quantised import SHARES, format_of, rounded
from anyattn.testing.laws.unwritten import fill_free_memory

Call = dict[str, Any]


def _tensors(
    device: str, batch: int = 2, seqlen_q: int = 192, seqlen_kv: int = 256, heads: int = 4, dim: int = 64
) -> Call:
    dtype = torch.bfloat16
    return {
        "query": torch.randn(batch, seqlen_q, heads, dim, device=device, dtype=dtype),
        "key": torch.randn(batch, seqlen_kv, heads, dim, device=device, dtype=dtype),
        "value": torch.randn(batch, seqlen_kv, heads, dim, device=device, dtype=dtype),
    }


def _misaligned(device: str) -> Call:
    call = _tensors(device)
    for name in ("query", "key", "value"):
        shape = call[name].shape
        flat = torch.randn(shape.numel() + 1, device=device, dtype=torch.bfloat16)
        call[name] = flat[1:].view(shape)
    return call


def _dead_rows(device: str) -> Call:
    call = _tensors(device)
    mask = torch.rand(2, 1, 192, 256, device=device) > 0.3
    mask[0, 0, 5] = False
    return call | {"attn_mask": mask}


def _padding_of_nothing(device: str) -> Call:
    lengths = torch.tensor([0, 100], device=device)
    return _tensors(device) | {"attn_mask": masks.KeyLengths(lengths)}


def _float32_mask(device: str) -> Call:
    return _tensors(device) | {"attn_mask": torch.randn(192, 256, device=device)}


def _lowest_row(device: str) -> Call:
    bias = torch.randn(192, 256, device=device, dtype=torch.bfloat16)
    bias[5] = torch.finfo(torch.bfloat16).min
    return _tensors(device) | {"attn_mask": bias, "return_lse": True}


def _expanded(device: str) -> Call:
    call = _tensors(device, seqlen_q=65)
    for name in ("key", "value"):
        call[name] = call[name][:, :, :1].expand(-1, -1, 4, -1)
    return call


def _gradients(device: str) -> Call:
    call = _tensors(device)
    for name in ("query", "key", "value"):
        call[name].requires_grad_()
    return call | {"attn_mask": torch.rand(2, 1, 192, 256, device=device) > 0.3}


def _bias_gradient(device: str, shape: tuple[int, ...], *, frozen: bool = False, dtype: Any = torch.bfloat16) -> Call:
    """A bias that needs a gradient, whose shape's last number is S_kv; `frozen` has it need one alone."""
    call = _tensors(device, seqlen_q=128, seqlen_kv=shape[-1])
    if not frozen:
        for name in ("query", "key", "value"):
            call[name].requires_grad_()
    return call | {"attn_mask": torch.randn(shape, device=device, dtype=dtype).requires_grad_()}


def _bias_gradients() -> dict[str, Callable[[str], Call]]:
    found: dict[str, Callable[[str], Call]] = {}
    for keys in (100, 128, 130, 192, 256):
        for shape in ((2, 4, 128, keys), (1, 4, 128, keys), (2, 1, 128, keys), (2, 1, 1, keys), (128, keys)):
            said = f"gradient of a bias {shape}"
            found[said] = lambda d, shape=shape: _bias_gradient(d, shape)  # type: ignore[misc]
            found[f"{said} alone"] = lambda d, shape=shape: _bias_gradient(d, shape, frozen=True)  # type: ignore[misc]
    found["gradient of a float32 bias"] = lambda d: _bias_gradient(d, (2, 4, 128, 128), dtype=torch.float32)
    return found


def _huge_row(device: str, low: float, dtype: torch.dtype, *, half: torch.dtype = torch.bfloat16) -> Call:
    """Rows whose every bias is huge, one of them alone and one but for three keys."""
    call = _tensors(device)
    bias = torch.randn(192, 256, device=device, dtype=dtype)
    bias[5], bias[6, 3:] = low, low
    return {name: tensor.to(half) for name, tensor in call.items()} | {"attn_mask": bias}


def _added_masks(device: str, dtype: torch.dtype) -> Call:
    """Causal and padding masks of finfo.min, added to each other: -inf where both forbid."""
    low = torch.finfo(dtype).min
    causal = torch.full((192, 192), low, device=device, dtype=torch.float64).triu(1).to(dtype)
    padding = torch.zeros(2, 1, 1, 192, device=device, dtype=dtype)
    padding[0, ..., :30] = low
    return _tensors(device, seqlen_kv=192) | {"attn_mask": causal + padding}


def _block_of_one_head(device: str) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, q, kv: (kv <= q) | (h == 1), None, None, 192, 256, device=device)
    return _tensors(device) | {"attn_mask": mask}


def _wide_value(device: str) -> Call:
    call = _tensors(device)
    call["value"] = torch.randn(2, 256, 4, 128, device=device, dtype=torch.bfloat16)
    return call


def _gradients_of(device: str, dim: int, **changes: Any) -> Call:
    """Gradients over several tiles; `dim_v` and `kv_heads` are as for the query unless they are given."""
    shape = (2, 320, changes.get("kv_heads", 4))
    sizes = {"query": (2, 200, 4, dim), "key": (*shape, dim), "value": (*shape, changes.get("dim_v", dim))}
    call: Call = {"enable_gqa": "kv_heads" in changes, "is_causal": True}
    for name, size in sizes.items():
        call[name] = torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True)
    return call


def _sweep() -> dict[str, Callable[[str], Call]]:
    """Give gradients at every head dim that is a multiple of 8, with heads of their own and shared ones."""
    found: dict[str, Callable[[str], Call]] = {}
    for dim in range(8, 257, 8):
        found[f"gradients, head_dim {dim}"] = lambda d, dim=dim: _gradients_of(d, dim)  # type: ignore[misc]
        if dim % 24 == 0 or dim in (40, 80, 160):
            found[f"gradients, head_dim {dim}, shared heads"] = (  # type: ignore[misc]
                lambda d, dim=dim: _gradients_of(d, dim, kv_heads=2)
            )
    for dim, dim_v in ((64, 128), (128, 64), (96, 40), (40, 96), (192, 128)):
        found[f"gradients, head_dim {dim} and {dim_v}"] = (  # type: ignore[misc]
            lambda d, dim=dim, dim_v=dim_v: _gradients_of(d, dim, dim_v=dim_v)
        )
    return found


def _beside_unwritten(device: str, sizes: tuple[int, ...], dtype: torch.dtype, **options: Any) -> Call:
    """Make a call of B, S_q, S_kv, H, H_kv and D beside free memory, and shared memory, that holds NaN."""
    batch, seqlen_q, seqlen_kv, heads, kv_heads, dim = sizes
    call: Call = {"enable_gqa": heads != kv_heads, "return_lse": True} | options
    for name, length, count in (
        ("query", seqlen_q, heads),
        ("key", seqlen_kv, kv_heads),
        ("value", seqlen_kv, kv_heads),
    ):
        call[name] = torch.randn(batch, length, count, dim, device=device, dtype=dtype)
    fill_free_memory(torch.device(device), [call[name].nbytes for name in ("query", "key", "value")])
    return call


def _unwritten() -> dict[str, Callable[[str], Call]]:
    """Give calls whose lengths are off a kernel's tile, or whose head_dim is padded, where free memory holds NaN."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    found: dict[str, Callable[[str], Call]] = {}
    for sizes, kind, causal in (
        ((2, 33, 40, 1, 1, 96), "bf16", False),
        ((3, 33, 129, 4, 4, 128), "bf16", True),
        ((2, 7, 40, 1, 1, 40), "fp16", True),
        ((2, 1, 1, 2, 2, 64), "fp16", False),
        ((2, 63, 63, 4, 2, 64), "bf16", True),
        ((2, 129, 129, 4, 4, 128), "bf16", True),
        ((2, 193, 193, 4, 1, 80), "fp16", True),
        ((2, 129, 33, 4, 4, 64), "bf16", True),
        ((1, 127, 65, 2, 2, 96), "fp16", False),
    ):
        name = f"unwritten memory, {kind} {sizes}{', causal' if causal else ''}"
        found[name] = lambda d, s=sizes, k=kind, c=causal: _beside_unwritten(d, s, half[k], is_causal=c)  # type: ignore[misc]
    return found


def _packed_tail(device: str, same: bool = True, grad: bool = False, **options: Any) -> Call:
    """Make a packed call that holds tokens, NaN, after the last sequence, and an empty sequence."""
    lengths_q = (200, 0, 129, 300, 315)
    lengths_k = lengths_q if same else (64, 30, 200, 0, 129)
    starts_q, starts_k = (
        torch.tensor((0, *lengths), device=device).cumsum(0).int() for lengths in (lengths_q, lengths_k)
    )
    call: Call = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_q if same else starts_k}
    call |= {"max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k)} | options
    for name, lengths in (("query", lengths_q), ("key", lengths_k), ("value", lengths_k)):
        tensor = torch.randn(sum(lengths) + 2, 4, 64, device=device, dtype=torch.bfloat16)
        tensor[sum(lengths) :] = torch.nan
        call[name] = tensor.requires_grad_(grad)
    fill_free_memory(torch.device(device), [call["query"].nbytes] * 2)
    return call


TRAPS: dict[str, Callable[[str], Call]] = {
    "scale of zero": lambda d: _tensors(d) | {"scale": 0.0},
    "negative scale": lambda d: _tensors(d) | {"scale": -0.1},
    "storage off by one element": _misaligned,
    "boolean row without a key": _dead_rows,
    "batch entry without a key": _padding_of_nothing,
    "float32 mask with bf16": _float32_mask,
    "row of finfo.min": _lowest_row,
    "no query": lambda d: _tensors(d, seqlen_q=0),
    "no key": lambda d: _tensors(d, seqlen_kv=0),
    "one key": lambda d: _tensors(d, seqlen_kv=1),
    "70000 heads in all": lambda d: _tensors(d, batch=700, heads=100, seqlen_q=8, seqlen_kv=8),
    "head_dim 44": lambda d: _tensors(d, dim=44),
    "head_dim_v of another size": _wide_value,
    "expanded heads, one query in the tail": _expanded,
    "causal upper left, lengths differ": lambda d: _tensors(d) | {"is_causal": True},
    "causal lower right, lengths differ": lambda d: _tensors(d) | {"attn_mask": masks.Causal("lower_right")},
    "lower right with rows without a key": lambda d: (
        _tensors(d, 2, 256, 192) | {"attn_mask": masks.Causal("lower_right")}
    ),
    "window": lambda d: _tensors(d) | {"window": (17, 5)},
    "gradients, mask, S % 128 == 64": _gradients,
    "block mask made for one head": _block_of_one_head,
    "row of float32 finfo.min": lambda d: _huge_row(d, torch.finfo(torch.float32).min, torch.float32),
    "row of float32 finfo.min, fp16": lambda d: _huge_row(
        d, torch.finfo(torch.float32).min, torch.float32, half=torch.float16
    ),
    "row of -1e9": lambda d: _huge_row(d, -1e9, torch.float32),
    "row of -1e9, fp16": lambda d: _huge_row(d, -1e9, torch.float32, half=torch.float16),
    "row of -1e30": lambda d: _huge_row(d, -1e30, torch.bfloat16),
    "row of float32 finfo.min, log-sum-exp": lambda d: (
        _huge_row(d, torch.finfo(torch.float32).min, torch.float32) | {"return_lse": True}
    ),
    "added masks of finfo.min": lambda d: _added_masks(d, torch.bfloat16),
    "added masks of float32 finfo.min": lambda d: _added_masks(d, torch.float32),
    **_bias_gradients(),
    "captured": lambda d: _tensors(d) | {"captured": True},
    "captured, value checks on": lambda d: _tensors(d) | {"captured": True, "checked": True},
    "on another stream": lambda d: _tensors(d) | {"streamed": True},
    "on another stream, causal": lambda d: _tensors(d, 4, 1000, 1000) | {"streamed": True, "is_causal": True},
    "on another stream, long": lambda d: _tensors(d, 2, 4096, 4096) | {"streamed": True},
    "captured, mask": lambda d: _tensors(d) | {"captured": True, "attn_mask": torch.rand(192, 256, device=d) > 0.3},
    "log-sum-exp": lambda d: _tensors(d) | {"return_lse": True},
    "log-sum-exp of rows without a key": lambda d: _dead_rows(d) | {"return_lse": True},
    **_sweep(),
    **_unwritten(),
    "packed tokens after the last sequence": _packed_tail,
    "packed tokens after the last sequence, causal": lambda d: _packed_tail(d, is_causal=True),
    "packed tokens after the last sequence, lengths differ": lambda d: _packed_tail(d, same=False),
    "packed tokens after the last sequence, gradients": lambda d: _packed_tail(d, grad=True),
    "packed tokens after the last sequence, gradients, lengths differ": lambda d: _packed_tail(d, False, grad=True),
}


def _captured(call: Call, backend: str, *, checked: bool) -> Any:
    """Make a call twice on a side stream, capture it in a CUDA graph, and give what a replay gives."""
    if checked:
        os.environ["ANYATTN_CHECKS"] = "1"
        anyattn.reset()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                anyattn.attention(**call, backend=backend)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = anyattn.attention(**call, backend=backend)
        graph.replay()
        torch.cuda.synchronize()
        return result
    finally:
        if checked:
            del os.environ["ANYATTN_CHECKS"]
            anyattn.reset()


def _streamed(call: Call, backend: str) -> Any:
    """Make a call on a stream of its own, on which its inputs are still to be written, and its result is changed."""
    names = ("query", "key", "value")
    true = {name: call[name].clone() for name in names}
    anyattn.attention(**call, backend=backend)  # compiled and decided before
    for name in names:
        call[name].fill_(float("nan"))
    torch.cuda.synchronize()
    busy = torch.randn(8192, 8192, device=call["query"].device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            busy = busy @ busy
        for name in names:
            call[name].copy_(true[name])
        return anyattn.attention(**call, backend=backend).clone()


def judge(call: Call, backend: str) -> dict[str, Any]:
    """Run one call and compare it with the reference, gradients included where inputs need them."""
    if "cu_seqlens_q" in call:
        return _judge_packed(call, backend)
    captured, checked, streamed = (call.pop(name, False) for name in ("captured", "checked", "streamed"))
    try:
        if streamed:
            result = _streamed(call, backend)
            torch.cuda.synchronize()
        elif captured:
            result = _captured(call, backend, checked=checked)
        else:
            result = anyattn.attention(**call, backend=backend)
    except (anyattn.UnsupportedCallError, anyattn.BackendUnavailableError) as error:
        return {"outcome": "refused", "why": str(error)}
    out, lse = result if isinstance(result, tuple) else (result, None)
    mask = anyattn.masks.values.as_mask(call.get("attn_mask"))
    if call.get("is_causal"):
        mask = masks.Causal()
    if call.get("window"):
        mask = masks.SlidingWindow(*call["window"])
    inputs = [call[name] for name in ("query", "key", "value")]
    arguments: Any = (*inputs, mask)
    truth, true_lse = reference.attention(*arguments, scale=call.get("scale"))
    kind = format_of(backend)
    if kind:
        # As in the laws: nothing is asked where the number format itself can't hold the values.
        least = _rounding_alone(inputs, mask, call.get("scale"), kind, (truth, true_lse), lse=lse is not None)
        if least > SHARES[kind]:
            return {"outcome": "too coarse", "rounding_over_budget": least}
        worst = _quantised_excess((out, lse), (truth, true_lse), lse=lse is not None)
        return {"outcome": "right" if worst <= 1 else "WRONG", "error_over_budget": worst}
    dtype = inputs[0].dtype
    plain, plain_lse = reference.attention(*arguments, scale=call.get("scale"), dtype=dtype)
    worst = tolerance.excess(out, truth, tolerance.budget(truth, plain, dtype, over=(1, 3)))
    if lse is not None:
        allowed = tolerance.budget(true_lse, plain_lse, dtype, over=(2,))
        worst = max(worst, tolerance.excess(lse, true_lse, allowed))
    needing = [tensor for tensor in (*inputs, call.get("attn_mask")) if getattr(tensor, "requires_grad", False)]
    if needing:
        weight = torch.randn_like(out)
        grads = [torch.autograd.grad((o * weight).sum(), needing) for o in (out, truth, plain)]
        for found, true, rough in zip(*grads, strict=True):
            over = (1, 3) if found.dim() == 4 and found.shape[-1] == inputs[0].shape[-1] else (-1,)
            allowed = tolerance.budget(true.double(), rough, dtype, over=over)
            worst = max(worst, tolerance.excess(found, true.double(), allowed))
    return {"outcome": "right" if worst <= 1 else "WRONG", "error_over_budget": worst}


def _quantised_excess(found: tuple[Any, Any], true: tuple[Any, Any], *, lse: bool) -> float:
    """Give the worst norm of the error of an output, and of an lse, in multiples of a quantised kernel's budget."""
    allowed = tolerance.quantised_budget(true[0], over=(1, 3))
    worst = tolerance.norm_excess(found[0], true[0], allowed, over=(1, 3))
    if lse:
        allowed = tolerance.quantised_budget(true[1], over=(2,), is_lse=True)
        worst = max(worst, tolerance.norm_excess(found[1], true[1], allowed, over=(2,)))
    return worst


def _rounding_alone(
    inputs: list[Any], mask: Any, scale: float | None, kind: str, true: tuple[Any, Any], *, lse: bool
) -> float:
    """Give the error, in multiples of the budget, of a plain computation with inputs rounded to a number format."""
    if not all(tensor.numel() for tensor in inputs):
        return 0.0
    near, lost = rounded(*(tensor.detach().double() for tensor in inputs), kind)
    out, lse_left = reference.attention(*near, mask, scale=scale)
    factor = inputs[0].shape[-1] ** -0.5 if scale is None else scale
    return _quantised_excess((out, lse_left + factor * lost), true, lse=lse)


def _judge_packed(call: Call, backend: str) -> dict[str, Any]:
    """Compare each packed sequence with the reference of it alone, and what comes after them with zeros."""
    inputs = [call[name] for name in ("query", "key", "value")]
    try:
        out = anyattn.attention_varlen(**call, backend=backend)
    except (anyattn.UnsupportedCallError, anyattn.BackendUnavailableError) as error:
        return {"outcome": "refused", "why": str(error)}
    starts = [call[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_k")]
    mask = masks.Causal() if call.get("is_causal") else None
    pieces = []
    for rows, keys in zip(*(itertools.pairwise(ends) for ends in starts), strict=True):
        spans = (slice(*rows), slice(*keys), slice(*keys))
        pieces.append(reference.attention(*(t[None, span] for t, span in zip(inputs, spans, strict=True)), mask)[0][0])
    truth = torch.cat(pieces)
    end = len(truth)
    pairs = [(out[:end], truth)]
    left = [out[end:]]
    if inputs[0].requires_grad:
        flow = torch.randn_like(out)
        fill_free_memory(out.device, [tensor.nbytes for tensor in inputs] * 2)
        found = torch.autograd.grad(out, inputs, flow)
        true = torch.autograd.grad(truth, inputs, flow[:end].to(truth.dtype))
        for one, other, last in zip(found, true, (starts[0][-1], starts[1][-1], starts[1][-1]), strict=True):
            pairs.append((one[:last], other[:last]))
            left.append(one[last:])
    worst = max(float(((one.double() - other).norm() / other.double().norm()).detach()) for one, other in pairs)
    zeros = not any(bool((rest != 0).any()) for rest in left)
    allowed = tolerance.QUANTISED if format_of(backend) else 1e-2
    return {"outcome": "right" if worst < allowed and zeros else "WRONG", "relative_error": worst, "zeros": zeros}


def main() -> None:
    """Run traps one after the other, and print a line of JSON for each: a lost device ends the process."""
    backend, device, names = sys.argv[1], sys.argv[2], sys.argv[3:]
    for name in names:
        torch.manual_seed(0)
        try:
            found = judge(TRAPS[name](device), backend)
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises is the finding
            found = {"outcome": "RAISED", "why": f"{type(error).__name__}: {str(error)[:800]}"}
        if device == "cuda":
            torch.cuda.synchronize()
            found["context"] = bool((torch.ones(8, device=device) * 2).sum() == 16)
        print(json.dumps({"trap": name} | found), flush=True)


if __name__ == "__main__":
    main()
