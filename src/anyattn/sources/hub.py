"""Kernels from the Hugging Face Hub, through the package `kernels`: the same functions as an installed package's.

Sources: `kernels` 0.17.2 (`load.py`, `hf_hub.py`, `resolver.py`, `archs.py`, `python_deps.py`, `validate.py`), its
0.12 to 0.17.0. From 0.14 on it checks that the Hub trusts the publisher; anyattn never asks it to trust more.

An adapter names the repository of its kernel and pins it. The pin is a commit if public projects record that they ran
it. Otherwise no commit is on record, and the pin is the version, a branch that may move. None was downloaded or run
while this was written, since no Hub was reachable. How each differs from the package was read in
github.com/huggingface/kernels-community.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from anyattn.environment import Environment, detect, variables_now
from anyattn.errors import BackendUnavailableError
from anyattn.sources.packages import Package, functions_of
from anyattn.types.reasons import Reason

KERNELS = Package("kernels", "kernels", ("get_kernel",), ">=0.12")

DIFFUSERS = "diffusers 0.42.1, models/attention_dispatch.py"
"""The source of the repositories' names, and of the versions of those without a known revision."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHECKS_PUBLISHERS = Version("0.14")
_FORM = "LOCAL_KERNELS=repo=folder:repo2=folder2"
_YES = frozenset(("1", "ON", "YES", "TRUE"))  # huggingface_hub's constants.py
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
# get_kernel's keywords that not every version has: passed if its signature has them.
_WHERE_KNOWN: Mapping[str, Any] = {"trust_remote_code": False, "check_arch": True}


@dataclass(frozen=True, slots=True)
class HubKernel:
    """One repository of kernels on the Hub, pinned.

    Attributes:
        repo: Its name, such as `"kernels-community/flash-attn2"`.
        functions: The functions that must be there.
        revision: The commit of the Hub's repository, 40 hexadecimal digits.
        version: If no commit is known: the version, which is a branch and may move.
        source: The source of the revision or version.
        note: How its functions differ from those of the package of the same kernel.
    """

    repo: str
    functions: tuple[str, ...]
    revision: str = ""
    version: int | None = None
    source: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if (self.version is None) != bool(self.revision):
            raise ValueError(f"{self.repo}: exactly one of revision and version pins it.")
        if self.revision and not _COMMIT.fullmatch(self.revision):
            raise ValueError(f"{self.repo}: a revision is a commit's 40 hexadecimal digits, not {self.revision!r}.")

    @property
    def pin(self) -> str:
        """The commit or version, in words."""
        return self.revision or f"version {self.version}, a branch that may move"

    def reasons(self, env: Environment) -> Iterator[Reason]:
        """Yield why the kernel can't be loaded on a machine, as far as that is known without a network. Pure."""
        yield from KERNELS.reasons(env)
        wrong = malformed(env.variables.get("LOCAL_KERNELS"))
        if wrong is not None:
            yield Reason("setting", _FORM, repr(wrong), "fix the environment variable LOCAL_KERNELS, or unset it")

    def origin(self, env: Environment) -> str:
        """Return which code would be loaded on a machine, in words. Pure."""
        if any(self.reasons(env)):
            return ""
        folder = _local_folders(env.variables.get("LOCAL_KERNELS")).get(self.repo)
        if folder is not None:
            return (
                f"the local folder {folder}, named by LOCAL_KERNELS for {self.repo}, "
                "which bypasses the pinned revision and publisher trust"
            )
        text = f"{self.repo} at {self.pin}, from the Hub"
        offline = next((name for name in _OFFLINE if env.variables.get(name)), "")
        if offline and is_offline(env):
            text += f"'s copy on this machine; with {offline} the publisher's trust isn't checked"
        version = env.version("kernels")
        if version is not None and version < _CHECKS_PUBLISHERS:
            text += f"; kernels {version} doesn't check the publisher's trust, 0.14 does"
        if env.variables.get("KERNELS_CACHE"):
            text += f"; cached in {env.variables['KERNELS_CACHE']}, by KERNELS_CACHE"
        return text

    def load(self, backend: str) -> Any:
        """Download the kernel if it isn't on this machine, import it, and return its functions as a namespace.

        Args:
            backend: The backend's name, for messages.

        Raises:
            BackendUnavailableError: With what went wrong and how to fix it.
        """
        try:
            get_kernel = KERNELS.load().get_kernel
        except Exception as error:
            hint = f"repair the package kernels, or install it and what it needs again ({KERNELS.command})"
            raise _unavailable(backend, "an importable package kernels", error, hint) from error
        try:
            self._agrees(detect())
            module = get_kernel(self.repo, **self._keywords(get_kernel))
            return functions_of(module, self.functions, f"{self.repo} at {self.pin}", self.note)
        except Exception as error:
            raise _unavailable(backend, f"{self.repo} at {self.pin}", error, cure(error) or _OTHERWISE) from error

    def _keywords(self, get_kernel: Any) -> dict[str, Any]:
        known = inspect.signature(get_kernel).parameters
        pin: dict[str, Any] = {"revision": self.revision} if self.revision else {"version": self.version}
        return {**pin, **{name: value for name, value in _WHERE_KNOWN.items() if name in known}}

    @staticmethod
    def _agrees(env: Environment) -> None:
        """Raise RuntimeError if the code would not come from where `origin` says."""
        now = variables_now()
        changed = [name for name in sorted({*now, *env.variables}) if now.get(name) != env.variables.get(name)]
        if changed:
            raise RuntimeError(f"{' and '.join(changed)} changed after anyattn read the environment variables")
        constants = sys.modules.get("huggingface_hub.constants")
        seen = getattr(constants, "HF_HUB_OFFLINE", is_offline(env))
        if seen != is_offline(env):
            raise RuntimeError(f"HF_HUB_OFFLINE changed after huggingface_hub was imported and read it as {seen}")


