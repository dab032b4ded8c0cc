"""Inside `replace_sdpa`, and there alone, torch's own attention function is anyattn's."""

from __future__ import annotations

import asyncio
import copy
import gc
import io
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import anyattn
from anyattn.errors import AnyattnWarning, InvalidCallError, UnknownBackendError
from anyattn.sdpa import replacing


@pytest.fixture(autouse=True)
def _undone() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled
    yield
    gc.collect()
    assert F.scaled_dot_product_attention is replacing.TORCHS
    assert torch.backends.mha.get_fastpath_enabled is fast


def _qkv(*shape: int) -> list[Tensor]:
    return [torch.randn(*(shape or (2, 2, 5, 8))) for _ in range(3)]


class Attend(nn.Module):
    """A layer of a vision transformer, as timm writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _chosen(run: Any) -> list[str | None]:
    with anyattn.record() as calls:
        run()
    return [call.chosen for call in calls]


def test_calls_inside_run_on_the_backend_and_calls_outside_are_torchs() -> None:
    model, x = Attend(), torch.randn(2, 5, 16)
    before = model(x)
    with anyattn.replace_sdpa("native_math"):
        assert _chosen(lambda: torch.testing.assert_close(model(x), before)) == ["native_math"]
    assert _chosen(lambda: model(x)) == []


def test_auto_is_the_default_and_decisions_name_the_block() -> None:
    with anyattn.replace_sdpa(), anyattn.record() as calls:
        F.scaled_dot_product_attention(*_qkv())
    assert (calls[0].preference.names, calls[0].preference.source) == (("auto",), "replace_sdpa")


def test_no_function_mode_is_entered_so_other_functions_cost_nothing() -> None:
    with anyattn.replace_sdpa():
        assert torch._C._len_torch_function_stack() == 0
        assert torch._C._len_torch_dispatch_stack() == 0


@pytest.mark.parametrize(
    "shapes",
    [
        [(5, 8), (7, 8), (7, 6)],
        [(3, 5, 8), (3, 7, 8), (3, 7, 8)],
        [(3, 5, 8), (1, 7, 8), (1, 7, 8)],
        [(2, 2, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)],
        [(2, 2, 5, 8), (1, 1, 7, 8), (2, 1, 7, 8)],
        [(1, 2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8)],
        [(2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8)],
        [(2, 3, 2, 5, 8), (2, 3, 2, 7, 8), (2, 1, 2, 7, 8)],
    ],
)
@pytest.mark.parametrize("mask", ["none", "causal", "2-D", "full"])
def test_shapes_that_torch_takes_are_taken(shapes: list[tuple[int, ...]], mask: str) -> None:
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    lead = torch.broadcast_shapes(*(shape[:-2] for shape in shapes))
    attn_mask = {"2-D": torch.rand(5, 7) < 0.7, "full": torch.randn(*lead, 5, 7)}.get(mask)
    options = {"attn_mask": attn_mask, "is_causal": mask == "causal"}
    wanted = F.scaled_dot_product_attention(q, k, v, **options)
    weights = torch.randn_like(wanted)
    gradients = torch.autograd.grad((wanted * weights).sum(), (q, k, v))
    with anyattn.replace_sdpa("native_math"), anyattn.record() as calls:
        found = F.scaled_dot_product_attention(q, k, v, **options)
    assert len(calls) == 1
    # A row without a key gives zeros with anyattn; torch's CPU kernels agree.
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), (q, k, v)), gradients)


@pytest.mark.parametrize("shapes", [[(2, 5, 8), (3, 7, 8), (3, 7, 8)], [(8,), (7, 8), (7, 8)]])
def test_shapes_that_torch_refuses_are_refused_in_words(shapes: list[tuple[int, ...]]) -> None:
    q, k, v = map(torch.randn, shapes)
    with anyattn.replace_sdpa(), pytest.raises(InvalidCallError, match=r"leading dimensions|two dimensions"):
        F.scaled_dot_product_attention(q, k, v)


def test_shared_heads_scale_and_dropout_are_honoured() -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    wanted = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    with anyattn.replace_sdpa("native"):
        found = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
        dropped = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, enable_gqa=True)
        with pytest.raises(InvalidCallError, match="enable_gqa"):
            F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(found, wanted)
    assert not torch.equal(dropped, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def test_another_thread_and_another_task_keep_torchs_function() -> None:
    q, k, v = _qkv()
    chosen: dict[str, list[str | None]] = {}
    with anyattn.replace_sdpa():
        thread = threading.Thread(
            target=lambda: chosen.update(thread=_chosen(lambda: F.scaled_dot_product_attention(q, k, v)))
        )
        thread.start()
        thread.join()
    assert chosen == {"thread": []}

    async def inside(entered: asyncio.Event, leave: asyncio.Event) -> None:
        with anyattn.replace_sdpa("native_math"):
            entered.set()
            await leave.wait()
            chosen["inside"] = _chosen(lambda: F.scaled_dot_product_attention(q, k, v))

    async def both() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(inside(entered, leave))
        await entered.wait()
        chosen["beside"] = _chosen(lambda: F.scaled_dot_product_attention(q, k, v))
        leave.set()
        await task

    asyncio.run(both())
    assert chosen == {"thread": [], "inside": ["native_math"], "beside": []}


def test_blocks_nest_and_end_in_any_order() -> None:
    call = lambda: F.scaled_dot_product_attention(*_qkv())  # noqa: E731
    outer, inner = anyattn.replace_sdpa("native"), anyattn.replace_sdpa("native_math")
    outer.__enter__()
    inner.__enter__()
    assert _chosen(call) == ["native_math"]
    outer.__exit__(None, None, None)
    assert _chosen(call) == ["native_math"]
    inner.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert _chosen(call) == []
    assert F.scaled_dot_product_attention is replacing.TORCHS


def test_blocks_and_pins_inside_choose_the_backend() -> None:
    model, x = Attend(), torch.randn(2, 5, 16)
    with anyattn.replace_sdpa("native"):
        with anyattn.attention_backend("native_math"):
            assert _chosen(lambda: model(x)) == ["native_math"]
        assert _chosen(lambda: model(x)) == ["native"]
        anyattn.set_attention_backend(model, "native_flash")
        with pytest.warns(AnyattnWarning, match="by the model's pin"):
            assert _chosen(lambda: model(x)) == ["native_flash"]
        with anyattn.replace_sdpa("native_math", override=True):
            assert _chosen(lambda: model(x)) == ["native_math"]
        anyattn.reset_attention_backend(model)


def test_plain_block_does_not_replace_torchs_function() -> None:
    with anyattn.attention_backend("native_math"):
        assert F.scaled_dot_product_attention is replacing.TORCHS


def test_error_inside_leaves_nothing() -> None:
    with pytest.raises(ZeroDivisionError), anyattn.replace_sdpa():
        1 / 0  # noqa: B018
    with pytest.raises(UnknownBackendError):
        anyattn.replace_sdpa("no_such_backend")


def test_functions_generators_and_coroutines_are_decorated() -> None:
    @anyattn.replace_sdpa("native_math")
    def plain() -> list[str | None]:
        return _chosen(lambda: F.scaled_dot_product_attention(*_qkv()))

    @anyattn.replace_sdpa(["native_math", "native"])
    def steps() -> Iterator[list[str | None]]:
        for _ in range(2):
            yield _chosen(lambda: F.scaled_dot_product_attention(*_qkv()))

    @anyattn.replace_sdpa()
    async def coroutine() -> list[str | None]:
        await asyncio.sleep(0)
        return _chosen(lambda: F.scaled_dot_product_attention(*_qkv()))

    assert plain() == ["native_math"]
    assert F.scaled_dot_product_attention is replacing.TORCHS
    found = steps()
    assert next(found) == ["native_math"]
    assert _chosen(lambda: F.scaled_dot_product_attention(*_qkv())) == [], "suspended: not in force here"
    assert list(found) == [["native_math"]]
    assert asyncio.run(coroutine()) == ["native"]


def test_generator_that_is_dropped_takes_its_block_along() -> None:
    def steps() -> Iterator[None]:
        with anyattn.replace_sdpa():
            yield

    found = steps()
    next(found)
    assert F.scaled_dot_product_attention is not replacing.TORCHS
    del found
    gc.collect()
    assert F.scaled_dot_product_attention is replacing.TORCHS


def test_function_imported_by_name_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("comfy_like")
    exec(
        "from torch.nn.functional import scaled_dot_product_attention as attention_pytorch\n"
        "optimized_attention = attention_pytorch\n"
        "def attend(q, k, v):\n    return optimized_attention(q, k, v)\n",
        vars(module),
    )
    monkeypatch.setitem(sys.modules, "comfy_like", module)
    for _ in range(2):
        with anyattn.replace_sdpa("native_math"):
            assert _chosen(lambda: module.attend(*_qkv())) == ["native_math"]
        assert module.optimized_attention is module.attention_pytorch is replacing.TORCHS
        assert _chosen(lambda: module.attend(*_qkv())) == []


def test_what_another_library_puts_in_place_stays_and_is_called_outside() -> None:
    asked: list[str] = []

    def foreign(*args: Any, **kwargs: Any) -> Tensor:
        asked.append("foreign")
        return replacing.TORCHS(*args, **kwargs)

    F.scaled_dot_product_attention = foreign
    try:
        with anyattn.replace_sdpa("native_math"):
            assert _chosen(lambda: F.scaled_dot_product_attention(*_qkv())) == ["native_math"]
            thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(*_qkv()))
            thread.start()
            thread.join()
        assert asked == ["foreign"], "the other thread has what it had before"
        assert F.scaled_dot_product_attention is foreign
    finally:
        F.scaled_dot_product_attention = replacing.TORCHS


def test_what_another_library_puts_on_top_stays_and_never_runs_in_circles() -> None:
    asked: list[str] = []
    try:
        with anyattn.replace_sdpa("native_math"):
            ours = F.scaled_dot_product_attention

            def foreign(*args: Any, **kwargs: Any) -> Tensor:
                asked.append("foreign")
                return ours(*args, **kwargs)

            F.scaled_dot_product_attention = foreign
        assert F.scaled_dot_product_attention is foreign
        with anyattn.replace_sdpa("native_math"):
            assert _chosen(lambda: F.scaled_dot_product_attention(*_qkv())) == ["native_math"]
        assert asked == []
        assert F.scaled_dot_product_attention is foreign
        assert _chosen(lambda: F.scaled_dot_product_attention(*_qkv())) == []
        assert asked == ["foreign"]
    finally:
        F.scaled_dot_product_attention = replacing.TORCHS


def test_torchs_own_layers_leave_their_fast_path_inside() -> None:
    layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 2).eval()
    attention = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        for run, count in (
            (lambda: layer(x), 2),
            (lambda: layer(x, src_key_padding_mask=padding)[~padding], 2),
            (lambda: attention(x, x, x, need_weights=False)[0], 1),
        ):
            wanted = run()
            with anyattn.replace_sdpa("native_math"), anyattn.record() as calls:
                torch.testing.assert_close(run(), wanted)
            assert [call.chosen for call in calls] == ["native_math"] * count


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_model_follows_the_block_and_its_end(backend: str) -> None:
    torch._dynamo.reset()
    model, x = Attend(), torch.randn(2, 5, 16)
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        seen.append("baddbmm" if "scaled_dot_product_attention_math" in str(graph.code) else "sdpa")
        return graph if backend == "eager" else torch._inductor.compile(graph, inputs)

    compiled = torch.compile(model, backend=look, fullgraph=True)
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(compiled(x), wanted)
        with anyattn.replace_sdpa("native_math"):
            torch.testing.assert_close(compiled(x), wanted)
        torch.testing.assert_close(compiled(x), wanted)
        with anyattn.replace_sdpa("native_math"):
            torch.testing.assert_close(compiled(x), wanted)
    assert seen == ["sdpa", "baddbmm"], "one graph each, and no third"


def test_block_inside_compiled_code_is_refused() -> None:
    def run(q: Tensor) -> Tensor:
        with anyattn.replace_sdpa():
            return F.scaled_dot_product_attention(q, q, q)

    with pytest.raises(Exception, match="Enter replace_sdpa outside"):
        torch.compile(run, backend="eager", fullgraph=True)(torch.randn(1, 1, 3, 8))


def test_transforms_autocast_and_checkpointing_are_right() -> None:
    model, x = Attend(), torch.randn(3, 2, 5, 16)
    wanted = torch.stack([model(one) for one in x])
    with anyattn.replace_sdpa("native_math"):
        torch.testing.assert_close(torch.vmap(model)(x), wanted)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x[0])
        q = x[0].requires_grad_()
        torch.utils.checkpoint.checkpoint(model, q, use_reentrant=False).sum().backward()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted[0], rtol=0.05, atol=0.05)
    gradient = q.grad
    q.grad = None
    model(q).sum().backward()
    torch.testing.assert_close(gradient, q.grad)


def test_pin_of_a_plain_module_reaches_torchs_function_there_alone() -> None:
    model, other, x = nn.Sequential(Attend(), Attend()), Attend(), torch.randn(2, 5, 16)
    wanted = model(x)
    anyattn.set_attention_backend(model[1], "native_math")
    torch.testing.assert_close(model(x), wanted)
    assert _chosen(lambda: (model(x), other(x))) == ["native_math"]
    anyattn.reset_attention_backend(model[1])
    assert F.scaled_dot_product_attention is replacing.TORCHS
    assert _chosen(lambda: model(x)) == []


def test_copies_and_pickles_of_a_pinned_module_keep_the_pin() -> None:
    model, x = Attend(), torch.randn(2, 5, 16)
    anyattn.set_attention_backend(model, "native_math")
    copied = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    anyattn.reset_attention_backend(model)
    with anyattn.record() as calls:
        copied(x)
    assert [call.chosen for call in calls] == ["native_math"]
    del copied
    gc.collect()
    assert F.scaled_dot_product_attention is replacing.TORCHS
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert _chosen(lambda: loaded(x)) == ["native_math"]
    anyattn.reset_attention_backend(loaded)


def test_pickle_that_is_loaded_in_a_new_process_works_there(tmp_path: Any) -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, batch_first=True))
    anyattn.set_attention_backend(model, "native_math")
    torch.save(model, tmp_path / "model.pt")
    anyattn.reset_attention_backend(model)
    script = (
        "import torch, anyattn, sys\n"
        "model = torch.load(sys.argv[1], weights_only=False).eval()\n"
        "with anyattn.record() as calls, torch.no_grad():\n    model(torch.randn(2, 5, 16))\n"
        "print([call.chosen for call in calls])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.pt")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['native_math']"


def test_model_that_is_gone_leaves_torchs_function() -> None:
    model = Attend()
    anyattn.set_attention_backend(model, "native_math")
    assert F.scaled_dot_product_attention is not replacing.TORCHS
    del model
    gc.collect()
    assert F.scaled_dot_product_attention is replacing.TORCHS


def test_modules_are_searched_once() -> None:
    with anyattn.replace_sdpa():
        pass
    assert sys.modules.keys() - replacing._scanned == set()
    before = len(replacing._holding)
    with anyattn.replace_sdpa():
        pass
    assert len(replacing._holding) == before


class Causal(nn.Module):
    """One causal call of torch's function."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


