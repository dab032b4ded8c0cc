"""The head dims of a kernel, if they depend on the compute capability."""

from __future__ import annotations

from dataclasses import dataclass

from anyattn.types.spec import AttentionSpec


@dataclass(frozen=True, slots=True)
class HeadDims:
    """The head dims of a kernel on the CUDA devices of one major compute capability.

    Attributes:
        major: The capability, such as 9 for sm90.
        largest: Up to this size head_dim and head_dim_v may be anything.
        pairs: More pairs of the two.
        largest_grad: `largest` when gradients are needed; None is the same.
        plain_pairs: More pairs, for calls without softcap, sinks and key masks.
    """

    major: int
    largest: int
    pairs: tuple[tuple[int, int], ...] = ()
    largest_grad: int | None = None
    plain_pairs: tuple[tuple[int, int], ...] = ()

    def takes(self, spec: AttentionSpec) -> bool:
        """Whether a call's head dims are among them."""
        pair = (spec.head_dim, spec.head_dim_v)
        plain = spec.softcap is None and not spec.sinks and spec.mask.key is None
        if self.largest_grad is not None and spec.needs_grad:
            return max(pair) <= self.largest_grad
        return max(pair) <= self.largest or pair in self.pairs or (plain and pair in self.plain_pairs)

    def __str__(self) -> str:
        said = [f"<= {self.largest}", *(str(pair) for pair in self.pairs)]
        if self.largest_grad is not None:
            said[0] += f" (<= {self.largest_grad} with gradients)"
        said += [f"{pair} without softcap, sinks and key masks" for pair in self.plain_pairs]
        return ", or ".join(said)
