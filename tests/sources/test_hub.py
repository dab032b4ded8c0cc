"""Kernels from the Hub: what is asked of the package `kernels`, what is reported, and that nothing else downloads."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import anyattn
import doubles
from anyattn import environment
from anyattn.adapters.flash2 import Flash2Hub
from anyattn.backend.from_hub import FromHub
from anyattn.backend.protocol import Backend
from anyattn.cli.commands.doctor import command
from anyattn.cli.commands.doctor.variables import variables
from anyattn.environment import Environment
from anyattn.errors import BackendUnavailableError, UnsupportedCallError
from anyattn.selection import registry, resolve
from anyattn.sources import packages
from anyattn.sources.hub import HubKernel, cure
from anyattn.testing import Case, verify
from anyattn.types.decision import Preference
from anyattn.types.spec import AttentionSpec

SHA = "0123456789abcdef0123456789abcdef01234567"
KERNEL = HubKernel("owner/flash", ("flash_attn_func",), revision=SHA)
BRANCH = HubKernel("owner/flash", ("flash_attn_func",), version=0)
SPEC = AttentionSpec(2, 128, 128, 8, 8, 64, 64, torch.bfloat16, "cuda", 0.125)


def machine(kernels: str = "0.17.2", **found: str) -> Environment:
    env = environment.preset("h100", packages={"kernels": kernels} if kernels else None)
    return dataclasses.replace(env, variables=found)


@pytest.mark.parametrize("pins", [{}, {"revision": SHA, "version": 1}, {"revision": "v1"}, {"revision": SHA[:12]}])
def test_kernel_is_pinned_by_exactly_one_whole_commit_or_version(pins: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="owner/flash"):
        HubKernel("owner/flash", ("f",), **pins)


@pytest.mark.parametrize(("version", "code"), [("", "not_installed"), ("0.11.7", "wrong_version")])
def test_package_that_is_missing_or_too_old_is_a_reason_with_the_command(version: str, code: str) -> None:
    (reason,) = KERNEL.reasons(machine(version))
    assert reason.code == code
    assert reason.hint == "pip install 'kernels>=0.12'"


@pytest.mark.parametrize("value", ["", "folder", "owner/flash=/here:", "owner/flash=/a:/b"])
def test_malformed_local_kernels_is_refused_before_anything_is_loaded(value: str) -> None:
    (reason,) = KERNEL.reasons(machine(LOCAL_KERNELS=value))
    assert reason.code == "setting"
    assert "repo=folder" in reason.need
    assert "LOCAL_KERNELS" in reason.hint
    assert KERNEL.origin(machine(LOCAL_KERNELS=value)) == ""
    (row,) = variables({"LOCAL_KERNELS": value})
    assert row.state == "wrong"


def test_call_with_malformed_local_kernels_is_unavailable_with_the_cure() -> None:
    decision = anyattn.explain(SPEC, backend="flash2_hub", env=machine(LOCAL_KERNELS="nonsense"))
    assert decision.chosen is None
    env = dataclasses.replace(environment.detect(), packages={"kernels": "0.17.2"}, variables={"LOCAL_KERNELS": "x"})
    query = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16)
    with environment.supposed(env), pytest.raises(BackendUnavailableError, match="fix the environment variable"):
        anyattn.attention(query, query, query, backend="flash2_hub")


@pytest.mark.parametrize(
    ("kernel", "env", "said"),
    [
        (KERNEL, machine(), f"owner/flash at {SHA}, from the Hub"),
        (BRANCH, machine(), "owner/flash at version 0, a branch that may move, from the Hub"),
        (KERNEL, machine(HF_HUB_OFFLINE="1"), "with HF_HUB_OFFLINE the publisher's trust isn't checked"),
        (KERNEL, machine(TRANSFORMERS_OFFLINE="yes"), "with TRANSFORMERS_OFFLINE the publisher's trust isn't checked"),
        (KERNEL, machine(HF_HUB_OFFLINE="0"), f"owner/flash at {SHA}, from the Hub"),
        (KERNEL, machine("0.13.0"), "kernels 0.13.0 doesn't check the publisher's trust, 0.14 does"),
        (KERNEL, machine(KERNELS_CACHE="/kept"), "cached in /kept, by KERNELS_CACHE"),
        (KERNEL, machine(LOCAL_KERNELS="other/one=/there"), f"owner/flash at {SHA}, from the Hub"),
        (
            KERNEL,
            machine(LOCAL_KERNELS="other/one=/there:owner/flash=/here"),
            "the local folder /here, named by LOCAL_KERNELS for owner/flash, "
            "which bypasses the pinned revision and publisher trust",
        ),
    ],
)
def test_origin_says_where_the_code_comes_from(kernel: HubKernel, env: Environment, said: str) -> None:
    origin = kernel.origin(env)
    assert origin.endswith(said)
    if said.endswith("from the Hub"):
        assert "trust" not in origin


def test_decision_shows_the_origin_everywhere() -> None:
    decision = anyattn.explain(
        SPEC, backend="flash2_hub", env=machine(LOCAL_KERNELS="kernels-community/flash-attn2=/x")
    )
    assert decision.chosen == "flash2_hub"
    assert "local folder /x" in decision.origin
    assert decision.to_dict()["origin"] == decision.origin
    assert f"from: {decision.origin}" in str(decision)
    assert anyattn.explain(SPEC, backend="native", env=machine()).origin == ""


def test_environment_keeps_the_variables_and_tells_machines_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    environment.detect()
    monkeypatch.setenv("LOCAL_KERNELS", "a/b=/c")
    assert environment.detect().variables.get("LOCAL_KERNELS") != "a/b=/c", "what was seen stays until reset"
    anyattn.reset()
    assert environment.detect().variables["LOCAL_KERNELS"] == "a/b=/c"
    assert environment.detect().to_dict()["variables"]["LOCAL_KERNELS"] == "a/b=/c"
    assert hash(machine(LOCAL_KERNELS="a=b")) != hash(machine())
    assert machine(LOCAL_KERNELS="a=b") != machine()


# get_kernel as kernels 0.12, 0.14 to 0.17.0 and 0.17.2 have it.
def _of_012(repo_id: str, revision: Any = None, version: Any = None, user_agent: Any = None) -> dict[str, Any]:
    return {"revision": revision, "version": version}


def _of_014(
    repo_id: str,
    revision: Any = None,
    version: Any = None,
    backend: Any = None,
    user_agent: Any = None,
    trust_remote_code: Any = False,
) -> dict[str, Any]:
    return {"revision": revision, "version": version, "trust": trust_remote_code}


def _of_0172(
    repo_id: str,
    *,
    revision: Any = None,
    version: Any = None,
    backend: Any = None,
    user_agent: Any = None,
    trust_remote_code: Any = False,
    check_arch: Any = True,
) -> dict[str, Any]:
    return {"revision": revision, "version": version, "trust": trust_remote_code, "check_arch": check_arch}


@pytest.fixture
def with_get_kernel(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Give a way to have a module `kernels` with some get_kernel."""

    def install(get_kernel: Any) -> None:
        made = types.ModuleType("kernels")
        made.get_kernel = get_kernel  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "kernels", made)
        monkeypatch.delitem(sys.modules, "huggingface_hub.constants", raising=False)

    return install


