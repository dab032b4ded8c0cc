"""A kernel's package that is there and can't be imported: the reason and the cure, once, wherever one looks."""

from __future__ import annotations

import json
import sys
import types
import warnings

import pytest
import torch
from breaking import (
    FROM_HUB,
    IMPORT_ERRORS,
    NAMES,
    WAYS,
    Fetches,
    admitted,
    broken_import,
    fetching,
    nothing_installed,
    preferred,
)

import anyattn
import doubles
from anyattn import environment
from anyattn.backend.from_hub import FromHub
from anyattn.cli.commands.doctor import probe, trial
from anyattn.selection import registry
from anyattn.selection.faults import one_line
from anyattn.sources import hub
from anyattn.types.reasons import Reason


def _one_broken_import(reasons: tuple[Reason, ...], error: Exception) -> None:
    (reason,) = reasons
    assert reason.code == "broken_import"
    # An adapter may add what it knows of the cause.
    assert reason.got.startswith(one_line(error))
    assert "\n" not in str(reason)
    assert reason.hint


@pytest.mark.parametrize("error", IMPORT_ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("name", "way"), WAYS)
def test_explicit_name_raises_with_the_reason_and_the_cure_and_never_imports_again(
    name: str, way: str, error: Exception
) -> None:
    with broken_import(name, error, way) as finder:
        inputs = admitted(name)
        causes = set()
        for call in (anyattn.attention, anyattn.attention, anyattn.scaled_dot_product_attention):
            with pytest.raises(anyattn.BackendUnavailableError) as caught:
                call(*inputs, backend=name)
            _one_broken_import(caught.value.reasons, error)
            assert str(caught.value).count(one_line(error)) == 1
            cause: BaseException = caught.value
            while cause.__cause__ is not None:
                cause = cause.__cause__
            causes.add(cause)
        assert causes == {error}
        # Imported once more, an extension may say something else: that its operators are there already.
        assert finder.tried == 1
        anyattn.reset()
        with pytest.raises(anyattn.BackendUnavailableError):
            anyattn.attention(*inputs, backend=name)
        assert finder.tried == 2


@pytest.mark.parametrize("error", IMPORT_ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("name", "way"), WAYS)
def test_broken_import_shows_in_backends_and_explain_once_seen(name: str, way: str, error: Exception) -> None:
    with broken_import(name, error, way):
        inputs = admitted(name)
        assert {row.name: row for row in anyattn.backends()}[name].usable
        with pytest.raises(anyattn.BackendUnavailableError):
            anyattn.attention(*inputs, backend=name)
        row = {row.name: row for row in anyattn.backends()}[name]
        assert row.installed
        assert not row.usable
        _one_broken_import(row.reasons, error)
        for wish in (name, [name, "native"], "native"):
            decision = anyattn.explain(*inputs, backend=wish)
            found = tuple(reason for reason in decision.reasons(name) if reason.code != "precision")
            _one_broken_import(found, error)
            assert decision.chosen == (None if wish == name else "native")
        # It says nothing of another machine.
        other = environment.preset("h100", packages=doubles.double_of(name).packages)
        codes = [reason.code for row in anyattn.backends(other) for reason in row.reasons]
        assert "broken_import" not in codes
        anyattn.reset()
        assert {row.name: row for row in anyattn.backends()}[name].usable


@pytest.mark.parametrize(("name", "way"), WAYS)
@pytest.mark.parametrize("call", ["attention", "sdpa", "plan"])
def test_list_goes_on_to_the_next_and_says_so_once(name: str, way: str, call: str) -> None:
    error = IMPORT_ERRORS[0]
    with broken_import(name, error, way), preferred(name, "native_math"):
        q, k, v = admitted(name)
        wanted = anyattn.attention(q, k, v, backend="native_math")
        with warnings.catch_warnings(record=True) as said, anyattn.record() as calls:
            warnings.simplefilter("always")
            for _ in range(3):
                if call == "attention":
                    out = anyattn.attention(q, k, v)
                elif call == "sdpa":
                    heads = (tensor.transpose(1, 2) for tensor in (q, k, v))
                    out = anyattn.scaled_dot_product_attention(*heads).transpose(1, 2)
                else:
                    out = anyattn.plan(anyattn.explain(q, k, v).spec)(q, k, v)
                assert torch.equal(out, wanted)
        ours = [warning for warning in said if issubclass(warning.category, anyattn.AnyattnWarning)]
        assert len(ours) == 1
        text = str(ours[0].message)
        assert text.startswith(f"The attention backend {name} can't be imported")
        assert one_line(error) in text
        assert text.endswith("native_math runs instead.")
        assert ours[0].filename == __file__, "a warning points to the line that called"
        assert [decision.chosen for decision in calls] == ([] if call == "plan" else ["native_math"] * 3)


