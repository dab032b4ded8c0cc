"""`anyattn explain`: words become the spec that tensors would, on this machine and on supposed ones."""

from __future__ import annotations

import json
import re

import pytest
import torch
from typer.testing import CliRunner

import anyattn
from anyattn import masks
from anyattn.cli.app import app
from anyattn.cli.reports import UsageError
from anyattn.cli.words import CallWords, spec_of
from anyattn.environment import PRESET_NAMES

B, S, H, D, KV = 2, 16, 4, 32, 24
SHAPE = f"{B},{S},{H},{D}"


def invoke(*arguments, columns="80", **environ):
    return CliRunner().invoke(app, ["explain", *arguments], env={"COLUMNS": columns, **environ})


def explained(*arguments, **environ):
    answer = invoke(*arguments, "--json", **environ)
    return answer.exit_code, json.loads(answer.stdout)


def dropped(dtype, *shape):
    """A mask of which something is forbidden, so that nothing is known of it."""
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., -1] = False
    return mask if dtype == torch.bool else torch.zeros(shape, dtype=dtype).masked_fill(~mask, -1.0)


@pytest.mark.parametrize(
    ("words", "mask", "options"),
    [
        ({}, None, {}),
        ({"masks": ("causal",)}, masks.Causal(), {}),
        ({"masks": ("causal-lower-right",)}, masks.Causal("lower_right"), {}),
        ({"masks": ("window:5,-1",)}, masks.SlidingWindow(5, -1), {}),
        ({"masks": ("window-lower-right:5,0",)}, masks.SlidingWindow(5, 0, "lower_right"), {}),
        ({"masks": ("window:5,3", "causal")}, masks.SlidingWindow(5, 3) & masks.Causal(), {}),
        ({"masks": ("padding",)}, masks.KeyPadding(dropped(torch.bool, B, KV)), {}),
        ({"masks": ("lengths",)}, masks.KeyLengths(torch.tensor([KV, 3], dtype=torch.int32)), {}),
        ({"masks": ("boolean",)}, dropped(torch.bool, B, 1, S, KV), {}),
        ({"masks": ("boolean:1,4,1,24",)}, dropped(torch.bool, 1, H, 1, KV), {}),
        ({"masks": ("bias",)}, dropped(torch.bfloat16, B, 1, S, KV), {}),
        ({"masks": ("bias:float32:1,1,1,24",)}, dropped(torch.float32, 1, 1, 1, KV), {}),
        (
            {"masks": ("padding", "causal-lower-right")},
            masks.KeyPadding(dropped(torch.bool, B, KV)) & masks.Causal("lower_right"),
            {},
        ),
        ({"scale": 0.5, "softcap": 30.0, "dropout": 0.25}, None, {"scale": 0.5, "softcap": 30.0, "dropout_p": 0.25}),
        ({"lse": True}, None, {"return_lse": True}),
        ({"sinks": True}, None, {"sinks": torch.zeros(H)}),
    ],
)
def test_words_give_the_spec_of_the_tensors_they_mean(words, mask, options):
    query, key = torch.randn(B, S, H, D).bfloat16(), torch.randn(B, KV, H, D).bfloat16()
    meant = anyattn.explain(query, key, key, mask, **options).spec
    assert spec_of(CallWords(SHAPE, kv=KV, **words), "cpu") == meant


def test_grouped_heads_value_head_dim_and_gradients_are_those_of_tensors():
    query = torch.randn(B, S, H, D, requires_grad=True)
    key, value = torch.randn(B, KV, 2, D, requires_grad=True), torch.randn(B, KV, 2, 8, requires_grad=True)
    meant = anyattn.explain(query, key, value, enable_gqa=True).spec
    words = CallWords(SHAPE, kv=KV, kv_heads=2, head_dim_v=8, dtype="fp32", grad=True)
    assert spec_of(words, "cpu") == meant


def test_gradient_of_the_mask_alone_is_described():
    spec = spec_of(CallWords(SHAPE, masks=("bias",), mask_grad=True), "cpu")
    assert spec.requires_grad == ("mask",)


def test_nothing_is_allocated_for_a_huge_call():
    spec = spec_of(CallWords("64,1000000,128,128", masks=("boolean",), grad=True), "cuda")
    assert spec.seqlen_q == 1_000_000


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_preset_gets_a_decision_that_lists_every_backend(name):
    code, found = explained("--shape", SHAPE, "--dtype", "float16", "--as", name)
    decision = found["decision"]
    assert code == (0 if decision["chosen"] else 1)
    assert found["ok"] is (code == 0)
    assert found["supposed"] == name
    assert {candidate["name"] for candidate in decision["candidates"]} >= {row.name for row in anyattn.backends()}
    assert all(candidate["admits"] or candidate["reasons"] for candidate in decision["candidates"])


