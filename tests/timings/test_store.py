"""The file of measurements, used by many processes, damaged, full, foreign, newer, or not to be written at all."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from anyattn.errors import AnyattnWarning
from anyattn.timings import store as stores
from anyattn.timings.keys import Key
from anyattn.timings.store import FILE, FOLDER, MOST, Row, Store, default_path

MACHINE = "a machine"


def row(number: int, seconds: float | None = 1e-3, *, backend: str = "native", machine: str = MACHINE) -> Row:
    key = Key(machine, f"B1 Q{number} K8 H2/2 D16/16", "none", "float32", "forward", "eager")
    return Row(key, backend, "", (1, number, 8, 2, 2, 16, 16), seconds, 1e-5, 2e-3, 0.5, 1000.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / FILE


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_store import *\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_rows_come_back_as_they_were_written(path: Path) -> None:
    rows = [row(1), row(2, None), row(3, backend="flex"), row(3, machine="another")]
    assert Store(path).add(rows)
    assert Store(path).rows() == rows
    assert Store(path).rows("another") == [rows[3]]


def test_newer_row_replaces_the_older_of_its_kind_alone(path: Path) -> None:
    store = Store(path)
    store.add([row(1, 1.0), row(2, 2.0)])
    store.add([row(1, 3.0)])
    assert [found.seconds for found in store.rows()] == [2.0, 3.0]


def test_reading_makes_no_file_and_no_folder(path: Path) -> None:
    assert Store(path).rows() == []
    assert not path.parent.exists()


def test_number_of_rows_is_bounded_and_those_written_first_go(path: Path) -> None:
    store = Store(path, most=10)
    for number in range(1, 31):
        store.add([row(number)])
    assert [found.sizes[1] for found in store.rows()] == list(range(21, 31))
    assert MOST >= 10_000


def test_rows_of_a_clock_set_back_are_kept_and_replace_older_ones(path: Path) -> None:
    store = Store(path, most=2)
    late, early = row(1, 1.0), row(2, 2.0)
    store.add([late])
    set_back = Row(**{**{name: getattr(early, name) for name in Row.__slots__}, "time": -5.0})
    store.add([set_back])
    store.add([row(3)])
    assert [found.sizes[1] for found in store.rows()] == [2, 3]
    assert store.rows()[0].time == -5.0


def _write_forty(path: Path, writer: int) -> None:
    store = Store(path)
    assert all(store.add([row(1000 * writer + number)]) for number in range(1, 41))


def together(target: object, arguments: list[tuple[object, ...]]) -> None:
    """Run a function in several processes at once, each of which must end well."""
    # A fork doesn't import torch again, and shows that no connection is inherited.
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    processes = [context.Process(target=target, args=given) for given in arguments]  # type: ignore[attr-defined]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * len(processes)


@pytest.mark.parametrize("begun", [False, True])
def test_eight_processes_write_at_once_and_no_row_is_lost(path: Path, begun: bool) -> None:
    if begun:
        Store(path).add([row(1)])
        Store(path).clear()
    together(_write_forty, [(path, writer) for writer in range(8)])
    wanted = {1000 * writer + number for writer in range(8) for number in range(1, 41)}
    assert {found.sizes[1] for found in Store(path).rows()} == wanted


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no kill -9")
def test_process_killed_amid_a_write_leaves_whole_writes_alone(path: Path) -> None:
    # Each write holds ten rows: afterwards either all ten of a write are there, or none.
    code = "store = Store(Path(sys.argv[1])); n = 0\nwhile True:\n"
    code += "    store.add([row(10 * n + k + 1) for k in range(10)]); n += 1; print(n, flush=True)"
    for written in (1, 20):
        writer = child(code, path)
        assert writer.stdout is not None
        while int(writer.stdout.readline()) < written:
            pass
        writer.kill()
        writer.wait()
        writer.communicate()
        store = Store(path)
        numbers = {found.sizes[1] for found in store.rows()}
        assert len(numbers) >= 10 * written
        assert {(number - 1) // 10 for number in numbers} == set(range(len(numbers) // 10))
        assert len(numbers) % 10 == 0
        assert store.add([row(10**6)])
        store.clear()


def _garbage(path: Path) -> None:
    path.write_bytes(b"no database, whatever it is called" * 200)


def _cut(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + os.urandom(4096))


def _foreign(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as file:
        file.execute("CREATE TABLE timings (name TEXT)")


def _without_columns(path: Path) -> None:
    with sqlite3.connect(path) as file:
        file.execute("ALTER TABLE timings DROP COLUMN error")


@pytest.mark.parametrize("spoil", [_garbage, _cut, _foreign, _without_columns])
@pytest.mark.parametrize("first", ["read", "write"])
def test_damaged_or_foreign_file_is_moved_aside_once(path: Path, spoil: object, first: str) -> None:
    Store(path).add([row(number) for number in range(1, 400)])
    with sqlite3.connect(path) as file:
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    file.close()
    spoil(path)  # type: ignore[operator]
    spoilt = path.read_bytes()
    store = Store(path)
    with pytest.warns(AnyattnWarning, match="unreadable-1"):
        assert store.rows() == [] if first == "read" else store.add([row(1)])
    assert path.with_name(f"{FILE}.unreadable-1").read_bytes() == spoilt
    assert store.add([row(2)])
    assert 2 in {found.sizes[1] for found in Store(path).rows()}


def test_file_of_a_newer_version_is_left_alone(path: Path) -> None:
    Store(path).add([row(1)])
    with sqlite3.connect(path) as file:
        file.execute("PRAGMA user_version=7")
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    file.close()
    before = path.read_bytes()
    store = Store(path)
    with pytest.warns(AnyattnWarning, match="schema 7"):
        assert store.rows() == []
    assert not store.add([row(2)])
    assert [found.sizes[1] for found in store.rows()] == [2]
    assert path.read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="the system has no limit on the size of files")
def test_full_disk_keeps_measurements_in_the_process_and_the_file_whole(path: Path) -> None:
    Store(path).add([row(1)])
    code = """
