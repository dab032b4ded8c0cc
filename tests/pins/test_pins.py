"""How a pin is put in force: by the modules that compute attention, with nothing on the others."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import anyattn
from anyattn.pins import attending, covering, pins
from anyattn.scopes import defaults


def attend(x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = anyattn.attention(x, x, x)
    return out


class Attend(nn.Module):
    scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return attend(x) * self.scale


class Dropping(Attend):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return anyattn.attention(x, x, x, dropout_p=0.3)  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attend = Attend()
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.attend(self.norm(x)))
        return out


class Model(nn.Module):
    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class Indirect(nn.Module):
    """Its code can't be read: what it calls is found at run time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return eval("anyattn").attention(x, x, x)  # type: ignore[no-any-return]


X = torch.randn(1, 4, 2, 8)


def ran(module: Callable[..., Any], x: torch.Tensor = X) -> list[str | None]:
    with anyattn.record() as calls:
        module(x)
    return [call.chosen for call in calls]


def test_only_the_root_and_attention_layers_are_covered_and_no_module_has_a_hook() -> None:
    model = Model()
    before = {name: (type(part), set(vars(part))) for name, part in model.named_modules()}
    anyattn.set_attention_backend(model, "native_math")
    assert [name for name, part in model.named_modules() if covering.is_covered(part)] == [
        "",
        "blocks.0.attend",
        "blocks.1.attend",
    ]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert repr(model) == repr(Model())
    assert isinstance(model, Model)
    assert model.state_dict().keys() == Model().state_dict().keys()
    anyattn.reset_attention_backend(model)
    assert {name: (type(part), set(vars(part))) for name, part in model.named_modules()} == before


def as_partial(module: nn.Module) -> nn.Module:
    module.fn = functools.partial(attend)
    return module


class Calls(nn.Module):
    fn: Any
    fns: ClassVar[dict[str, Any]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fn(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("found", [Attend(), as_partial(Calls())])
def test_code_that_leads_to_attention_is_found(found: nn.Module) -> None:
    assert attending.may_attend(found)
    assert not attending.may_attend(Block())
    assert not attending.may_attend(nn.Linear(2, 2))


def test_where_no_code_can_be_read_every_module_is_covered() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Indirect()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, x, use_reentrant=True)  # type: ignore[no-any-return]

    model = Around()
    anyattn.set_attention_backend(model, "native_math")
    with anyattn.record() as calls:
        model(X.clone().requires_grad_()).sum().backward()
    assert [call.chosen for call in calls] == ["native_math"] * 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_backward_on_another_thread_runs_on_the_pin(reentrant: bool) -> None:
    model = Model(reentrant)
    anyattn.set_attention_backend(model, "native_math")
    seen: list[str | None] = []
    loss = model(X.clone().requires_grad_()).sum()

    def backward() -> None:
        with anyattn.record() as calls:
            loss.backward()
        seen.extend(call.chosen for call in calls)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert seen == ["native_math"] * 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, GeneratorExit])
def test_forward_that_is_broken_off_leaves_nothing(error: type[BaseException]) -> None:
    class Broken(Attend):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            attend(x)
            raise error

    model = nn.Sequential(Broken())
    anyattn.set_attention_backend(model, "native_math")
    before = defaults.current.get()
    with pytest.raises(error):
        model(X)
    assert defaults.current.get() is before


def by_file(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "way",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: pickle.loads(pickle.dumps(m, 1)), by_file],
)
def test_copies_are_pinned_and_reset_by_themselves_and_so_are_copied_parts(way: Any) -> None:
    model = Model()
    anyattn.set_attention_backend(model, "native_math")
    twin, part = way(model), way(model.blocks[0])
    assert ran(twin) == ["native_math"] * 2
    assert ran(part) == ["native_math"]
    anyattn.reset_attention_backend(model)
    assert ran(model) == ["native"] * 2
    assert ran(twin) == ["native_math"] * 2
    assert pins.pin_of(twin.blocks[1].norm) == pins.pin_of(twin) is not None
    anyattn.reset_attention_backend(twin)
    anyattn.reset_attention_backend(part)
    assert ran(twin) == ["native"] * 2
    assert ran(part) == ["native"]
    assert not any(covering.is_covered(module) for copied in (model, twin, part) for module in copied.modules())
    with pytest.raises(anyattn.InvalidCallError, match="no backend"):
        anyattn.reset_attention_backend(part)


