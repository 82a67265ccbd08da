"""What the tests of studies need: a tiny run, data that fail in given ways, and rows as a study writes them."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.runs import TINY
from trainers.data.planted import PlantedText
from trainers.studies.runner import Study
from trainers.studies.runs import Run


def tiny_run(key: str, *overrides: str, **labels: Any) -> Run:
    return Run(key, [*TINY["language"], "loop.steps=12", "loop.warmup=2", *overrides], labels)


def broken_data(name: str) -> str:
    """The override that makes a run's data come from a function of this module."""
    return f"data._target_={__name__}.{name}"


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Stands for a full disk: this process and those it starts can write no file beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def killed(**options: Any) -> PlantedText:
    """Stands for the kernel's OOM killer."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def killed_once(name: str, **options: Any) -> PlantedText:
    """Killed the first time; ``name`` is the file that remembers."""
    marker = Path(name)
    if not marker.exists():
        marker.touch()
        killed()
    return PlantedText(**options)


def spoils(**options: Any) -> PlantedText:
    """Stands for an error of CUDA, after which a process has no use of it."""
    os.environ["SPOILT"] = "1"
    raise ValueError("an illegal memory access")


def spoilt(**options: Any) -> PlantedText:
    """Works where ``spoils`` has not been."""
    assert "SPOILT" not in os.environ
    return PlantedText(**options)


def disk_full(**options: Any) -> PlantedText:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def region_row(
    arm: str, multiplier: float, balance: float, seed: int, loss: float | None, dead: float = 0.0, **changes: Any
) -> dict[str, Any]:
    """A row of the region study; without a loss the run diverged."""
    results = {} if loss is None else {"valid/loss": loss, "train/dead_share": dead}
    return {
        "study": "region",
        "key": f"{arm}/x{multiplier:g}/balance{balance:g}/seed{seed}",
        "labels": {"arm": arm, "multiplier": multiplier, "balance": balance},
        "seed": seed,
        "status": "diverged" if loss is None else "done",
        "reason": "NaN or inf at step 3" if loss is None else None,
        "results": results,
        "warnings": [],
        "data": "stdlib 0123",
        "started": "2026-01-02T03:04:05Z",
        "seconds": 20.0,
        "commit": "abc",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hardware": {"cpu": "a processor", "cores": 2},
        "command": "python -m trainers.stress region",
        "overrides": [],
        "configuration": {
            "seed": seed,
            "model": {"layers": 2, "dim": 96, "num_experts": 8, "top_k": 2},
            "data": {"_target_": "stdlib", "batch_size": 8, "length": 128, "seed": seed},
            "loop": {"steps": 390},
        },
    } | changes


def alert(step: int, level: str, failure: str = "expert collapse", **more: Any) -> dict[str, Any]:
    """An event of a row, as the controller's alerts are kept."""
    found = {"event": "alert", "step": step, "level": level, "title": "t", "layer": "layer0", "failure": failure}
    return found | more


def decision(step: int, kind: str, name: str, **more: Any) -> dict[str, Any]:
    """An event of a row, as the controller's decisions are kept."""
    event = "action" if kind in ("apply", "undo", "release") else "outcome"
    return {"event": event, "step": step, "level": "info", "title": "t", "kind": kind, "name": name, **more}


def benchmark_rows(
    tier: Any, runs: Sequence[Run], losses: Sequence[float | None], **results: Sequence[float]
) -> list[dict[str, Any]]:
    """Rows of the benchmark's runs with these validation losses; without a loss the run diverged.

    ``results`` are further ones, their names with ``__`` for a slash.
    """
    found = []
    for index, (run, loss) in enumerate(zip(runs, losses, strict=True)):
        seed = next(int(override.removeprefix("seed=")) for override in run.overrides if override.startswith("seed="))
        row = region_row("", 1.0, 0.0, seed, loss, study=tier.study, key=run.key, labels=dict(run.labels))
        if loss is not None:
            row["results"] |= {name.replace("__", "/"): values[index] for name, values in results.items()}
        found.append(row)
    return found


def study(tmp_path: Path, runs: Sequence[Run], **options: Any) -> Study:
    return Study(name="test", runs=runs, path=tmp_path / "rows.jsonl", command="a command", **options)


def done_at_once(count: int, before: Callable[[], object] = lambda: None) -> type:
    """Return a class in the place of ``Workers``, whose runs are done at once.

    Args:
        count: of the runs that are done.
        before: called before each.
    """

    class Answers:
        def __init__(self, *arguments: Any) -> None:
            pass

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: Any) -> None:
            pass

        def outcomes(self) -> Iterator[tuple[int, dict[str, Any]]]:
            for index in range(count):
                before()
                yield index, {"status": "done", "results": {"valid/loss": 1.0}, "seconds": 1.0}

    return Answers