@pytest.mark.parametrize(("name", "device"), [("h100", "cuda"), ("cpu", "cpu"), ("mps", "mps"), ("npu", "npu")])
def test_preset_decides_the_device(name, device):
    _, found = explained("--shape", SHAPE, "--as", name)
    assert found["decision"]["spec"]["device_type"] == device


def test_device_option_beats_the_presets():
    _, found = explained("--shape", SHAPE, "--as", "h100", "--device", "cpu")
    assert found["decision"]["spec"]["device_type"] == "cpu"


def test_dtype_that_an_old_gpu_lacks_is_refused_with_the_arch():
    code, found = explained("--shape", SHAPE, "--as", "t4", "--backend", "native_flash")
    reasons = {c["name"]: [r["code"] for r in c["reasons"]] for c in found["decision"]["candidates"]}
    assert code == 1
    assert "arch" in reasons["native_flash"]


def test_single_backend_is_required_and_several_are_preferred():
    code, found = explained("--shape", SHAPE, "--softcap", "30", "--backend", "native_math")
    assert (code, found["decision"]["chosen"], found["decision"]["preference"]["mode"]) == (1, None, "require")
    code, found = explained("--shape", SHAPE, "--softcap", "30", "--backend", "native_math,flex")
    assert (code, found["decision"]["chosen"], found["decision"]["preference"]["mode"]) == (0, "flex", "prefer")


def test_environment_variable_is_followed_as_in_a_call():
    _, found = explained("--shape", SHAPE, ANYATTN_BACKEND="native_math")
    assert found["decision"]["chosen"] == "native_math"
    assert found["decision"]["preference"]["source"] == "ANYATTN_BACKEND"


def test_supposed_packages_and_torch_reach_the_machine():
    _, found = explained("--shape", SHAPE, "--as", "h100", "--with", "Flash_Attn=2.8.3", "--torch", "2.11")
    assert found["machine"]["packages"] == {"flash-attn": "2.8.3"}
    assert found["machine"]["torch"] == "2.11"
    _, found = explained("--shape", SHAPE, "--with", "xformers==0.0.30")
    assert found["machine"]["packages"]["xformers"] == "0.0.30"


def test_known_bad_kernel_is_refused_on_the_supposed_torch():
    arguments = ("--shape", "1,64,4,64", "--mask", "boolean", "--grad", "--as", "h100", "--backend", "native_cudnn")
    code, found = explained(*arguments, "--torch", "2.11")
    reasons = found["decision"]["candidates"][0]["reasons"]
    assert code == 1
    assert any(reason["code"] == "known_bad" and "196678" in reason["link"] for reason in reasons)


def test_json_has_the_documented_keys():
    _, found = explained("--shape", SHAPE)
    assert list(found) == ["ok", "supposed", "machine", "decision"]
    assert set(found["decision"]) == {
        "spec",
        "chosen",
        "kernel",
        "conversions",
        "preference",
        "basis",
        "candidates",
        "overruled",
        "origin",
        "timings",
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--shape", "1,2,3"), "B,S,H,D"),
        (("--shape", "1,2,3,x"), "B,S,H,D"),
        (("--shape", SHAPE, "--dtype", "bfloat61"), "bfloat16"),
        (("--shape", SHAPE, "--dtype", "int8"), "floating-point"),
        (("--shape", SHAPE, "--mask", "cusal"), "Did you mean causal"),
        (("--shape", SHAPE, "--mask", "window:5"), "LEFT,RIGHT"),
        (("--shape", SHAPE, "--mask", "window:-2,0"), "-1 for unbounded"),
        (("--shape", SHAPE, "--mask", "causal", "--mask", "causal-lower-right", "--kv", "9"), "alignment"),
        (("--shape", SHAPE, "--mask", "padding", "--mask", "lengths"), "one key mask"),
        (("--shape", SHAPE, "--mask", "bias", "--mask", "boolean"), "at most one dense"),
        (("--shape", SHAPE, "--mask", "boolean:1,2,3,4"), "broadcast"),
        (("--shape", SHAPE, "--mask", "boolean:float32"), "nothing else"),
        (("--shape", SHAPE, "--mask-grad"), "--mask bias"),
        (("--shape", SHAPE, "--kv", "-1"), "--kv"),
        (("--shape", SHAPE, "--kv-heads", "3"), "multiple"),
        (("--shape", SHAPE, "--softcap", "0"), "softcap"),
        (("--shape", SHAPE, "--dropout", "1.5"), "dropout_p"),
        (("--shape", SHAPE, "--scale", "nan"), "finite"),
        (("--shape", SHAPE, "--as", "h1000"), "Did you mean h100"),
        (("--shape", SHAPE, "--device", "gpu"), "cuda"),
        (("--shape", SHAPE, "--with", "flash-attn"), "NAME=VERSION"),
        (("--shape", SHAPE, "--with", "flashattn=2.8"), "flash-attn"),
        (("--shape", SHAPE, "--torch", "new"), "version"),
        (("--shape", SHAPE, "--backend", "flsh"), "Did you mean"),
        (("--shape", SHAPE, "--backend", ","), "--backend"),
    ],
)
def test_bad_usage_is_one_message_and_code_2(arguments, says):
    answer = invoke(*arguments)
    assert answer.exit_code == 2
    assert answer.stdout == ""
    assert says in answer.stderr
    assert "Traceback" not in answer.stderr
    as_json = invoke(*arguments, "--json")
    assert as_json.exit_code == 2
    assert says in json.loads(as_json.stdout)["error"]["message"]


