"""A kernel of another distribution: its name, versions and functions, and how it is loaded.

`FUNCTIONS` holds what was loaded, by backend name: code that torch.compile traces reads it without an import.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet

from anyattn.environment import Environment
from anyattn.types.reasons import Reason

FUNCTIONS: dict[str, Any] = {}
"""Per backend, a namespace of the kernel's functions; filled by `Backend.load`."""


@dataclass(frozen=True, slots=True)
class Package:
    """One distribution that brings a kernel: the one place for its versions and the command that installs it.

    Attributes:
        distribution: Its name, as pip knows it; empty if only the module tells (a build without metadata).
        module: The module that holds the functions.
        functions: The functions that must be there.
        versions: The versions that serve, as a specifier such as `">=2.6.3"`; empty is any.
        install: What installs it. `{requirement}` stands for the distribution with its versions, quoted for a shell,
            and `{versions}` for the versions.
        found_by: A module that must be there too, as far as files tell; empty asks for none.
        note: What else to say if it is missing.
        others: Other distributions that bring the same module, or share its name; reports list them too.
    """

    distribution: str
    module: str
    functions: tuple[str, ...]
    versions: str = ""
    install: str = "pip install {requirement}"
    found_by: str = ""
    note: str = ""
    others: tuple[str, ...] = ()

    @property
    def wanted(self) -> str:
        """The distribution and versions that are needed, in words."""
        return f"{self.distribution or self.module} {self.versions}".strip()

    @property
    def command(self) -> str:
        """The command, or the words, that installs a version that serves."""
        if "{requirement}" in self.install and not self.distribution:
            return ""
        return self.install.replace("{requirement}", self._requirement).replace("{versions}", self.versions)

    @property
    def _requirement(self) -> str:
        return f"'{self.distribution}{self.versions}'" if self.versions else self.distribution

    def origin(self, env: Environment) -> str:
        """Return which distribution brings the kernel on a machine, with its version. Pure."""
        names = (self.distribution,) if self.distribution else self.others
        found = next((name for name in names if name in env.packages), "")
        return f"{found} {env.packages[found]}" if found else self.distribution or self.module

    def reasons(self, env: Environment) -> Iterator[Reason]:
        """Yield why the package doesn't serve on a machine, according to its metadata. Pure."""
        version = env.packages.get(self.distribution) if self.distribution else None
        missing = "; ".join(part for part in (self.command, self.note) if part)
        if self.distribution and version is None:
            yield Reason("not_installed", self.wanted, f"no distribution {self.distribution}", missing)
        elif self.versions and version is not None and not _serves(self.versions, version):
            yield Reason("wrong_version", self.wanted, version, self._pinned())
        elif self.found_by and self.found_by not in env.modules:
            got = f"no module {self.found_by}" + (f" beside {self.distribution} {version}" if version else "")
            yield Reason("not_installed", self.wanted, got, missing)

    def _pinned(self) -> str:
        """Return the command with the versions that serve: without them pip may keep or get one that doesn't."""
        if self._requirement in self.command:
            return self.command
        return "; ".join(part for part in (self.command, f"it has to be {self._requirement}") if part)

    def load(self) -> Any:
        """Import the module and return its functions as a namespace.

        Raises:
            ImportError: If a function is missing, with what was found instead.
            Exception: Whatever the package raises when it is imported.
        """
        return functions_of(importlib.import_module(self.module), self.functions, self.module, self.note)


def functions_of(module: Any, functions: Sequence[str], name: str, note: str = "") -> Any:
    """Return a module's functions as a namespace, with the module itself as `module`.

    Raises:
        ImportError: If a function is missing, with what was found instead.
    """
    missing = [function for function in functions if not callable(getattr(module, function, None))]
    if missing:
        where = getattr(module, "__file__", None) or "a namespace without a file"
        raise ImportError(f"{name} ({where}) has no function {' and '.join(missing)}. {note}".strip())
    return types.SimpleNamespace(**{function: getattr(module, function) for function in functions}, module=module)


def _serves(versions: str, found: str) -> bool:
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(versions).contains(found, prereleases=True)
    except InvalidVersion:
        return False


def first_that_serves(packages: Sequence[Package], env: Environment) -> Package | None:
    """Return the first package that serves on a machine, or None."""
    return next((package for package in packages if not any(package.reasons(env))), None)


def package_reasons(packages: Sequence[Package], env: Environment) -> Iterator[Reason]:
    """Yield why none of several packages serves; nothing if one does. Pure."""
    if first_that_serves(packages, env) is None:
        for package in packages:
            yield from package.reasons(env)
