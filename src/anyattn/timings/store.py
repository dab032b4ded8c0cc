"""The file of measurements: one SQLite database in the user's cache folder, which many processes use at once.

What is wrong with the file never fails a call: a damaged file or one of another program is moved aside, and where
nothing can be written, measurements last as long as the process. Each is said once.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import platformdirs

from anyattn.errors import AnyattnWarning
from anyattn.timings.keys import Key

FOLDER: Final = "ANYATTN_CACHE_DIR"
"""The environment variable with the folder of the file; without it, the user's cache folder of the system."""

FILE: Final = "timings.sqlite3"
SCHEMA: Final = 1
MOST: Final = 20_000
"""How many rows the file holds; the ones written longest ago go first, by their order and not by the clock."""

_APPLICATION: Final = 0x616E7961
_WAIT: Final = 5.0
_COLUMNS: Final = (
    *("machine", "shape", "mask", "dtype", "direction", "mode", "backend", "kernel"),
    *("sizes", "seconds", "spread", "first_call", "error", "time", "source"),
)
_TABLE: Final = """
CREATE TABLE IF NOT EXISTS timings (
    serial INTEGER PRIMARY KEY AUTOINCREMENT,
    machine TEXT NOT NULL, shape TEXT NOT NULL, mask TEXT NOT NULL, dtype TEXT NOT NULL, direction TEXT NOT NULL,
    mode TEXT NOT NULL, backend TEXT NOT NULL, kernel TEXT NOT NULL,
    sizes TEXT NOT NULL, seconds REAL, spread REAL, first_call REAL, error REAL, time REAL, source TEXT NOT NULL,
    UNIQUE (machine, shape, mask, dtype, direction, mode, backend, kernel)
)"""
# SQLite's messages for a file that no waiting mends.
_DAMAGED: Final = ("not a database", "malformed", "no such table", "no such column", "has no column")


@dataclass(frozen=True, slots=True)
class Row:
    """One backend's measurement for one kind of call.

    Attributes:
        key: The machine and the calls that it stands for.
        backend: The backend.
        kernel: Where its kernel came from, with the version; empty if it is part of torch.
        sizes: `(B, S_q, S_kv, H, H_kv, D, D_v)` of the call that was measured.
        seconds: The median time of a call; None if it wasn't timed, since its result was wrong.
        spread: The distance between the quartiles of the times, in seconds.
        first_call: What the first call took, with the compilation and planning that it started, in seconds.
        error: The error as a multiple of its budget; None if it wasn't compared.
        time: When it was measured, in seconds since 1970 by this machine's clock.
        source: What measured it: `"anyattn tune"` or `"ANYATTN_TUNE"`.
    """

    key: Key
    backend: str
    kernel: str
    sizes: tuple[int, ...]
    seconds: float | None
    spread: float | None = None
    first_call: float | None = None
    error: float | None = None
    time: float = 0.0
    source: str = "anyattn tune"

    @property
    def identity(self) -> tuple[str, ...]:
        """What a newer row replaces it by."""
        return (*self.key, self.backend, self.kernel)


def default_path() -> Path | None:
    """Return the file of this user; None if there is no folder for it."""
    given = os.environ.get(FOLDER, "")
    folder = Path(given).expanduser() if given else platformdirs.user_cache_path("anyattn", appauthor=False)
    # Without a home, a path such as "~/.cache" is left as it is.
    return folder / FILE if folder.is_absolute() or given else None


class Newer(Exception):
    """The file was written by a newer version of anyattn; it is left alone."""


