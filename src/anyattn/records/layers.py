"""Find the layer that makes a call: the innermost module whose code is running, and its name in the outermost one."""

from __future__ import annotations

import sys
import weakref
from types import FrameType

from torch import nn

NO_LAYER = "(no module)"


class Layers:
    """The names of layers, looked up once per module."""

    def __init__(self) -> None:
        # By identity: modules may define equality. A module that is gone takes its entry along.
        self._names: dict[int, dict[int, str]] = {}

    def running(self) -> str:
        """Return the dotted name of the module that is running, with its model's class in front.

        A call that no module makes is `(no module)`. Modules are found on the Python stack of this thread.
        """
        inner: nn.Module | None = None
        outer: nn.Module | None = None
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            module = _module_of(frame)
            if module is not None:
                inner, outer = inner if inner is not None else module, module
            frame = frame.f_back
        if inner is None or outer is None:
            return NO_LAYER
        return self._name(outer, inner)

    def _name(self, outer: nn.Module, inner: nn.Module) -> str:
        names = self._names.get(id(outer))
        if names is None or id(inner) not in names:
            names = self._names[id(outer)] = {id(module): name for name, module in outer.named_modules()}
            weakref.finalize(outer, self._names.pop, id(outer), None)
        root = type(outer).__name__
        name = names.get(id(inner))
        if name is None:  # a module that isn't registered inside the outermost one
            return f"{root} > {type(inner).__name__}"
        return f"{root}.{name}" if name else root


def _module_of(frame: FrameType) -> nn.Module | None:
    """Return the module whose method a frame runs, or that a host passes to its attention function."""
    code = frame.f_code
    if not code.co_argcount or code.co_varnames[0] not in ("self", "module"):
        return None
    found = frame.f_locals.get(code.co_varnames[0])
    # torch's own containers and wrappers (Sequential, DistributedDataParallel) run no attention of their own.
    if not isinstance(found, nn.Module) or type(found).__module__.startswith("torch.nn.parallel"):
        return None
    return found
