"""Which wish counts where several meet: threads, contexts, pins of Diffusers and of anyattn, parts and wholes."""

from __future__ import annotations

import threading

import pytest
from diffusers_tiny import chosen, make, output

import anyattn
from anyattn.integrations import diffusers as integration
from anyattn.integrations.diffusers.calls import doors
from anyattn.pins import pins
from anyattn.process.bounded import Bounded
from anyattn.selection import decide

attention_dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
REGISTRY = attention_dispatch._AttentionBackendRegistry


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    # What is said once per process must be said to the test that waits for it.
    monkeypatch.setattr(decide, "_said", Bounded(256))
    monkeypatch.setattr(doors, "_said", Bounded(256))
    active = REGISTRY._active_backend
    yield
    integration.disable()
    REGISTRY.set_active_backend(active)


def test_context_of_one_thread_is_not_seen_by_another():
    """Diffusers' context manager writes one attribute for the whole process."""
    integration.enable()
    model, inputs = make("flux")
    seen = {}
    entered, done = threading.Event(), threading.Event()

    def inside():
        with anyattn.attention_backend("native_math"):
            entered.set()
            done.wait(20)
            seen["inside"] = chosen("flux", model, inputs)

    thread = threading.Thread(target=inside)
    thread.start()
    entered.wait(20)
    seen["outside"] = chosen("flux", model, inputs)
    done.set()
    thread.join(20)
    assert seen == {"inside": {"native_math"}, "outside": set()}


def test_overlapping_contexts_of_two_threads_leave_nothing_behind():
    integration.enable()
    model, inputs = make("flux")
    first_in, second_in = threading.Event(), threading.Event()

    def first():
        with anyattn.attention_backend("native_math"):
            first_in.set()
            second_in.wait(20)

    def second():
        first_in.wait(20)
        with anyattn.attention_backend("flex"):
            second_in.set()
            threads[0].join(20)

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert chosen("flux", model, inputs) == set()


def test_model_pinned_in_one_thread_runs_on_its_pin_in_another():
    model, inputs = make("sd3")
    integration.set_attention_backend(model, "native_math")
    seen = []
    thread = threading.Thread(target=lambda: seen.append(chosen("sd3", model, inputs)))
    thread.start()
    thread.join(20)
    assert seen == [{"native_math"}]


def test_context_around_a_pinned_model_is_overruled_and_that_is_said():
    model, inputs = make("flux")
    integration.set_attention_backend(model, "native_math")
    with (
        pytest.warns(anyattn.AnyattnWarning, match="native_math"),
        anyattn.attention_backend("flex"),
        anyattn.record() as calls,
    ):
        output("flux", model, inputs)
    assert {call.chosen for call in calls} == {"native_math"}


def test_overriding_context_beats_the_pin():
    model, inputs = make("flux")
    integration.set_attention_backend(model, "native")
    with anyattn.attention_backend("native_math", override=True):
        assert chosen("flux", model, inputs) == {"native_math"}


def test_context_around_a_model_pinned_by_diffusers_keeps_its_name_and_says_so():
    integration.enable()
    model, inputs = make("flux")
    model.set_attention_backend("_native_math")
    with pytest.warns(anyattn.AnyattnWarning, match="more specific"), anyattn.attention_backend("flex"):
        assert chosen("flux", model, inputs) == {"native_math"}
    with anyattn.attention_backend("flex", override=True):
        assert chosen("flux", model, inputs) == {"flex"}
    integration.set_attention_backend(model, "native")
    assert chosen("flux", model, inputs) == {"native"}


def test_pin_of_a_part_beats_the_pin_of_the_whole():
    model, inputs = make("flux")
    part = model.transformer_blocks[0]
    integration.set_attention_backend(model, "native")
    integration.set_attention_backend(part, "native_math")
    with anyattn.record() as calls:
        output("flux", model, inputs)
    assert [call.chosen for call in calls] == ["native_math", "native", "native"]
    integration.reset_attention_backend(part)
    assert chosen("flux", model, inputs) == {"native"}


def test_pin_made_by_hand_comes_back():
    model, inputs = make("flux")
    pins.pin(model, "native_math")
    integration.set_attention_backend(model, "native")
    assert chosen("flux", model, inputs) == {"native"}
    integration.enable()
    integration.reset_attention_backend(model)
    assert chosen("flux", model, inputs) == {"native_math"}


def test_diffusers_setter_after_a_pin_says_that_it_waits():
    model, inputs = make("flux")
    integration.set_attention_backend(model, "native_math")
    with pytest.warns(anyattn.AnyattnWarning, match="waits: anyattn pinned .* native_math"):
        model.set_attention_backend("native")
    assert chosen("flux", model, inputs) == {"native_math"}
    integration.reset_attention_backend(model)
    model.set_attention_backend("native")
