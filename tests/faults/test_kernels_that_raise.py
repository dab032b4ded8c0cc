"""A kernel that raises when it runs: an explicit name fails, `auto` and lists go on to the next and say so."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from breaking import NAMES, admitted, preferred, raising
from torch import Tensor

import anyattn
import doubles
from anyattn import environment, masks
from anyattn.adapters.native import NativeMath
from anyattn.backend.protocol import Output, Parts, Plan
from anyattn.scopes import defaults
from anyattn.selection import faults, registry


class PlainTritonError(Exception):
    """Triton's errors are no RuntimeErrors."""


PlainTritonError.__module__ = "triton.compiler.errors"

ERRORS = (
    RuntimeError("this kernel was not compiled for head_dim 64\nmore"),
    NotImplementedError("No operator found"),
    TypeError("flash_attn_func() got an unexpected keyword argument 'softcap'"),
    ValueError("unsupported"),
    AssertionError("Unsupported CUDA architecture"),
    KeyError("sm90"),
    PlainTritonError("out of resource: shared memory"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
)


def _ids(error: Exception) -> str:
    return f"{type(error).__name__} {str(error)[:10]}"


@pytest.mark.parametrize("error", ERRORS, ids=_ids)
@pytest.mark.parametrize("name", NAMES)
def test_explicit_name_raises_the_kernels_error_each_time(name: str, error: Exception) -> None:
    with raising(name, error) as seen:
        inputs = admitted(name)
        heads = [tensor.transpose(1, 2) for tensor in inputs]
        plan = anyattn.plan(anyattn.explain(*inputs, backend=name).spec, backend=name)
        for call in (
            lambda: anyattn.attention(*inputs, backend=name),
            lambda: anyattn.scaled_dot_product_attention(*heads, backend=name),
            lambda: plan(*inputs),
        ):
            for _ in range(2):
                with pytest.raises(anyattn.KernelError) as caught:
                    call()
                assert caught.value.backend == name
                assert caught.value.__cause__ is error
                assert name in str(caught.value)
                assert "anyattn doctor" in str(caught.value)
        assert len(seen) == 6
        assert anyattn.explain(*inputs, backend=name).chosen == name


@pytest.mark.parametrize("error", ERRORS, ids=_ids)
@pytest.mark.parametrize("name", NAMES)
def test_list_goes_on_and_says_so_once_with_the_true_name(name: str, error: Exception) -> None:
    with raising(name, error) as seen, preferred(name, "native_math"):
        inputs = admitted(name)
        with warnings.catch_warnings(record=True) as said, anyattn.record() as calls:
            warnings.simplefilter("always")
            outs = [anyattn.attention(*inputs) for _ in range(3)]
        wanted = anyattn.attention(*inputs, backend="native_math")
        assert all(torch.equal(out, wanted) for out in outs)
        assert len(seen) == 1, "a kernel that failed for a call is tried for it once"
        (text,) = (str(w.message) for w in said if issubclass(w.category, anyattn.AnyattnWarning))
        assert text.startswith(f"The attention backend {name} failed for ")
        assert faults.one_line(error) in text
        assert text.endswith("native_math runs instead.")
        assert [decision.chosen for decision in calls] == ["native_math"] * 3, "what ran is what is recorded"
        (reason,) = anyattn.explain(*inputs).reasons(name)
        assert (reason.code, reason.got) == ("fault", faults.one_line(error))
        assert "doctor" in reason.hint


@pytest.mark.filterwarnings("ignore::anyattn.errors.AnyattnWarning")
@pytest.mark.parametrize("name", NAMES)
def test_other_calls_still_use_the_kernel_and_reset_has_it_tried_again(name: str) -> None:
    with raising(name, RuntimeError("not for this length"), only=128) as seen, preferred(name, "native_math"):
        for seqlen in (128, 256, 128, 256):
            with anyattn.record() as calls:
                anyattn.attention(*admitted(name, seqlen))
            assert calls[0].chosen == ("native_math" if seqlen == 128 else name)
        assert seen == [128, 256, 256]
        anyattn.reset()
        anyattn.attention(*admitted(name, 128))
        assert seen == [128, 256, 256, 128]


def test_wrong_answer_found_by_the_checks_is_a_fault_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYATTN_CHECKS", "1")
    anyattn.reset()
    with doubles.installed("flash2") as backend:
        run = type(backend).run
        type(backend).run = staticmethod(lambda *args: run(*args) * 2)  # type: ignore[method-assign]
        inputs = admitted("flash2")
        with pytest.raises(anyattn.KernelError):
            anyattn.attention(*inputs, backend="flash2")
        with pytest.warns(anyattn.AnyattnWarning, match="flash2 failed"):
            out = anyattn.attention(*inputs, backend=["flash2", "native_math"])
    assert torch.equal(out, anyattn.attention(*inputs, backend="native_math"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        MemoryError("no room"),
    ],
    ids=_ids,
)
@pytest.mark.parametrize("wish", [["flash2", "native_math"], "flash2"], ids=str)
def test_out_of_memory_passes_through_and_is_no_fault(wish: Any, error: Exception) -> None:
    with raising("flash2", error) as seen:
        inputs = admitted("flash2")
        heads = [tensor.transpose(1, 2) for tensor in inputs]
        plan = anyattn.plan(anyattn.explain(*inputs, backend=wish).spec, backend=wish)
        for call in (
            lambda: anyattn.attention(*inputs, backend=wish),
            lambda: anyattn.scaled_dot_product_attention(*heads, backend=wish),
            lambda: plan(*inputs),
        ):
            with pytest.raises(type(error)) as caught:
                call()
            assert caught.value is error
        assert len(seen) == 3
        assert anyattn.explain(*inputs, backend=wish).chosen == "flash2"


class AcceleratorError(RuntimeError):
    """As torch.AcceleratorError, which torch 2.6 hasn't."""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: misaligned address\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error (/src/flash_fwd_launch_template.h:180): invalid configuration argument"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("HIP error: unspecified launch failure"),
        RuntimeError("cudaErrorIllegalInstruction"),
        AcceleratorError("device-side assert triggered"),
    ],
    ids=_ids,
)
def test_error_that_loses_the_device_is_raised_and_never_retried(error: Exception) -> None:
    with raising("flash2", error) as seen:
        inputs = admitted("flash2")
        with pytest.raises(anyattn.KernelError, match="restart the process") as caught:
            anyattn.attention(*inputs, backend=["flash2", "native_math"])
        assert caught.value.__cause__ is error
        assert len(seen) == 1
        assert anyattn.explain(*inputs, backend=["flash2", "native_math"]).chosen == "flash2"