class Store:
    """Measurements in a file, or in this process where there can be no file.

    The file is opened for each operation, so that no connection is shared between threads or inherited by a fork.

    Args:
        path: The file; None keeps measurements in this process alone.
        most: How many rows are kept.
    """

    def __init__(self, path: Path | None, most: int = MOST) -> None:
        self.path = path
        self.most = most
        self._lock = threading.RLock()
        self._here: dict[tuple[str, ...], Row] = {}
        self._said = False
        if path is None:
            self._keep_here((), "there is no home folder")

    def rows(self, machine: str | None = None) -> list[Row]:
        """Return the rows of one machine, or all, the oldest first."""
        found: dict[tuple[str, ...], Row] = {}
        if self.path is not None and self.path.exists():
            try:
                with self._opened(write=False) as file:
                    found = {row.identity: row for row in _read(file, machine)}
            except Newer as error:
                self._keep_here((), str(error))
            except (sqlite3.Error, OSError) as error:
                self._after(error)
        with self._lock:
            mine = [row for row in self._here.values() if machine in (None, row.key.machine)]
        for row in mine:
            found.pop(row.identity, None)
            found[row.identity] = row
        return list(found.values())

    def add(self, rows: Iterable[Row]) -> bool:
        """Add rows, each in place of an older one of its kind.

        Returns:
            Whether they are in the file; else they are kept in this process.
        """
        rows = tuple(rows)
        if self.path is None:
            self._keep_here(rows, "there is no home folder")
            return False
        for attempt in (1, 2):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self._opened(write=True) as file:
                    _write(file, rows, self.most)
                return True
            except Newer as error:
                self._keep_here(rows, str(error))
                return False
            except (sqlite3.Error, OSError) as error:
                if attempt == 1 and self._after(error):
                    continue
                self._keep_here(rows, f"{type(error).__name__}: {error}")
                return False
        return False

    def clear(self, machine: str | None = None) -> None:
        """Remove the rows of one machine, or all."""
        with self._lock:
            self._here = {name: row for name, row in self._here.items() if machine not in (None, row.key.machine)}
        if self.path is None or not self.path.exists():
            return
        with contextlib.suppress(Newer), self._opened(write=True) as file:
            file.execute("DELETE FROM timings WHERE ? IS NULL OR machine = ?", (machine, machine))

    @contextlib.contextmanager
    def _opened(self, *, write: bool) -> Iterator[sqlite3.Connection]:
        """Open the file, in one transaction if it is written to."""
        assert self.path is not None
        mode = "rwc" if write else "rw" if os.access(self.path, os.W_OK) else "ro"
        name = f"{self.path.resolve().as_uri()}?mode={mode}"
        if mode == "ro" and not os.access(self.path.parent, os.W_OK):
            name += "&immutable=1"  # the files beside it that SQLite would need can't be made
        file = sqlite3.connect(name, uri=True, timeout=_WAIT, isolation_level=None)
        try:
            known = _version(file)
            if write:
                if not known:
                    # Two processes that begin at once may meet here; then the other one sets it.
                    with contextlib.suppress(sqlite3.OperationalError):
                        file.execute("PRAGMA journal_mode=WAL")
                file.execute("PRAGMA synchronous=NORMAL")
                file.execute("BEGIN IMMEDIATE")
                if not _version(file):
                    _make(file)
            elif not known:
                raise sqlite3.DatabaseError("no such table: it is empty")
            yield file
            if file.in_transaction:
                file.execute("COMMIT")
        finally:
            if file.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    file.execute("ROLLBACK")
            file.close()

    def _after(self, error: Exception) -> bool:
        """Move a damaged file aside; return whether that was done."""
        if not isinstance(error, sqlite3.DatabaseError) or not any(word in str(error) for word in _DAMAGED):
            return False
        assert self.path is not None
        with self._lock:
            if _is_usable(self.path):
                return True  # another process or thread was faster
            aside = _free_name(self.path)
            try:
                for ending in ("-wal", "-shm", ""):
                    part = Path(f"{self.path}{ending}")
                    if part.exists():
                        os.replace(part, f"{aside}{ending}")
            except OSError:
                return False
        text = f"{self.path} holds no measurements that anyattn can read ({error}); it is now {aside}."
        warnings.warn(f"{text} Measurements go to a new file.", AnyattnWarning, stacklevel=2)
        return True

    def _keep_here(self, rows: tuple[Row, ...], why: str) -> None:
        with self._lock:
            for row in rows:
                self._here.pop(row.identity, None)
                self._here[row.identity] = row
            while len(self._here) > self.most:
                self._here.pop(next(iter(self._here)))
            first, self._said = not self._said, True
        if first:
            text = f"Measurements of attention kernels last as long as this process: {why}. "
            warnings.warn(f"{text}Set {FOLDER} to a folder that can be written to.", AnyattnWarning, stacklevel=2)


def _version(file: sqlite3.Connection) -> int:
    """Return the schema of a file of anyattn's; 0 for a new file.

    Raises:
        Newer: If a newer version of anyattn wrote it.
        sqlite3.DatabaseError: If it is another program's.
    """
    schema = int(file.execute("PRAGMA user_version").fetchone()[0])
    owner = int(file.execute("PRAGMA application_id").fetchone()[0])
    tables = int(file.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    if owner == _APPLICATION and schema > SCHEMA:
        raise Newer(f"their file has schema {schema}, and this version of anyattn knows {SCHEMA}")
    if owner != _APPLICATION and (tables or schema or owner):
        raise sqlite3.DatabaseError("not a database of anyattn's")
    return schema if tables else 0


def _make(file: sqlite3.Connection) -> None:
    file.execute(_TABLE)
    file.execute(f"PRAGMA application_id={_APPLICATION}")
    file.execute(f"PRAGMA user_version={SCHEMA}")


def _read(file: sqlite3.Connection, machine: str | None) -> Iterator[Row]:
    where = "" if machine is None else " WHERE machine = ?"
    text = f"SELECT {', '.join(_COLUMNS)} FROM timings{where} ORDER BY serial"
    for found in file.execute(text, () if machine is None else (machine,)):
        row = _row(found)
        if row is not None:
            yield row


def _row(found: tuple[Any, ...]) -> Row | None:
    """Make a row of what the file holds; None for one that another hand wrote."""
    try:
        sizes = tuple(int(size) for size in str(found[8]).split(","))
        numbers = [None if number is None else float(number) for number in found[9:14]]
    except ValueError:
        return None
    if len(sizes) != 7 or (numbers[0] is not None and not numbers[0] > 0):
        return None
    seconds, spread, first_call, error, time = numbers
    return Row(Key(*found[:6]), found[6], found[7], sizes, seconds, spread, first_call, error, time or 0.0, found[14])


def _write(file: sqlite3.Connection, rows: Iterable[Row], most: int) -> None:
    text = f"INSERT OR REPLACE INTO timings ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"
    for row in rows:
        sizes = ",".join(map(str, row.sizes))
        numbers = (row.seconds, row.spread, row.first_call, row.error, row.time)
        file.execute(text, (*row.identity, sizes, *numbers, row.source))
    file.execute(
        "DELETE FROM timings WHERE serial <= (SELECT serial FROM timings ORDER BY serial DESC LIMIT 1 OFFSET ?)",
        (most,),
    )


def _is_usable(path: Path) -> bool:
    """Whether a file is one of anyattn's that can be read, or isn't there."""
    if not path.exists():
        return True
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=_WAIT)) as file:
            if _version(file):
                file.execute(f"SELECT {', '.join(_COLUMNS)} FROM timings").fetchall()
            return path.stat().st_size == 0 or _version(file) > 0
    except Newer:
        return True
    except (sqlite3.Error, OSError):
        return False


def _free_name(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.unreadable-{number}")).exists():
        number += 1
    return aside
