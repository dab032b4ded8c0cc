"""`auto` by time: made-up timings on every kind of machine, and laws that hold whatever the timings are."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyattn.environment import Environment, preset
from anyattn.selection import registry
from anyattn.selection.choice import Known, choice_of
from anyattn.selection.resolve import resolve
from anyattn.types.decision import Decision, Preference
from anyattn.types.reasons import Reason
from anyattn.types.spec import AttentionSpec, MaskSpec, PatternSpec
from anyattn.types.timings import GAIN, Timing, Timings, age

PACKAGES = {"flash-attn": "2.8.3", "fa3-fwd": "0.0.3", "flash-attn-4": "4.0.0b36", "xformers": "0.0.33"}
AUTO = Preference(("auto",), "prefer", "default")


def call(device_type: str = "cuda", **changes: object) -> AttentionSpec:
    spec = AttentionSpec(2, 1024, 1024, 16, 16, 64, 64, torch.bfloat16, device_type, 0.125)
    return spec.replace(**changes)


def machine(name: str) -> Environment:
    packages = {} if name in ("cpu", "t4") else PACKAGES
    packages = {"amd-aiter": "0.1.5"} if name == "mi300" else packages
    return preset(name, packages=packages, torch_version="2.11.0")


def times(**seconds: float) -> Timings:
    return Timings(tuple(Timing(name, value, time=1000.0) for name, value in seconds.items()))


def choose(name: str, timings: Timings | None, wish: Preference = AUTO, spec: AttentionSpec | None = None) -> Decision:
    device_type = "cpu" if name == "cpu" else "cuda"
    known = Known((), third_parties=False)
    return resolve(spec or call(device_type), machine(name), wish, known, timings=timings)


FASTER = {
    "h100": "flash3",
    "a100": "flash2",
    "t4": "native_efficient",
    "b200": "flash4",
    "mi300": "aiter",
    "cpu": "native_math",
}


@pytest.mark.parametrize("name", FASTER)
def test_faster_backend_that_admits_the_call_runs_instead(name: str) -> None:
    spec = call("cpu" if name == "cpu" else "cuda", dtype=torch.float16 if name == "t4" else torch.bfloat16)
    plain = choose(name, None, spec=spec)
    assert plain.chosen == "native"
    faster = FASTER[name]
    decision = choose(name, times(**{faster: 1.0, "native": 1.5}), spec=spec)
    assert decision.chosen == faster
    assert decision.basis == "measured on this machine"
    assert choice_of(decision).instead_of == "native"
    slower = choose(name, times(**{faster: 1.5, "native": 1.0}), spec=spec)
    assert (slower.chosen, slower.basis) == ("native", "measured on this machine")


@pytest.mark.parametrize("name", FASTER)
def test_without_timings_nothing_changes(name: str) -> None:
    spec = call("cpu" if name == "cpu" else "cuda")
    decision = choose(name, None, spec=spec)
    assert decision.timings is None
    assert decision == choose(name, Timings(), spec=spec)
    assert decision == choose(name, times(flash2_hub=1e-9, unheard_of=1e-9), spec=spec)


def test_incumbent_changes_for_two_per_cent_and_not_for_less() -> None:
    assert choose("h100", times(native=GAIN * 1.001, flash3=1.0)).chosen == "flash3"
    assert choose("h100", times(native=GAIN * 0.999, flash3=1.0)).chosen == "native"
    assert choose("h100", dataclasses.replace(times(native=1.4, flash3=1.0), least=0.5)).chosen == "native"


def test_incumbent_of_the_rule_is_what_timings_are_compared_with() -> None:
    long = call(seqlen_q=8192, seqlen_kv=8192)
    assert choose("h100", None, spec=long).chosen == "flash3"
    assert choose("h100", times(flash3=1.01, native=1.0), spec=long).chosen == "flash3"
    assert choose("h100", times(flash3=1.5, native=1.0), spec=long).chosen == "native"


def test_backend_without_a_time_keeps_its_place() -> None:
    # Nothing is known of native, so nothing says that flash2 is faster.
    decision = choose("h100", times(flash2=1.0, flash3=1.5))
    assert (decision.chosen, decision.basis) == ("native", "fixed order")


def test_faster_backend_that_refuses_the_call_is_passed_over_with_its_reasons() -> None:
    wide = call(head_dim=512, head_dim_v=512)
    decision = choose("h100", times(flash2=1.0, native_efficient=2.0, native=3.0), spec=wide)
    assert decision.chosen == "native_efficient"
    assert "flash2" in {candidate.name for candidate in choice_of(decision).refused}
    assert {reason.code for reason in decision.reasons("flash2")} >= {"head_dim"}


def test_quantised_kernel_is_taken_only_where_precision_allows_it() -> None:
    long = call(seqlen_q=8192, seqlen_kv=8192)
    known = times(flash3_fp8=1.0, flash3=2.0)
    packages = {**PACKAGES, "flash-attn-3": "3.0.0"}
    env = preset("h100", packages=packages, torch_version="2.11.0")
    backends = Known((), third_parties=False)
    exact = resolve(long, env, AUTO, backends, timings=known)
    assert exact.chosen == "flash3"
    assert {reason.code for reason in exact.reasons("flash3_fp8")} >= {"precision"}
    loose = dataclasses.replace(AUTO, precision="fp8")
    allowed = resolve(long, env, loose, backends, timings=known)
    assert "precision" not in {reason.code for reason in allowed.reasons("flash3_fp8")}


WRONG = Reason("inexact", "a result within the error budget", "an error of 7 times the budget")


def test_backend_whose_result_was_wrong_is_left_out_and_says_so() -> None:
    timings = dataclasses.replace(times(flash2=1.0, native_cudnn=2.0), refused={"native": WRONG})
    decision = choose("h100", timings)
    assert decision.chosen not in ("native", None)
    assert WRONG in decision.reasons("native")
    assert "7 times the budget" in str(decision)


def test_backend_whose_result_was_wrong_still_runs_where_it_is_named() -> None:
    timings = dataclasses.replace(times(flash2=1.0, native_cudnn=2.0), refused={"native": WRONG})
    assert choose("h100", timings, Preference(("native",), "require", "backend=")).chosen == "native"
    assert choose("h100", timings, Preference(("native", "auto"), "prefer", "backend=")).chosen == "native"


def test_wrong_results_of_all_leave_the_choice_as_it_was() -> None:
    refused = dict.fromkeys(registry.built_in_names(), WRONG)
    decision = choose("cpu", dataclasses.replace(times(native=1.0, flex=2.0), refused=refused), spec=call("cpu"))
    assert decision.chosen == "native"


@pytest.mark.parametrize("names", [("flash2",), ("flash2", "native")])
def test_explicit_names_are_not_reordered(names: tuple[str, ...]) -> None:
    mode = "require" if len(names) == 1 else "prefer"
    wish = Preference(names, mode, "backend=")  # type: ignore[arg-type]
    assert choose("h100", times(native=0.1, flash2=9.0), wish).chosen == "flash2"


def test_name_before_auto_in_a_list_is_preferred_whatever_the_times() -> None:
    wish = Preference(("flash2", "auto"), "prefer", "backend=")
    assert choose("h100", times(native=0.1, flash2=9.0), wish).chosen == "flash2"
    wish = Preference(("xla", "auto"), "prefer", "backend=")
    assert choose("h100", times(native=2.0, flash2=1.0), wish).chosen == "flash2"


def test_decision_shows_times_their_source_and_age() -> None:
    decision = choose("h100", times(native=2e-3, flash3=1e-3))
    text = str(decision)
    assert "measured on this machine" in text
    assert "days ago" in text
    assert "flash3 1 ms, native 2 ms" in text
    assert decision.to_dict()["timings"]["rows"][0]["seconds"] == 2e-3


def test_ages_are_in_words_and_a_clock_set_back_is_no_error() -> None:
    assert age(0.0, 3 * 86400.0) == "3 days ago"
    assert age(0.0, 86400.0) == "1 day ago"
    assert age(0.0, 7200.0) == "2 hours ago"
    assert age(0.0, 61.0) == "1 minute ago"
    assert age(0.0, 5.0) == age(5.0, 0.0) == "less than a minute ago"
    assert age(1e6, 0.0) == "at a time that this machine's clock hasn't reached"


SPECS = st.builds(
    lambda lengths, heads, dims, dtype, mask, grad, lse: AttentionSpec(
        2,
        lengths[0],
        lengths[1],
        heads[0],
        heads[1],
        *dims,
        dtype,
        "cuda",
        0.125,
        mask=mask,
        requires_grad=("query", "key", "value") if grad else (),
        return_lse=lse,
        same_lengths=lengths[0] == lengths[1],
    ),
    st.tuples(st.sampled_from((1, 77, 1024, 9000)), st.sampled_from((1, 77, 1024, 9000))),
    st.sampled_from(((16, 16), (16, 4))),
    st.sampled_from(((64, 64), (96, 96), (512, 512), (64, 128))),
    st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    st.sampled_from(
        (
            MaskSpec(),
            MaskSpec(PatternSpec(-1, 0, "lower_right")),
            MaskSpec(key="padding"),
            MaskSpec(key="lengths", prefix=True),
            MaskSpec(PatternSpec(100, 0, "upper_left"), dead_rows=True),
        )
    ),
    st.booleans(),
    st.booleans(),
)
NAMES = st.sampled_from(registry.built_in_names())


@settings(max_examples=150, deadline=None)
@given(
    SPECS,
    st.sampled_from(("h100", "a100", "t4", "b200", "mi300")),
    st.dictionaries(NAMES, st.floats(1e-6, 1.0), max_size=8),
    st.sets(NAMES, max_size=4),
    st.sampled_from(("exact", "int8", "fp8")),
)
def test_what_is_chosen_always_admits_the_call(
    spec: AttentionSpec, name: str, seconds: dict[str, float], wrong: set[str], precision: str
) -> None:
    wish = dataclasses.replace(AUTO, precision=precision)
    plain = choose(name, None, wish, spec)
    timings = dataclasses.replace(times(**seconds), refused=dict.fromkeys(wrong, WRONG))
    decision = choose(name, timings, wish, spec)
    # Timings never lose a call, and never admit one.
    assert (decision.chosen is None) == (plain.chosen is None)
    if decision.chosen is None:
        return
    admits = {candidate.name for candidate in plain.candidates if candidate.admits}
    assert decision.chosen in admits
    assert decision.chosen not in wrong or admits - _hub() <= wrong
    if plain.chosen in seconds and plain.chosen not in wrong and decision.chosen != plain.chosen:
        assert seconds[decision.chosen] * GAIN <= seconds[plain.chosen]
        right = (admits & seconds.keys()) - wrong - _hub()
        assert seconds[decision.chosen] == min(seconds[other] for other in right)


def _hub() -> set[str]:
    return {name for name, backend in registry.known(registry.built_in_names()) if backend.downloads}


def test_steps_of_decoding_stay_with_kernels_that_prepare_nothing_for_a_new_length() -> None:
    step = call(seqlen_q=1, seqlen_kv=4096, same_lengths=False)
    known = times(flash3=2e-4, native=1e-4, native_cudnn=1e-4, native_flash=3e-4)
    assert choose("h100", known, spec=step).chosen == "flash3"
    assert choose("h100", times(flash3=2e-4, flash2=1e-4, native=1e-5), spec=step).chosen == "flash2"
    assert choose("h100", known, spec=call(seqlen_q=64, seqlen_kv=4096, same_lengths=False)).chosen == "native"