@pytest.mark.parametrize("kernel", [KERNEL, BRANCH], ids=["revision", "version"])
@pytest.mark.parametrize("get_kernel", [_of_012, _of_014, _of_0172])
def test_every_version_of_kernels_gets_the_pin_and_never_more_trust(
    get_kernel: Any, kernel: HubKernel, with_get_kernel: Callable[[Any], None]
) -> None:
    asked: list[dict[str, Any]] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        assert arguments == ("owner/flash",)
        asked.append(get_kernel(*arguments, **options))
        return types.SimpleNamespace(flash_attn_func=len)

    watched.__signature__ = __import__("inspect").signature(get_kernel)  # type: ignore[attr-defined]
    with_get_kernel(watched)
    assert kernel.load("flash2_hub").flash_attn_func is len
    (seen,) = asked
    assert (seen["revision"], seen["version"]) == (kernel.revision or None, kernel.version)
    assert seen.get("trust", False) is False
    assert seen.get("check_arch", True) is True


class HfHubHTTPError(OSError):
    """Stands for huggingface_hub's, which counts by the module that it is from."""


HfHubHTTPError.__module__ = "huggingface_hub.errors"

FAILURES = [
    (ValueError("Invalid LOCAL_KERNELS entry: x. Expected format: repo_id_1=path_1"), "fix the environment variable"),
    (
        FileNotFoundError(
            "Cannot find a build variant for this system in owner/flash (revision: x):\n\n"
            "torch212-cxx11-cu126-x86_64-linux: Torch version (2.12) does not match environment Torch version (2.13)"
        ),
        "use a torch and CUDA that it has a build for",
    ),
    (FileNotFoundError("Cannot find a local snapshot for owner/flash (revision: x)."), "go online once"),
    (ValueError("Version 1 of 'owner/flash' is not available in the local cache"), "go online once"),
    (
        RuntimeError("Kernel 'flash' variant 'v' does not support the current device: CUDA capability 7.5"),
        "choose another backend",
    ),
    (RuntimeError("Kernel 'flash' variant 'v' requires kernels>=0.18"), "pip install --upgrade kernels"),
    (
        ImportError("Kernel module `f` requires Python dependency `einops`. Please install with: pip install einops"),
        "pip install einops",
    ),
    (ValueError("Kernel module `f` uses unsupported kernel dependency: new"), "pip install --upgrade kernels"),
    (ValueError("Kernel repository 'owner/flash' is not from a trusted publisher. Set"), "anyattn never trusts"),
    (ValueError("Kernel repository 'owner/flash' could not verify publisher trust status."), "fix the network"),
    (ImportError("_flash.abi3.so: undefined symbol: _ZN3c10"), "the build is for another torch"),
    (HfHubHTTPError("404 Client Error"), "fix the network"),
    (ConnectionError("no route to host"), "fix the network"),
    (TimeoutError("timed out"), "fix the network"),
    (ModuleNotFoundError("No module named 'cutlass'", name="cutlass"), "install the package that brings it"),
]


