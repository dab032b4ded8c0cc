"""The parts of `run.py` that run in one process, each of which prints one line of JSON."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F

import anyattn
from anyattn import environment, reference
from anyattn.reference import tolerance
from anyattn.testing.laws.quantised import format_of

CALLS: dict[str, dict[str, Any]] = {
    "flux-1024": {"q": (1, 4608, 24, 128)},
    "sd3.5L-1024": {"q": (2, 4429, 38, 64)},
    "sdxl-self-64": {"q": (2, 4096, 10, 64)},
    "sdxl-cross-64": {"q": (2, 4096, 10, 64), "kv": (2, 77, 10, 64)},
    "sd15-self-64": {"q": (2, 4096, 8, 40)},
    "vit-l-224": {"q": (64, 257, 16, 64)},
    "llama8b-prefill-8k": {"q": (1, 8192, 32, 128), "kv": (1, 8192, 8, 128), "is_causal": True, "enable_gqa": True},
    "sdxl-cross-64, padding": {"q": (2, 4096, 10, 64), "kv": (2, 77, 10, 64), "padded": 20},
    "qwen-image-1024, padding": {"q": (2, 4352, 24, 128), "padded": 100},
    "t5-xxl-512, bias": {"q": (1, 512, 64, 64), "bias": True},
}
"""Attention calls of published models, as (batch, seqlen, heads, head_dim); `padded` keys are forbidden by a mask."""


def about(device: str, backends: str) -> dict[str, Any]:
    from anyattn.selection import registry

    beside = ("diffusers", "transformers", "triton")
    machine = environment.detect().holding((*registry.distributions(), *beside), registry.modules())
    return machine.to_dict() | {"anyattn": anyattn.__version__, "device": device}


def laws(device: str, backend: str, cases: str, law: str, thin: str, keep: str, shard: str) -> dict[str, Any]:
    """Run one law, or a shard `2/8` of it.

    `keep` says what a trimmed build of a kernel has: `{"flash2": [["bfloat16"], 128]}`.
    """
    from anyattn.selection import registry
    from anyattn.testing.cases.drawing import TILED, always, drawn, space
    from anyattn.testing.laws.memory import off_tiles
    from anyattn.testing.verify import verify

    caps = registry.get(backend).declarations.get(device)
    if caps is None:
        return verify(backend, device=device, cases=0, laws=[law]).to_dict()
    whole = space(None if law == "rejected" else caps, device)
    fixed = list(always(caps, device))
    # What models call is run whole; the adversarial and the drawn cases are many, and may be thinned.
    tiled = fixed[-len(TILED) :] if device != "cpu" and fixed else []
    rest = [*fixed[: len(fixed) - len(tiled)], *drawn(int(cases), 0, whole)]
    found = [*tiled, *rest[:: int(thin)]]
    dtypes, largest = json.loads(keep).get(backend, (None, None))
    if dtypes is not None:
        found = [case for case in found if case.dtype in dtypes and max(case.head_dim, case.head_dim_v) <= largest]
        if law in ("unwritten_memory", "packed_tails"):  # these change head_dim in some cases
            found = [case for case in found if off_tiles(case, caps).head_dim <= largest]
    number, of = map(int, shard.split("/"))
    return verify(backend, device=device, cases=found[number::of], laws=[law]).to_dict()


def _inputs(device: str, shape: tuple[int, ...] = (2, 192, 4, 64)) -> list[torch.Tensor]:
    return [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3)]


def graphs(device: str, backends: str) -> dict[str, Any]:
    """Capture a call in a CUDA graph, replay it on new data, and compare."""
    found: dict[str, Any] = {}
    for name in backends.split(","):
        q, k, v = _inputs(device)
        try:
            for _ in range(3):
                anyattn.attention(q, k, v, is_causal=True, backend=name)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = anyattn.attention(q, k, v, is_causal=True, backend=name)
            for tensor in (q, k, v):
                tensor.copy_(torch.randn_like(tensor))
            graph.replay()
            torch.cuda.synchronize()
            truth = reference.attention(q, k, v, anyattn.masks.Causal())[0]
            error = float((out.double() - truth).norm() / truth.norm())
            found[name] = {"outcome": "right" if error < _allowed(name) else "WRONG", "relative_error": error}
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises is the finding
            found[name] = _raised(error)
    return found


def _allowed(backend: str) -> float:
    """Say what relative error is right here: of bf16, or of a kernel that computes in less."""
    return tolerance.QUANTISED if format_of(backend) else 1e-2


def _raised(error: Exception) -> dict[str, Any]:
    """Say whether a call was refused, or accepted and then broken."""
    chain: BaseException | None = error
    while chain is not None and not isinstance(chain, anyattn.UnsupportedCallError | anyattn.BackendUnavailableError):
        chain = chain.__cause__ or chain.__context__
    outcome = "RAISED" if chain is None else "refused"
    return {"outcome": outcome, "why": f"{type(error).__name__}: {str(error)[:500]}"}


KINDS = "causal,key lengths,mask function,function and lengths,storage,views"
"""What is traced."""


def compile(device: str, backends: str, kinds: str = KINDS) -> dict[str, Any]:
    """Trace each backend with fullgraph=True and dynamic lengths, with inductor, forward and backward."""
    found: dict[str, Any] = {}
    for name in backends.split(","):
        found[name] = {}
        for kind in kinds.split(","):
            forward = _compiled(name, device, kind, grad=False)
            found[name][kind] = {"forward": forward}
            if forward["outcome"] == "right":
                found[name][kind]["gradients"] = _compiled(name, device, kind, grad=True)
    return found


def _mask_of(kind: str, lengths: torch.Tensor) -> Any:
    if kind == "mask function":
        return anyattn.masks.frame_causal(64)
    if kind == "function and lengths":
        return anyattn.masks.frame_causal(64) & anyattn.masks.KeyLengths(lengths)
    return anyattn.masks.KeyLengths(lengths) if kind == "key lengths" else anyattn.masks.Causal()


def _off_by(elements: int, tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to where its storage is off by some elements."""
    storage = tensor.new_empty(tensor.numel() + elements)
    return storage[elements:].view(tensor.shape).copy_(tensor)


