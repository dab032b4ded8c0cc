"""What all commands share: help, version, JSON, and errors that are one message."""

from __future__ import annotations

import json
import os

import pytest
import typer
from typer.testing import CliRunner

import anyattn
from anyattn.cli import app as module
from anyattn.cli import render
from anyattn.cli.app import app
from anyattn.cli.reports import Step

COMMANDS = ("doctor", "explain", "verify", "demo", "tune")


class _Report:
    def __init__(self, data, code=0):
        self.data, self.exit_code = data, code

    def to_dict(self):
        return self.data


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_json_and_exit_codes(command):
    answer = CliRunner().invoke(app, [command, "--help"])
    assert answer.exit_code == 0
    assert "--json" in answer.stdout
    assert "Exit codes: 0" in answer.stdout


def test_help_lists_the_commands_with_whole_sentences():
    answer = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"})
    lines = [line for line in answer.stdout.splitlines() if line.strip().startswith(COMMANDS)]
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert not any("..." in line for line in lines)


def test_no_command_shows_the_help():
    answer = CliRunner().invoke(app, [])
    assert answer.exit_code in (0, 2)
    assert "Commands" in answer.output


def test_version_is_the_package_version():
    answer = CliRunner().invoke(app, ["--version"])
    assert (answer.exit_code, answer.stdout) == (0, f"anyattn {anyattn.__version__}\n")


@pytest.mark.parametrize("code", [0, 1])
def test_report_decides_the_exit_code(code):
    with pytest.raises(typer.Exit) as caught:
        module._answer(lambda progress: _Report({}, code), lambda report: "text", False)
    assert caught.value.exit_code == code


def test_error_is_one_message_without_a_traceback(capsys):
    def fail(progress):
        raise anyattn.InvalidCallError("needs this [not markup], got that")

    with pytest.raises(typer.Exit) as caught:
        module._answer(fail, str, False)
    out, err = capsys.readouterr()
    assert caught.value.exit_code == 2
    assert (out, err) == ("", "InvalidCallError: needs this [not markup], got that\n")


def test_bug_is_not_hidden_as_an_answer():
    def fail(progress):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        module._answer(fail, str, False)


def test_json_has_words_for_what_json_has_no_numbers_for(capsys):
    data = {"a": float("nan"), "b": [float("inf"), -float("inf")], "c": (1, 2.5, None), "d": {"e": True}}
    render.report(_Report(data), str, True)
    found = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(word))
    assert found == {"a": "NaN", "b": ["Infinity", "-Infinity"], "c": [1, 2.5, None], "d": {"e": True}}
    assert float(found["b"][1]) == -float("inf")


def test_whatever_is_written_to_stdout_meanwhile_is_kept_out_of_json(capfd):
    with render.busy(True):
        print("from Python")
        os.write(1, b"from C\n")
    print("after")
    out, err = capfd.readouterr()
    assert out == "after\n"
    assert "from Python" in err
    assert "from C" in err


def test_progress_goes_to_stderr_alone(capfd):
    with render.busy(False) as progress:
        progress(Step("working", 0, 2))
        progress(Step("working", 2, 2))
    assert capfd.readouterr().out == ""