@pytest.mark.parametrize(("error", "hint"), FAILURES, ids=lambda value: type(value).__name__)
def test_each_failure_is_unavailable_with_what_was_said_and_a_cure(
    error: Exception, hint: str, with_get_kernel: Callable[[Any], None]
) -> None:
    def get_kernel(repo_id: str, *, revision: str) -> Any:
        raise error

    with_get_kernel(get_kernel)
    with pytest.raises(BackendUnavailableError) as caught:
        KERNEL.load("flash2_hub")
    assert caught.value.backend == "flash2_hub"
    assert caught.value.__cause__ is error
    (reason,) = caught.value.reasons
    assert all(line in reason.got for line in str(error).splitlines())
    assert "\n" not in reason.got
    assert hint in reason.hint
    assert str(reason) in str(caught.value)


def test_error_that_is_unknown_gets_no_invented_cure() -> None:
    assert cure(RuntimeError("something else")) == ""


def test_missing_function_is_named(with_get_kernel: Callable[[Any], None]) -> None:
    with_get_kernel(lambda repo_id, revision: types.SimpleNamespace(other=len))
    with pytest.raises(BackendUnavailableError, match="has no function flash_attn_func"):
        KERNEL.load("flash2_hub")


def test_network_error_that_kernels_hides_is_shown(with_get_kernel: Callable[[Any], None]) -> None:
    def get_kernel(repo_id: str, *, revision: str) -> Any:
        try:
            raise ConnectionError("Name or service not known")
        except ConnectionError:
            raise ValueError("could not verify publisher trust status")  # noqa: B904 - as kernels does

    with_get_kernel(get_kernel)
    with pytest.raises(BackendUnavailableError, match="after ConnectionError: Name or service not known"):
        KERNEL.load("flash2_hub")


