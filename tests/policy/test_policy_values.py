"""Policies are values: written in Python, as plain data, as TOML or by name, and equal after every round trip."""

from __future__ import annotations

import pickle
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import anyattn
from anyattn import InvalidSettingError, Policy, Rule, UnknownBackendError
from anyattn.pins.spans import parse
from anyattn.policy.files import FILE_NAME

TEXT = st.text(st.characters(categories=["L", "N", "P", "S"], include_characters=" "), min_size=1, max_size=12).filter(
    lambda text: text.strip() and text.isprintable()
)
BACKENDS = st.sampled_from(["native", "native_math", "flex", "auto", "sage", "flash"])
ENDS = st.sampled_from(["", "1", "-3", "0.25", "12"])
SPANS = st.one_of(
    st.integers(-50, 50).map(str),
    st.sampled_from([":", "1:", ":-1", "2:-2", "0.2:0.8", "::2", "1:0.5", "0.1:-1:3", " 1 : 2 "]),
)
SEVERAL = st.one_of(TEXT, st.lists(TEXT, min_size=1, max_size=3))


@st.composite
def rules(draw: st.DrawFn, name: str) -> Rule:
    return Rule(
        name,
        draw(st.one_of(BACKENDS, st.lists(BACKENDS, min_size=1, max_size=3))),
        precision=draw(st.sampled_from(["exact", "int8", "fp8", "fp4"])),
        role=draw(st.sampled_from([None, "self", ["self", "cross"], ("vae",), "text_encoder"])),
        modules=draw(st.one_of(st.none(), SEVERAL)),
        layers=draw(st.one_of(st.none(), SPANS)),
        steps=draw(st.one_of(st.none(), SPANS)),
        optional=draw(st.booleans()),
    )


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    names = draw(st.lists(TEXT, min_size=1, max_size=4, unique=True))
    return Policy([draw(rules(name)) for name in names], draw(st.one_of(st.none(), TEXT)))


@given(policies())
def test_policy_is_equal_after_plain_data_toml_and_pickle(tmp_path_factory: Any, policy: Policy) -> None:
    assert Policy.from_dict(policy.to_dict()) == policy
    file = policy.save(tmp_path_factory.mktemp("policy"))
    assert Policy.load(file) == policy
    assert tomllib.loads(file.read_text(encoding="utf-8")) == policy.to_dict()
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert hash(Policy.load(file)) == hash(policy)


def test_policy_is_saved_in_a_folder_or_as_a_file_and_read_from_either(tmp_path: Path) -> None:
    policy = Policy.named("wan")
    assert policy.save(tmp_path / "model") == tmp_path / "model" / FILE_NAME
    assert policy.save(tmp_path / "own.toml") == tmp_path / "own.toml"
    assert Policy.load(tmp_path / "model") == Policy.load(str(tmp_path / "own.toml")) == policy
    with pytest.raises(FileNotFoundError, match=r"no policy at .*nowhere.*Policy\.save"):
        Policy.load(tmp_path / "nowhere")


def test_spans_may_be_slices_and_whole_numbers() -> None:
    rule = Rule("one", "auto", layers=slice(2, -2), steps=3)  # type: ignore[arg-type]
    assert (rule.layers, rule.steps) == ("2:-2", "3")
    assert Rule("one", "auto", layers=slice(None, 0.5, 2)).layers == ":0.5:2"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "total", "places"),
    [
        ("2:-2", 6, [2, 3]),
        ("2:-2", 4, []),
        ("2:-2", 3, []),
        ("0.2:0.8", 10, [2, 3, 4, 5, 6, 7]),
        ("0.1:1.0", 30, list(range(3, 30))),  # 0.1 * 30 is above 3 in floating point
        ("0.5:", 5, [3, 4]),
        (":0.5", 5, [0, 1, 2]),
        ("::2", 5, [0, 2, 4]),
        ("1:-1:2", 6, [1, 3]),
        ("-1", 4, [3]),
        ("-2", 4, [2]),
        ("0", 4, [0]),
        ("7", 4, []),
        (":", 2, [0, 1]),
        ("0.5:-1", 6, [3, 4]),
    ],
)
def test_span_holds_these_places(text: str, total: int, places: list[int]) -> None:
    span = parse(text)
    assert [place for place in range(total) if span.holds(place, total)] == places == list(span.range(total))


