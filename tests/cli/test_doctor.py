"""The doctor's parts that need no process: variables, cures, the default without trying, and what people read."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import doubles
from anyattn import environment
from anyattn.backend.known_bad import table
from anyattn.backend.protocol import Backend
from anyattn.call.arguments import describe
from anyattn.cli import render
from anyattn.cli.app import app
from anyattn.cli.commands.doctor import command, probe, trial
from anyattn.cli.commands.doctor.catalogue import cure, known_bad_here, listed
from anyattn.cli.commands.doctor.variables import variables
from anyattn.cli.views import doctor as doctor_view
from anyattn.cli.views.doctor import show
from anyattn.process import installed
from anyattn.selection import registry
from anyattn.types.reasons import Reason

CPU = environment.preset("cpu", torch_version="2.13.0")


def invoke(*arguments, **environ):
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "80", **environ})


def test_json_has_the_documented_keys():
    found = json.loads(invoke("--no-try", "--json").stdout)
    assert list(found) == ["ok", "anyattn", "environment", "variables", "default", "backends", "known_bad"]
    assert list(found["default"]) == [
        "names",
        "source",
        "device",
        "works",
        "tried",
        "chosen",
        "kernel",
        "detail",
        "compiled",
        "compiled_detail",
    ]
    assert {tuple(row) for row in found["backends"]} == {
        (
            "name",
            "family",
            "state",
            "installed",
            "package",
            "found",
            "wanted",
            "install",
            "exact",
            "reasons",
            "cure",
            "trials",
            "ended",
            "output",
            "double",
            "downloads",
            "origin",
        )
    }
    assert {"torch", "devices", "packages", "cudnn", "cxx", "python", "platform"} <= set(found["environment"])


def test_every_known_backend_is_listed_with_every_reason_or_as_usable():
    found = json.loads(invoke("--no-try", "--json").stdout)
    assert [row["name"] for row in found["backends"]] == list(registry.BUILTIN)
    for row in found["backends"]:
        backend = registry.get(row["name"])
        assert row["reasons"] == [reason.to_dict() for reason in backend.availability(environment.detect())]
        assert (row["state"] == "unusable") is bool(row["reasons"])
        assert (row["wanted"], row["install"]) == (backend.needs, backend.install)


def test_no_try_starts_no_process(monkeypatch):
    def start(*arguments, **options):
        raise AssertionError("a process was started")

    monkeypatch.setattr(probe.subprocess, "Popen", start)
    answer = invoke("--no-try")
    assert answer.exit_code == 0, answer.output
    assert "not tried" in answer.stdout


@pytest.mark.parametrize(
    ("variable", "value", "nearest"),
    [
        ("ANYATTN_BACKEND", "flsh", "flash"),
        ("DIFFUSERS_ATTN_BACKEND", "native_mth", "native_math"),
        ("ANYATTN_BACKEND", "native,flax", "flex"),
        ("ANYATTN_CHECKS", "tru", "true"),
        ("DIFFUSERS_ATTN_CHECKS", "onn", "on"),
    ],
)
def test_typo_in_a_variable_is_reported_with_the_nearest_and_fails(variable, value, nearest):
    answer = invoke("--no-try", "--json", **{variable: value})
    found = json.loads(answer.stdout)
    assert answer.exit_code == 1
    (row,) = found["variables"]
    assert (row["name"], row["value"], row["state"]) == (variable, value, "wrong")
    assert nearest in row["nearest"]
    assert variable in found["default"]["detail"]
    assert value.split(",")[-1] in invoke("--no-try", **{variable: value}).stdout


@pytest.mark.parametrize(
    ("value", "state", "note", "nearest"),
    [
        ("flux", "in force", "3 rules, where a program asks anyattn.Policy.from_env()", ()),
        ("fluks", "wrong", "ANYATTN_POLICY is 'fluks', which is neither a ready-made policy", ("flux",)),
        (" ", "no effect", "names no policy", ()),
    ],
)
def test_variable_of_a_policy_is_read(value, state, note, nearest):
    (row,) = variables({"ANYATTN_POLICY": value})
    assert (row.name, row.state, row.nearest) == ("ANYATTN_POLICY", state, nearest)
    assert row.note.startswith(note)


def test_misspelt_variable_is_reported_and_harmless():
    (row,) = variables({"ANYATTN_BACKENDS": "flex", "ANYTHING": "else"})
    assert (row.name, row.state, row.nearest[0]) == ("ANYATTN_BACKENDS", "no effect", "ANYATTN_BACKEND")
    assert invoke("--no-try", ANYATTN_BACKENDS="flex").exit_code == 0


def test_overruled_variable_is_said_to_be():
    both = {"ANYATTN_BACKEND": "flex", "DIFFUSERS_ATTN_BACKEND": "native"}
    states = {row.name: row.state for row in variables(both)}
    assert states == {"ANYATTN_BACKEND": "in force", "DIFFUSERS_ATTN_BACKEND": "overruled"}


def test_typo_that_is_overruled_is_reported_but_does_not_fail():
    answer = invoke("--no-try", "--json", ANYATTN_BACKEND="flex", DIFFUSERS_ATTN_BACKEND="flsh")
    found = json.loads(answer.stdout)
    assert answer.exit_code == 0
    assert [(row["name"], row["state"]) for row in found["variables"]][1] == ("DIFFUSERS_ATTN_BACKEND", "overruled")
    assert "flash" in found["variables"][1]["nearest"]


@pytest.mark.parametrize(("wish", "code"), [("xla", 1), ("xla,native", 0), ("auto", 0), ("flex_attn", 0)])
def test_untried_default_is_judged_by_what_is_usable(wish, code):
    assert invoke("--no-try", ANYATTN_BACKEND=wish).exit_code == code


def test_unknown_backend_is_wrong_usage():
    answer = invoke("flsh")
    assert answer.exit_code == 2
    assert "Did you mean" in answer.stderr
    assert "Traceback" not in answer.output


def test_error_as_json_is_json():
    answer = invoke("flsh", "--json")
    found = json.loads(answer.stdout)
    assert answer.exit_code == 2
    assert found["ok"] is False
    assert found["error"]["type"] == "UnknownBackendError"


@pytest.mark.parametrize("width", ["80", "120"])
def test_report_keeps_to_the_terminal(width):
    answer = CliRunner().invoke(app, ["doctor", "--no-try"], env={"COLUMNS": width})
    lines = answer.stdout.splitlines()
    assert max(map(len, lines)) <= int(width)
    assert len(lines) < 70
    # Words in brackets must not be taken for markup.
    assert "native" in answer.stdout


def test_cure_is_the_install_command_where_installing_cures():
    missing = Reason("not_installed", "xformers >= 0.0.29", "nothing")
    assert cure((missing,), "pip install 'xformers>=0.0.29'", CPU) == "pip install 'xformers>=0.0.29'"
    assert cure((Reason("layout", "a", "b", "call .contiguous()"),), "", CPU) == "call .contiguous()"


def test_cpu_build_of_torch_is_named_as_the_likely_cause():
    built_for_cpu = environment.preset("cpu", torch_version="2.13.0+cpu")
    no_gpu = (Reason("no_device", "a cuda device", "cpu"),)
    assert "built for CPUs only" in cure(no_gpu, "", built_for_cpu)
    assert cure(no_gpu, "", CPU) == ""


def test_version_found_is_the_kernel_package():
    machine = environment.preset("h100", packages={"flash-attn": "2.8.3", "fa3-fwd": "0.1", "kernels": "0.12.1"})
    found = {row.name: (row.package, row.found) for row in listed(machine)}
    assert found["flash2"] == ("flash-attn", "2.8.3")
    assert found["flash3"] == ("fa3-fwd", "0.1")
    assert found["flash3_hub"] == ("kernels", "0.12.1")
    assert found["native"][0] == "torch"
    assert found["xformers"] == ("xformers", "")


def test_known_bad_rows_are_those_of_the_machine():
    def of(name, version):
        return {row.name for row in known_bad_here(environment.preset(name, torch_version=version))}

    assert "cudnn-b200-few-kv-heads" in of("b200", "2.11")
    assert "cudnn-b200-few-kv-heads" not in of("h100", "2.11")
    assert "cudnn-dead-rows" in of("h100", "2.11")
    assert "cudnn-dead-rows" not in of("h100", "2.13")
    assert not {name for name in of("cpu", "2.13") if name.startswith("cudnn")}


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-6, "aborted by signal SIGABRT"),
        (-11, "aborted by signal SIGSEGV"),
        (0xC0000005, "aborted by an access violation"),
        (3, "ended before it was done, with exit code 3"),
    ],
)
def test_end_of_a_process_is_said_in_words(code, words):
    assert probe.how_it_ended(code) == words


def test_line_cut_off_by_a_crash_is_left_out():
    job = probe.Job("native")
    text = '{"event": "begin", "device": "cpu", "step": "forward"}\n{"event": "end", "tri'
    found = probe._read(job, text, -11, None, ["one", "two"])
    assert [(t.step, t.outcome) for t in found.trials] == [("forward", "died")]
    assert found.output == ("one", "two")


class OnlyHeadDim128(Backend):
    name = "only_128"
    family = "test"
    declarations = {"cpu": registry.get("native").declarations["cpu"].replace(head_dim_multiple=128, dead_rows=False)}
    run = staticmethod(registry.get("native").run)

    def lower(self, spec, env):
        return registry.get("native").lower(spec, env)


class Quantised(OnlyHeadDim128):
    name = "quantised"
    declarations = {"cpu": registry.get("native").declarations["cpu"].replace(exact=False, backward=False)}
    factor = 1.02

    @staticmethod
    def run(plan, query, key, value, parts):
        return registry.get("native").run(plan, query, key, Quantised.factor * value, parts)


@pytest.fixture
def tried(monkeypatch):
    """Try a backend in this process, and give what the child would have written."""

    def try_backend(backend):
        monkeypatch.setitem(registry._added, backend.name, backend)
        events = []
        trial._try_backend(backend.name, True, events.append)
        return {e["trial"]["step"]: e["trial"] for e in events if e["event"] == "end"}

    return try_backend


def test_trial_tries_shapes_until_the_backend_admits_one(tried):
    assert tried(OnlyHeadDim128())["forward"]["outcome"] == "passed"


def test_step_that_is_refused_says_why_and_is_no_failure(tried):
    found = tried(OnlyHeadDim128())["padding"]
    assert found["outcome"] in ("passed", "refused")
    if found["outcome"] == "refused":
        assert "leave every row a key" in found["detail"]


def test_quantised_kernel_is_judged_by_its_relative_error(tried, monkeypatch):
    found = tried(Quantised())
    assert set(found) == {"forward", "padding", "gqa"}, "no backward is declared, so none is tried"
    assert found["forward"]["outcome"] == "passed"
    monkeypatch.setattr(Quantised, "factor", 1.2)
    assert tried(Quantised())["forward"]["outcome"] == "wrong"


def test_default_trial_makes_a_call_as_a_program_does():
    events = []
    trial._try_default(events.append)
    found = [event["trial"] for event in events if event["event"] == "end"]
    assert [trial["step"] for trial in found] == ["forward", "compiled"]
    assert {(trial["backend"], trial["outcome"], trial["kernel"]) for trial in found} == {("native", "passed", "sdpa")}


def test_progress_counts_every_process(monkeypatch):
    steps = []

    def run_all(jobs, *, timeout, finished):
        for index, job in enumerate(jobs):
            finished(job, index + 1)
        return {}

    monkeypatch.setattr(command, "run_all", run_all)
    command.doctor(environ={}, progress=steps.append)
    assert [step.done for step in steps] == list(range(steps[0].total + 1))
    assert steps[-1].done == steps[-1].total


@pytest.mark.parametrize("step", trial.STEPS)
@pytest.mark.parametrize("name", ["cpu", "a100", "h100", "b200"])
def test_tiny_calls_keep_clear_of_the_known_bad_table(step, name):
    machine = environment.preset(name, torch_version="2.11")
    kind = "cpu" if name == "cpu" else "cuda"
    kernels = {backend for row in table.TABLE for backend in row.backends}
    for call in trial._calls("cpu", step):
        spec = describe(call.query, call.key, call.value, call.mask, None, call.options).replace(device_type=kind)
        live = spec.replace(mask=dataclasses.replace(spec.mask, dead_rows=False))
        found = {row.name for row in table.hits(kernels, live, machine)}
        # Of a CPU's strides a spec says nothing, so that the row holds for every call there: the adapter always copies.
        copies = registry.get("flex").lower(live.replace(compiled=True), machine).copy
        shared = {"cudnn-b200-few-kv-heads"} if (step, name) == ("gqa", "b200") else set()
        assert found == shared | ({"flex-cpu-strides"} if copies else set())


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", ["h100", "b200", "mi300", "mps", "npu"])
def test_report_of_any_machine_fits_the_terminal(name, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    machine = environment.preset(name, torch_version="2.11.0")
    backends = tuple(command._backend(row, None, machine) for row in listed(machine))
    default = command.DefaultReport(("native",), "built-in", trial.main_device(machine), True, False)
    found = command.DoctorReport(machine, (), default, backends, known_bad_here(machine))
    render.report(found, show, False)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) < 105, "a report that is a wall isn't read"


@pytest.mark.parametrize("name", environment.PRESET_NAMES)
def test_every_fact_about_an_unusable_backend_is_shown_once(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    machine = environment.preset(name, torch_version="2.11.0+cpu" if name == "cpu" else "2.11.0")
    backends = tuple(command._backend(row, None, machine) for row in listed(machine))
    default = command.DefaultReport(("native",), "built-in", trial.main_device(machine), True, False)
    render.report(command.DoctorReport(machine, (), default, backends, ()), show, False)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    unusable = [row for row in backends if row.reasons]
    assert unusable
    for row in unusable:
        for reason in row.reasons:
            if reason.code != "not_installed":
                said = f"needs {reason.need}, got {reason.got}"
                assert sum(line == said or line.endswith(f": {said}") for line in lines) == 1
        if row.install and any(reason.code == "not_installed" for reason in row.reasons):
            assert sum(line.endswith(f" {row.install}") for line in lines) == 1
        elif row.cure:
            assert lines.count(f"cure: {row.cure}") == 1


def test_double_is_never_shown_as_a_kernel_nor_tried(monkeypatch, capsys):
    tried = []

    def run_all(jobs, *, timeout, finished):
        tried.extend(job.name for job in jobs)
        return {}

    monkeypatch.setattr(command, "run_all", run_all)
    monkeypatch.setenv("COLUMNS", "120")
    with doubles.installed("flash2"):
        found = command.doctor(environ={"ANYATTN_BACKEND": "flash2"})
        untried = command.doctor(environ={"ANYATTN_BACKEND": "flash2"}, try_kernels=False)
    assert "native" in tried
    assert "flash2" not in tried
    row = next(row for row in found.backends if row.name == "flash2")
    assert row.double
    assert row.to_dict()["double"]
    assert row.state == "not tried"
    assert not untried.default.works
    render.report(found, show, False)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("flash2 "))
    assert "contract double of flash-attn 2.8.3" in line


def test_kernel_that_raises_is_told_once_with_a_cure(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    machine = environment.preset("h100", packages={"flash-attn": "2.8.3"})
    (row,) = (row for row in listed(machine) if row.name == "flash2")
    said = "RuntimeError: no kernel image is available"
    trials = tuple(trial.Trial("flash2", "cuda", step, "raised", detail=said) for step in trial.STEPS)
    report = command._backend(row, probe.Probe("flash2", None, trials), machine)
    assert report.state == "fails"
    assert "pip install 'flash-attn" in report.cure
    default = command.DefaultReport(("native",), "built-in", "cuda", True, False)
    render.report(command.DoctorReport(machine, (), default, (report,), ()), show, False)
    text = capsys.readouterr().out
    assert text.count(said) == 1
    assert f"{', '.join(trial.STEPS)} on cuda: raised; {said}" in text
    assert text.count("pip install 'flash-attn") == 1


class ForgetsSharedHeads(OnlyHeadDim128):
    name = "forgets"
    declarations = {"cpu": registry.get("native").declarations["cpu"]}

    @staticmethod
    def run(plan, query, key, value, parts):
        result = registry.get("native").run(plan, query, key, value, parts)
        return (result[0], result[1] + 1) if plan.spec.is_gqa else result


def test_shared_heads_are_tried_with_their_lse(tried):
    found = tried(ForgetsSharedHeads())
    assert found["forward"]["outcome"] == "passed"
    assert found["gqa"]["outcome"] == "wrong"


def _default_told():
    events = []
    trial._try_default(events.append)
    return probe.Probe("", None, tuple(trial.Trial(**e["trial"]) for e in events if e["event"] == "end"))


def test_default_is_tried_inside_torch_compile_too(monkeypatch):
    machine = environment.detect()
    found = command._default((), _default_told(), (), machine, {})
    assert (found.works, found.compiled, found.compiled_detail) == (True, "passed", "")
    with environment.supposed(environment.preset("cpu", torch_version="2.7.1")):
        torch._dynamo.reset()
        found = command._default((), _default_told(), (), machine, {})
    assert (found.works, found.compiled) == (True, "raised")
    assert "need torch 2.8" in found.compiled_detail


def test_cudnn_its_file_and_replaced_kernels_are_printed():
    machine = dataclasses.replace(
        environment.preset("h100"), cudnn_file="/lib/libcudnn.so.9", overrides={"native_flash": "FA3"}
    )

    def printed(env):
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(doctor_view._machine(env))
        return console.export_text()

    assert "9.19.0, from /lib/libcudnn.so.9" in printed(machine)
    assert "torch's native_flash, by FA3" in printed(machine)
    assert "9.19.0, from a file that is unknown" in printed(environment.preset("h100"))
    assert "replaced" not in printed(environment.preset("h100"))


def test_file_of_cudnn_is_read_from_the_process_maps(monkeypatch, tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(
        "7f0 r-xp 0 00:00 1 /x/libcudnn_graph.so.9\n7f1 r-xp 0 00:00 2       /a b/libcudnn.so.9\n7f2 rw-p 0 0:0 0\n"
    )
    monkeypatch.setattr(installed, "Path", lambda name: maps)
    assert installed.cudnn_file() == "/a b/libcudnn.so.9"
    monkeypatch.setattr(installed.platform, "system", lambda: "Windows")
    assert installed.cudnn_file() == ""
