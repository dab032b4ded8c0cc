"""What is remembered for the life of a process is bounded, whatever is asked."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from anyattn.process.bounded import Bounded


def test_oldest_makes_room() -> None:
    cache: Bounded[int, str] = Bounded(3)
    for number in range(5):
        cache[number] = str(number)
    assert cache == {2: "2", 3: "3", 4: "4"}


def test_writing_an_entry_again_drops_none() -> None:
    cache: Bounded[str, int] = Bounded(2)
    cache["a"], cache["b"] = 1, 2
    cache["a"] = 3
    assert cache == {"a": 3, "b": 2}


def test_once_is_true_once() -> None:
    seen: Bounded[str, None] = Bounded(2)
    assert [seen.once(word) for word in ("a", "a", "b", "c", "b")] == [True, False, True, True, False]
    assert seen.once("a"), "it made room for another"


def test_threads_leave_it_within_its_bound() -> None:
    cache: Bounded[int, int] = Bounded(16)

    def write(start: int) -> None:
        for number in range(start, start + 3000):
            cache[number] = number
            assert len(cache) <= 16

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, (0, 10_000, 20_000, 30_000)))
    assert len(cache) == 16
