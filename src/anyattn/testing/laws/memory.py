"""Laws about memory that isn't part of a call: uninitialised memory, and packed tokens that belong to no sequence."""

from __future__ import annotations

import itertools
import math
import zlib

import torch
from torch import Tensor

from anyattn import varlen
from anyattn.backend.capabilities import Capabilities
from anyattn.errors import BackendUnavailableError, UnsupportedCallError
from anyattn.masks.objects import Mask
from anyattn.testing.cases.case import Case, Inputs
from anyattn.testing.laws.base import (
    TOO_COARSE,
    LawBroken,
    LawResult,
    excesses,
    inapplicable,
    judged,
    reasons_against,
    reasons_of,
    refused,
    too_coarse,
)
from anyattn.testing.laws.measure import cotangent, gradients
from anyattn.testing.laws.quantised import bounds_for
from anyattn.testing.laws.unwritten import fill_free_memory, sizes_of, surrounded

LENGTHS = (1, 7, 33, 40, 127, 129)
"""Lengths that are no multiple of a kernel's tile."""

SHORT = (1, 7, 33, 40, 33, 65)
"""The same for a CPU, on which no kernel has tiles of 128 and long calls are slow."""

HEAD_DIMS = (40, 80, 96)
"""Head dims that kernels pad."""


def off_tiles(case: Case, caps: Capabilities) -> Case:
    """Change a case's lengths to ones off every tile, and in half of the cases head_dim to one that kernels pad."""
    number = zlib.crc32(repr(case).encode())
    lengths = SHORT if case.device == "cpu" else LENGTHS
    seqlen_q, seqlen_kv = lengths[number % 6], lengths[number // 6 % 6]
    if case.seqlen_q == case.seqlen_kv or case.strides == "packed":
        seqlen_kv = seqlen_q
    dim = HEAD_DIMS[number // 36 % 3]
    if number // 108 % 2 or dim > caps.head_dim_max or dim % caps.head_dim_multiple:
        dim = case.head_dim
    return case.replace(seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, head_dim=dim)


def unwritten_memory(backend: str, case: Case) -> LawResult:
    """Law 12: uninitialised memory isn't used: forward, lse and gradients are right if all of it is NaN."""
    law = "unwritten_memory"
    inputs = case.build()
    if inputs.leaves():
        inputs = inputs.replace(flow=cotangent(inputs, _like_output(inputs)))
    inputs = surrounded(inputs, apart=case.strides == "plain" and zlib.crc32(repr(case).encode()) % 2 == 0)
    against = reasons_against(backend, inputs)
    if against:
        return refused(law, backend, case, against)
    if too_coarse(backend, inputs):
        return inapplicable(law, backend, case, TOO_COARSE)
    sizes = sizes_of(inputs)
    fill_free_memory(inputs.query.device, sizes)
    out, lse = inputs.attend(backend)
    found = {"out": out.detach()} | ({} if lse is None else {"lse": lse})
    if inputs.leaves():
        fill_free_memory(inputs.query.device, sizes)
        found |= gradients(inputs, out)
    grad = bool(inputs.leaves())
    worst = judged(
        law, backend, case, lambda orders: excesses(bounds_for(backend, inputs, gradients=grad, orders=orders), found)
    )
    return LawResult(law, backend, case, "passed", worst)


def _like_output(inputs: Inputs) -> Tensor:
    case = inputs.case
    return inputs.query.new_empty(case.batch, case.seqlen_q, case.heads, case.head_dim_v or case.head_dim)


def packable(case: Case, caps: Capabilities) -> Case:
    """Change a case so that it can be packed: lengths off tiles, and a pattern as its mask, or none."""
    case = off_tiles(case, caps)
    first = case.mask.split("&")[0].strip()
    mask = first if first.startswith(("causal", "window")) else "none"
    grad = case.grad.replace("m", "")
    return case.replace(layout="BSHD", strides="plain", mask=mask, grad=grad, dropout_p=0.0)


def packed_tails(backend: str, case: Case) -> LawResult:
    """Law 13: packed sequences are right if tokens of no sequence hold NaN, and those tokens get zeros."""
    law = "packed_tails"
    inputs = case.build()
    if too_coarse(backend, inputs):
        return inapplicable(law, backend, case, TOO_COARSE)
    packed = _Packed(inputs)
    fill_free_memory(inputs.query.device, sizes_of(inputs))
    try:
        result = packed.attend(backend)
    except (UnsupportedCallError, BackendUnavailableError) as error:
        return refused(law, backend, case, reasons_of(error, backend))
    out, lse = result if isinstance(result, tuple) else (result, None)
    found = {"out": out.detach()} | ({} if lse is None else {"lse": lse.t()})
    leaves = packed.leaves()
    if leaves:
        fill_free_memory(inputs.query.device, sizes_of(inputs))
        flow = packed.flow(out)
        found |= dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), flow), strict=True))
    for name, tensor in found.items():
        left = tensor[packed.end_of(name) :]
        alone = -math.inf if inputs.sinks is None else inputs.sinks.to(left.dtype)
        if not bool((left == (alone if name == "lse" else 0)).all()):
            raise LawBroken(law, backend, case, f"{name} isn't zeros (lse: -inf) where tokens are in no sequence", 1e9)
    worst = judged(law, backend, case, lambda orders: packed.errors(backend, found, orders))
    if not packed.judged:
        return inapplicable(law, backend, case, TOO_COARSE)
    return LawResult(law, backend, case, "passed", worst)