@pytest.mark.parametrize("asked", [True, False], ids=["in force", "replaced alone"])
@pytest.mark.parametrize("record", [torch.jit.script, torch.fx.symbolic_trace], ids=["script", "fx"])
def test_scripts_and_fx_graphs_that_are_made_inside_hold_torchs_function(
    record: Any, asked: bool, tmp_path: Any
) -> None:
    given = _qkv()
    elsewhere = nn.Linear(2, 2)
    anyattn.set_attention_backend(elsewhere, "native_math")
    if asked:
        with anyattn.replace_sdpa("native_math"):
            made = record(Causal())
    else:
        made = record(Causal())
    anyattn.reset_attention_backend(elsewhere)
    expected = Causal()(*given)
    assert torch.equal(made(*given), expected)
    if record is torch.jit.script:
        torch.jit.save(made, tmp_path / "scripted.pt")
        assert torch.equal(torch.jit.load(tmp_path / "scripted.pt")(*given), expected)
    else:
        assert replacing.TORCHS in {node.target for node in made.graph.nodes}


def test_torchs_own_layers_are_scripted_inside() -> None:
    layer, x = nn.TransformerEncoderLayer(16, 2, batch_first=True).eval(), torch.randn(2, 5, 16)
    with anyattn.replace_sdpa("native_math"):
        scripted = torch.jit.script(layer)
    torch.testing.assert_close(scripted(x), layer(x))
