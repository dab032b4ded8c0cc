"""What shows the choice, what is known of masks, and the checks that read values."""

from __future__ import annotations

import gc
import json
import threading
from typing import Any

import pytest
import torch

import anyattn
from anyattn import masks, reference
from anyattn.adapters.native import kernels
from anyattn.environment import preset
from anyattn.masks.values import _not_all_true, _prepared_values


def tensors(seqlen_q: int = 6, seqlen_kv: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, seqlen_q, 2, 16), torch.randn(2, seqlen_kv, 2, 16), torch.randn(2, seqlen_kv, 2, 16)


def test_explain_runs_nothing_and_says_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_ENTRIES", {})
    decision = anyattn.explain(*tensors(), is_causal=True, window=(3, -1), backend="native_math")
    assert decision.chosen == "native_math"
    assert [conversion.code for conversion in decision.conversions] == ["dense_mask"]
    assert "native_math" in str(decision)
    assert json.loads(json.dumps(decision.to_dict()))["chosen"] == "native_math"


def test_explain_takes_a_spec_and_another_machine() -> None:
    spec = anyattn.explain(*tensors()).spec
    assert anyattn.explain(spec).chosen == "native"
    cuda = spec.replace(device_type="cuda", scale=-1.0, dtype=torch.bfloat16)
    decision = anyattn.explain(cuda, env=preset("h100", torch_version="2.11.0"))
    assert decision.kernel == "efficient"
    assert anyattn.explain(cuda).chosen is None


def test_explain_of_a_refused_call_has_no_choice_and_does_not_raise() -> None:
    decision = anyattn.explain(*tensors(), softcap=1.0, backend="native")
    assert decision.chosen is None
    assert "softcap" in str(decision)


def test_explain_and_the_error_give_the_same_reasons() -> None:
    decision = anyattn.explain(*tensors(), softcap=1.0, backend="native")
    with pytest.raises(anyattn.UnsupportedCallError) as caught:
        anyattn.attention(*tensors(), softcap=1.0, backend="native")
    assert caught.value.decision == decision


def test_plan_runs_what_it_chose_and_refuses_other_shapes() -> None:
    q, k, v = tensors()
    run = anyattn.plan(anyattn.explain(q, k, v, is_causal=True).spec)
    assert torch.equal(run(q, k, v), anyattn.attention(q, k, v, is_causal=True))
    assert run.decision.chosen == "native"
    with pytest.raises(anyattn.InvalidCallError, match="Plan again"):
        run(q[:, :3], k, v)
    with pytest.raises(anyattn.InvalidCallError, match="Plan again"):
        run(q.double(), k.double(), v.double())


def test_plan_with_a_mask_needs_one() -> None:
    q, k, v = tensors()
    mask = masks.KeyPadding(torch.rand(2, 8) > 0.3)
    run = anyattn.plan(anyattn.explain(q, k, v, mask).spec, backend="native_math")
    assert torch.equal(run(q, k, v, mask), anyattn.attention(q, k, v, mask, backend="native_math"))
    with pytest.raises(anyattn.InvalidCallError, match="mask"):
        run(q, k, v)


def test_backends_lists_every_known_name_with_cures() -> None:
    rows = {row.name: row for row in anyattn.backends()}
    assert rows["native"].usable
    assert rows["native"].version == torch.__version__
    assert not rows["flash3"].usable
    assert rows["flash3"].install
    for row in rows.values():
        assert row.usable is not bool(row.reasons)
    assert not rows["sage"].exact


def test_mask_that_allows_everything_is_dropped_on_a_cpu() -> None:
    q, k, v = tensors()
    full = torch.ones(2, 8, dtype=torch.bool)
    for mask in (full[:, None, None], masks.KeyPadding(full), masks.KeyLengths(torch.tensor([8, 8]))):
        with anyattn.record() as calls:
            out = anyattn.attention(q, k, v, mask)
        assert calls[0].spec.mask.is_empty
        assert torch.equal(out, anyattn.attention(q, k, v))


@pytest.mark.parametrize("write", ["in place", "data", "numpy"])
def test_mask_written_to_after_it_was_seen_is_never_stale(write: str) -> None:
    q, k, v = tensors()
    padding = torch.ones(2, 8, dtype=torch.bool)
    mask = masks.KeyPadding(padding)
    anyattn.attention(q, k, v, mask)
    if write == "in place":
        padding[:, 4:] = False
    elif write == "data":
        padding.data[:, 4:] = False
    else:
        padding.numpy()[:, 4:] = False
    wanted = reference.attention(q, k, v, masks.KeyPadding(padding))[0]
    assert (anyattn.attention(q, k, v, mask) - wanted).abs().max() < 1e-5
    padding.fill_(True)
    assert (anyattn.attention(q, k, v, mask) - reference.attention(q, k, v)[0]).abs().max() < 1e-5


def test_what_is_known_of_masks_goes_with_them() -> None:
    q, k, v = tensors()
    gc.collect()
    before = len(_not_all_true), len(_prepared_values)
    for _ in range(20):
        padding = torch.rand(2, 8) > 0.5
        padding[:, 0] = False
        anyattn.prepare_mask(padding[:, None, None])
        anyattn.attention(q, k, v, masks.KeyPadding(padding))
    del padding
    gc.collect()
    assert (len(_not_all_true), len(_prepared_values)) == before


def test_freed_masks_storage_used_again_is_not_taken_for_it() -> None:
    q, k, v = tensors()
    for step in range(50):
        padding = torch.zeros(2, 8, dtype=torch.bool)
        padding[:, : 1 + step % 8] = True
        wanted = reference.attention(q, k, v, masks.KeyPadding(padding))[0]
        assert (anyattn.attention(q, k, v, masks.KeyPadding(padding)) - wanted).abs().max() < 1e-5


