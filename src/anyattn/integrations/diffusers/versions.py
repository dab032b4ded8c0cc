"""Which releases of Diffusers this integration was written for, and whether the one here is as expected."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from anyattn.errors import AnyattnError

SUPPORTED = ">=0.42.1,<0.43"
"""The releases of Diffusers that the integration accepts, as a version specifier."""

BACKEND_NAME = "anyattn"
"""The name under which Diffusers knows this library once the integration is enabled."""

SIGNATURES: dict[str, tuple[str, ...]] = {
    "models.attention_dispatch:dispatch_attention_fn": (
        "query",
        "key",
        "value",
        "attn_mask",
        "dropout_p",
        "is_causal",
        "scale",
        "enable_gqa",
        "attention_kwargs",
        "backend",
        "parallel_config",
    ),
    "models.attention_dispatch:attention_backend": ("backend",),
    "models.attention_dispatch:_AttentionBackendRegistry.get_active_backend": (),
    "models.attention_dispatch:_AttentionBackendRegistry.set_active_backend": ("backend",),
    "models.modeling_utils:ModelMixin.set_attention_backend": ("self", "backend"),
    "models.modeling_utils:ModelMixin.reset_attention_backend": ("self",),
    "models.attention:AttentionModuleMixin.set_attention_backend": ("self", "backend"),
}
"""What is replaced or called, with the parameters that it must have."""

TABLES: dict[str, type] = {
    "models.attention_dispatch:_AttentionBackendRegistry._backends": dict,
    "models.attention_dispatch:_AttentionBackendRegistry._constraints": dict,
    "models.attention_dispatch:_AttentionBackendRegistry._supported_arg_names": dict,
    "models.attention_dispatch:AttentionBackendName._member_map_": dict,
    "models.attention_dispatch:AttentionBackendName._value2member_map_": dict,
    "models.attention_dispatch:AttentionBackendName._member_names_": list,
    "utils.constants:DIFFUSERS_ATTN_BACKEND": str,
}
"""What is added to, with its type."""


class UnsupportedVersionError(AnyattnError, RuntimeError):
    """This release of Diffusers isn't one that the integration knows; nothing was changed."""


def check_version() -> str:
    """Return the installed version of Diffusers, without importing it.

    Raises:
        UnsupportedVersionError: If Diffusers isn't installed, or in a release outside `SUPPORTED`.
    """
    try:
        found = importlib.metadata.version("diffusers")
    except importlib.metadata.PackageNotFoundError as error:
        raise UnsupportedVersionError(
            f"The Diffusers integration needs diffusers{SUPPORTED}, and none is installed. "
            f"Install it with: pip install 'diffusers{SUPPORTED}'"
        ) from error
    loaded = getattr(sys.modules.get("diffusers"), "__version__", found)
    for version in (found, loaded):
        # Releases of packaging differ in whether a specifier takes 0.42.2.dev0; no pre-release was tested here.
        if Version(version).is_prerelease or Version(version) not in SpecifierSet(SUPPORTED):
            raise UnsupportedVersionError(
                f"The Diffusers integration knows diffusers{SUPPORTED}; {version} is installed. Nothing was "
                f"changed. Install a known one with: pip install 'diffusers{SUPPORTED}'"
            )
    return found


def check_interface() -> None:
    """Compare everything that will be replaced or added to with what it must look like.

    Raises:
        UnsupportedVersionError: If anything is missing or has other parameters; it lists every difference.
    """
    wrong = [
        f"{path} takes ({', '.join(found)}) instead of ({', '.join(wanted)})"
        for path, wanted in SIGNATURES.items()
        if (found := _parameters(find(path))) != wanted
    ]
    wrong += [
        f"{path} is a {type(found).__name__} instead of a {wanted.__name__}"
        for path, wanted in TABLES.items()
        if not isinstance(found := find(path), wanted)
    ]
    if wrong:
        raise UnsupportedVersionError(
            "This Diffusers calls itself a known release and yet differs from it (edited, or patched by "
            "another package?). Nothing was changed. Differences: " + "; ".join(wrong) + "."
        )


def find(path: str) -> Any:
    """Return what `"module:attribute.attribute"` names below the package diffusers; None if nothing does."""
    module_name, _, attributes = path.partition(":")
    found: Any = load(module_name)
    for attribute in attributes.split("."):
        found = getattr(found, attribute, None)
    return found


def load(module_name: str) -> ModuleType:
    """Import a module by its name below the package diffusers."""
    return importlib.import_module(f"diffusers.{module_name}")


def _parameters(function: Callable[..., Any] | None) -> tuple[str, ...]:
    if not callable(function):
        return ("nothing: it is missing",)
    return tuple(inspect.signature(function).parameters)