@pytest.mark.parametrize(
    ("span", "why"),
    [
        ("", "a single place is a whole number"),
        ("0.5", "a single place is a whole number"),
        ("middle", "'middle' is neither a whole number nor a fraction"),
        ("1:2:3:4", "more than two colons"),
        ("::0", "step is not a whole number above 0"),
        ("::-1", "step is not a whole number above 0"),
        ("::0.5", "step is not a whole number above 0"),
        ("0.2:1.5", "1.5 is a fraction above 1.0"),
        ("-0.5:", "'-0.5' is neither a whole number nor a fraction"),
        ("3:2", "it stops before it starts"),
        ("0.8:0.2", "it stops before it starts"),
        ("-2:-2", "it stops before it starts"),
        ("1e1:", "'1e1' is neither"),
        ("٣:", "is neither"),
        ("1" * 40, "is neither"),
    ],
)
@pytest.mark.parametrize("key", ["layers", "steps"])
def test_span_without_meaning_is_refused_with_the_reason(key: str, span: str, why: str) -> None:
    with pytest.raises(InvalidSettingError, match=rf"Policy rule 'one': {key} must be a slice.*{why}"):
        Rule("one", "auto", **{key: span})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "A policy rule needs a name, as one line of text; '' was given"),
        ({"name": "two\nlines"}, "needs a name, as one line"),
        ({"name": 3}, "needs a name, as one line of text; 3 was given"),
        ({"backend": []}, r"backend must be a name or a list of names; \[\] was given"),
        ({"backend": None}, "backend must be a name or a list of names; None was given"),
        ({"backend": ["native", 3]}, "backend must be a name or a list"),
        ({"precision": "int4"}, "precision must be one of 'exact', 'int8', 'fp8', 'fp4'; 'int4' was given"),
        ({"role": "selff"}, r"role must be of 'self', .*'selff' was given \(did you mean 'self'\?\)"),
        ({"role": ["self", "decoder"]}, "role must be of .*'decoder' was given"),
        ({"modules": ""}, "modules must be a name or a list of names; '' was given"),
        ({"layers": 0.5}, "layers must be a slice"),
        ({"steps": True}, "steps must be a slice"),
        ({"optional": "yes"}, "optional must be true or false; 'yes' was given"),
    ],
)
def test_value_without_meaning_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        Rule(**{"name": "one", "backend": "native", **change})


def test_unknown_backend_is_refused_with_the_rule_and_the_nearest_name() -> None:
    with pytest.raises(UnknownBackendError, match=r"Policy rule 'one': .*nativ_math.*native_math"):
        Rule("one", ["native", "nativ_math"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rule": []}, r"'rule' in a policy is unknown \(did you mean 'rules'\?\). Known keys: schema, name, rules"),
        ({"name": "x"}, r"'rules' is missing in a policy; its keys are \['name'\]"),
        ({"rules": []}, "needs at least one rule"),
        ({"rules": "auto"}, "takes a list of rules; 'auto' was given"),
        ({"rules": ["auto"]}, "A policy rule is a table of keys and values; 'auto' was given"),
        ([], r"A policy is a table with the key 'rules'; \[\] was given"),
        ({"schema": 2, "rules": []}, "This policy has schema 2; this version of anyattn reads schema 1"),
        ({"rules": [{"backend": "auto"}]}, r"'name' is missing in a policy rule; \{'backend': 'auto'\} was given"),
        ({"rules": [{"name": "a"}]}, "'backend' is missing in policy rule 'a'"),
        ({"rules": [{"name": "a", "backend": "auto", "step": "1:"}]}, r"'step' in policy rule 'a' .*mean 'steps'"),
        ({"rules": [{"name": "a", "backend": "auto"}] * 2}, "Two rules of a policy are named 'a'"),
        ({"name": "", "rules": [{"name": "a", "backend": "auto"}]}, "A policy's name is one line of text"),
    ],
)
def test_plain_data_without_meaning_is_refused(data: Any, message: str) -> None:
    with pytest.raises(InvalidSettingError, match=message):
        Policy.from_dict(data)


