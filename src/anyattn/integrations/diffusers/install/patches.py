"""Put the doors into Diffusers' modules, those imported later too, and take them out again exactly."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import ModuleType
from typing import Any

from anyattn.integrations.diffusers.calls import doors
from anyattn.integrations.diffusers.install.sites import SDPA_CALLERS, Alias
from anyattn.integrations.diffusers.versions import UnsupportedVersionError

DISPATCH = "dispatch_attention_fn"


def install_dispatcher(dispatcher: Any, undo: ExitStack) -> None:
    """Replace the dispatcher wherever a module holds it by its name; new imports take it from its home."""
    stock = getattr(dispatcher, DISPATCH)
    doors.Stock.dispatch = staticmethod(stock)
    doors.Stock.registry = dispatcher._AttentionBackendRegistry
    changed = _holders(stock)

    def put_back() -> None:
        # A module that was taken out of sys.modules is put back too; one that a third party patched is left.
        for module in (*changed, *_holders(doors.dispatch_attention_fn)):
            if vars(module).get(DISPATCH) is doors.dispatch_attention_fn:
                setattr(module, DISPATCH, stock)

    undo.callback(put_back)
    for module in changed:
        setattr(module, DISPATCH, doors.dispatch_attention_fn)


def install_sdpa(undo: ExitStack) -> None:
    """Replace torch's function in the modules that call it themselves, now or when they are imported."""
    finder = _Finder()
    undo.callback(finder.uninstall)
    sys.meta_path.insert(0, finder)
    for name, alias in SDPA_CALLERS.items():
        module = sys.modules.get(f"diffusers.{name}")
        if module is not None:
            finder.put_proxy(module, alias)


def replace(owner: Any, name: str, value: Any, undo: ExitStack) -> None:
    """Set an attribute of a class, and remember what its own dictionary held."""
    before = vars(owner)[name]

    def put_back() -> None:
        if vars(owner)[name] is value:
            setattr(owner, name, before)

    undo.callback(put_back)
    setattr(owner, name, value)


def _holders(function: Callable[..., Any]) -> list[ModuleType]:
    # vars(), not getattr: a lazy module would import things to answer.
    return [
        module
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType) and vars(module).get(DISPATCH) is function and module is not doors
    ]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of `SDPA_CALLERS` as usual, and puts the proxy in once they have run."""

    def __init__(self) -> None:
        self.changed: list[tuple[ModuleType, Alias]] = []

    def put_proxy(self, module: ModuleType, alias: Alias) -> None:
        """Let a module see torch through a proxy.

        Raises:
            UnsupportedVersionError: If the module doesn't hold torch's module under that name.
        """
        proxy = doors.PROXIES[alias]
        found = vars(module).get(alias)
        if found is not vars(proxy)["_behind"]:
            raise UnsupportedVersionError(
                f"{module.__name__} was expected to hold torch's {proxy.__name__} as {alias!r}, and it holds "
                f"{type(found).__name__}. This Diffusers differs from the release that it calls itself."
            )
        self.changed.append((module, alias))
        setattr(module, alias, proxy)

    def uninstall(self) -> None:
        """Restore torch's own function in every module, and stop watching imports."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for module, alias in self.changed:
            proxy = doors.PROXIES[alias]
            if vars(module).get(alias) is proxy:
                setattr(module, alias, vars(proxy)["_behind"])
        self.changed.clear()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find a module by the ordinary machinery; None for every module that isn't in the table."""
        package, _, name = fullname.partition(".")
        alias = SDPA_CALLERS.get(name)
        if package != "diffusers" or alias is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        loader = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                self.put_proxy(module, alias)

        setattr(loader, "exec_module", exec_module)  # noqa: B010 - the loader is this import's own
        return spec
