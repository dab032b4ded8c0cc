"""Which calls share a measurement, and what makes a measurement another machine's."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import anyattn
from anyattn.environment import Device, detect, preset
from anyattn.timings.keys import bucket_ends, fingerprint, key_of, mask_class, rounded, shape_bucket
from anyattn.types.spec import AttentionSpec, DenseSpec, MaskSpec, PatternSpec

SPEC = AttentionSpec(2, 4429, 77, 16, 4, 64, 80, torch.bfloat16, "cuda", 0.125, same_lengths=False)
H200 = preset("h200", torch_version="2.11.0")


@pytest.mark.parametrize("length", [1, 2, 3, 5, 9, 16, 77, 127, 1000, 4429])
def test_ends_of_buckets_are_the_first_and_last_length_of_each(length: int) -> None:
    low = 1 << (length.bit_length() - 1)
    buckets: dict[int, list[int]] = {}
    for other in range(low, 2 * low):
        buckets.setdefault(rounded(other), []).append(other)
    wanted = {end for bucket in buckets.values() for end in (bucket[0], bucket[-1])}
    assert bucket_ends(length) == tuple(sorted(wanted))


def test_rounding_keeps_short_lengths_and_is_at_most_a_quarter_above() -> None:
    assert [rounded(length) for length in range(1, 9)] == list(range(1, 9))
    for length in range(1, 5000):
        assert length <= rounded(length) <= 1.25 * length
        assert rounded(rounded(length)) == rounded(length)


def test_calls_of_one_bucket_share_a_key_and_other_sizes_do_not() -> None:
    key = key_of(SPEC, H200)
    assert key is not None
    assert key == key_of(SPEC.replace(seqlen_q=4430, seqlen_kv=80), H200)
    assert shape_bucket(SPEC) == "B2 Q5120 K80 H16/4 D64/80"
    for change in ({"seqlen_q": 6000}, {"num_heads": 32}, {"num_kv_heads": 16}, {"head_dim": 96}, {"head_dim_v": 64}):
        assert key_of(SPEC.replace(**change), H200) != key
    assert key_of(SPEC.replace(layout="BHSD", device_index=0), H200) == key


def test_direction_dtype_and_launch_are_told_apart() -> None:
    found = {
        key_of(SPEC.replace(**change), H200)
        for change in ({}, {"dtype": torch.float16}, {"requires_grad": ("query",)}, {"captured": True})
    }
    assert len(found) == 4
    compiled, captured = key_of(SPEC.replace(compiled=True), H200), key_of(SPEC.replace(captured=True), H200)
    assert compiled == captured


MASKS = {
    "none": MaskSpec(),
    "causal upper_left": MaskSpec(PatternSpec(-1, 0, "upper_left")),
    "causal lower_right": MaskSpec(PatternSpec(-1, 0, "lower_right")),
    "window 256,0 upper_left": MaskSpec(PatternSpec(250, 0, "upper_left")),
    "padding": MaskSpec(key="padding"),
    "padding in front": MaskSpec(key="padding", prefix=True),
    "lengths in front": MaskSpec(key="lengths", prefix=True),
    "boolean (B,1,Q,K)": MaskSpec(dense=DenseSpec("boolean", torch.bool, (2, 1, 4429, 77))),
    "bias (1,H,Q,K) bfloat16": MaskSpec(dense=DenseSpec("bias", torch.bfloat16, (1, 16, 4429, 77))),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask_classes_are_in_words(name: str) -> None:
    assert mask_class(SPEC.replace(mask=MASKS[name])) == name


def test_alignment_of_a_causal_mask_counts_for_unequal_lengths_alone() -> None:
    square = SPEC.replace(seqlen_kv=4429, same_lengths=True)
    classes = {mask_class(square.replace(mask=MASKS[f"causal {align}"])) for align in ("upper_left", "lower_right")}
    assert classes == {"causal"}


@pytest.mark.parametrize("change", [{"softcap": 5.0}, {"sinks": True}, {"return_lse": True}, {"dropout_p": 0.1}])
def test_other_options_are_classes_of_their_own(change: dict[str, object]) -> None:
    assert mask_class(SPEC.replace(**change)) != "none"


@pytest.mark.parametrize(
    "change", [{"seqlen_q": -1}, {"seqlen_kv": 0}, {"packed": True}, {"forward_ad": True}, {"vmap": True}]
)
def test_calls_that_are_never_measured_have_no_key(change: dict[str, object]) -> None:
    assert key_of(SPEC.replace(**change), H200) is None


def test_call_on_a_device_that_is_not_there_has_no_key() -> None:
    assert key_of(SPEC, preset("cpu")) is None
    assert key_of(SPEC.replace(device_type="meta"), H200) is None


def test_each_thing_that_changes_times_changes_the_fingerprint() -> None:
    name = fingerprint(H200, "cuda")
    assert name == "NVIDIA H200, sm90, cuDNN 9.19.0, torch 2.11.0"
    others = [
        dataclasses.replace(H200, driver="580.65"),
        dataclasses.replace(H200, cudnn=(9, 20, 0)),
        dataclasses.replace(H200, overrides={"native_flash": "FA3"}),
        dataclasses.replace(H200, devices=(Device("cpu"), Device("cuda", "NVIDIA H100", (9, 0)))),
        preset("h200", torch_version="2.12.0"),
    ]
    assert len({name, *(fingerprint(env, "cuda") for env in others)}) == 6
    # Versions of kernels stand beside each measurement, and other packages don't matter.
    assert fingerprint(preset("h200", torch_version="2.11.0", packages={"flash-attn": "2.8.3"}), "cuda") == name


def test_fingerprint_of_this_machine_names_its_processor_and_threads() -> None:
    env = detect()
    assert env.processor.endswith(f", {torch.get_num_threads()} threads")
    assert env.processor in fingerprint(env, "cpu")
    assert "driver" not in fingerprint(env, "cpu")
    assert key_of(anyattn.explain(*[torch.randn(1, 4, 2, 8)] * 3).spec, env) is not None
