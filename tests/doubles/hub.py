"""Doubles of the package `kernels` 0.17.2 with one repository on its Hub, whose functions are another double's.

Source: `kernels/load.py` (the signature of get_kernel), `_versions.py` (exactly one of revision and version),
`resolver.py` (FileNotFoundError where there is no such build).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

from anyattn.adapters.aiter import AiterHub
from anyattn.adapters.flash2 import Flash2Hub
from anyattn.adapters.flash3 import Flash3Hub
from anyattn.adapters.flash4 import Flash4Hub
from anyattn.adapters.sage import SageHub
from anyattn.adapters.sage_blackwell import SageBlackwellHub
from anyattn.sources.hub import HubKernel
from doubles.double import Double, module
from doubles.kernels import aiter, flash2, flash3, flash4, sage, sage_blackwell


def hub_double(backend: str, kernel: HubKernel, functions: Mapping[str, Callable[..., Any]]) -> Double:
    """Make the double of a hub backend.

    Args:
        backend: The backend.
        kernel: The one repository, in the one state, that there is.
        functions: What it exports.
    """

    def get_kernel(
        repo_id: str,
        *,
        revision: str | None = None,
        version: int | None = None,
        backend: str | None = None,
        user_agent: str | dict[str, str] | None = None,
        trust_remote_code: bool | list[str] = False,
        check_arch: bool = True,
    ) -> types.ModuleType:
        if (revision is None) == (version is None):
            raise ValueError("Only one of `revision` or `version` must be specified.")
        if repo_id != kernel.repo or (revision or "", version) != (kernel.revision, kernel.version):
            raise FileNotFoundError(f"Cannot find a build variant for this system in {repo_id}")
        return module(f"_{repo_id.partition('/')[2].replace('-', '_')}_double", **functions)

    def modules() -> Mapping[str, types.ModuleType]:
        return {"kernels": module("kernels", __version__="0.17.2", get_kernel=get_kernel)}

    return Double(backend, {"kernels": "0.17.2"}, modules)


FLASH2 = hub_double(
    "flash2_hub",
    Flash2Hub.hub,
    {"flash_attn_func": flash2.flash_attn_func, "flash_attn_varlen_func": flash2.flash_attn_varlen_func},
)
FLASH3 = hub_double(
    "flash3_hub",
    Flash3Hub.hub,
    {"flash_attn_func": flash3.flash_attn_func, "flash_attn_varlen_func": flash3.flash_attn_varlen_func},
)
FLASH4 = hub_double(
    "flash4_hub",
    Flash4Hub.hub,
    {"flash_attn_func": flash4.flash_attn_func, "flash_attn_varlen_func": flash4.flash_attn_varlen_func},
)
SAGE = hub_double("sage_hub", SageHub.hub, {"sageattn": sage.sageattn})
SAGE_BLACKWELL = hub_double(
    "sage_blackwell_hub",
    SageBlackwellHub.hub,
    {"sageattn3_blackwell": sage_blackwell.sageattn3_blackwell},
)


def _forward_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give an AITER function as the Hub's build has it: bf16, head_dim 64 or 128, detached, other keywords ignored."""

    def forward(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> Any:
        if q.dtype is not torch.bfloat16 or q.shape[-1] not in (64, 128):
            raise RuntimeError("invalid argument for fmha_fwd")
        known = {name: value for name, value in options.items() if name not in ("deterministic", "dropout_p")}
        return function(q.detach(), k.detach(), v.detach(), *rest, **known)

    return forward


AITER = hub_double(
    "aiter_hub",
    AiterHub.hub,
    {
        "flash_attn_func": _forward_only(aiter.flash_attn_func),
        "flash_attn_varlen_func": _forward_only(aiter.flash_attn_varlen_func),
    },
)
