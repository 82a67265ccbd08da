"""The rows file of a study: one JSON object a finished run, complete up to the last row whenever it is killed."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from trainers.studies.runs import StudyError
from trainers.train import FREE_KEYS as RUNS_FREE_KEYS
from trainers.train import flat_settings

Row = dict[str, Any]

#: More than a row has, in bytes.
_ROOM = 64 * 1024

#: What may differ between a run and its row; a row without a probe that is asked for is not complete.
FREE_KEYS = tuple(key for key in RUNS_FREE_KEYS if key != "probes")


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, without a last one that was torn by a kill; none if there is no file.

    Raises:
        StudyError: another line is not a row.
    """
    return _read(path)[0] if path.exists() else []


def by_seed(rows: Sequence[Row], name: str) -> dict[int, float]:
    """Return a result of the finished runs that have it, by seed."""
    done = [row for row in rows if row["status"] == "done" and row["results"].get(name) is not None]
    return {row["seed"]: float(row["results"][name]) for row in done}


def _read(path: Path) -> tuple[list[Row], int]:
    """Return the rows and how many bytes they are."""
    rows, size = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not line.endswith(b"\n"):
                break  # being written when the study was killed
            if not isinstance(row, dict) or not {"study", "key", "status", "configuration"} <= row.keys():
                raise StudyError(f"{path}, line {number}: expected a row of a study, got {line[:60]!r}")
            rows.append(row)
            size += len(line)
    return rows, size


class RowsFile:
    """A rows file that is being written; only one study at a time can.

    Args:
        path: the file; missing parent folders are made.
        fresh: begin anew; the former file stays beside it as ``NAME.old.jsonl``, ``NAME.old2.jsonl`` …
        drop: which rows go, so that their runs are run again; None: with ``fresh`` all, else none.

    Raises:
        StudyError: another process writes here, a line is not a row, or there is no room for another one.
    """

    def __init__(self, path: Path, *, fresh: bool = False, drop: Callable[[Row], bool] | None = None) -> None:
        self.path, self.notes = path, list[str]()
        with _said_in_one_line(path), ExitStack() as opened:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path.parent, os.O_RDONLY)  # the folder, because the file itself may be replaced
            opened.callback(os.close, lock)
            self._take(lock)
            if fresh and drop is None and path.exists() and path.stat().st_size:  # unread: it may be damaged
                os.replace(path, _beside(path))
            path.touch()
            self.rows = self._repaired()
            if drop is not None and any(map(drop, self.rows)):
                self._keep([row for row in self.rows if not drop(row)], _beside(path) if fresh else None)
            self._file = opened.enter_context(path.open("ab", buffering=0))
            os.truncate(path, self._write(b" " * _ROOM))  # before a run is trained in vain
            self._close = opened.pop_all().close

    def _take(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(f"another study is writing to {self.path.parent}: wait, or take another --out") from None

    def _repaired(self) -> list[Row]:
        rows, size = _read(self.path)
        if size < self.path.stat().st_size:
            os.truncate(self.path, size)
            self.notes.append(f"{self.path}: the last row was torn by a kill and is dropped")
        return rows

    def _keep(self, rows: list[Row], former: Path | None) -> None:
        shorter = self.path.with_name(self.path.name + ".partial")
        with shorter.open("wb") as file:
            file.writelines(map(_line, rows))
            file.flush()
            os.fsync(file.fileno())
        if former is not None:
            os.replace(self.path, former)
        os.replace(shorter, self.path)
        self.rows = rows

    def append(self, row: Row) -> None:
        """Write one row, whole or not at all.

        Raises:
            StudyError: it cannot be written, e.g. the disk is full.
        """
        with _said_in_one_line(self.path):
            self._write(_line(row))
        self.rows.append(row)

    def _write(self, data: bytes) -> int:
        """Write whole or not at all; return the size of before."""
        size, left = os.fstat(self._file.fileno()).st_size, memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, size)
            raise
        return size

    def __enter__(self) -> RowsFile:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file and let others write."""
        self._close()


@contextmanager
def _said_in_one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StudyError(f"cannot write to {path}: {error.strerror}; the rows before are whole") from None


def _beside(path: Path) -> Path:
    """Return the first of ``rows.old.jsonl``, ``rows.old2.jsonl`` … that is not there: the only copy of former rows."""
    names = (path.with_suffix(f".old{number if number > 1 else ''}{path.suffix}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def _line(row: Row) -> bytes:
    return json.dumps(row, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def changed_settings(config: Mapping[str, Any], overrides: Sequence[str], row: Row) -> list[str]:
    """Return how the configuration of a run differs from that of its row: ``"loop.steps: 390 then, 40 now"`` ….

    Args:
        config: the run's, now.
        overrides: the run's, now.
        row: of the same key.
    """
    now, then = flat_settings(config), flat_settings(row["configuration"])
    # A key that came later did not exist then, and has its default unless this very run sets it.
    keys = then.keys() if list(overrides) == row["overrides"] else then.keys() | now.keys()
    return [
        f"{key}: {then.get(key)} then, {now.get(key)} now"
        for key in sorted(keys)
        if then.get(key) != now.get(key) and not is_under(key, FREE_KEYS)
    ]


def is_under(name: str, keys: Iterable[str]) -> bool:
    """Return whether a flat name is one of the keys, or in a group that one of them names."""
    return any(name == key or name.startswith(f"{key}.") for key in keys)


def reasons(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the runs that have no result, and why."""
    lost = [row for row in rows if row["status"] != "done"]
    if lost:
        yield from ("", "## Runs without a result", "")
        yield from (f"- {row['key']}: {row['status']}, {row['reason']}" for row in lost)
