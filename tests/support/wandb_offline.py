"""Read an offline run of wandb 0.31 back from its ``run-ID.wandb`` file, without wandb's own (slow) command.

The file is a LevelDB log behind a 7-byte header: blocks of 32 KiB, in them chunks of (crc32, length, type, data),
where a record is one full chunk or a first, some middle and a last one. Each record is a protobuf ``Record``.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32 * 1024
FILE_HEADER, CHUNK_HEADER = struct.Struct("<4sHB"), struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    history: list[dict[str, Any]] = field(default_factory=list)
    """The rows, without wandb's own keys (_step, _runtime, _timestamp)."""
    config: dict[str, Any] = field(default_factory=dict)
    step_metrics: dict[str, str] = field(default_factory=dict)
    """Metric name or glob -> the metric on its x axis."""
    project: str = ""
    run_id: str = ""
    tags: list[str] = field(default_factory=list)
    alerts: list[tuple[str, str, str]] = field(default_factory=list)
    """Level, title and text of each notification."""
    exit_code: int | None = None


def find_runs(directory: Path) -> list[Path]:
    return sorted(directory.glob("wandb/*run-*/run-*.wandb"))


def read_finished_run(path: Path, timeout_s: float = 10.0) -> OfflineRun:
    """Read a run that was finished: wandb's service writes the end of the file just after ``finish`` returned."""
    deadline = time.monotonic() + timeout_s
    while (run := read_run(path)).exit_code is None:
        assert time.monotonic() < deadline, f"{path} did not end within {timeout_s} s"
        time.sleep(0.01)
    return run


def read_run(path: Path) -> OfflineRun:
    from wandb.proto.wandb_internal_pb2 import Record

    run = OfflineRun()
    for data in _records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        match record.WhichOneof("record_type"):
            case "history":
                row = _items(record.history.item)
                run.history.append({key: value for key, value in row.items() if not key.startswith("_")})
            case "config":
                run.config |= _items(record.config.update)
            case "run":
                run.config |= _items(record.run.config.update)
                run.project, run.run_id, run.tags = record.run.project, record.run.run_id, list(record.run.tags)
            case "metric":
                run.step_metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
            case "alert":
                run.alerts.append((record.alert.level, record.alert.title, record.alert.text))
            case "exit":
                run.exit_code = record.exit.exit_code
    return run


def shown_table(path: Path, key: str) -> list[list[Any]]:
    """Return the rows of an incremental table that the run's last state of it is made of: those of all its parts."""
    logged = [row for row in read_run(path).history if f"{key}/path" in row]
    files = {row[f"{key}/artifact_path"]: path.parent / "files" / row[f"{key}/path"] for row in logged}
    parts = [*logged[-1][f"{key}/previous_increments_paths"], logged[-1][f"{key}/artifact_path"]]
    return [row for part in parts for row in json.loads(files[part].read_bytes())["data"]]


def _items(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(content: bytes) -> Iterator[bytes]:
    magic, _, _ = FILE_HEADER.unpack_from(content)
    assert magic == b":W&B", f"not a wandb file: starts with {magic!r}"
    position, parts = FILE_HEADER.size, b""
    while position + CHUNK_HEADER.size <= len(content):
        left_in_block = BLOCK - position % BLOCK
        if left_in_block < CHUNK_HEADER.size:
            position += left_in_block
            continue
        _, length, kind = CHUNK_HEADER.unpack_from(content, position)
        position += CHUNK_HEADER.size
        if position + length > len(content):
            return  # still being written
        parts = (b"" if kind in (FULL, FIRST) else parts) + content[position : position + length]
        position += length
        if kind in (FULL, LAST):
            yield parts
