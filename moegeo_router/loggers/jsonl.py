"""A log as JSON lines: one object a row, always valid JSON, complete up to the last row when the process is killed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .base import Level, bin_values, check_alert, check_event, check_heatmap, check_histogram, check_metrics


class JSONLLogger:
    """Append rows to a JSON-lines file.

    A row of numbers is ``{"step": 3, "time": 1700000000.0, "train/loss": 2.5}``, an event
    ``{"step": 3, "time": ..., "event": "checkpoint", "path": "..."}``, a distribution
    ``{"step": 3, "time": ..., "histogram": "geometry/layer0/load", "counts": [...], "edges": [...]}`` and a matrix
    ``{"step": 3, "time": ..., "heatmap": "geometry/loads", "labels": [...], "rows": [[...]]}``; ``time`` is in seconds
    since the epoch.
    JSON has no NaN: such a value is written as null and named in the row's
    ``"non_finite": {"train/loss": "nan" | "inf" | "-inf"}``; ``read_jsonl`` gives the float back. Inside the lists and
    dicts of an event it becomes that string.
    Every row is handed to the operating system at once: a killed process loses none (a power cut may).

    Args:
        path: the file; missing parent folders are made.
        resume_step: go on with the file of an interrupted run from the checkpoint of this step: rows of later steps,
            and a last line torn by the kill, are dropped first (atomically). A missing file is started.

    Raises:
        FileExistsError: the file holds rows and ``resume_step`` is None.
        ValueError: ``resume_step`` is given and a line of the file, other than a torn last one, is not a row.
    """

    def __init__(self, path: str | Path, *, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and self.path.stat().st_size > 0:
            if resume_step is None:
                raise FileExistsError(f"path: expected a new log (or resume_step), got {self.path}, which holds rows")
            _drop_rows_after(self.path, resume_step)
        self._file = self.path.open("a", encoding="ascii", newline="\n")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one row of numbers (see ``Logger.log``)."""
        check_metrics(metrics, step)
        self._write({"step": step, "time": time.time()}, dict(zip(metrics, _plain(metrics.values()), strict=True)))

    def event(self, kind: str, fields: Mapping[str, object], step: int) -> None:
        """Write one event (see ``Logger.event``)."""
        check_event(kind, fields, step)
        nested = {key: value if isinstance(value, float) else _finite(value) for key, value in fields.items()}
        self._write({"step": step, "time": time.time(), "event": kind}, nested)

    def record(self, kind: str, fields: Mapping[str, object], step: int) -> None:
        """Write the row of an event (see ``Logger.record``)."""
        self.event(kind, fields, step)

    def alert(self, kind: str, title: str, text: str, level: Level, fields: Mapping[str, object], step: int) -> None:
        """Write the row of an event with ``title``, ``text`` and ``level`` among its fields (see ``Logger.alert``)."""
        self.event(kind, check_alert(kind, title, text, level, fields, step), step)

    def histogram(self, key: str, values: Sequence[float], step: int) -> None:
        """Write one distribution, as the counts in equal bins and the edges of these (see ``Logger.histogram``)."""
        check_histogram(key, values, step)
        counts, edges = bin_values(values)
        self._write({"step": step, "time": time.time(), "histogram": key, "counts": counts, "edges": edges}, {})

    def heatmap(self, key: str, rows: Sequence[Sequence[float]], labels: Sequence[str], step: int) -> None:
        """Write one matrix, as its numbers (see ``Logger.heatmap``)."""
        check_heatmap(key, rows, labels, step)
        numbers = [_plain(row) for row in rows]
        self._write({"step": step, "time": time.time(), "heatmap": key, "labels": list(labels), "rows": numbers}, {})

    def close(self, exit_code: int = 0) -> None:
        """Close the file; the exit code is not recorded."""
        self._file.close()

    def _write(self, row: dict[str, Any], values: Mapping[str, Any]) -> None:
        non_finite = {key: str(value) for key, value in values.items() if _is_non_finite(value)}
        row |= {key: None if key in non_finite else value for key, value in values.items()}
        if non_finite:
            row["non_finite"] = non_finite
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read a log back, with the NaN and infinities that JSON cannot hold; a torn last line is left out.

    Args:
        path: a file written by ``JSONLLogger``.

    Returns:
        The rows in the order they were written.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line other than a torn last one is not a row.
    """
    rows = []
    for _, row in _complete_rows(Path(path)):
        row |= {key: float(name) for key, name in row.pop("non_finite", {}).items()}
        rows.append(row)
    return rows


def _complete_rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
            except ValueError:
                if not line.endswith(b"\n"):
                    return  # the row that was being written when the process was killed
                row = None
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError(f'{path}, line {number}: expected a JSON object with a "step", got {line[:60]!r}')
            yield line, row


def _drop_rows_after(path: Path, step: int) -> None:
    shorter = path.with_name(path.name + ".partial")
    with shorter.open("wb") as file:
        for line, row in _complete_rows(path):
            if row["step"] <= step:
                file.write(line.rstrip(b"\n") + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(shorter, path)


def _plain(values: Iterable[float]) -> list[float]:
    # Other libraries' scalars (numpy's float32) are Real, but json does not know them.
    return [value if isinstance(value, int | float) else float(value) for value in values]


def _is_non_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if _is_non_finite(value) else value