def test_shallow_copy_runs_its_own_forward() -> None:
    model = Attend()
    anyattn.set_attention_backend(model, "native_math")
    twin = copy.copy(model)
    twin.scale = 2.0
    assert torch.equal(twin(X), 2 * model(X))
    assert ran(twin) == ["native_math"]
    anyattn.reset_attention_backend(twin)
    assert (ran(twin), ran(model)) == (["native"], ["native_math"])
    twin = copy.copy(model)
    anyattn.reset_attention_backend(model)
    assert ran(twin) == ["native"]
    assert pins.pin_of(twin) is None


def test_replica_of_data_parallel_runs_its_own_forward() -> None:
    model = Attend()
    anyattn.set_attention_backend(model, "native_math")
    replica = model._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
    replica.scale = 2.0
    assert torch.equal(replica(X), 2 * model(X))
    assert ran(replica) == ["native_math"]


@pytest.mark.parametrize("hook_first", [True, False])
def test_pin_holds_with_a_wrapped_forward_in_either_order(hook_first: bool) -> None:
    """As accelerate's offloading does it: an attribute `forward` on the instance, taken back later."""
    model = Model()
    layer = model.blocks[0].attend
    assert isinstance(layer, Attend)

    def wrap() -> None:
        old = layer.forward
        layer.forward = functools.partial(lambda module, x: old(x), layer)  # type: ignore[method-assign]

    steps = [wrap, lambda: anyattn.set_attention_backend(model, "native_math")]
    for step in steps if hook_first else steps[::-1]:
        step()
    assert ran(model) == ["native_math"] * 2
    assert ran(model.blocks[0]) == ["native_math"]
    anyattn.reset_attention_backend(model)
    assert ran(model) == ["native"] * 2


def test_part_added_after_the_pin_is_followed_and_taken_back() -> None:
    model = Model(reentrant=True)
    anyattn.set_attention_backend(model, "native_math")
    model.blocks.append(Block())
    with anyattn.record() as calls:
        model(X.clone().requires_grad_()).sum().backward()
    assert [call.chosen for call in calls] == ["native_math"] * 6
    anyattn.reset_attention_backend(model)
    assert not any(covering.is_covered(part) for part in model.modules())


def test_part_taken_out_says_what_it_does() -> None:
    model = Model()
    anyattn.set_attention_backend(model, "native_math")
    layer = model.blocks[0].attend
    assert isinstance(layer, nn.Module)
    model.blocks[0].attend = Attend()
    assert pins.pin_of(layer) is not None
    assert ran(layer) == ["native_math"]
    anyattn.reset_attention_backend(model)
    assert pins.pin_of(layer) is None
    assert ran(layer) == ["native"]


def test_class_that_looks_at_its_subclasses_sees_none() -> None:
    seen: list[str] = []

    class Registering(Attend):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            seen.append(cls.__name__)

    model = Registering()
    anyattn.set_attention_backend(model, "native_math")
    assert ran(model) == ["native_math"]
    assert seen == []


def test_refusal_names_the_layer_of_the_pinned_model_that_asked() -> None:
    model = Model()
    anyattn.set_attention_backend(model, "flash3")
    with pytest.raises(anyattn.BackendUnavailableError, match=r"blocks\.0\.attend \(Attend\) of Model"):
        model(X)
    anyattn.set_attention_backend(model, "native_flash")
    model.blocks[0].attend = Dropping()
    with pytest.raises(anyattn.UnsupportedCallError, match=r"blocks\.0\.attend") as caught:
        model(X)
    assert caught.value.decision.chosen is None
    with pytest.raises(anyattn.BackendUnavailableError) as other:
        anyattn.attention(X, X, X, backend="flash3")
    assert "layer" not in str(other.value)