def test_variable_that_changed_since_it_was_reported_stops_the_load(
    with_get_kernel: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment.detect()
    monkeypatch.setenv("LOCAL_KERNELS", "owner/flash=/elsewhere")
    with_get_kernel(lambda repo_id, revision: types.SimpleNamespace(flash_attn_func=len))
    with pytest.raises(BackendUnavailableError, match=r"LOCAL_KERNELS changed after .*anyattn\.reset\(\)"):
        KERNEL.load("flash2_hub")
    anyattn.reset()
    assert KERNEL.load("flash2_hub").flash_attn_func is len


def test_offline_that_huggingface_hub_does_not_know_of_stops_the_load(
    with_get_kernel: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_get_kernel(lambda repo_id, revision: types.SimpleNamespace(flash_attn_func=len))
    constants = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub.constants", constants)  # type: ignore[arg-type]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    anyattn.reset()
    with pytest.raises(BackendUnavailableError, match="read it as False"):
        KERNEL.load("flash2_hub")
    constants.HF_HUB_OFFLINE = True
    assert KERNEL.load("flash2_hub").flash_attn_func is len


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Have flash2_hub usable on the CPU, through its double, and note each load."""
    seen: list[str] = []
    with doubles.installed("flash2_hub") as backend:
        load = backend.load

        def watched() -> None:
            seen.append(backend.name)
            load()

        monkeypatch.setattr(backend, "load", watched, raising=False)
        yield seen


def test_nothing_is_loaded_where_the_backend_is_not_named(loads: list[str]) -> None:
    query = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16)
    rows = {row.name: row for row in anyattn.backends()}
    assert rows["flash2_hub"].usable
    anyattn.attention(query, query, query)
    anyattn.attention(query, query, query, backend="auto")
    anyattn.attention(query, query, query, backend=["auto", "native"])
    decision = anyattn.explain(query, query, query, backend="flash2_hub")
    assert decision.chosen == "flash2_hub"
    report = verify(device="cpu", cases=[Case(dtype="bfloat16")], laws=["unchanged"])
    (row,) = [row for row in report.backends if row.backend == "flash2_hub"]
    assert row.status == "not verified"
    assert [reason.code for reason in row.unusable] == ["not_named"]
    assert loads == []


@pytest.mark.parametrize("wish", ["flash2_hub", "flash_hub", ["flash2_hub", "native"], ["auto", "flash2_hub"]])
def test_naming_the_backend_is_asking_for_it(wish: str | list[str], loads: list[str]) -> None:
    query = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16)
    with anyattn.record() as calls:
        anyattn.attention(query, query, query, backend=wish)
    chosen = "native" if isinstance(wish, list) and wish[0] == "auto" else "flash2_hub"
    assert calls[0].chosen == chosen
    assert loads == ["flash2_hub"] * (chosen == "flash2_hub")
    assert verify("flash2_hub", device="cpu", cases=0, laws=["unchanged"]).passed


def test_auto_does_not_take_it_unless_it_is_named() -> None:
    known = dict(registry.known(registry.built_in_names()))
    env = machine()
    decision = resolve.resolve(SPEC, env, Preference(("auto",), "prefer", "backend="), known)
    assert decision.chosen == "native"
    named = Preference(("flash2_hub", "auto"), "prefer", "backend=")
    assert resolve.resolve(SPEC, env, named, known).chosen == "flash2_hub"


def test_third_partys_backend_that_downloads_is_left_out_too() -> None:
    class Fetched(Backend):
        name = "fetched"
        declarations = {"cuda": registry.get("flash2").declarations["cuda"]}  # type: ignore[union-attr]
        downloads = True

    wanted, _ = resolve.order("cuda", [Fetched()])
    assert "fetched" in wanted, "auto takes third parties' backends"
    decision = resolve.resolve(SPEC, machine(), Preference(("auto",), "prefer", "backend="), {"fetched": Fetched()})
    assert decision.chosen is None


def test_doctor_tries_it_where_it_is_named_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Any] = []

    def run_all(found: Any, *, timeout: float, finished: Any) -> dict[str, Any]:
        jobs[:] = found
        return {}

    monkeypatch.setattr(command, "run_all", run_all)
    with environment.supposed(machine()):
        report = command.doctor(environ={})
        assert "native" in {job.name for job in jobs}
        assert "flash2_hub" not in {job.name for job in jobs}
        (row,) = [row for row in report.backends if row.name == "flash2_hub"]
        assert (row.state, row.origin) == ("not tried", Flash2Hub.hub.origin(machine()))
        command.doctor(["flash_hub"], environ={})
        assert [(job.name, job.named) for job in jobs if job.name] == [("flash2_hub", True)]


def test_doctors_child_downloads_nothing_that_was_not_named(loads: list[str]) -> None:
    from anyattn.cli.commands.doctor import trial

    events: list[dict[str, Any]] = []
    trial._try_backend("flash2_hub", True, events.append)
    assert [event["event"] for event in events] == ["begin", "described"]
    assert loads == []
    trial._try_backend("flash2_hub", True, events.append, named=True)
    tried = [event["trial"] for event in events if event["event"] == "end"]
    assert [(trial["step"], trial["outcome"]) for trial in tried] == [(step, "passed") for step in trial.STEPS]
    assert loads == ["flash2_hub"]


def test_failing_load_is_passed_over_in_a_list_and_raised_for_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_kernel(repo_id: str, *, revision: str) -> Any:
        raise FileNotFoundError("Cannot find a build variant for this system")

    query = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16)
    with doubles.installed("flash2_hub"):
        monkeypatch.setattr(sys.modules["kernels"], "get_kernel", get_kernel)
        with pytest.raises(BackendUnavailableError, match="use a torch and CUDA"):
            anyattn.attention(query, query, query, backend="flash2_hub")
        with pytest.warns(anyattn.AnyattnWarning, match="passed over"), anyattn.record() as calls:
            anyattn.attention(query, query, query, backend=["flash2_hub", "native"])
        assert calls[0].chosen == "native"


def test_constants_are_pinned_and_come_from_diffusers_repositories() -> None:
    found = {name: backend.hub for name, backend in registry.known(registry.BUILTIN) if isinstance(backend, FromHub)}
    assert set(found) == {name for name in registry.BUILTIN if name.endswith("_hub")}
    for kernel in found.values():
        assert kernel.source
        assert kernel.functions
        assert ("may move" in kernel.pin) is not bool(kernel.revision)
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch", reason="diffusers is an extra of anyattn")
    theirs = {config.repo_id for config in dispatch._HUB_KERNELS_REGISTRY.values()}
    assert {kernel.repo for kernel in found.values()} <= theirs
    for kernel in found.values():
        (version, *_), functions = zip(
            *(
                (c.version, c.function_attr)
                for c in dispatch._HUB_KERNELS_REGISTRY.values()
                if c.repo_id == kernel.repo
            ),
            strict=True,
        )
        assert set(functions) <= set(kernel.functions)
        assert kernel.version in (None, version)


def test_functions_go_with_the_double() -> None:
    with doubles.installed("flash2_hub") as backend:
        backend.load()
        assert "flash2_hub" in packages.FUNCTIONS
    assert "flash2_hub" not in packages.FUNCTIONS


def test_refused_call_names_others_and_loads_nothing(loads: list[str]) -> None:
    query = torch.randn(1, 8, 2, 16)
    with pytest.raises(UnsupportedCallError, match="dtype"):
        anyattn.attention(query, query, query, backend="flash2_hub")
    assert loads == []


@pytest.mark.parametrize("variable", ["ANYATTN_BACKEND", "DIFFUSERS_ATTN_BACKEND"])
def test_environment_variable_that_names_it_loads_it_at_the_first_call(
    variable: str, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "flash_hub")
    anyattn.scopes.defaults.forget()
    query = torch.randn(1, 8, 2, 16, dtype=torch.bfloat16)
    anyattn.attention(query, query, query)
    anyattn.attention(query, query, query)
    assert loads == ["flash2_hub"]


def test_doctor_reports_local_kernels_and_the_origin(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from anyattn.cli import render
    from anyattn.cli.views.doctor import show

    monkeypatch.setenv("COLUMNS", "80")
    local = {"LOCAL_KERNELS": "kernels-community/flash-attn2=/here"}
    with environment.supposed(machine(**local)):
        report = command.doctor(try_kernels=False, environ=local)
    assert report.exit_code == 0
    assert [(row.name, row.state) for row in report.variables] == [("LOCAL_KERNELS", "in force")]
    render.report(report, show, False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "neither the revision nor the publisher checked" in shown
    assert "anyattn doctor NAME flash2_hub the local folder /here, named by LOCAL_KERNELS" in shown


def test_malformed_local_kernels_is_reported_and_leaves_the_default_alone() -> None:
    with environment.supposed(machine(LOCAL_KERNELS="x")):
        report = command.doctor(try_kernels=False, environ={"LOCAL_KERNELS": "x"})
    assert report.exit_code == 0
    (row,) = [row for row in report.backends if row.name == "flash2_hub"]
    assert row.state == "unusable"
    assert row.cure == "fix the environment variable LOCAL_KERNELS, or unset it"