def test_list_says_what_it_goes_past_even_where_an_explicit_call_met_it_first() -> None:
    with broken_import("flash2", IMPORT_ERRORS[1]):
        inputs = admitted("flash2")
        with pytest.raises(anyattn.BackendUnavailableError):
            anyattn.attention(*inputs, backend="flash")
        with pytest.warns(anyattn.AnyattnWarning, match=r"backend flash2 can't be imported.*libcudart"):
            anyattn.attention(*inputs, backend=["flash", "native"])


def test_backend_that_says_itself_that_it_cannot_be_loaded_is_gone_past_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def load() -> None:
        tried.append(1)
        raise anyattn.BackendUnavailableError("there is no licence", backend="flash2")

    with doubles.installed("flash2") as backend:
        inputs = admitted("flash2")
        monkeypatch.setattr(backend, "load", load)
        with pytest.warns(anyattn.AnyattnWarning, match="flash2 can't be imported .* there is no licence"):
            anyattn.attention(*inputs, backend=["flash2", "native"])
        with pytest.raises(anyattn.BackendUnavailableError, match="there is no licence"):
            anyattn.attention(*inputs, backend="flash2")
    assert tried == [1]


def test_list_of_nothing_but_broken_kernels_is_refused_with_every_reason() -> None:
    with broken_import("flash2", IMPORT_ERRORS[0]):
        inputs = admitted("flash2")
        with pytest.raises(anyattn.UnsupportedCallError, match=r"flash2:\n.*broken_import.*undefined symbol"):
            anyattn.attention(*inputs, backend=["flash2"])


@pytest.mark.parametrize("required", [True, False])
def test_compiled_code_goes_on_to_the_next_or_says_why_not(required: bool) -> None:
    torch._dynamo.reset()
    with broken_import("flash2", IMPORT_ERRORS[0]):
        inputs = admitted("flash2")
        wish = "flash2" if required else ("flash2", "native_math")
        run = torch.compile(
            lambda q, k, v: anyattn.attention(q, k, v, backend=wish), fullgraph=True, backend="aot_eager"
        )
        if required:
            with pytest.raises(Exception, match=r"broken_import.*undefined symbol"):
                run(*inputs)
            return
        with pytest.warns(anyattn.AnyattnWarning, match="flash2 can't be imported"):
            out = run(*inputs)
        assert torch.equal(out, anyattn.attention(*inputs, backend="native_math"))
    torch._dynamo.reset()


def test_namespace_without_the_functions_is_a_broken_import_that_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with doubles.installed("flash2"):
        inputs = admitted("flash2")
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
        with pytest.raises(anyattn.BackendUnavailableError) as caught:
            anyattn.attention(*inputs, backend="flash_varlen")
        (reason,) = caught.value.reasons
        assert reason.code == "broken_import"
        assert "flash_attn_func and flash_attn_varlen_func" in reason.got
        assert "flash-attn-4" in reason.got


@pytest.mark.parametrize("name", FROM_HUB)
def test_kernel_of_the_hub_without_the_functions_is_a_broken_import_that_names_them(name: str) -> None:
    with fetching(name, Fetches(gives=types.ModuleType("fetched"))) as asked:
        inputs = admitted(name)
        for _ in range(2):
            with pytest.raises(anyattn.BackendUnavailableError) as caught:
                anyattn.attention(*inputs, backend=name)
            (reason,) = caught.value.reasons
            backend = registry.get(name)
            assert isinstance(backend, FromHub)
            assert reason.code == "broken_import"
            assert " and ".join(backend.hub.functions) in reason.got
            assert backend.hub.repo in reason.got
            assert reason.hint
        assert asked.tried == 1


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_doctor_tells_a_broken_import_once_with_its_cure(name: str, way: str) -> None:
    from anyattn.cli.commands.doctor import command
    from anyattn.cli.commands.doctor.catalogue import listed

    error = IMPORT_ERRORS[2]
    events: list[dict[str, object]] = []
    with broken_import(name, error, way):
        # What would be downloaded is tried where it is named alone.
        trial._try_backend(name, True, events.append, named=name in FROM_HUB)
    lines = "\n".join(map(json.dumps, [*events, {"event": "done"}]))
    found = probe._read(probe.Job(name), lines, 0, None, ())
    assert found.trials == ()
    env = environment.preset("h100")
    (row,) = (row for row in listed(env) if row.name == name)
    report = command._backend(row, found, env)
    assert report.state == "unusable"
    assert [reason.code for reason in report.reasons] == ["broken_import"]
    assert report.reasons[0].got == (hub._one_line(error) if name in FROM_HUB else one_line(error))
    assert report.cure == report.reasons[0].hint != ""