def _compiled(name: str, device: str, kind: str, *, grad: bool) -> dict[str, Any]:
    """Compile one call; what is told apart by lengths, and by where tensors start, follows one after the other."""
    torch._dynamo.reset()

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        if kind == "views":
            q, k, v = torch.stack((q, k, v), 2).unbind(2)
        return anyattn.attention(q, k, v, _mask_of(kind, lengths), backend=name)  # type: ignore[return-value]

    run = torch.compile(call, fullgraph=True, dynamic=True)
    worst = 0.0
    try:
        with torch.set_grad_enabled(grad):
            for seqlen, off in ((192, 1), (200, 0), (256, 3), (192, 8), (192, 0), (200, 5)):
                inputs = _inputs(device, (2, seqlen, 4, 64))
                if kind == "storage":
                    inputs = [_off_by(off, tensor) for tensor in inputs]
                inputs = [tensor.requires_grad_(grad) for tensor in inputs]
                lengths = torch.tensor([seqlen, seqlen - 70], device=device)
                out, truth = run(*inputs, lengths), reference.attention(*inputs, _mask_of(kind, lengths))[0]
                pairs = [(out, truth)]
                if grad:
                    flow = torch.randn_like(out)
                    ours, theirs = torch.autograd.grad(out, inputs, flow), torch.autograd.grad(truth, inputs, flow)
                    pairs += zip(ours, theirs, strict=True)
                for one, other in pairs:
                    worst = max(worst, float(((one.double() - other).norm() / other.norm()).detach()))
    except Exception as error:  # noqa: BLE001 - dynamo wraps errors in its own
        return _raised(error)
    return {"outcome": "right" if worst < _allowed(name) else "WRONG", "relative_error": worst}


PACKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "empty sequences, lengths apart": {"lengths_k": (1, 70, 0, 330, 129), "lengths_q": (200, 0, 5, 129, 300)},
    "causal": {"mask": anyattn.masks.Causal()},
    "causal lower right, lengths apart": {
        "mask": anyattn.masks.Causal("lower_right"),
        "lengths_k": (257, 70, 33, 330, 129),
    },
    "window": {"mask": anyattn.masks.SlidingWindow(60, 0)},
    "shared heads, odd head_dim": {"kv_heads": 2, "dim": 44, "mask": anyattn.masks.Causal()},
    "off by one element": {"off": 1},
}
"""Packed calls: what is asked for beside 4 heads of 64, and sequences of the same lengths."""


def packed(device: str, backends: str) -> dict[str, Any]:
    """Attend over packed sequences, and compare each with the reference, with lse and gradients where there are any."""
    with torch.enable_grad():
        return {name: {kind: _packed(name, device, **PACKED[kind]) for kind in PACKED} for name in backends.split(",")}


def _packed(
    name: str,
    device: str,
    mask: Any = None,
    lengths_q: tuple[int, ...] = (200, 1, 33, 129, 300),
    lengths_k: tuple[int, ...] | None = None,
    kv_heads: int = 4,
    dim: int = 64,
    off: int = 0,
) -> dict[str, Any]:
    both = [torch.tensor((0, *n), device=device).cumsum(0).int() for n in (lengths_q, lengths_k or lengths_q)]
    starts_q, starts_k = both if lengths_k else (both[0], both[0])
    shapes = [(int(starts_q[-1]), 4, dim), *((int(starts_k[-1]), kv_heads, dim),) * 2]
    tensors = [_off_by(off, torch.randn(shape, device=device, dtype=torch.bfloat16)) for shape in shapes]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    options: dict[str, Any] = {"attn_mask": mask, "enable_gqa": kv_heads != 4, "backend": name}

    def call(**more: Any) -> Any:
        most = max(lengths_q), max(lengths_k or lengths_q)
        return anyattn.attention_varlen(*tensors, starts_q, starts_k, *most, **options, **more)

    try:
        graded = _unless_refused(call)
        with torch.no_grad(), anyattn.record() as calls:
            out, with_lse = call(), _unless_refused(call, return_lse=True)
        out = out if graded is None else graded
        ends = zip(*(itertools.pairwise(starts.tolist()) for starts in (starts_q, starts_k)), strict=True)
        each = [
            reference.attention(*(t[None, slice(*r)] for t, r in zip(tensors, (q, k, k), strict=True)), mask)
            for q, k in ends
        ]
        truth = torch.cat([found[0] for found, _ in each])
        pairs = [(out, truth)]
        if graded is not None:
            flow = torch.randn_like(out)
            pairs += zip(*(torch.autograd.grad(o, tensors, flow.to(o.dtype)) for o in (out, truth)), strict=True)
        worst = max(float(((one.double() - other).norm() / other.norm()).detach()) for one, other in pairs)
        if with_lse is not None:
            true = torch.cat([lse[0] for _, lse in each], -1)
            if format_of(name):
                allowed = tolerance.quantised_budget(true, over=(0, 1), is_lse=True)
                far = tolerance.norm_excess(with_lse[1], true, allowed, over=(0, 1)) > 1
            else:
                apart = torch.where(true.isneginf() & (with_lse[1] == true), 0.0, (with_lse[1] - true).abs())
                far = not bool((apart < 1e-2).all())
            worst = float("inf") if far else worst
    except Exception as error:  # noqa: BLE001 - whatever a kernel raises is the finding
        return _raised(error)
    outcome = "right" if worst < _allowed(name) else "WRONG"
    padded = "unpacked" in {note.code for note in calls[0].conversions}
    shown = {"gradients": graded is not None, "lse": with_lse is not None, "padded": padded}
    return {"outcome": outcome, "relative_error": worst} | shown


def _unless_refused(call: Callable[..., Any], **options: Any) -> Any:
    try:
        return call(**options)
    except (anyattn.UnsupportedCallError, anyattn.BackendUnavailableError):
        return None