def test_masks_made_in_inference_mode_work_in_training() -> None:
    q, k, v = tensors()
    with torch.inference_mode():
        mask = masks.KeyPadding(torch.rand(2, 8) > 0.3)
        anyattn.attention(q, k, v, mask)
    q.requires_grad_()
    anyattn.attention(q, k, v, mask).sum().backward()
    assert q.grad is not None


def test_prepare_mask_drops_what_allows_everything() -> None:
    assert anyattn.prepare_mask(torch.ones(6, 8, dtype=torch.bool)) is None
    assert anyattn.prepare_mask(torch.zeros(6, 8)) is None
    assert anyattn.prepare_mask(masks.KeyLengths(torch.tensor([8, 8])), seqlen_kv=8) is None
    kept = anyattn.prepare_mask(masks.KeyPadding(torch.ones(2, 8, dtype=torch.bool)) & masks.Causal())
    assert kept is not None
    assert kept.key is None
    assert kept.pattern == (-1, 0, "upper_left")
    with pytest.raises(anyattn.InvalidCallError, match="seqlen_kv"):
        anyattn.prepare_mask(masks.KeyLengths(torch.tensor([8, 8])))


def test_prepared_mask_is_known_to_leave_no_row_dead_until_it_is_written_to() -> None:
    from anyattn.masks.values import NOTHING, _learn, _prepared

    mask = torch.rand(6, 8) > 0.2
    mask[:, 0] = True
    mask[0, 1] = False
    _learn(mask, 0)
    assert _prepared(mask, 8).live
    mask[3] = False
    assert _prepared(mask, 8) == NOTHING


def test_checks_are_off_by_default_and_on_by_either_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    k[0, 0] = float("nan")
    anyattn.attention(q, k, v)
    for variable, word in (("ANYATTN_CHECKS", "yes"), ("DIFFUSERS_ATTN_CHECKS", "TRUE"), ("ANYATTN_CHECKS", "on")):
        monkeypatch.setenv(variable, word)
        anyattn.reset()
        with pytest.raises(anyattn.InvalidCallError, match="key holds NaN"):
            anyattn.attention(q, k, v)
        monkeypatch.delenv(variable)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYATTN_CHECKS", "1")
    anyattn.reset()


@pytest.mark.usefixtures("checks")
@pytest.mark.parametrize("backend", ["native", "native_flash", "native_math", "flex"])
def test_checks_pass_right_calls(backend: str) -> None:
    q, k, v = tensors()
    padding = torch.rand(2, 8) > 0.3
    padding[:, 0] = True
    for mask in (None, masks.Causal(), masks.KeyPadding(padding) & masks.SlidingWindow(8, 8), torch.randn(2, 6, 8)):
        anyattn.attention(q, k, v, mask, backend=backend)
    if backend != "native_math":
        anyattn.attention(q, k, v, masks.Causal("lower_right"), sinks=torch.randn(2), return_lse=True, backend=backend)


@pytest.mark.usefixtures("checks")
@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.full((6, 8), float("nan")), "NaN"),
        (torch.full((6, 8), float("inf")), "NaN or \\+inf"),
        (masks.KeyLengths(torch.tensor([3, 9])), "Key lengths"),
        (masks.KeyLengths(torch.tensor([-1, 3])), "Key lengths"),
    ],
)
def test_checks_refuse_masks_without_meaning(mask: Any, says: str) -> None:
    with pytest.raises(anyattn.InvalidCallError, match=says):
        anyattn.attention(*tensors(), mask)


@pytest.mark.usefixtures("checks")
def test_checks_tell_of_rows_without_a_key() -> None:
    with pytest.warns(anyattn.AnyattnWarning, match="without any key"):
        anyattn.attention(*tensors(), masks.KeyLengths(torch.tensor([0, 3])))


@pytest.mark.usefixtures("checks")
def test_checks_find_a_kernel_that_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = kernels._ENTRIES["math"]

    def lying(spec: Any, q: Any, k: Any, v: Any, mask: Any, causal: bool) -> Any:
        return plain(spec, q, k * 1.01, v, mask, causal)

    monkeypatch.setitem(kernels._ENTRIES, "math", lying)  # type: ignore[arg-type]
    with pytest.raises(anyattn.KernelError, match="disagrees with the reference"):
        anyattn.attention(*tensors(64, 64), backend="native_math")


def test_many_threads_decide_and_run_at_once() -> None:
    q, k, v = tensors()
    wanted = anyattn.attention(q, k, v, is_causal=True)
    failures: list[Exception] = []

    def work(index: int) -> None:
        try:
            name = ("native", "native_math", "native_flash")[index % 3]
            for step in range(30):
                with anyattn.attention_backend(name), anyattn.record() as calls:
                    part = q[:, : 1 + (index + step) % 6]
                    out = anyattn.attention(part, k, v, is_causal=True)
                assert [call.chosen for call in calls] == [name]
                assert (out - wanted[:, : part.shape[1]]).abs().max() < 1e-5
        except Exception as error:  # noqa: BLE001 - told to the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_explanation_fits_one_screen_and_says_what_backends_share_once() -> None:
    q = torch.randn(1, 8, 2, 16)
    text = str(anyattn.explain(q, q, q))
    assert len(text.splitlines()) <= 40, text
    for candidate in anyattn.explain(q, q, q).candidates:
        assert candidate.name in text
    lines = [line for line in text.splitlines() if line.startswith("  ") and line.endswith("refuse")]
    assert any("native_efficient, native_cudnn" in line for line in lines)