def test_doctor_tells_of_a_package_of_ours_that_kills_the_process_at_import() -> None:
    from anyattn.cli.commands.doctor import command
    from anyattn.cli.commands.doctor.catalogue import Listed

    described = '{"event": "described", "family": "flash2", "exact": true, "reasons": []}'
    text = f'{{"event": "begin", "device": "", "step": "import"}}\n{described}\n'
    text += '{"event": "begin", "device": "", "step": "import"}\n'
    found = probe._read(probe.Job("flash2"), text, -11, None, ("Fatal Python error",))
    row = Listed("flash2", "flash2", "flash-attn", "2.8.3", "flash-attn", "pip install flash-attn", True, ())
    report = command._backend(row, found, environment.preset("h100"))
    assert report.state == "unusable"
    assert report.reasons[0].code == "broken_import"
    assert "SIGSEGV" in report.reasons[0].got
    assert report.cure


@pytest.mark.parametrize("version", ["2.5.9", "3.0.0", "not-a-version"])
def test_version_that_does_not_serve_is_told_with_one_that_does(version: str) -> None:
    env = environment.preset("h100", packages={"flash-attn": version})
    q = torch.randn(1, 8, 2, 64, dtype=torch.bfloat16)
    spec = anyattn.explain(q, q, q).spec.replace(device_type="cuda", device_index=0)
    row = {row.name: row for row in anyattn.backends(env)}["flash2"]
    for (reason,) in (row.reasons, anyattn.explain(spec, backend="flash2", env=env).reasons("flash2")):
        assert (reason.code, reason.got) == ("wrong_version", version)
        # Without the upper bound pip would keep 3.0.0, and call that done.
        assert "'flash-attn>=2.6.3,<3'" in reason.hint
    from anyattn.cli.commands.doctor.catalogue import cure

    assert "'flash-attn>=2.6.3,<3'" in cure(row.reasons, "pip install flash-attn", env)


@pytest.mark.parametrize(("distribution", "install"), [("a-b", "pip install --pre a-b"), ("a-b", "get 'a-b>1'")])
def test_command_that_cures_a_wrong_version_names_those_that_serve(distribution: str, install: str) -> None:
    from anyattn.sources.packages import Package

    package = Package(distribution, "a_b", (), ">=2,<3", install)
    (reason,) = package.reasons(environment.preset("h100", packages={"a-b": "4.0"}))
    assert reason.hint.endswith("'a-b>=2,<3'")
    elsewhere = Package(distribution, "a_b", (), ">=2,<3", "build it from a-b-c")
    (reason,) = elsewhere.reasons(environment.preset("h100", packages={"a-b": "4.0"}))
    assert reason.hint == "build it from a-b-c; it has to be 'a-b>=2,<3'"


@pytest.mark.parametrize("name", NAMES)
def test_kernel_that_is_not_installed_is_unavailable_with_its_cure(name: str) -> None:
    with nothing_installed():
        _is_unavailable_with_its_cure(name)


def _is_unavailable_with_its_cure(name: str) -> None:
    with pytest.raises(anyattn.BackendUnavailableError) as caught:
        anyattn.attention(*torch.randn(3, 1, 8, 2, 64, dtype=torch.bfloat16), backend=name)
    assert any(reason.hint for reason in caught.value.reasons)
    assert len({str(reason) for reason in caught.value.reasons}) == len(caught.value.reasons)
    out = anyattn.attention(*torch.randn(3, 1, 8, 2, 64), backend=[name, "native"])
    assert out.shape == (1, 8, 2, 64)
