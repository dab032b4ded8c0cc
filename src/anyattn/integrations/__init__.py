"""What connects anyattn to other libraries; each part imports its library only when it is used."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "diffusers":
        import importlib

        return importlib.import_module("anyattn.integrations.diffusers")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
