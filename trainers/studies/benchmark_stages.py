"""The benchmark in stages: what the question is about before the rest; in each task tuning, then the runs it chose."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainers.data.base import data_file
from trainers.studies.benchmark import ARMS, LEADING, Task, Tier, main_key, main_runs, seeds_of, tuning_runs
from trainers.studies.benchmark_tuning import Choice, choices
from trainers.studies.rows import Row, read_rows
from trainers.studies.runner import Study, run_study
from trainers.studies.runs import Run, StudyError, configurations


@dataclass(frozen=True)
class Stage:
    """A part of the benchmark.

    Attributes:
        task: its name.
        leading: whether it is of the arms that decide the question, or of the others; None: of all.
        tuning: whether it tunes or trains.
    """

    task: str
    leading: bool | None
    tuning: bool


@dataclass(kw_only=True)
class Benchmark:
    """The benchmark as it was asked for.

    Attributes:
        tier: how much is run.
        out: a folder; each task has one in it.
        command: that was typed.
        tasks: names of the tier's tasks.
        arms: names of ``ARMS``.
        seeds: of ours and the best linear baseline; None: the tier's.
        processes: side by side; None: the tier's.
        fresh: begin anew.
        retry_failed: run failed runs again.
        until: of ``time.monotonic()``; no run begins after it.
        say: takes the lines for the terminal.
        broken: tasks that could not go on, and why; filled by ``run``.

    Raises:
        StudyError: an unknown task or arm, or no seed.
    """

    tier: Tier
    out: Path
    command: str
    tasks: Sequence[str] = ()
    arms: Sequence[str] = tuple(ARMS)
    seeds: int | None = None
    processes: int | None = None
    fresh: bool = False
    retry_failed: bool = False
    until: float | None = None
    say: Callable[[str], None] = print
    broken: dict[str, str] = field(default_factory=dict)
    _begun: set[str] = field(default_factory=set)
    _missing: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.tasks = list(dict.fromkeys(self.tasks or self.tier.tasks))
        self.arms = [arm for arm in ARMS if arm in _known(self.arms, ARMS, "arm")]
        _known(self.tasks, self.tier.tasks, "task")
        if self.seeds is not None and self.seeds < 1:
            raise StudyError(f"expected a seed or more, got {self.seeds}")

    def run(self) -> None:
        """Train what has no row yet, as far as the time goes; what is wrong with a task is said, the others go on.

        Raises:
            KeyboardInterrupt: Ctrl-C, after saying how to continue.
        """
        groups = (True, False) if self.tier.leading_first else (None,)
        stages = [Stage(task, leading, tuning) for leading in groups for task in self.tasks for tuning in (True, False)]
        for number, stage in enumerate(stages):
            if self.over:
                break
            if stage.task not in self.broken:
                self._stage(stage, stages[number + 1 :])
        if self.over and (left := sum(len(self._open(stage)) for stage in stages)):
            self.say(f"{left} runs are left; the same command continues{' without --fresh' if self.fresh else ''}")

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return self.until is not None and time.monotonic() >= self.until

    def path(self, task: str) -> Path:
        """The rows file of a task."""
        return self.out / task / "rows.jsonl"

    def rows(self, task: str) -> list[Row]:
        """The rows of a task."""
        return read_rows(self.path(task))

    def main_runs(self, task: str, leading: bool | None = None) -> list[Run]:
        """Return the runs that are judged, of the arms that are tuned.

        Args:
            task: one of the tasks.
            leading: as in ``Stage``.
        """
        return self._main_runs(task, leading, choices(self.tier, task, self.rows(task)))

    def _main_runs(self, task: str, leading: bool | None, found: Mapping[str, Choice]) -> list[Run]:
        counts = {arm: count for arm, count in self._seeds(task, leading).items() if arm in found}
        return main_runs(self.tier, task, {arm: choice.setting for arm, choice in found.items()}, counts)

    def _stage(self, stage: Stage, later: Sequence[Stage]) -> None:
        try:
            self._check_files(self.tier.tasks[stage.task])
            runs = self._tuning_runs(stage) if stage.tuning else self.main_runs(stage.task, stage.leading)
            if runs:
                run_study(self._study(stage.task, runs, later), self.say)
        except (StudyError, OSError) as error:
            self.broken[stage.task] = str(error)
            self.say(f"error: {stage.task} is left out: {error}")

    def _study(self, task: str, runs: Sequence[Run], later: Sequence[Stage]) -> Study:
        first = task not in self._begun
        self._begun.add(task)
        return Study(
            name=self.tier.study,
            runs=runs,
            path=self.path(task),
            command=self.command,
            processes=self.tier.processes if self.processes is None else self.processes,
            fresh=self.fresh and first,
            retry_failed=self.retry_failed and first,
            until=self.until,
            later=sum(weight for stage in later for weight in self._open(stage).values()),
        )

    def _check_files(self, task: Task) -> None:
        for relative in task.files:
            try:
                data_file(None, relative)
            except (ValueError, OSError) as error:
                raise StudyError(str(error).removeprefix("root: ")) from None

    def _tuning_runs(self, stage: Stage) -> list[Run]:
        return [
            run
            for arm in self._arms(stage.task, stage.leading)
            if self._composes(stage.task, arm)
            for run in tuning_runs(self.tier, stage.task, arm)
        ]

    def _arms(self, task: str, leading: bool | None) -> list[str]:
        wanted = [arm for arm in self.arms if leading is None or (arm in LEADING) == leading]
        return [arm for arm in wanted if (task, arm) not in self._missing]

    def _seeds(self, task: str, leading: bool | None) -> dict[str, int]:
        return seeds_of(self.tier, self._arms(task, leading), self.seeds)

    def _composes(self, task: str, arm: str) -> bool:
        """Whether an arm's configuration can be; if not, it is said, and the others go on."""
        try:
            configurations(tuning_runs(self.tier, task, arm)[:1])
        except StudyError as error:
            self._missing.add((task, arm))
            self.say(f"error: arm {arm} of {task} is left out: {error}")
            return False
        return True

    def _open(self, stage: Stage) -> dict[str, float]:
        """Return the keys of a stage's runs that have no row, and their weights; as far as they are known."""
        if stage.task in self.broken:
            return {}
        try:
            rows = [] if self.fresh and stage.task not in self._begun else self.rows(stage.task)
        except StudyError:
            return {}
        there = {row["key"] for row in rows}
        return {key: weight for key, weight in self._expected(stage, rows) if key not in there}

    def _expected(self, stage: Stage, rows: Sequence[Row]) -> Iterator[tuple[str, float]]:
        if stage.tuning:
            for arm in self._arms(stage.task, stage.leading):
                yield from ((run.key, run.weight) for run in tuning_runs(self.tier, stage.task, arm))
            return
        tuned = choices(self.tier, stage.task, rows)
        yield from ((run.key, run.weight) for run in self._main_runs(stage.task, stage.leading, tuned))
        for arm, count in self._seeds(stage.task, stage.leading).items():
            if arm not in tuned:
                weight = self.tier.tasks[stage.task].seconds * ARMS[arm].weight
                yield from ((main_key(stage.task, arm, seed), weight) for seed in range(count))


def _known(names: Sequence[str], there: Mapping[str, object], what: str) -> Sequence[str]:
    if unknown := next((name for name in names if name not in there), None):
        raise StudyError(f"there is no {what} {unknown}; the {what}s are {', '.join(there)}")
    return names
