"""The doctor in a process of its own: whatever a kernel does, the report comes, and is right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import cli_sabotage as sabotage
import pytest
from cli_process import environ_of, install, run, start

from anyattn.cli.commands.doctor.probe import Job, run_all
from anyattn.cli.commands.doctor.trial import STEPS

posix = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
TIMEOUT = 20


@pytest.fixture(scope="module")
def sick(tmp_path_factory):
    """The doctor's answer on a machine where another package brings every sabotaged backend."""
    path = install(
        tmp_path_factory.mktemp("sick"),
        "sabotage",
        {kind.name: f"cli_sabotage:{kind.__name__}" for kind in sabotage.ALL},
    )
    names = [kind.name for kind in sabotage.ALL]
    return run("doctor", *names, "--json", "--timeout", str(TIMEOUT), PYTHONPATH=path)


@pytest.fixture(scope="module")
def rows(sick):
    return {row["name"]: row for row in json.loads(sick.stdout)["backends"]}


def outcomes(row):
    return {trial["step"]: trial["outcome"] for trial in row["trials"]}


def test_stdout_is_one_json_document_whatever_kernels_print(sick):
    assert json.loads(sick.stdout)["ok"] is True
    assert "hello" not in sick.stdout


def test_default_works_beside_sick_backends(sick):
    assert sick.returncode == 0
    found = json.loads(sick.stdout)["default"]
    assert found["works"]
    assert found["tried"]
    assert (found["names"], found["chosen"], found["kernel"], found["detail"]) == (["native"], "native", "sdpa", "")


@posix
@pytest.mark.parametrize(
    ("name", "step", "signal_name"),
    [
        ("aborts", "forward", "SIGABRT"),
        ("segfaults", "forward", "SIGSEGV"),
        ("aborts_in_backward", "backward", "SIGABRT"),
    ],
)
def test_backend_that_kills_its_process_is_reported_with_the_signal(rows, name, step, signal_name):
    row = rows[name]
    assert row["state"] == "fails"
    assert outcomes(row)[step] == "died"
    assert row["ended"] == f"aborted by signal {signal_name} during {step} on cpu"
    assert any("cli_sabotage.py" in line for line in row["output"]), "the report shows where it happened"


@posix
def test_steps_before_the_fatal_one_are_kept(rows):
    assert outcomes(rows["aborts_in_backward"]) == {"forward": "passed", "padding": "passed", "backward": "died"}


def test_backend_that_hangs_is_ended_and_shown_where(rows):
    row = rows["hangs"]
    assert (row["state"], outcomes(row)) == ("fails", {"forward": "hung"})
    assert row["ended"] == f"took more than {TIMEOUT} s and was ended during forward on cpu"
    assert any("cli_sabotage.py" in line for line in row["output"])


def test_process_that_leaves_early_with_code_0_has_not_passed(rows):
    assert outcomes(rows["leaves"]) == {"forward": "died"}
    assert rows["leaves"]["ended"].startswith("ended before it was done, with exit code 0")


def test_exception_is_reported_by_its_first_line(rows):
    details = {trial["detail"] for trial in rows["raises"]["trials"]}
    assert details == {"RuntimeError: no kernel image is available"}
    assert outcomes(rows["raises"]) == dict.fromkeys(STEPS, "raised")


@pytest.mark.parametrize("name", ["wrong", "gives_nan"])
def test_wrong_result_is_reported_as_wrong(rows, name):
    assert outcomes(rows[name])["forward"] == "wrong"
    assert float(rows[name]["trials"][0]["error"]) > 1


def test_right_backend_of_another_package_works(rows):
    row = rows["chatty"]
    assert row["state"] == "works"
    assert (row["package"], row["found"]) == ("sabotage-dist", "3.2.1")
    assert set(outcomes(row).values()) == {"passed"}


def test_only_the_backends_named_are_tried(rows):
    assert {name for name, row in rows.items() if row["trials"]} == {kind.name for kind in sabotage.ALL}
    assert rows["native"]["state"] == "not tried"