def _unavailable(backend: str, need: str, error: Exception, hint: str) -> BackendUnavailableError:
    reason = Reason("broken_import", need, _one_line(error), hint)
    text = f"The attention backend {backend} can't be loaded from the Hub:\n  - {reason}"
    return BackendUnavailableError(text, backend=backend, reasons=(reason,))


def is_offline(env: Environment) -> bool:
    """Whether an environment variable keeps huggingface_hub off the network."""
    value = next((env.variables[name] for name in _OFFLINE if env.variables.get(name)), "")
    return value.upper() in _YES


def malformed(value: str | None) -> str | None:
    """Return the first entry of LOCAL_KERNELS that `kernels` refuses, or None."""
    entries = [] if value is None else value.split(":")
    return next((entry for entry in entries if "=" not in entry), None)


def _local_folders(value: str | None) -> dict[str, str]:
    entries = [] if value is None else value.split(":")
    return {repo: folder for repo, _, folder in (entry.partition("=") for entry in entries)}


_CURES: tuple[tuple[str, str], ...] = (
    ("changed after", "anyattn.reset() reads it again; what huggingface_hub read at its import needs a new process"),
    ("LOCAL_KERNELS", "fix the environment variable LOCAL_KERNELS, or unset it"),
    (
        "verify publisher trust",
        "the Hub couldn't be reached: fix the network and call anyattn.reset(), or set HF_HUB_OFFLINE=1 once the "
        "kernel is on this machine",
    ),
    (
        "trusted publisher",
        "anyattn never trusts a publisher that the Hub doesn't: read the code, and name your copy of it in "
        "LOCAL_KERNELS",
    ),
    (
        "Cannot find a local snapshot",
        "the Hub is offline (HF_HUB_OFFLINE): go online once to download the kernel, or name a folder in LOCAL_KERNELS",
    ),
    ("not available in the local cache", "go online once to download the kernel (unset HF_HUB_OFFLINE)"),
    (
        "Cannot find a build variant",
        "use a torch and CUDA that it has a build for, install the kernel's own package, or choose another backend",
    ),
    ("does not support the current device", "the build doesn't support this GPU: choose another backend"),
    ("requires kernels>=", "pip install --upgrade kernels"),
    ("unsupported kernel dependency", "pip install --upgrade kernels"),
    (
        "No kernel module found",
        "the folder holds no kernel: it needs build/<variant>/__init__.py",
    ),
    ("undefined symbol", "the build is for another torch: install the torch that it is for, or choose another backend"),
)
"""A part of a message of `kernels`, and what to do then; the first match counts."""

_OTHERWISE = "choose another backend, or name a build that works in LOCAL_KERNELS"
"""What to do if the cause isn't known."""

_MODULES_OF_NETWORKS = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")


def cure(error: BaseException) -> str:
    """Return what to do about a kernel that can't be loaded; empty if that isn't known."""
    text = str(error)
    asked = re.search(r"Please install with: (pip install \S+)", text)
    if asked is not None:
        return asked[1]
    for fragment, hint in _CURES:
        if fragment in text:
            return hint
    module = type(error).__module__.split(".")[0]
    if module.startswith(_MODULES_OF_NETWORKS) or isinstance(error, ConnectionError | TimeoutError):
        return (
            "the Hub wasn't reached, or doesn't have this revision: fix the network and call anyattn.reset(), "
            "or name a folder in LOCAL_KERNELS"
        )
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"the kernel needs the module {error.name}: install the package that brings it"
    return ""


def _one_line(error: BaseException) -> str:
    """Write an error on one line, with the error that `kernels` raised it for."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = ": ".join((type(error).__name__, *(["; ".join(lines)] if lines else [])))
    hidden = error.__context__ if error.__cause__ is None else error.__cause__
    if hidden is not None and not isinstance(hidden, KeyError):
        first = next(iter(str(hidden).strip().splitlines()), "")
        text += f" (after {type(hidden).__name__}: {first})"
    return text
