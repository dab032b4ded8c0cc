"""The choice of cases: drawn from a backend's declaration, and a fixed list of adversarial ones that always run."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from anyattn.backend.capabilities import Capabilities
from anyattn.testing.cases.case import DTYPES, Case
from anyattn.testing.cases.recipes import DATA, STRIDES

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

LENGTHS: tuple[int, ...] = (1, 2, 3, 7, 8, 13, 16, 24, 31, 37, 40, 64, 67)
LONG: tuple[int, ...] = (96, 128, 129, 191, 256, 257, 320, 515)
"""Lengths besides, on accelerators: their kernels work in tiles of 64 to 256 positions, and go wrong at their edges."""

HEAD_DIMS: tuple[int, ...] = (8, 16, 32, 40, 44, 64, 72, 80, 96, 128, 160)
WIDE: tuple[int, ...] = (192, 256)
"""Head dims besides, on accelerators."""

PATTERNS: tuple[str, ...] = (
    "causal",
    "causal:lower_right",
    "window:3:0",
    "window:0:0",
    "window:0:4:lower_right",
    "window:2:2",
    "window:-1:2:lower_right",
    "window:4:-1",
)
KEYS: tuple[str, ...] = ("padding:left", "padding:right", "padding:scattered", "padding:dead", "lengths")
BOOLEANS: tuple[str, ...] = ("boolean:qk", "boolean:bhqk", "boolean:hk", "boolean:bqk:dead", "boolean:bk")
BIASES: tuple[str, ...] = ("bias:qk:own", "bias:bhqk:own:inf", "bias:hqk:own", "bias:bqk:own:dead", "bias:hqk:own:min")
BIASES_FLOAT32: tuple[str, ...] = ("bias:qk:float32", "bias:bhqk:float32:min", "bias:hqk:float32:dead")
JOINED: tuple[str, ...] = (
    "causal & padding:left",
    "causal:lower_right & padding:right",
    "window:3:3 & boolean:qk",
    "padding:scattered & boolean:hqk",
)
FUNCTIONS: tuple[str, ...] = (
    "document",
    "document & causal",
    "document:shared & padding:left",
    "prefix",
    "prefix:int & window:9:9",
    "frames:4",
    "frames:3 & lengths",
    "function:heads",
    "function:dead",
    "frames:4 & boolean:hqk",
)

Space = Mapping[str, tuple[Any, ...]]
"""For each field of a case, the values that it may take; one that stands twice is twice as likely."""


def space(caps: Capabilities | None, device: str = "cpu") -> Space:
    """Return the fields that a declaration admits; None is everything, to find out what is refused."""
    every = caps is None
    dtypes = tuple(name for name, dtype in DTYPES.items() if caps is None or dtype in caps.dtypes)
    largest, multiple = (1 << 20, 1) if caps is None else (caps.head_dim_max, caps.head_dim_multiple)
    lengths, every_dim = (LENGTHS, HEAD_DIMS) if device == "cpu" else (LENGTHS + LONG, HEAD_DIMS + WIDE)
    dims = tuple(dim for dim in every_dim if dim <= largest and dim % multiple == 0)
    masks = ["none"] * 4
    if caps is None or caps.boolean or caps.causal or caps.window:
        masks += [*PATTERNS]
    if caps is None or caps.boolean or caps.key_mask:
        masks += [*KEYS]
    if caps is None or caps.boolean:
        masks += [*BOOLEANS, *JOINED]
    if caps is None or caps.bias:
        masks += [*BIASES, "causal & bias:bqk:own", "padding:left & bias:hqk:own"]
    if caps is None or (caps.bias and caps.bias_float32):
        masks += [*BIASES_FLOAT32]
    if caps is None or caps.block:
        masks += ["block:causal", "block:heads"]
    if caps is None or caps.block or caps.boolean:
        masks += [*FUNCTIONS]
    if caps is not None and not caps.dead_rows:
        masks = [mask for mask in masks if "dead" not in mask]
    pairs = [(2, 2), (1, 1), (3, 3)] + ([(4, 2), (3, 1), (6, 3)] if every or caps.gqa else [])  # type: ignore[union-attr]
    grads = ["", ""] + (["qkv", "q", "kv"] if every or caps.backward else [])  # type: ignore[union-attr]
    grads += ["qkvm"] if every or (caps.backward and caps.mask_grad) else []  # type: ignore[union-attr]
    return {
        "batch": (1, 2, 3),
        "seqlen_q": lengths,
        "seqlen_kv": lengths,
        "same": (True, False),
        "pair": tuple(pairs),
        "head_dim": dims,
        "head_dim_v": (0, 0, *dims[:3]) if every or caps.head_dim_v else (0,),  # type: ignore[union-attr]
        "dtype": dtypes,
        "device": (device,),
        "layout": ("BSHD", "BHSD"),
        "mask": tuple(masks),
        "scale": (None, None, 0.5, 2.0) + ((-0.7, 0.0) if every or caps.scale_any else ()),  # type: ignore[union-attr]
        "softcap": (None, None, 5.0) if every or caps.softcap else (None,),  # type: ignore[union-attr]
        "sinks": (False, False, True) if every or caps.sinks or caps.lse else (False,),  # type: ignore[union-attr]
        "lse": (False, True) if every or caps.lse else (False,),  # type: ignore[union-attr]
        "grad": tuple(grads),
        "data": ("normal", *DATA),
        "strides": ("plain", *STRIDES),
        "seed": tuple(range(100)),
    }


def fit(fields: Mapping[str, Any]) -> Case:
    """Make a case of one value per field, with what contradicts itself set right."""
    chosen = dict(fields)
    heads, kv_heads = chosen.pop("pair")
    if chosen.pop("same") or chosen["strides"] == "packed":
        chosen["seqlen_kv"] = chosen["seqlen_q"]
    if chosen["strides"] == "packed":
        kv_heads, chosen["head_dim_v"] = heads, 0
    if chosen["dtype"] == "float64" and chosen["data"] == "constant":
        # The errors of float64 are taken from float32's, and those of constants are nothing alike.
        chosen["data"] = "normal"
    if "document" in chosen["mask"]:
        chosen["seqlen_q"] = chosen["seqlen_kv"]
    if "bias" not in chosen["mask"]:
        chosen["grad"] = chosen["grad"].replace("m", "")
    return Case(heads=heads, kv_heads=kv_heads, **chosen)


def draw(rng: random.Random, fields: Space) -> Case:
    """Draw one case."""
    return fit({name: rng.choice(options) for name, options in fields.items()})


def drawn(count: int, seed: int, fields: Space) -> Iterator[Case]:
    """Draw cases, the same ones for the same seed."""
    rng = random.Random(seed)
    return (draw(rng, fields) for _ in range(count))


def strategy(caps: Capabilities | None, device: str = "cpu") -> SearchStrategy[Case]:
    """Return a hypothesis strategy over a declaration's cases; failures shrink to the plainest values."""
    from hypothesis import strategies as st

    parts = {name: st.sampled_from(options) for name, options in space(caps, device).items()}
    return st.fixed_dictionaries(parts).map(fit)


