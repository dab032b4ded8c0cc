"""Backends that are wrong as a whole, and not by one broken call: `anyattn.testing.sabotage` lists them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from anyattn import reference
from anyattn.adapters.native import NativeFlash, NativeMath
from anyattn.adapters.native import kernels as native
from anyattn.backend.protocol import Lowering, Output, Parts, Plan
from anyattn.environment import Environment
from anyattn.testing.laws.quantised import as_int8
from anyattn.types.reasons import Conversion, Reason
from anyattn.types.spec import AttentionSpec

NAME = "sabotaged"
"""The name under which a sabotaged backend is registered."""


class Sinkless(NativeFlash):
    """Declares sinks, and drops them."""

    name = NAME
    declarations = {"cpu": NativeFlash.declarations["cpu"].replace(sinks=True)}

    @staticmethod
    def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        """Run without the sinks."""
        without = dataclasses.replace(plan, spec=plan.spec.replace(sinks=False))
        return native.run(without, query, key, value, parts._replace(sinks=None))


class Hasty(NativeMath):
    """Loads its kernel while it computes its reasons."""

    name = NAME

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        """Load, then yield."""
        self.load()
        yield from super().rejects(spec, env)
        if spec.head_dim == 8:
            yield Reason("head_dim", "head_dim > 8", "8")


class Forgetful(NativeMath):
    """Returns its reasons only every other time: it runs a call that it refused before."""

    name = NAME

    def __init__(self) -> None:
        self.asked = 0

    def rejects(self, spec: AttentionSpec, env: Environment) -> Iterator[Reason]:
        """Refuse every other time."""
        self.asked += 1
        if self.asked % 2:
            yield Reason("value", "to be asked twice", "once")


class Coarse(NativeFlash):
    """A right kernel of its kind: scores in int8, which no exact kernel's budget lets pass."""

    name = NAME
    declarations = {
        "cpu": NativeFlash.declarations["cpu"].replace(
            exact=False, quantised="int8", dtypes=frozenset((torch.float32,)), backward=False, mask_grad=False
        )
    }

    @staticmethod
    def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        """Run with query and key rounded, keys less their mean."""
        heads, axis = (2, 1) if plan.spec.layout == "BSHD" else (1, 2)
        mean = key.mean(axis, keepdim=True)
        coarse, near = (as_int8(tensor.transpose(1, axis)).transpose(1, axis) for tensor in (query, key - mean))
        result = native.run(plan, coarse, near + mean, value, parts)
        if not isinstance(result, tuple):
            return result
        moved = mean.repeat_interleave(plan.spec.num_heads // plan.spec.num_kv_heads, heads)
        lost = plan.spec.scale * ((query - coarse) * moved).sum(-1)
        return result[0], result[1] + (lost.transpose(1, 2) if axis == 1 else lost)


class Overflowing(NativeMath):
    """Takes packed sequences and declares that it reads their lengths; tokens after the last are NaN."""

    name = NAME
    declarations = {"cpu": NativeMath.declarations["cpu"].replace(varlen=True, causal=frozenset(), window=frozenset())}

    def lower(self, spec: AttentionSpec, env: Environment) -> Lowering:
        """Declare that lengths are read, so tokens after the last sequence aren't replaced by zeros."""
        plain = super().lower(spec.replace(packed=False), env)
        read = Conversion("host_lengths", "read, and forgotten")
        return dataclasses.replace(plain, conversions=(*plain.conversions, read)) if spec.packed else plain

    @staticmethod
    def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        """Attend to each packed sequence, and leave NaN after the last one."""
        starts_q, starts_k = parts.cu_seqlens_q, parts.cu_seqlens_k
        if starts_q is None or starts_k is None:
            return native.run(plan, query, key, value, parts)
        out = query.new_full((*query.shape[:2], value.shape[-1]), torch.nan)
        ends = zip(*(itertools.pairwise(starts.tolist()) for starts in (starts_q, starts_k)), strict=True)
        for rows, keys in ends:
            part = slice(*rows)
            q, k, v = query[None, part], key[None, slice(*keys)], value[None, slice(*keys)]
            found = reference.attention(q, k, v, scale=plan.spec.scale)[0]
            out = torch.cat((out[: rows[0]], found[0].to(out.dtype), out[rows[1] :]))
        return out
