"""`anyattn verify`: what the laws find reaches the person, the program and the exit code."""

from __future__ import annotations

import importlib
import json

import pytest
from typer.testing import CliRunner

from anyattn.cli.app import app
from anyattn.cli.commands import verify as command
from anyattn.types.reasons import Reason

# The package gives a function of the same name.
verify = importlib.import_module("anyattn.testing.verify")

LINE = "from anyattn.testing import Case, check; check('right', 'flex', Case(batch=1, seqlen_q=21, dtype='float64'))"
ABSENT = (Reason("no_device", "a cuda device", "cpu [not markup]"),)


def invoke(*arguments):
    return CliRunner().invoke(app, ["verify", *arguments], env={"COLUMNS": "80"})


def law(number=1, name="right", run=3, failures=()):
    return verify.LawReport(name, number, "is right", run, run - len(failures), 2, 0.5, (("mask", 2),), failures)


def reported(*backends):
    return verify.VerifyReport("cpu", "a cpu", "2.13.0", 0, backends)


PASSED = verify.BackendReport("native", (law(), law(2, "rejected")))
BROKEN = verify.BackendReport("flex", (law(failures=(verify.Failure("is off by 7", LINE, 7.0),)), law(2, "rejected")))
IDLE = verify.BackendReport("lazy", (law(run=0), law(2, "rejected")))
DOUBLE = verify.BackendReport("flash2", (law(), law(2, "rejected")), ran="contract double")
NOT_HERE = verify.BackendReport("native_cudnn", unusable=ABSENT)


@pytest.fixture
def found(monkeypatch):
    """Have the suite report what a test wants, and note what it was asked."""
    asked = {}

    def report(*backends):
        def fake(backend, *, device, cases, laws, seed, progress):
            asked.update(backend=backend, device=device, cases=cases, laws=laws, seed=seed)
            progress("native", "right", 0, 1)
            return reported(*backends)

        monkeypatch.setattr(verify, "verify", fake)
        return asked

    return report


@pytest.mark.parametrize(
    ("backends", "named", "code"),
    [
        ((PASSED,), False, 0),
        ((PASSED, NOT_HERE), False, 0),
        ((PASSED, NOT_HERE), True, 1),
        ((PASSED, BROKEN), False, 1),
        ((PASSED, IDLE), False, 1),
        ((NOT_HERE,), False, 1),
        ((), False, 1),
    ],
)
def test_exit_code_is_0_only_if_all_were_verified_and_passed(found, backends, named, code):
    found(*backends)
    names = [row.backend for row in backends] if named else []
    assert invoke(*names).exit_code == code
    answer = invoke(*names, "--json")
    assert answer.exit_code == code
    assert json.loads(answer.stdout)["ok"] is (code == 0)


def test_people_read_the_table_the_breach_and_the_line_to_copy(found):
    found(PASSED, BROKEN, NOT_HERE)
    lines = invoke().stdout.splitlines()
    assert any(line.split() == ["native", "3", "3", "passed"] for line in lines)
    assert any(line.split() == ["flex", "1/3", "3", "failed"] for line in lines)
    assert any("is off by 7" in line for line in lines)
    assert any(line.strip() == LINE for line in lines), "a line to copy is one line"
    assert any("cpu [not markup]" in line for line in lines)


def test_options_reach_the_suite(found):
    asked = found(PASSED)
    assert invoke("flex", "native", "--cases", "7", "--law", "right", "--seed", "3", "--device", "cpu").exit_code == 0
    assert asked == {"backend": ("flex", "native"), "device": "cpu", "cases": 7, "laws": ("right",), "seed": 3}
    steps = []
    command.verify(progress=steps.append)
    assert asked["backend"] is None
    assert steps[0].text == "native: right"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("flsh",), "Did you mean"),
        (("--device", "nowhere"), "--device"),
        (("--device", "cpu:0"), "write cpu"),
        (("--law", "rigth"), "right"),
        (("--cases", "-1"), "--cases"),
    ],
)
def test_bad_usage_is_code_2(arguments, says):
    answer = invoke(*arguments)
    assert answer.exit_code == 2
    assert says in answer.stderr
    assert "Traceback" not in answer.stderr


def test_laws_really_run():
    answer = invoke("native_math", "--device", "cpu", "--cases", "0", "--law", "unchanged", "--json")
    data = json.loads(answer.stdout)
    assert answer.exit_code == 0, answer.output
    (row,) = data["backends"]
    assert (row["backend"], row["status"]) == ("native_math", "passed")
    assert row["run"] > 0


def test_double_is_never_shown_as_a_kernel(found):
    found(PASSED, DOUBLE)
    text = invoke().stdout
    kernels, doubles = text.split("Contract doubles")
    assert "native" in kernels
    assert "flash2" not in kernels
    assert "flash2" in doubles
    assert "not kernels" in " ".join(doubles.split())
    assert "its kernel was not run" in " ".join(text.split())
    assert "native: passed" in str(reported(PASSED, DOUBLE))
    assert "flash2 (contract double): passed" in str(reported(PASSED, DOUBLE))
    broken = verify.BackendReport("flash2", (law(failures=(verify.Failure("off", LINE, 7.0),)),), ran="contract double")
    found(broken)
    assert "flash2 (contract double), law 1 (right)" in invoke().stdout
