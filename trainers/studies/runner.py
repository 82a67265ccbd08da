"""The runner: the runs of a study side by side, a row for each, continued where it was stopped."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.studies.origin import origin
from trainers.studies.rows import Row, RowsFile, changed_settings
from trainers.studies.runs import Run, StudyError, configurations
from trainers.studies.workers import Workers


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is run and how.

    Attributes:
        name: of the study, in every row.
        runs: in the order in which they begin: seeds outermost, so that a study that is stopped has whole seeds.
        path: the rows file.
        command: that was typed, for the report.
        resume: says how to go on where the study was stopped.
        processes: worker processes side by side, one thread each.
        fresh: begin anew even if there are rows.
        retry_failed: run those of the runs again that failed.
        until: of ``time.monotonic()``; no run begins after it. None: no limit.
        later: weight of what follows this study, for the time left.

    Raises:
        StudyError: two runs of one key, or no process.
    """

    name: str
    runs: Sequence[Run]
    path: Path
    command: str
    resume: str = "the same command continues"
    processes: int = 2
    fresh: bool = False
    retry_failed: bool = False
    until: float | None = None
    later: float = 0.0

    def __post_init__(self) -> None:
        keys = [run.key for run in self.runs]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise StudyError(f"two runs of the study {self.name} are called {twice}")
        if self.processes < 1:
            raise StudyError(f"processes must be at least 1, got {self.processes}")


def run_study(study: Study, say: Callable[[str], None] = print) -> list[Row]:
    """Train all runs that have no row yet; write a row for each as it finishes.

    Args:
        study: what to run.
        say: takes the lines for the terminal.

    Returns:
        All rows of the file.

    Raises:
        StudyError: a configuration that cannot be, rows of other settings, another study writing there, a full disk.
        KeyboardInterrupt: Ctrl-C, after saying how to continue.
    """
    configs, keys = configurations(study.runs), {run.key for run in study.runs}

    def again(row: Row) -> bool:
        return row["status"] == "failed" and row["key"] in keys

    drop = again if study.retry_failed and not study.fresh else None
    with RowsFile(study.path, fresh=study.fresh, drop=drop) as file:
        for note in file.notes:
            say(note)
        there = _finished(study, configs, file.rows)
        missing = [index for index, run in enumerate(study.runs) if run.key not in there]
        say(f"{study.name}: {len(study.runs)} runs, {len(there)} of them done before; rows in {study.path}")
        try:
            _train(study, [(study.runs[index], configs[index]) for index in missing], file, len(there), say)
        except KeyboardInterrupt:
            done = keys & {row["key"] for row in file.rows}
            say(f"stopped; {len(done)} of {len(keys)} runs are in {study.path}; {study.resume}")
            raise
        done = keys & {row["key"] for row in file.rows}
        if len(done) < len(keys):
            say(f"the time is up; {len(done)} of {len(keys)} runs are in {study.path}; {study.resume}")
        failed = sum(row["status"] == "failed" and row["key"] in keys for row in file.rows)
        if failed:
            say(f"{failed} runs failed, their rows say why; --retry-failed runs them again")
        return file.rows


def _finished(study: Study, configs: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> set[str]:
    """Return the keys of the runs that have rows."""
    by_key = {row["key"]: row for row in rows}
    for row in rows:
        if row["study"] != study.name:
            raise StudyError(f"{study.path} holds rows of the study {row['study']}: take another --out")
    for run, config in zip(study.runs, configs, strict=True):
        if run.key in by_key and (changed := changed_settings(config, run.overrides, by_key[run.key])):
            raise StudyError(
                f"{study.path} holds {run.key} with other settings ({'; '.join(changed[:3])}): "
                "take another --out, or --fresh to begin anew"
            )
    return {run.key for run in study.runs if run.key in by_key}


def _train(
    study: Study, tasks: Sequence[tuple[Run, dict[str, Any]]], file: RowsFile, before: int, say: Callable[[str], None]
) -> None:
    common, began, trained = origin(), time.monotonic(), 0.0
    in_all = sum(run.weight for run, _ in tasks) + study.later
    with (
        _temporary_folder(study.path) as folder,
        Workers([config for _, config in tasks], study.processes, folder, lambda: not _over(study)) as w,
    ):
        for done, (index, outcome) in enumerate(w.outcomes(), start=1):
            run, config = tasks[index]
            row = {
                "study": study.name,
                "key": run.key,
                "labels": dict(run.labels),
                "seed": config["seed"],
                **outcome,
                **common,
                "command": study.command,
                "overrides": list(run.overrides),
                "configuration": config,
            }
            try:
                file.append(row)
            except StudyError as error:
                raise StudyError(f"{error}; {study.resume}") from None
            trained += run.weight
            left = (time.monotonic() - began) / trained * (in_all - trained)
            say(f"[{before + done}/{before + len(tasks)}] {_line(row)}; {_duration(left)} left")


def _over(study: Study) -> bool:
    return study.until is not None and time.monotonic() >= study.until


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """A folder for the runs' files; its name is the study's, so that what a killed study left is removed here."""
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"moegeo-study-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _line(row: Row) -> str:
    found = row["results"]
    if row["status"] != "done":
        return f"{row['key']}: {row['status']}, {row['reason']}"
    dead = "" if found.get("train/dead_share") is None else f", {found['train/dead_share']:.0%} dead"
    return f"{row['key']}: loss {found['valid/loss']:.4f}{dead}, {row['seconds']:.0f} s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest:02} s"