class _Packed:
    """The entries of a case as packed sequences: one is shorter, some are empty, and tokens of NaN follow the last."""

    def __init__(self, inputs: Inputs) -> None:
        case, self.inputs = inputs.case, inputs
        self.judged = 0
        same = case.seqlen_q == case.seqlen_kv
        self.lengths_q = [max(0, case.seqlen_q - 3 * entry) for entry in range(case.batch)]
        self.lengths_k = self.lengths_q if same else [max(0, case.seqlen_kv - 5 * entry) for entry in range(case.batch)]
        self.starts_q = _starts(self.lengths_q, inputs.query.device)
        self.starts_k = self.starts_q if same else _starts(self.lengths_k, inputs.query.device)
        self.query = _with_tail(inputs.query, self.lengths_q)
        self.key, self.value = (_with_tail(tensor, self.lengths_k) for tensor in (inputs.key, inputs.value))

    def attend(self, backend: str) -> Tensor | tuple[Tensor, Tensor]:
        inputs, case = self.inputs, self.inputs.case
        mask = None if inputs.mask is None else Mask(pattern=inputs.mask.pattern)
        return varlen.attention_varlen(
            self.query,
            self.key,
            self.value,
            self.starts_q,
            self.starts_k,
            case.seqlen_q,
            case.seqlen_kv,
            mask,
            scale=case.scale,
            enable_gqa=case.heads != case.kv_heads,
            softcap=case.softcap,
            sinks=inputs.sinks,
            return_lse=case.lse,
            backend=backend,
        )

    def leaves(self) -> dict[str, Tensor]:
        named = {"query": self.query, "key": self.key, "value": self.value}
        return {name: tensor for name, tensor in named.items() if tensor.requires_grad}

    def end_of(self, name: str) -> int:
        return sum(self.lengths_k if name in ("key", "value") else self.lengths_q)

    def flow(self, out: Tensor) -> Tensor:
        whole = cotangent(self.inputs, _like_output(self.inputs))
        return _with_tail(whole, self.lengths_q).detach().view_as(out)

    def errors(self, backend: str, found: dict[str, Tensor], orders: int) -> dict[str, float]:
        """Compare each sequence with the reference of that sequence, if the backend's number format holds its values.

        Each sequence is judged by its own budget: another's may be smaller or larger.
        """
        self.judged = 0
        worst: dict[str, float] = {}
        ends = zip(itertools.pairwise(_ends(self.lengths_q)), itertools.pairwise(_ends(self.lengths_k)), strict=True)
        for entry, (rows, keys) in enumerate(ends):
            if rows[0] == rows[1] or keys[0] == keys[1]:
                continue
            one = self._alone(entry, rows[1] - rows[0], keys[1] - keys[0])
            if too_coarse(backend, one):
                continue
            self.judged += 1
            known = bounds_for(backend, one, gradients=bool(one.leaves()), orders=orders)
            part = {}
            for name, tensor in found.items():
                piece = tensor[slice(*(keys if name in ("key", "value") else rows))]
                part[name] = (piece.t() if name == "lse" else piece)[None]
            for name, error in excesses(known, part).items():
                worst[name] = max(worst.get(name, 0.0), error) if not math.isnan(error) else error
        return worst

    def _alone(self, entry: int, seqlen_q: int, seqlen_kv: int) -> Inputs:
        case, inputs = self.inputs.case, self.inputs

        def cut(tensor: Tensor, length: int) -> Tensor:
            return tensor.detach()[entry : entry + 1, :length].requires_grad_(tensor.requires_grad)

        flow = cotangent(inputs, _like_output(inputs))[entry : entry + 1, :seqlen_q]
        return inputs.replace(
            case=case.replace(batch=1, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, scale=case.factor),
            query=cut(inputs.query, seqlen_q),
            key=cut(inputs.key, seqlen_kv),
            value=cut(inputs.value, seqlen_kv),
            flow=flow,
        )


def _ends(lengths: list[int]) -> list[int]:
    return list(itertools.accumulate(lengths, initial=0))


def _starts(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor(_ends(lengths), dtype=torch.int32, device=device)


def _with_tail(tensor: Tensor, lengths: list[int]) -> Tensor:
    """Pack the first tokens of each entry, followed by some that are NaN."""
    parts = [entry[:length] for entry, length in zip(tensor.detach(), lengths, strict=True)]
    tail = tensor.new_full((9, *tensor.shape[2:]), math.nan)
    return torch.cat([*parts, tail]).requires_grad_(tensor.requires_grad)
