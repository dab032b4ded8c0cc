"""Times: interleaved, within a budget, with random generators as they were, and never where nothing can be measured."""

from __future__ import annotations

import random
import time

import pytest
import torch

from anyattn.tuning.timer import can_measure, fewest_runs, first_call, time_calls, undisturbed

CPU = torch.device("cpu")


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_times_are_those_of_the_calls_and_order_them() -> None:
    found = time_calls({"slow": lambda: spin(4e-3), "fast": lambda: spin(1e-3)}, CPU, budget=0.2)
    assert 1e-3 <= found["fast"].seconds < found["slow"].seconds
    assert 4e-3 <= found["slow"].seconds < 8e-3
    assert found["fast"].spread >= 0.0
    assert found["fast"].runs == found["slow"].runs >= 5
    assert found["fast"].graph is None


def test_each_round_runs_every_call_in_an_order_that_changes() -> None:
    ran: list[str] = []
    calls = {name: (lambda name=name: ran.append(name)) for name in "abcd"}
    time_calls(calls, CPU, budget=0.01)
    rounds = ["".join(ran[start : start + 4]) for start in range(0, len(ran), 4)]
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert len(set(rounds)) > 3


def test_budget_bounds_the_time_and_five_runs_are_the_least() -> None:
    start = time.perf_counter()
    found = time_calls({"one": lambda: spin(2e-3)}, CPU, budget=0.0)
    assert time.perf_counter() - start < 1
    assert found["one"].runs == 5


def test_spent_budget_runs_each_call_a_known_number_of_times() -> None:
    ran: list[int] = []
    time_calls({"one": lambda: (ran.append(1), spin(1e-4))}, CPU, budget=0.0)
    assert len(ran) == fewest_runs(CPU)


def test_warming_goes_on_while_times_fall() -> None:
    count = iter(range(10_000))
    found = time_calls({"one": lambda: spin(2e-3 if next(count) < 9 else 2e-4)}, CPU, budget=0.4)
    assert found["one"].seconds < 1e-3


def test_first_call_is_timed_and_gives_its_result() -> None:
    seconds, result = first_call(lambda: (spin(3e-3), 7)[1], CPU)
    assert seconds >= 3e-3
    assert result == 7


def test_random_generators_are_as_they_were() -> None:
    torch.manual_seed(3)
    random.seed(3)
    wanted = torch.rand(4), random.random()
    torch.manual_seed(3)
    random.seed(3)
    with undisturbed(CPU):
        torch.manual_seed(11)
        time_calls({"draws": lambda: torch.rand(8)}, CPU, budget=0.01)
    assert torch.equal(torch.rand(4), wanted[0])
    assert random.random() == wanted[1]


def test_error_restores_the_random_generators_too() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)

    def fail() -> None:
        with undisturbed(CPU):
            torch.rand(4)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(torch.rand(4), wanted)


def test_nothing_is_measured_under_a_tracer_or_transform_or_without_values() -> None:
    tensor = torch.randn(3, 4)
    assert can_measure(tensor, None)
    assert not can_measure(torch.empty(3, device="meta"))
    seen: list[bool] = []
    torch.func.vmap(lambda row: (seen.append(can_measure(row)), row)[1])(tensor)
    torch.func.grad(lambda given: (seen.append(can_measure(given)), given.sum())[1])(tensor)
    torch.jit.trace(lambda given: (seen.append(can_measure(given)), given)[1], tensor, check_trace=False)
    compiled = torch.compile(lambda given: given + can_measure(given), backend="eager", fullgraph=True)
    assert torch.equal(compiled(tensor), tensor)
    assert seen == [False, False, False]