@pytest.mark.parametrize("arguments", [(), ("--shape", SHAPE, "--nonsense"), ("--shape", SHAPE, "--kv", "many")])
def test_wrong_options_are_code_2(arguments):
    assert invoke(*arguments).exit_code == 2


def test_typo_in_an_environment_variable_is_code_2_and_names_it():
    answer = invoke("--shape", SHAPE, ANYATTN_BACKEND="flsh")
    assert answer.exit_code == 2
    assert "ANYATTN_BACKEND" in answer.stderr


@pytest.mark.parametrize("columns", ["80", "120"])
def test_people_read_what_runs_and_every_reason(columns):
    answer = invoke(
        "--shape", SHAPE, "--softcap", "30", "--lse", "--as", "h100", "--backend", "native", columns=columns
    )
    assert answer.exit_code == 1
    assert max(map(len, answer.stdout.splitlines())) <= int(columns)
    assert "No requested backend runs this call." in answer.stdout
    assert "Would run it" in answer.stdout
    assert "softcap: needs no softcap; got 30.0" in answer.stdout


@pytest.mark.parametrize(
    "arguments", [(), ("--as", "cpu"), ("--as", "mps"), ("--as", "cpu", "--backend", "flash2,xla")]
)
def test_plain_call_on_a_laptop_fits_one_screen(arguments):
    text = invoke("--shape", "2,4096,24,128", *arguments, columns="80").stdout
    assert len(text.splitlines()) <= 40, text
    _, found = explained("--shape", "2,4096,24,128", *arguments)
    for candidate in found["decision"]["candidates"]:
        assert re.search(rf"\b{candidate['name']}\b", text), candidate["name"]


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_each_reason_is_shown_once_with_every_backend_that_has_it(name):
    arguments = ("--shape", "2,4096,24,128", "--dtype", "float16", "--softcap", "30", "--as", name)
    text = invoke(*arguments, columns="1000").stdout
    _, found = explained(*arguments)
    lines = [line.strip() for line in text.splitlines()]
    for candidate in found["decision"]["candidates"]:
        for reason in candidate["reasons"]:
            if reason["code"] == "not_installed":
                said = rf"\b{candidate['name']}\b.*: .*{re.escape(reason['need'])}"
                assert len([line for line in lines if re.search(said, line)]) == 1, said
            elif reason["code"] != "known_bad":
                said = f"{reason['code']}: needs {reason['need']}; got {reason['got']}"
                assert sum(line == said or line.endswith(f": {said}") for line in lines) == 1, said


def test_missing_package_has_its_command_where_it_would_help():
    on_gpu = invoke("--shape", SHAPE, "--as", "h100", columns="200").stdout
    on_cpu = invoke("--shape", SHAPE, "--as", "cpu", columns="200").stdout
    assert "pip install 'flash-attn" in on_gpu
    assert "pip install" not in on_cpu
    assert "anyattn doctor" in on_cpu


def test_conversion_is_shown():
    answer = invoke("--shape", SHAPE, "--kv", "77", "--mask", "causal-lower-right", columns="200")
    assert "native runs this call" in answer.stdout
    assert "converted" in answer.stdout


def test_usage_error_is_an_anyattn_error():
    assert issubclass(UsageError, anyattn.AnyattnError)