class Stops(Exception):
    """As gradient checkpointing stops a forward that runs again: no error of a kernel's."""


@pytest.mark.parametrize("wish", [["flash2", "native_math"], "flash2"], ids=str)
def test_exception_that_is_no_kernels_passes_through(wish: Any) -> None:
    with raising("flash2", Stops()) as seen:  # type: ignore[arg-type]
        inputs = admitted("flash2")
        plan = anyattn.plan(anyattn.explain(*inputs, backend=wish).spec, backend=wish)
        for call in (lambda: anyattn.attention(*inputs, backend=wish), lambda: plan(*inputs)):
            with pytest.raises(Stops):
                call()
        assert len(seen) == 2
        assert anyattn.explain(*inputs, backend=wish).chosen == "flash2"


def test_call_without_keys_runs_no_kernel_and_meets_no_fault() -> None:
    with raising("flash2", RuntimeError("never")) as seen:
        q = torch.randn(2, 128, 2, 64, dtype=torch.bfloat16)
        out = anyattn.attention(q, q[:, :0], q[:, :0], backend=["flash2", "native_math"])
        assert not out.any()
        assert seen == []


@pytest.mark.filterwarnings("ignore::anyattn.errors.AnyattnWarning")
def test_fault_keeps_no_tensor_alive() -> None:
    error = RuntimeError("always")
    with raising("flash2", error):
        query, key, value = admitted("flash2")
        gone = weakref.ref(query)
        anyattn.attention(query, key, value, backend=["flash2", "native_math"])
        error.__traceback__ = None
        del query
        gc.collect()
        assert gone() is None


@pytest.mark.parametrize("way", ["call", "plan"])
def test_error_that_passes_through_keeps_no_tensor_alive(way: str) -> None:
    query = torch.randn(1, 6, 2, 8)
    gc.collect()
    gc.disable()
    try:
        with doubled_error(lambda: torch.OutOfMemoryError("CUDA out of memory")):
            call = anyattn.plan(anyattn.explain(query, query, query).spec) if way == "plan" else anyattn.attention
            for _ in range(2):
                with pytest.raises(torch.OutOfMemoryError):
                    call(query, query, query)
        seen = weakref.ref(query)
        del query
        assert seen() is None
    finally:
        gc.enable()


@contextlib.contextmanager
def doubled_error(make: Callable[[], Exception]) -> Iterator[None]:
    """Have native raise a new error at each call."""

    class Raising(NativeMath):
        name = "native"

        @staticmethod
        def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
            raise make()

    with registry.substituted(Raising()):
        yield


def test_list_whose_last_kernel_fails_says_every_reason() -> None:
    says = r"flash2:\n.*fault: .*RuntimeError: broken"
    with raising("flash2", RuntimeError("broken")), pytest.raises(anyattn.UnsupportedCallError, match=says):
        anyattn.attention(*admitted("flash2"), backend=["flash2"])


