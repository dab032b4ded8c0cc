"""The builds of FlashAttention-3, and what each takes.

Source: `hopper/flash_api.cpp` (static switches) and `hopper/setup.py` of flash-attention, tokenspeed-fa3 3.0.0 (by
reading); fa3-fwd 0.0.3 on an H100. In `Environment.builds` True is a feature that a build left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from anyattn.adapters import _flash
from anyattn.backend.capabilities import Capabilities
from anyattn.environment import Environment
from anyattn.sources.packages import Package
from anyattn.types.reasons import Reason
from anyattn.types.spec import AttentionSpec

BUILD = "build hopper/ of github.com/Dao-AILab/flash-attention"

# Distributions with flash_attn_interface; only one can be installed, since their modules have the same names.
OWN, TOKENSPEED = "flash-attn-3", "tokenspeed-fa3"

FORWARD_ONLY = Package(
    "fa3-fwd", "fa3_fwd_interface", _flash.FUNCTIONS, ">=0.0.3", "pip install {requirement} (forward only)"
)

PACKAGES = (
    Package(
        "",
        "flash_attn_interface",
        _flash.FUNCTIONS,
        install=BUILD,
        found_by="flash_attn_interface",
        others=(TOKENSPEED, OWN),
    ),
    # This package holds the functions since July 2026; before, it held only the extension.
    Package(OWN, "flash_attn_3", _flash.FUNCTIONS, install=BUILD, found_by="flash_attn_3"),
    FORWARD_ONLY,
)


def config_of(package: Package) -> str:
    """Return the name of the module in which a package's build lists what it left out."""
    return "fa3_fwd_config" if package is FORWARD_ONLY else "flash_attn_config"


def is_own(package: Package, env: Environment) -> bool:
    """Whether a package is flash-attention's own distribution, by its name."""
    return package.origin(env).split()[0] == OWN


@dataclass(frozen=True, slots=True)
class Build:
    """What a build of FlashAttention-3 has, on a machine."""

    package: Package
    env: Environment

    def has(self, feature: str) -> bool:
        """Whether the build has a feature, by its own list or, without one, by what is known of its distribution."""
        left_out = self.env.left_out(config_of(self.package), feature)
        if left_out is not None:
            return not left_out
        if self.package is FORWARD_ONLY:
            return feature not in ("BACKWARD", "LOCAL", "FP16")  # seen with 0.0.3 on an H100
        return is_own(self.package, self.env)

    def tells(self, feature: str) -> bool:
        """Whether the build's own list says that it has a feature."""
        return self.env.left_out(config_of(self.package), feature) is False

    @property
    def widest(self) -> int:
        """The largest head_dim; one without a kernel of its own uses the next larger kernel."""
        return max((size for size in (64, 96, 128, 192, 256) if self.has(f"HDIM{size}")), default=0)


def of_build(caps: Capabilities, build: Build) -> Capabilities:
    """Return a declaration without what a build leaves out."""
    backward, varlen = build.has("BACKWARD"), build.has("VARLEN")
    return caps.replace(
        dtypes=caps.dtypes if build.has("FP16") else caps.dtypes - {torch.float16},
        window=caps.window if build.has("LOCAL") else frozenset(),
        softcap=caps.softcap and build.has("SOFTCAP"),
        backward=caps.backward and backward,
        deterministic=caps.deterministic and backward,
        key_mask=caps.key_mask and varlen,
        varlen=caps.varlen and varlen,
    )


def rejected(spec: AttentionSpec, build: Build | None) -> Iterator[Reason]:
    """Yield the reasons that no field of a declaration can express; None is an unknown build."""
    yield from _head_dims(spec, build)
    if spec.deterministic and spec.needs_grad and spec.head_dim > 192:
        yield Reason("deterministic", "head_dim <= 192 for deterministic gradients", str(spec.head_dim))


def _head_dims(spec: AttentionSpec, build: Build | None) -> Iterator[Reason]:
    """Refuse head dims without a kernel (`hopper/flash_api.cpp`)."""
    dim, dim_v = spec.head_dim, spec.head_dim_v
    pair = (128 < dim <= 192 and 96 < dim_v <= 128) or (dim <= 64 and dim_v <= 512)
    widest = 256 if build is None else build.widest or 256
    if dim > widest:
        yield Reason("head_dim", f"head_dim <= {widest}", str(dim))
    if dim != dim_v and not pair:
        need = "head_dim_v == head_dim, or head_dim <= 64, or head_dim in (128, 192] with head_dim_v in (96, 128]"
        yield Reason("head_dim_v", need, f"{dim} and {dim_v}")
    elif dim != dim_v and spec.needs_grad:
        yield Reason("head_dim_v", "head_dim_v == head_dim with gradients", f"{dim} and {dim_v}")
    elif dim <= 64 < dim_v and (build is None or not build.tells("HDIMDIFF64")):
        # Without that kernel the one for 64 and 64 runs, and silently leaves the rest of the output unwritten.
        need = "head_dim_v <= 64, or a build whose flash_attn_config lists HDIMDIFF64 as built"
        hint = f"pad query and key to {dim_v}, or {BUILD} with every feature"
        yield Reason("head_dim_v", need, f"{dim} and {dim_v}", hint)
