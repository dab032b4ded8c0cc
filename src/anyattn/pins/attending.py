"""Find the modules of a tree that may compute attention themselves, by reading their code.

A module is left out only if everything its code names could be read and nothing of it leads to attention. The modules
inside a module are judged by themselves.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import nn

ATTENTION: Final = frozenset(
    ("anyattn", "scaled_dot_product_attention", "dispatch_attention_fn", "memory_efficient_attention")
)
"""Names in a function's code that show that it computes attention, or may."""

HOLDERS: Final = ("processor",)
"""Attributes in which hosts store the object that computes a layer's attention, and may exchange it."""

_MOST_FUNCTIONS = 400
_MOST_ENTRIES = 64

_known: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def modules(root: nn.Module) -> list[nn.Module]:
    """Return the modules inside a tree, without its root, that may compute attention.

    If none is found, every module that isn't torch's own is returned: the code must then be written in a way that can't
    be read.
    """
    inside = [module for module in root.modules() if module is not root and not _is_opaque(module)]
    return [module for module in inside if may_attend(module)] or inside


def may_attend(module: nn.Module) -> bool:
    """Whether a module's own code may compute attention; the modules inside it don't count."""
    kind = type(module)
    if any(getattr(module, name, None) is not None for name in HOLDERS):
        return True
    found = _known.get(kind)
    if found is None:
        found = _known[kind] = _leads_to_attention([kind.forward], kind)
    return found or _leads_to_attention(_callables(vars(module).values()), kind)


def _is_opaque(module: nn.Module) -> bool:
    """Whether a module is torch's own, or compiled by TorchScript, which calls no Python."""
    return type(module).__module__.startswith("torch.") or isinstance(module, torch.jit.ScriptModule)


def _leads_to_attention(start: list[Any], kind: type) -> bool:
    waiting, seen = list(start), set()
    while waiting:
        function = _function(waiting.pop())
        if function is None or function in seen or not _is_local(function):
            continue
        seen.add(function)
        if len(seen) > _MOST_FUNCTIONS or (function.__module__ or "").partition(".")[0] == "anyattn":
            return True
        names = names_of(function)
        if names & ATTENTION:
            return True
        for found in _named(function, names, kind):
            if _is_anyattns(found):
                return True
            waiting.append(found)
    return False


def _function(found: Any) -> types.FunctionType | None:
    """Return the Python function behind a callable, or None if it has none."""
    for _ in range(8):
        if isinstance(found, functools.partial):
            found = found.func
        elif isinstance(found, (types.MethodType, staticmethod, classmethod)):
            found = found.__func__
        elif isinstance(found, property):
            found = found.fget
        elif isinstance(found, types.FunctionType):
            return inspect.unwrap(found) if hasattr(found, "__wrapped__") else found
        elif isinstance(found, type):
            # A class that is called by its name: an autograd function, or an object with a `__call__`.
            found = vars(found).get("forward") or vars(found).get("__call__")
        else:
            found = inspect.getattr_static(type(found), "__call__", None)
            if not isinstance(found, types.FunctionType):
                return None
    return None


def _named(function: types.FunctionType, names: set[str], kind: type) -> Iterator[Any]:
    """Yield what a function's code names: globals, attributes of modules, closures, methods of the class."""
    closure = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    known = function.__globals__
    # An attribute may have the name of a global: only names that are loaded as globals count here.
    for found in (*closure, *(known[name] for name in _globals_of(function.__code__) if name in known)):
        if isinstance(found, types.ModuleType):
            yield found
            if _is_read(found.__name__):
                yield from (vars(found)[name] for name in names if name in vars(found))
        elif isinstance(found, (Mapping, list, tuple)):
            yield from _callables(found.values() if isinstance(found, Mapping) else found)
        elif callable(found) and not isinstance(found, nn.Module):
            yield found
    for name in names:
        found = inspect.getattr_static(kind, name, None)
        if isinstance(found, (types.FunctionType, staticmethod, classmethod, property)):
            yield found


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - raises if it is empty
    except ValueError:
        return False
    return True


def _callables(values: Any) -> list[Any]:
    """Return the callables among values and one level inside containers, without modules and classes."""
    found: list[Any] = []
    for value in list(values)[:_MOST_ENTRIES]:
        if isinstance(value, Mapping):
            inner = list(value.values())[:_MOST_ENTRIES]
        else:
            inner = list(value)[:_MOST_ENTRIES] if isinstance(value, (list, tuple)) else [value]
        found += [one for one in inner if callable(one) and not isinstance(one, (nn.Module, type))]
    return found


def _is_anyattns(found: Any) -> bool:
    name = found.__name__ if isinstance(found, types.ModuleType) else getattr(found, "__module__", None)
    return isinstance(name, str) and name.partition(".")[0] == "anyattn"


def _is_local(function: types.FunctionType) -> bool:
    return _is_read(function.__module__ or "")


def _is_read(module_name: str) -> bool:
    top = module_name.partition(".")[0]
    return top not in ("torch", "numpy") and (top == "__main__" or top not in sys.stdlib_module_names)


def _globals_of(code: types.CodeType) -> set[str]:
    names = {str(step.argval) for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _globals_of(constant)
    return names


def names_of(function: types.FunctionType) -> set[str]:
    """Return every global and attribute name that a function's code mentions, nested functions included."""
    names: set[str] = set()
    waiting: list[types.CodeType] = [function.__code__]
    while waiting:
        code = waiting.pop()
        names.update(code.co_names)
        waiting += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return names
