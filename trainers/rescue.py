"""Two trainings that are made to collapse, side by side: without the controller, and with it.

``python -m trainers.rescue`` shows both while they train, and ends with a table and a picture.
"""

from __future__ import annotations

import math
import multiprocessing
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from trainers.command import Parser, one_line_mistakes
from trainers.progress import Silent
from trainers.rescue_picture import check_path, draw
from trainers.studies.runs import DataCache, Outcome, Run, StudyError, configurations, train_run
from trainers.studies.workers import ctrl_c_ignored

#: The two runs: what they are called, and the override that makes them differ.
RUNS: Mapping[str, str] = {"without": "controller=off", "with": "controller=act"}

#: What is shown: label, scalar of a layer, how the layers come to one number.
SHOWN = (("FSI, worst layer", "fsi", max), ("dead experts", "dead_fraction", fmean), ("logit scale", "z_loss", max))

#: Steps that a shown loss is the mean of; seconds between two lines where there is no terminal; messages shown.
SMOOTHED, SECONDS, MESSAGES = 20, 10.0, 12


@dataclass
class Course:
    """What is known of one run so far.

    Attributes:
        scalars: by name, a value a step.
        messages: of its controller, with their steps.
        outcome: at its end.
    """

    scalars: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    messages: list[tuple[int, str]] = field(default_factory=list)
    outcome: Outcome | None = None

    def add(self, scalars: Mapping[str, float]) -> None:
        """Take in a step."""
        self.scalars["loss"].append(scalars["train/loss"])
        for label, name, combine in SHOWN:
            of_layer = re.compile(rf"geometry/[^/]+/{name}")  # not geometry/NAME, which is of the whole model
            values = [value for key, value in scalars.items() if of_layer.fullmatch(key)]
            value = combine(values) if values else math.nan
            self.scalars[label].append(math.sqrt(value) if name == "z_loss" else value)

    def cells(self) -> dict[str, str]:
        """Return what to show, by its label."""
        if not (losses := self.scalars["loss"]):
            return {}
        cells = {"step": str(len(losses)), "loss": f"{fmean(losses[-SMOOTHED:]):.3f}"}
        for label, name, _ in SHOWN:
            value = self.scalars[label][-1]
            cells[label] = f"{value:.0%}" if name == "dead_fraction" else f"{value:.2f}"
        return cells


class _Telling(Silent):
    """Sends what a run does to the process that shows it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """Send a step."""
        self._connection.send(dict(scalars))

    def mark(self, step: int, line: str) -> None:
        """Send a message of the controller."""
        self._connection.send((step, line))


def work(connection: Connection, config: Mapping[str, Any], directory: str) -> None:
    """Train one run: the main function of its process."""
    torch.set_num_threads(1)
    outcome = train_run(config, Path(directory), DataCache(), _Telling(connection))
    connection.send(("outcome", outcome))


def watch(configs: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[list[Course]]:
    """Train runs side by side, a process each; yield what is known of them, whenever that is more.

    Raises:
        StudyError: a process died.
    """
    courses = [Course() for _ in configs]
    with _processes(configs, folder) as connections:
        while connections:
            for connection in wait(list(connections)):
                assert isinstance(connection, Connection)
                course = courses[connections[connection]]
                try:
                    _take(course, connection.recv())
                except EOFError:
                    del connections[connection]
                    if course.outcome is None:
                        raise StudyError("a training process died; what it said is above") from None
            yield courses


def _take(course: Course, message: Any) -> None:
    if isinstance(message, dict):
        course.add(message)
    elif message[0] == "outcome":
        course.outcome = message[1]
    else:
        course.messages.append(message)


@contextmanager
def _processes(configs: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[dict[Connection, int]]:
    context, processes, connections = multiprocessing.get_context("spawn"), [], {}
    try:
        for number, config in enumerate(configs):
            ours, theirs = context.Pipe(duplex=False)
            directory = folder / str(number)
            directory.mkdir()
            process = context.Process(target=work, args=(theirs, config, str(directory)), daemon=True)
            with ctrl_c_ignored():
                process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            processes.append(process)
            connections[ours] = number
        yield connections
    finally:
        for process in processes:
            process.kill()
            process.join()


def show(states: Iterator[list[Course]], steps: int) -> list[Course]:
    """Show the runs until they end: a table that changes in a terminal, else a line now and then."""
    from rich.console import Console
    from rich.live import Live

    courses: list[Course] = []
    if Console().is_terminal:
        with Live(refresh_per_second=4, vertical_overflow="crop") as live:
            for courses in states:
                live.update(_table(courses, steps))
        return courses
    told, following = 0, 0.0
    for courses in states:
        for step, line in courses[-1].messages[told:]:
            print(f"step {step}  {line}", flush=True)
        told = len(courses[-1].messages)
        if time.monotonic() >= following:
            following = time.monotonic() + SECONDS
            for name, course in zip(RUNS, courses, strict=True):
                fields = "  ".join(f"{label} {cell}" for label, cell in course.cells().items())
                print(f"{name:>7}: {fields or 'starting'}", flush=True)
    return courses


def _table(courses: Sequence[Course], steps: int) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{steps} steps, made to collapse")
    table.add_column("")
    cells = [course.cells() for course in courses]
    for name in RUNS:
        table.add_column(f"{name} the controller", justify="right", min_width=18)
    for label in cells[0] or cells[1]:
        table.add_row(label, *(own.get(label, "") for own in cells))
    lines = [f"step {step}  {line}" for step, line in courses[-1].messages[-MESSAGES:]]
    return Group(table, Text("\n".join(lines) or "The controller has said nothing yet."))


def report(courses: Sequence[Course]) -> str:
    """Return what became of the runs, in lines.

    Raises:
        StudyError: a run failed, other than by diverging.
    """
    lines = [f"{'':24}{'without':>10}{'with':>10}"]
    results = []
    for course in courses:
        assert course.outcome is not None
        if course.outcome["status"] == "failed":
            raise StudyError(f"a run failed: {course.outcome['reason']}")
        results.append(course.outcome["results"])
    for label, key, form in (
        ("validation loss (nats)", "valid/loss", "{:.4f}"),
        ("training loss, last 20", "train/loss", "{:.4f}"),
        ("dead experts, last 20", "train/dead_share", "{:.1%}"),
    ):
        cells = [found.get(key) for found in results]
        shown = ["diverged" if cell is None else form.format(cell) for cell in cells]
        lines.append(f"{label:24}{shown[0]:>10}{shown[1]:>10}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run both, show them, and write the picture.

    Args:
        arguments: the command line; None for the process's own.
    """
    parser = Parser(prog="python -m trainers.rescue", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of model and data (0)")
    parser.add_argument("--picture", type=Path, default=Path("runs/rescue.png"), help="where it goes (runs/rescue.png)")
    parser.add_argument("overrides", nargs="*", help="of the configuration, for both runs: key=value")
    options = parser.parse_args(arguments)
    with one_line_mistakes():
        common = ["experiment=rescue", f"seed={options.seed}", f"data.seed={options.seed}", *options.overrides]
        configs = configurations(Run(name, [*common, switch], {}) for name, switch in RUNS.items())
        check_path(options.picture)  # before the training
        with tempfile.TemporaryDirectory() as folder:
            courses = show(watch(configs, Path(folder)), configs[0]["loop"]["steps"])
        print(report(courses))
        draw(courses, options.picture)
    print("One pair of runs shows how it works and proves nothing; docs/results/faults has the study.")
    print(options.picture)


if __name__ == "__main__":
    main()