@posix
def test_package_that_aborts_when_imported_is_named_and_the_rest_reported(tmp_path):
    path = install(tmp_path, "fatal", {"fatal": "fatal:Fatal"})
    (tmp_path / "fatal.py").write_text("import os\nos.abort()\n")
    answer = run("doctor", "native", "--json", PYTHONPATH=path)
    found = json.loads(answer.stdout)
    rows = {row["name"]: row for row in found["backends"]}
    assert rows["native"]["state"] == "works"
    assert rows["fatal"]["state"] == "unusable"
    assert rows["fatal"]["reasons"][0]["code"] == "broken_import"
    assert "SIGABRT" in rows["fatal"]["reasons"][0]["got"]
    assert "uninstall fatal-dist" in rows["fatal"]["cure"]
    # What a program gets is what counts: while anyattn imports such a package with its first call, no call works.
    assert found["default"]["works"] is (answer.returncode == 0)
    if not found["default"]["works"]:
        assert "fatal" in found["default"]["detail"]


def test_package_that_raises_when_imported_is_named(tmp_path):
    path = install(tmp_path, "broken", {"broken": "broken:Broken"})
    (tmp_path / "broken.py").write_text("raise OSError('undefined symbol: _ZN3c10')\n")
    answer = run("doctor", "--no-try", PYTHONPATH=path)
    assert answer.returncode == 0, "native is usable by all that is declared"
    assert "undefined symbol" in answer.stdout
    assert "uninstall broken-dist" in answer.stdout


@posix
def test_interrupted_doctor_leaves_no_process_behind(tmp_path):
    path = install(tmp_path, "one", {"hangs": "cli_sabotage:Hangs"})
    noted = tmp_path / "pid"
    # On a loaded machine importing torch alone may take a minute; what ends the child has to be the interrupt.
    process = start("doctor", "hangs", "--timeout", "900", PYTHONPATH=path, SABOTAGE_PID=str(noted))
    try:
        child = _pid_noted(noted, lambda: process.poll() is None)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode not in (0, 1)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def _pid_noted(path, waits):
    deadline = time.monotonic() + 300
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, "the child never came to its kernel"
        assert waits(), "the doctor ended before its child came to the kernel"
        time.sleep(0.05)
    return int(path.read_text())


@posix
def test_interrupt_while_children_are_started_leaves_none_behind(tmp_path, monkeypatch):
    path = install(tmp_path, "one", {"hangs": "cli_sabotage:Hangs"})
    noted = tmp_path / "pid"
    environ = environ_of({"PYTHONPATH": path, "SABOTAGE_PID": str(noted)})
    monkeypatch.setattr(sys, "path", [*path.split(os.pathsep), *sys.path])
    found = []

    class Interrupted(list):
        def __iter__(self):
            yield from super().__iter__()
            found.extend((_pid_noted(noted, lambda: True), time.monotonic()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(Interrupted([Job("hangs", environ=environ)]), timeout=100)
    assert time.monotonic() - found[1] < 90, "its own time limit ended the child, not the interrupt"
    with pytest.raises(ProcessLookupError):
        os.kill(found[0], 0)


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_one_line_says_what_to_install(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from anyattn.cli import main; main()"
    answer = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.splitlines()[-1].endswith("pip install 'anyattn[cli]'")
    assert len(answer.stderr.splitlines()) == 1


def test_terminal_that_lacks_a_letter_gets_the_report_all_the_same(tmp_path):
    path = install(tmp_path, "accents", {"accents": "accents:Any"})
    (tmp_path / "accents.py").write_text("raise OSError('bibliothèque introuvable')\n")
    answer = run("doctor", "--no-try", PYTHONPATH=path, PYTHONIOENCODING="ascii")
    assert answer.returncode == 0, answer.stderr
    assert "biblioth?que introuvable" in answer.stdout
