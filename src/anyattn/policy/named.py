"""The ready-made policies, as data.

Each allows quantised kernels only for self-attention, only in the middle layers and in the middle denoising steps;
everything else gets exact kernels. The lists end in `auto`, so where no quantised kernel is installed a policy means
`auto`. What a policy gains and what it changes in the result is to be read in the table of docs/policies.md, or to be
measured with benchmarks/policies.py: no figure is assumed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final


def _policy(blocks: str | list[str], layers: str) -> tuple[Mapping[str, Any], ...]:
    """Give the rules for a transformer whose blocks of equal width have these names."""
    return (
        {
            "name": "middle layers and steps",
            "backend": ["sage", "auto"],
            "precision": "fp8",
            "role": "self",
            "modules": blocks,
            "layers": layers,
            "steps": "0.2:0.8",
        },
        {"name": "other attention of the transformer", "backend": "auto", "role": ["self", "cross"]},
        {"name": "vae", "backend": "auto", "role": "vae", "optional": True},
    )


_TWO_KINDS: Final = ["transformer_blocks", "single_transformer_blocks"]

POLICIES: Final[Mapping[str, tuple[Mapping[str, Any], ...]]] = {
    # 19 blocks with joint attention of text and image, then 38 single blocks: one attention layer each. Quantised
    # kernels are allowed in 49 of the 57 layers, in 60 % of the steps.
    "flux": _policy(_TWO_KINDS, "4:-4"),
    # 30 or 40 blocks, each with a self-attention layer over all frames and a cross-attention layer to the short text,
    # which stays exact. The two transformers of Wan 2.2 are counted each by itself, their steps together.
    "wan": _policy("blocks", "2:-2"),
    # 20 blocks with joint attention, then 40 single blocks. The few layers of the text refiner stay exact.
    "hunyuan_video": _policy(_TWO_KINDS, "4:-4"),
}
"""The rules of each ready-made policy by its name."""