import resource
store = Store(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    written = [store.add([row(10 * n + k) for k in range(10)]) for n in range(1, 60)]
assert not written[-1], written
assert len({found.sizes[1] for found in store.rows()}) == 591
print(len(said))
"""
    out, error = child(code, path).communicate(timeout=120)
    assert (out.strip(), error) == ("1", "")
    store = Store(path)
    assert 1 in {found.sizes[1] for found in store.rows()}
    assert store.add([row(2)])


def test_file_that_may_not_grow_keeps_measurements_in_the_process(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(path)
    store.add([row(1)])
    connect = sqlite3.connect

    def full(*arguments: object, **options: object) -> sqlite3.Connection:
        file = connect(*arguments, **options)  # type: ignore[call-overload]
        file.execute("PRAGMA max_page_count=1")
        return file  # type: ignore[no-any-return]

    monkeypatch.setattr(stores.sqlite3, "connect", full)
    with pytest.warns(AnyattnWarning, match="full"):
        assert not store.add([row(number) for number in range(2, 900)])
    assert len(store.rows()) == 899


def test_folder_that_can_not_be_made_is_said_once_and_rows_stay_here(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / FILE)
    with pytest.warns(AnyattnWarning, match=FOLDER) as said:
        assert [store.add([row(1)]), store.add([row(2)])] == [False, False]
    assert len(said) == 1
    assert len(store.rows()) == 2
    store.clear()
    assert store.rows() == []


def test_file_in_a_folder_that_can_not_be_written_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(path).add([row(1)])
    monkeypatch.setattr(stores.os, "access", lambda *_: False)
    assert [found.sizes[1] for found in Store(path).rows()] == [1]


def test_without_a_home_rows_stay_in_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setattr(stores.platformdirs, "user_cache_path", lambda *_, **__: Path("~/.cache/anyattn"))
    monkeypatch.chdir(tmp_path)
    assert default_path() is None
    with pytest.warns(AnyattnWarning, match="no home"):
        store = Store(None)
    assert not store.add([row(1)])
    assert len(store.rows()) == 1
    assert list(tmp_path.iterdir()) == []


def test_rows_kept_in_the_process_are_bounded() -> None:
    with pytest.warns(AnyattnWarning, match="no home"):
        store = Store(None, most=5)
    store.add([row(number) for number in range(1, 20)])
    assert [found.sizes[1] for found in store.rows()] == [15, 16, 17, 18, 19]


def test_environment_variable_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    assert default_path() == tmp_path / FILE
    monkeypatch.delenv(FOLDER)
    assert default_path() is not None


def test_row_that_another_hand_spoiled_is_left_out(path: Path) -> None:
    Store(path).add([row(1), row(2), row(3)])
    with sqlite3.connect(path) as file:
        file.execute("UPDATE timings SET seconds = 'soon' WHERE sizes LIKE '1,1,%'")
        file.execute("UPDATE timings SET sizes = '1,2' WHERE sizes LIKE '1,2,%'")
    file.close()
    assert [found.sizes[1] for found in Store(path).rows()] == [3]


def test_process_that_holds_the_file_for_long_does_not_stop_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(path).add([row(1)])
    monkeypatch.setattr(stores, "_WAIT", 0.05)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    store = Store(path)
    start = time.perf_counter()
    with pytest.warns(AnyattnWarning, match="locked"):
        assert not store.add([row(2)])
    assert time.perf_counter() - start < 5
    assert [found.sizes[1] for found in store.rows()] == [1, 2]
    holder.execute("ROLLBACK")
    holder.close()


def _write_one(path: Path, number: int) -> None:
    warnings.simplefilter("ignore")
    assert Store(path).add([row(number)])


def test_processes_that_find_a_damaged_file_keep_what_each_writes(path: Path) -> None:
    for _ in range(5):
        path.parent.mkdir(exist_ok=True)
        _garbage(path)
        together(_write_one, [(path, number) for number in (5, 6, 7, 8)])
        assert {found.sizes[1] for found in Store(path).rows()} == {5, 6, 7, 8}
        shutil.rmtree(path.parent)


def test_copy_of_the_file_is_read_like_the_file(path: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Store(path).add([row(1)])
        shutil.copytree(path.parent, tmp_path / "copy")
        assert len(Store(tmp_path / "copy" / FILE).rows()) == 1