ADVERSARIAL: tuple[Case, ...] = (
    Case(),
    Case(seqlen_q=1, seqlen_kv=1),
    Case(seqlen_q=1, seqlen_kv=37, mask="causal"),
    Case(seqlen_q=1, seqlen_kv=37, mask="causal:lower_right", grad="qkv"),
    Case(seqlen_q=37, seqlen_kv=1),
    Case(seqlen_q=31, seqlen_kv=13, mask="causal:lower_right", lse=True),
    Case(seqlen_q=13, seqlen_kv=31, mask="causal", layout="BHSD", lse=True),
    Case(seqlen_q=24, seqlen_kv=24, data="large", head_dim=64),
    Case(seqlen_q=24, seqlen_kv=40, data="large", mask="causal:lower_right", grad="qkv"),
    Case(seqlen_q=33, seqlen_kv=64, data="unequal", lse=True, head_dim=40),
    Case(seqlen_q=16, seqlen_kv=64, data="unequal", grad="qkv"),
    Case(seqlen_q=17, seqlen_kv=17, data="constant"),
    Case(seqlen_q=17, seqlen_kv=19, data="shifted", lse=True),
    Case(data="zeros", seqlen_kv=11, lse=True),
    Case(seqlen_q=19, seqlen_kv=23, mask="padding:left", lse=True),
    Case(seqlen_q=19, seqlen_kv=23, mask="padding:right", grad="qkv"),
    Case(seqlen_q=19, seqlen_kv=23, mask="padding:scattered", head_dim=44),
    Case(seqlen_q=19, seqlen_kv=23, mask="padding:dead", lse=True),
    Case(seqlen_q=19, seqlen_kv=23, mask="padding:dead", grad="qkv"),
    Case(seqlen_q=12, seqlen_kv=12, mask="padding:left"),
    Case(batch=7, mask="padding:scattered"),
    Case(mask="lengths", seqlen_kv=40),
    Case(mask="lengths:dead", seqlen_kv=24, lse=True),
    Case(mask="boolean:qk:dead", grad="qkv", seqlen_q=11, seqlen_kv=8),
    Case(mask="boolean:bhqk", layout="BHSD", lse=True),
    Case(mask="bias:bhqk:own", grad="qkvm", seqlen_q=9, seqlen_kv=13),
    Case(mask="bias:hqk:own:inf", lse=True),
    Case(mask="bias:qk:own:min", lse=True),
    Case(mask="bias:bqk:own:dead", grad="qkv", lse=True),
    Case(mask="bias:qk:float32", dtype="bfloat16"),
    Case(mask="bias:bhqk:float32:min", dtype="float16"),
    Case(mask="causal & padding:left", seqlen_q=21, seqlen_kv=21, lse=True),
    Case(mask="causal & bias:bqk:own", seqlen_q=21, seqlen_kv=21, grad="qkv"),
    Case(mask="window:0:0", seqlen_q=9, seqlen_kv=5),
    Case(mask="window:3:0", seqlen_q=29, seqlen_kv=29),
    Case(mask="window:0:3:lower_right", seqlen_q=13, seqlen_kv=29),
    Case(mask="window:-1:2", seqlen_q=29, seqlen_kv=13, lse=True),
    Case(mask="window:4:-1:lower_right", seqlen_q=29, seqlen_kv=13),
    Case(scale=0.0, lse=True),
    Case(scale=-0.7, seqlen_kv=13, grad="qkv"),
    Case(scale=-0.7, mask="causal", layout="BHSD"),
    Case(heads=4, kv_heads=2, mask="causal", grad="qkv"),
    Case(heads=6, kv_heads=1, lse=True, seqlen_kv=11),
    Case(heads=6, kv_heads=3, strides="expanded_heads", seqlen_q=65),
    Case(head_dim=8),
    Case(head_dim=72, strides="packed", seqlen_q=16, seqlen_kv=16),
    Case(head_dim=80, strides="packed", mask="causal", grad="qkv"),
    Case(head_dim=96, head_dim_v=40),
    Case(head_dim=160, lse=True),
    Case(strides="transposed", grad="qkv"),
    Case(strides="offset", head_dim=64, mask="causal"),
    Case(strides="strided", head_dim=40, lse=True),
    Case(strides="gapped", layout="BHSD", mask="padding:left"),
    Case(strides="expanded_heads", seqlen_q=33, seqlen_kv=33),
    Case(strides="expanded_batch", batch=3, layout="BHSD"),
    Case(softcap=3.0, data="large", lse=True),
    Case(softcap=3.0, mask="causal & bias:hqk:own"),
    Case(sinks=True, lse=True, seqlen_kv=11),
    Case(sinks=True, mask="padding:dead", lse=True),
    Case(mask="block:causal", seqlen_q=40, seqlen_kv=24),
    Case(mask="block:heads", heads=4, kv_heads=4, seqlen_q=13, seqlen_kv=29),
    Case(mask="document", seqlen_q=37, seqlen_kv=37, grad="qkv"),
    Case(mask="document & causal", seqlen_q=40, seqlen_kv=40, batch=3, lse=True, layout="BHSD"),
    Case(mask="prefix", seqlen_q=29, seqlen_kv=29, grad="qkv"),
    Case(mask="prefix & causal:lower_right", seqlen_q=13, seqlen_kv=29, lse=True),
    Case(mask="frames:4", seqlen_q=26, seqlen_kv=26, lse=True),
    Case(mask="frames:4 & bias:hqk:own:inf", seqlen_q=24, seqlen_kv=24, grad="qkv"),
    Case(mask="function:heads", heads=4, kv_heads=2, seqlen_q=13, seqlen_kv=29),
    Case(mask="function:dead", seqlen_q=19, seqlen_kv=19, lse=True),
)
"""What has broken kernels before: odd lengths, dead rows, odd storage, scales not above 0, saturated softmax."""