def test_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("rules = [")
    with pytest.raises(InvalidSettingError, match=r"own\.toml isn't TOML: "):
        Policy.load(file)
    file.write_text('[[rules]]\nname = "a"\nbackends = "auto"\n')
    with pytest.raises(InvalidSettingError, match=r"own\.toml: 'backends' in policy rule 'a' .*mean 'backend'"):
        Policy.load(file)
    file.write_text('[[rules]]\nname = "a"\nbackend = "nativ"\n')
    with pytest.raises(UnknownBackendError, match=r"own\.toml: Policy rule 'a'"):
        Policy.load(file)
    file.write_bytes(b'name = "\xff"')
    with pytest.raises(InvalidSettingError, match="isn't TOML"):
        Policy.load(file)


def test_environment_variable_names_a_policy_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Policy([Rule("one", "auto")], "own")
    monkeypatch.setenv("ANYATTN_POLICY", str(own.save(tmp_path / "own.toml")))
    assert Policy.from_env() == own
    monkeypatch.setenv("ANYATTN_POLICY", str(own.save(tmp_path).parent))
    assert Policy.from_env() == own
    monkeypatch.setenv("ANYATTN_POLICY", " flux ")
    assert Policy.from_env(own) == Policy.named("flux")
    assert Policy.from_env(environ={"ANYATTN_POLICY": "wan"}) == Policy.named("wan")


def test_environment_variable_without_meaning_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANYATTN_POLICY", raising=False)
    with pytest.raises(InvalidSettingError, match=r"ANYATTN_POLICY isn't set.*flux, wan, hunyuan_video"):
        Policy.from_env()
    own = Policy([Rule("one", "auto")])
    assert Policy.from_env(own) is own
    monkeypatch.setenv("ANYATTN_POLICY", "fluxx")
    with pytest.raises(InvalidSettingError, match=r"ANYATTN_POLICY is 'fluxx', which is neither .*mean 'flux'"):
        Policy.from_env(own)
    (tmp_path / "own.toml").write_text("rules = 3")
    monkeypatch.setenv("ANYATTN_POLICY", str(tmp_path / "own.toml"))
    with pytest.raises(InvalidSettingError, match=r"ANYATTN_POLICY is .*own\.toml: A policy takes a list of rules; 3"):
        Policy.from_env()


@pytest.mark.parametrize("name", Policy.names())
def test_ready_made_policies_are_exact_but_for_the_middle_of_self_attention(name: str) -> None:
    policy = Policy.named(name)
    assert policy.name == name
    for rule in policy.rules:
        if rule.precision != "exact":
            assert (rule.roles, rule.steps) == (("self",), "0.2:0.8")
            layers = parse(rule.layers or "")
            assert not layers.holds(0, 40)
            assert not layers.holds(39, 40)
        assert rule.preference.mode == "prefer"
        assert rule.preference.names[-1] == "auto"


def test_unknown_ready_made_policy_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidSettingError, match=r"no ready-made policy 'hunyuan' \(did you mean 'hunyuan_video'\?\)"):
        Policy.named("hunyuan")


def test_single_name_is_required_and_lists_and_auto_are_preferred() -> None:
    assert Rule("a", "flash").preference == anyattn.Preference(("flash2",), "require", "policy rule 'a'")
    assert Rule("a", "auto", "fp8").preference == anyattn.Preference(("auto",), "prefer", "policy rule 'a'", "fp8")
    assert Rule("a", ["native"]).preference.mode == "prefer"


def test_policy_prints_its_rules() -> None:
    policy = Policy([Rule("a", "auto", role=["self"], optional=True), Rule("b", ["flash", "native"])], "two")
    assert str(policy) == "policy 'two':\n  a: auto; role self; optional\n  b: flash2, native"
