"""Import what the demo needs beyond torch, or raise an error that names the extra to install."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from anyattn.errors import AnyattnError
from anyattn.integrations.diffusers.install import names as names_of_diffusers

__all__ = ["MissingExtraError", "load_diffusers", "require"]


class MissingExtraError(AnyattnError, ImportError):
    """A package of the extra `anyattn[demo]` isn't installed."""


def require(module: str) -> ModuleType:
    """Import a module of the `demo` extra.

    Args:
        module: Its dotted name.

    Raises:
        MissingExtraError: If it isn't installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name is None or error.name.split(".")[0] != package:
            raise
        raise MissingExtraError(
            f"The demo needs the package that provides '{package}', and it isn't installed; install the demo's "
            "packages with: pip install 'anyattn[demo]'"
        ) from error


def load_diffusers(*names: str) -> tuple[Any, ...]:
    """Return classes of Diffusers by name.

    Args:
        names: Attributes of the `diffusers` module, such as `"FluxPipeline"`.

    Raises:
        MissingExtraError: If Diffusers or Transformers isn't installed.
    """
    require("diffusers")
    # DIFFUSERS_ATTN_BACKEND=anyattn is a word that Diffusers refuses while its models are imported.
    names_of_diffusers.import_dispatcher()
    transformers = require("transformers")
    diffusers = require("diffusers")
    with _quiet(transformers):
        return tuple(getattr(diffusers, name) for name in names)


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    # Diffusers' pipelines import image processors that the demo never uses, and Transformers 5 prints a line
    # for each of them if torchvision isn't installed.
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