def _tiled() -> tuple[Case, ...]:
    """Return every head dim that models have beside every kind of mask that they call, over several tiles."""
    found = []
    for row, dim in enumerate((40, 64, 72, 80, 96, 128, 160, 256)):
        for column, mask in enumerate(_CALLED):
            number = row * len(_CALLED) + column
            case = Case(
                seqlen_q=(200, 129, 320)[(row + column) % 3],
                seqlen_kv=(257, 320, 129)[(row + column) % 3] if "window" not in mask else 320,
                heads=4,
                kv_heads=(4, 2, 1)[(row + column * 2 // 3) % 3],
                head_dim=dim,
                dtype=("bfloat16", "float16")[(row + column) % 2],
                layout=("BSHD", "BHSD")[(row + column // 3) % 2],
                mask=mask,
                lse=(row // 4 + column // 2) % 2 == 1,
                grad="qkv" if (row // 2 + column) % 2 == 0 else "",
                strides="transposed" if number % 5 == 0 else "plain",
                seed=number,
            )
            found.append(case)
    # Laws that take every so many cases are to meet every kind.
    random.Random(0).shuffle(found)
    return tuple(found)


_CALLED = (
    "none",
    "causal:lower_right",
    "causal",
    "window:60:0:lower_right",
    "window:70:70",
    "padding:left",
    "padding:right",
    "padding:scattered",
    "lengths",
)

TILED: tuple[Case, ...] = _tiled()
"""Calls over several tiles, on accelerators: head dims and masks of models, in both half precisions."""


def always(caps: Capabilities, device: str = "cpu") -> tuple[Case, ...]:
    """Return the adversarial cases in the dtypes that a declaration names, each in up to two of them.

    On accelerators the calls over several tiles follow, each in its own dtype, or in another if that isn't declared.
    head_dim is rounded up to the multiple that the kernel takes: a kernel without small ones would refuse them all.
    """
    names = [name for name in ("float32", "bfloat16", "float16", "float64") if DTYPES[name] in caps.dtypes]
    if not names:
        return ()

    def whole(dim: int) -> int:
        return -(-dim // caps.head_dim_multiple) * caps.head_dim_multiple

    found = []
    for index, case in enumerate(ADVERSARIAL):
        first = case.dtype if case.dtype in names and case.dtype != "float32" else names[0]
        second = names[1 + index % (len(names) - 1)] if len(names) > 1 else first
        for name in dict.fromkeys((first, "float32" if case.data == "constant" else second)):
            if DTYPES[name] not in caps.dtypes:
                continue
            dims = {"head_dim": whole(case.head_dim), "head_dim_v": whole(case.head_dim_v)}
            found.append(case.replace(dtype=name, device=device, **dims))
    for case in TILED if device != "cpu" else ():
        name = case.dtype if case.dtype in names else names[-1]
        gqa = caps.gqa or case.heads == case.kv_heads
        found.append(
            case.replace(
                dtype=name,
                device=device,
                head_dim=whole(case.head_dim),
                kv_heads=case.kv_heads if gqa else case.heads,
                grad=case.grad if caps.backward else "",
            )
        )
    return tuple(found)
