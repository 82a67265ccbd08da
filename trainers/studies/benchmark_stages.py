"""The benchmark in stages: what the question is about before the rest; in each task tuning, then the runs it chose."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainers.studies.benchmark import ARMS, LEADING, main_key, main_runs, seeds_of, tuning_runs
from trainers.studies.benchmark_ready import check_ready
from trainers.studies.benchmark_tasks import Tier
from trainers.studies.benchmark_tuning import Choice, choices, unchosen
from trainers.studies.rows import Row, RowsFile, read_rows
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
        resume: as in ``Study``.
        seeds: of ours and the linear baselines; None: the tier's.
        processes: side by side; None: the tier's.
        fresh: names of the arms that begin anew; all of them: whatever the rows are.
        retry_failed: run failed runs of the arms again.
        until: of ``time.monotonic()``; no run begins after it.
        say: takes the lines for the terminal.
        broken: tasks that are left out, and why.
        missing: arms that are left out, by task and arm, and why.

    Raises:
        StudyError: an unknown task or arm, or no seed.
    """

    tier: Tier
    out: Path
    command: str
    resume: str = "the same command continues"
    tasks: Sequence[str] = ()
    arms: Sequence[str] = tuple(ARMS)
    seeds: int | None = None
    processes: int | None = None
    fresh: Sequence[str] = ()
    retry_failed: bool = False
    until: float | None = None
    say: Callable[[str], None] = print
    broken: dict[str, str] = field(default_factory=dict)
    missing: dict[tuple[str, str], str] = field(default_factory=dict)
    _ready: set[str] = field(default_factory=set)
    _begun: set[str] = field(default_factory=set)

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
            self.say(f"{left} runs are left; {self.resume}")

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return self.until is not None and time.monotonic() >= self.until

    def path(self, task: str) -> Path:
        """The rows file of a task."""
        return self.out / task / "rows.jsonl"

    def rows(self, task: str) -> list[Row]:
        """The rows of a task.

        Raises:
            StudyError: they are another study's, or as in ``read_rows``.
        """
        rows = read_rows(self.path(task))
        if other := next((row["study"] for row in rows if row["study"] != self.tier.study), None):
            raise StudyError(f"{self.path(task)} holds rows of {other}, not of {self.tier.study}")
        return rows

    def leave_out(self, task: str, why: str, arm: str | None = None) -> None:
        """Go on without a task, or without one of its arms; say why, once."""
        if arm is None and task not in self.broken:
            self.broken[task] = why
            self.say(f"error: {task} is left out: {why}")
        elif arm is not None and (task, arm) not in self.missing:
            self.missing[task, arm] = why
            self.say(f"error: arm {arm} of {task} is left out: {why}")

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
            runs = self._tuning_runs(stage) if stage.tuning else self._judged_runs(stage)
            if runs:
                self._begin(stage.task, runs)
                run_study(self._study(stage.task, runs, later), self.say)
        except (StudyError, OSError) as error:
            self.leave_out(stage.task, str(error))

    def _begin(self, task: str, runs: Sequence[Run]) -> None:
        """Before a task's first run make sure that it can be trained; with --fresh, put away the rows that were."""
        rows, (arm, setting) = self._staying(task), (runs[0].labels[name] for name in ("arm", "setting"))
        if task not in self._ready and {run.key for run in runs} - {row["key"] for row in rows}:
            judged = main_runs(self.tier, task, {arm: setting}, {arm: 1})[0]
            check_ready([judged] if runs[0].key == judged.key else [runs[0], judged], rows)
            self._ready.add(task)
        if self.fresh and task not in self._begun:
            anew = None if self._all_anew else lambda row: row["labels"]["arm"] in self.fresh
            with RowsFile(self.path(task), fresh=True, drop=anew):
                pass
        self._begun.add(task)

    @property
    def _all_anew(self) -> bool:
        return {*self.fresh} == {*ARMS}

    def _staying(self, task: str) -> list[Row]:
        """The rows of a task whose runs are not trained again."""
        fresh = () if task in self._begun else self.fresh
        if fresh and self._all_anew:
            return []  # unread: they may be damaged
        rows = [row for row in self.rows(task) if row["labels"]["arm"] not in fresh]
        return [row for row in rows if not (self.retry_failed and row["status"] == "failed")]

    def _study(self, task: str, runs: Sequence[Run], later: Sequence[Stage]) -> Study:
        return Study(
            name=self.tier.study,
            runs=runs,
            path=self.path(task),
            command=self.command,
            resume=self.resume,
            processes=self.tier.processes if self.processes is None else self.processes,
            retry_failed=self.retry_failed,
            until=self.until,
            later=sum(weight for stage in later for weight in self._open(stage).values()),
        )

    def _judged_runs(self, stage: Stage) -> list[Run]:
        """Return the runs that are judged, without the arms whose runs had another setting than tuning chooses now."""
        found = choices(self.tier, stage.task, self.rows(stage.task))
        for arm, why in unchosen(self._staying(stage.task), found).items():
            if arm in self._arms(stage.task, stage.leading):
                how = f"--tasks {stage.task} --arms {arm} --fresh begins it anew and leaves the others"
                self.leave_out(stage.task, f"{why}; {how}", arm)
        return self._main_runs(stage.task, stage.leading, found)

    def _tuning_runs(self, stage: Stage) -> list[Run]:
        return [
            run
            for arm in self._arms(stage.task, stage.leading)
            if self._composes(stage.task, arm)
            for run in tuning_runs(self.tier, stage.task, arm)
        ]

    def _arms(self, task: str, leading: bool | None) -> list[str]:
        wanted = [arm for arm in self.arms if leading is None or (arm in LEADING) == leading]
        return [arm for arm in wanted if (task, arm) not in self.missing]

    def _seeds(self, task: str, leading: bool | None) -> dict[str, int]:
        return seeds_of(self.tier, self._arms(task, leading), self.seeds)

    def _composes(self, task: str, arm: str) -> bool:
        """Whether an arm's configuration can be; if not, it is said, and the others go on."""
        try:
            configurations(tuning_runs(self.tier, task, arm)[:1])
        except StudyError as error:
            self.leave_out(task, str(error), arm)
            return False
        return True

    def _open(self, stage: Stage) -> dict[str, float]:
        """Return the keys of a stage's runs that have no row, and their weights; as far as they are known."""
        if stage.task in self.broken:
            return {}
        try:
            rows = self._staying(stage.task)
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
