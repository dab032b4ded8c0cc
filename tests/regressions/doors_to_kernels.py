"""The ways to a kernel that isn't here, against its contract double: a call of anyattn, and each name of Diffusers.

A backend joins by getting a double (`doubles.DOUBLES`): everything here is computed from that table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from doors_to_backends import IN_KWARGS, tensors
from torch import Tensor

import anyattn
import doubles
from anyattn.backend.capabilities import Capabilities
from anyattn.backend.protocol import Backend
from anyattn.selection.registry import canonical

DIFFUSERS_NAMES = (
    "flash",
    "flash_hub",
    "flash_varlen",
    "flash_varlen_hub",
    "flash_4_hub",
    "_flash_3",
    "_flash_varlen_3",
    "_flash_3_hub",
    "_flash_3_varlen_hub",
    "aiter_fa2_hub",
    "flex",
    "native",
    "_native_cudnn",
    "_native_efficient",
    "_native_flash",
    "_native_math",
    "_native_npu",
    "_native_xla",
    "sage",
    "sage_hub",
    "sage_blackwell_hub",
    "sage_varlen",
    "_sage_qk_int8_pv_fp8_cuda",
    "_sage_qk_int8_pv_fp8_cuda_sm90",
    "_sage_qk_int8_pv_fp16_cuda",
    "_sage_qk_int8_pv_fp16_triton",
    "xformers",
)
"""The names of Diffusers 0.42.1; a test compares."""

DOORS = tuple(("call", name) for name in doubles.DOUBLES) + tuple(
    ("diffusers", name) for name in DIFFUSERS_NAMES if canonical(name) in doubles.DOUBLES
)

_TOLERANCES = {torch.float32: 1e-4, torch.float16: 6e-3, torch.bfloat16: 4e-2}
_OF_QUANTISED = 0.15


@dataclass(frozen=True)
class Kernel:
    """A backend whose double is installed, behind one door."""

    door: str
    name: str
    backend: Backend
    of_training: torch.dtype | None = None

    @property
    def caps(self) -> Capabilities:
        return self.backend.declarations["cpu"]

    @property
    def dtype(self) -> torch.dtype:
        return self.of_training or next(dtype for dtype in _TOLERANCES if dtype in self.caps.dtypes)

    def _only_infers_in(self, dtype: torch.dtype) -> bool:
        """Whether a call with gradients is refused for its dtype and nothing else (xla in float32)."""
        decision = anyattn.explain(*tensors(dim=64, dtype=dtype, requires_grad=True), backend=self.backend.name)
        return [reason.code for reason in decision.reasons(self.backend.name)] == ["dtype"]

    def in_training(self) -> Kernel:
        """Give the same with inputs of a dtype in which it gives gradients, where it gives any."""
        if not self.caps.backward:
            return self
        declared = (dtype for dtype in _TOLERANCES if dtype in self.caps.dtypes)
        return replace(self, of_training=next(dtype for dtype in declared if not self._only_infers_in(dtype)))

    @property
    def tol(self) -> float:
        return _TOLERANCES[self.dtype] if self.caps.exact else _OF_QUANTISED

    def inputs(self, seqlen_q: int = 6, seqlen_kv: int = 9, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        return tensors(2, seqlen_q, seqlen_kv, dim=64, dtype=self.dtype, **options)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **options: Any) -> Any:
        """Call through the door; that the backend ran and no other is part of it."""
        with anyattn.record() as calls:
            if self.door == "call":
                result = anyattn.attention(query, key, value, mask, backend=self.name, **options)
            else:
                result = self._through_diffusers(query, key, value, mask, **options)
        assert [decision.chosen for decision in calls] == [self.backend.name]
        return result

    def _through_diffusers(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        from diffusers.models import attention_dispatch

        given = {name: options.pop(name) for name in IN_KWARGS if name in options}
        name = attention_dispatch.AttentionBackendName(self.name)
        with anyattn.attention_backend("native"):  # what the call names is more specific
            return attention_dispatch.dispatch_attention_fn(
                query, key, value, mask, backend=name, attention_kwargs=given or None, **options
            )

    def is_right(self, wanted: Tensor, *args: Any, **options: Any) -> bool:
        """Make a call that must be right or refused with a reason; says which."""
        out = self.unless_refused(*args, **options)
        if out is not None:
            self.assert_right(out, wanted)
        return out is not None

    def unless_refused(self, *args: Any, **options: Any) -> Any:
        """Make a call, and give None where it is refused with a reason."""
        try:
            return self.attend(*args, **options)
        except anyattn.UnsupportedCallError as refusal:
            if not refusal.decision.reasons(self.backend.name):
                raise AssertionError(f"{self.name} refuses without a reason") from refusal
            return None

    def plain(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give the inputs of a call without mask, of lengths that the kernel takes."""
        for seqlen_q, seqlen_kv in ((6, 9), (128, 256), (512, 512)):
            inputs = self.inputs(seqlen_q, seqlen_kv)
            if anyattn.explain(*inputs, backend=self.backend.name).chosen is not None:
                return inputs
        raise AssertionError(f"{self.name} takes no plain call")

    @property
    def takes_padding(self) -> bool:
        return self.caps.key_mask or self.caps.boolean

    def assert_right(self, out: Tensor, wanted: Tensor) -> None:
        assert out.shape == wanted.shape
        assert (out.double() - wanted).abs().max().item() < self.tol * max(1.0, wanted.abs().max().item())

    def tells_apart(self, first: Tensor, second: Tensor) -> bool:
        """Whether two truths are so far apart that this kernel's rounding can't hide one in the other."""
        return (first - second).abs().max().item() > 2 * self.tol * max(1.0, first.abs().max().item())


@contextmanager
def behind(door: str, name: str) -> Iterator[Kernel]:
    backend = canonical(name)
    assert backend is not None
    with doubles.installed(backend) as found:
        yield Kernel(door, name, found)
