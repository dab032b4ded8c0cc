"""What connects anyattn to other libraries; each part imports its library only when it is used."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("diffusers", "transformers"):
        import importlib

        return importlib.import_module(f"anyattn.integrations.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