@pytest.mark.parametrize("masked", [False, True])
def test_plan_of_a_list_goes_on_to_the_next(masked: bool) -> None:
    with raising("flash2", RuntimeError("not today")) as seen:
        inputs = admitted("flash2")
        mask = masks.KeyPadding(torch.rand(2, 128) > 0.3) if masked else None
        given = (*inputs, mask) if masked else inputs
        plan = anyattn.plan(anyattn.explain(*given).spec, backend=["flash2", "native_math"])
        assert plan.decision.chosen == "flash2"
        with pytest.warns(anyattn.AnyattnWarning, match="flash2 failed"):
            out = plan(*given)
        assert plan.decision.chosen == "native_math"
        wanted = anyattn.attention(*given, backend="native_math")
        assert torch.equal(out, wanted)
        assert torch.equal(plan(*given), wanted)
        assert len(seen) == 1


def test_compiled_code_goes_past_a_kernel_that_failed_in_eager_code() -> None:
    torch._dynamo.reset()
    with raising("flash2", RuntimeError("not today")) as seen:
        inputs = admitted("flash2")
        wish = ("flash2", "native_math")
        with pytest.warns(anyattn.AnyattnWarning, match="flash2 failed"):
            wanted = anyattn.attention(*inputs, backend=wish)
        run = torch.compile(
            lambda q, k, v: anyattn.attention(q, k, v, backend=wish), fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(run(*inputs), wanted)
        assert len(seen) == 1
    torch._dynamo.reset()


class Moody(NativeMath):
    """Has a short way, which raises at the second call."""

    name = "moody"
    calls = 0

    @staticmethod
    def run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Output:
        return NativeMath.run(plan, query, key, value, parts)

    def bind(self, plan: Plan) -> Any:
        def short(query: Tensor, key: Tensor, value: Tensor) -> Output:
            Moody.calls += 1
            if Moody.calls > 1:
                raise RuntimeError("a bad mood")
            return self.run(plan, query, key, value, Parts())

        return short


@pytest.fixture
def moody(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Moody, "calls", 0)
    registry.register(Moody())
    yield
    registry.unregister("moody")


@pytest.mark.usefixtures("moody")
def test_kernel_that_fails_in_the_short_way_is_passed_over_or_raised() -> None:
    q, k, v = torch.randn(3, 2, 8, 2, 16)
    wanted = anyattn.attention(q, k, v, backend="native_math")
    with anyattn.attention_backend(["moody", "native_math"]):
        anyattn.attention(q, k, v)
        assert defaults.current.get().short, "the call is in the short table, which this test is of"
        with pytest.warns(anyattn.AnyattnWarning, match=r"moody failed for .* a bad mood"):
            assert torch.equal(anyattn.attention(q, k, v), wanted)
        assert torch.equal(anyattn.attention(q, k, v), wanted)
        assert Moody.calls == 2
    with anyattn.attention_backend("moody"):
        Moody.calls = 0
        anyattn.attention(q, k, v)
        with pytest.raises(anyattn.KernelError, match="a bad mood"):
            anyattn.attention(q, k, v)


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"dtype": torch.float32}, "dtype"), ({"head_dim": 512, "head_dim_v": 512}, "head_dim"), ({}, "arch")],
)
def test_call_that_the_hardware_or_kernel_cannot_take_is_refused_before_it_runs(
    changes: dict[str, Any], code: str
) -> None:
    double = doubles.double_of("flash2")
    env = environment.preset("t4" if code == "arch" else "h100", packages=double.packages)
    env = dataclasses.replace(env, modules=double.found)
    q = torch.randn(1, 8, 2, 64, dtype=torch.bfloat16)
    spec = anyattn.explain(q, q, q).spec.replace(device_type="cuda", device_index=0, **changes)
    decision = anyattn.explain(spec, backend="flash2", env=env)
    assert decision.chosen is None
    reasons = decision.reasons("flash2")
    assert [reason.code for reason in reasons] == [code]
    assert reasons[0].need
    assert reasons[0].got
    with doubles.installed("flash2"):
        if code == "dtype":
            with pytest.raises(anyattn.UnsupportedCallError, match="needs bfloat16, float16, got float32; cast"):
                anyattn.attention(q.float(), q.float(), q.float(), backend="flash2")
        if code == "head_dim":
            wide = torch.randn(1, 8, 2, 512, dtype=torch.bfloat16)
            with pytest.raises(anyattn.UnsupportedCallError, match="head_dim <= 256, got 512"):
                anyattn.attention(wide, wide, wide, backend="flash2")
    rest = anyattn.explain(spec, backend=["flash2", "native_math"], env=env)
    assert rest.chosen == "native_math"
    assert [reason.code for reason in rest.reasons("flash2")] == [code]
