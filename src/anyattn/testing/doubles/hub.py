"""Doubles of the package `kernels` 0.17.2 with one repository on its Hub, whose functions are another double's.

Source: `kernels/load.py` (the signature of get_kernel), `_versions.py` (exactly one of revision and version),
`resolver.py` (FileNotFoundError where there is no such build).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

from anyattn import hub_kernels
from anyattn.hub import HubKernel
from anyattn.testing.doubles import flash2
from anyattn.testing.doubles.double import Double, module


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
    hub_kernels.FLASH2,
    {"flash_attn_func": flash2.flash_attn_func, "flash_attn_varlen_func": flash2.flash_attn_varlen_func},
)