def devices(device: str, backends: str) -> dict[str, Any]:
    """Give masks on two devices, alike and unlike, from threads and with either as the current one, and compare."""
    if torch.cuda.device_count() < 2:
        return {"outcome": "not run", "why": "one device"}
    found: dict[str, Any] = {}
    for name in backends.split(","):
        generator = torch.Generator().manual_seed(3)
        keep = torch.rand(2, 192, generator=generator) < 0.6
        # The same values, other values, and one on each device at a time.
        masks = [anyattn.masks.KeyPadding((keep if turn < 2 else ~keep).to(f"cuda:{turn % 2}")) for turn in range(4)]

        def once(turn: int, masks: Any = masks, name: str = name) -> float:
            where = turn % 2
            with torch.cuda.device((turn // 4) % 2):
                q, k, v = (tensor.to(f"cuda:{where}") for tensor in _inputs("cpu"))
                out = anyattn.attention(q, k, v, masks[turn % 4], backend=name)
                truth = reference.attention(q, k, v, masks[turn % 4])[0]
                return float((out.double() - truth).norm() / truth.norm())

        try:
            with ThreadPoolExecutor(4) as pool:
                worst = max([once(turn) for turn in range(8)] + list(pool.map(once, range(32))))
            masks[1].key.logical_not_()
            worst = max([worst, *(once(turn) for turn in range(8))])
        except Exception as error:  # noqa: BLE001 - whatever a kernel raises is the finding
            found[name] = _raised(error)
            continue
        found[name] = {"outcome": "right" if worst < _allowed(name) else "WRONG", "relative_error": worst}
    return found


def _median_ms(runs: dict[str, Any], rounds: int = 30) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(5):
            run()
    for _ in range(rounds):
        for name, run in runs.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(5):
                run()
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / 5 * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def _mask(call: dict[str, Any], device: str) -> torch.Tensor | None:
    batch, seqlen, heads, _ = call["q"]
    seqlen_kv = call.get("kv", call["q"])[1]
    if call.get("bias"):
        return torch.randn(1, heads, seqlen, seqlen_kv, device=device, dtype=torch.bfloat16)
    if "padded" not in call:
        return None
    mask = torch.ones(batch, 1, 1, seqlen_kv, device=device, dtype=torch.bool)
    mask[..., -call["padded"] :] = False
    return mask


def speed(device: str, backends: str) -> dict[str, Any]:
    """Time calls of real models: anyattn's native against SDPA by hand, and each kernel, interleaved in one run."""
    found: dict[str, Any] = {}
    for name, call in CALLS.items():
        q = torch.randn(call["q"], device=device, dtype=torch.bfloat16)
        k, v = (torch.randn(call.get("kv", call["q"]), device=device, dtype=torch.bfloat16) for _ in range(2))
        flags = {key: call[key] for key in ("is_causal", "enable_gqa") if key in call}
        flags["attn_mask"] = _mask(call, device)

        def by_hand(q: Any = q, k: Any = k, v: Any = v, flags: Any = flags) -> Any:
            return F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **flags
            ).transpose(1, 2)

        runs: dict[str, Any] = {"by hand": by_hand}
        raised: dict[str, Any] = {}
        for backend in backends.split(","):

            def attend(q: Any = q, k: Any = k, v: Any = v, flags: Any = flags, backend: str = backend) -> Any:
                return anyattn.attention(q, k, v, **flags, backend=backend)

            try:
                attend()
            except Exception as error:  # noqa: BLE001 - whatever a kernel raises is the finding
                raised[backend] = _raised(error)
            else:
                runs[backend] = attend
        found[name] = {"ms": _median_ms(runs)} | raised
    return found


PARTS = {
    "about": about,
    "laws": laws,
    "graphs": graphs,
    "compile": compile,
    "packed": packed,
    "devices": devices,
    "speed": speed,
}

if __name__ == "__main__":
    with torch.no_grad() if sys.argv[1] != "laws" else torch.enable_grad():
        print(json.dumps(PARTS[sys.argv[1]](*sys.argv[2:])))
