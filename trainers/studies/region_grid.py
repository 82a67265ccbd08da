"""The rows of the stable-region study as a grid: balance weights, arms, multipliers, and the seeds in each cell."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trainers.studies.intervals import mean_interval, with_half_width
from trainers.studies.region import ARMS
from trainers.studies.rows import Row
from trainers.studies.runs import StudyError

#: A cell of the grid: balance weight, arm, multiplier.
Key = tuple[float, str, float]


@dataclass
class Cell:
    """What the seeds of one cell found.

    Attributes:
        loss: validation loss by seed, of the runs that are done.
        dead: likewise the share of dead experts.
        diverged: how many runs did.
        failed: how many runs did.
    """

    loss: dict[int, float] = field(default_factory=dict)
    dead: dict[int, float] = field(default_factory=dict)
    diverged: int = 0
    failed: int = 0

    def text(self, seeds: int) -> str:
        """Return the cell of the table.

        Args:
            seeds: how many there are elsewhere; fewer are said.
        """
        notes = [f"{n} {status}" for n, status in ((self.diverged, "diverged"), (self.failed, "failed")) if n]
        if not self.loss:
            return ", ".join(notes) or "-"
        if len(self.loss) + self.diverged + self.failed < seeds:
            notes.append(f"n = {len(self.loss)}")
        dead = f" ({mean_interval([*self.dead.values()]).mean:.0%})" if self.dead else ""
        return ", ".join([f"{with_half_width(mean_interval([*self.loss.values()]))}{dead}", *notes])


@dataclass(frozen=True)
class Grid:
    """The rows by cell, and the values of the grid in their order."""

    cells: Mapping[Key, Cell]
    balances: Sequence[float]
    arms: Sequence[str]
    multipliers: Sequence[float]
    seeds: int

    def cell(self, balance: float, arm: str, multiplier: float) -> Cell:
        """Return a cell, an empty one where there are no rows."""
        return self.cells.get((balance, arm, multiplier), Cell())

    def best(self, balance: float, arm: str) -> float | None:
        """Return the multiplier of the lowest mean loss, among those with the most seeds done; None without any."""
        found = {m: self.cell(balance, arm, m).loss for m in self.multipliers if self.cell(balance, arm, m).loss}
        most = max(map(len, found.values()), default=0)
        means = {m: mean_interval([*loss.values()]).mean for m, loss in found.items() if len(loss) == most}
        return min(means, key=means.__getitem__, default=None)


def grid_of(rows: Sequence[Row]) -> Grid:
    """Return the rows as a grid.

    Raises:
        StudyError: rows of another study, or of trainings of different size, which do not compare.
    """
    if other := next((row["study"] for row in rows if row["study"] != "region"), None):
        raise StudyError(f"the rows are of the study {other}, not of region")
    if len({_size(row) for row in rows}) > 1:
        raise StudyError("the rows are of models, data or trainings of different size: they need folders of their own")
    cells: dict[Key, Cell] = defaultdict(Cell)
    for row in rows:
        labels = row["labels"]
        cell = cells[labels["balance"], labels["arm"], labels["multiplier"]]
        if row["status"] == "done":
            cell.loss[row["seed"]] = row["results"]["valid/loss"]
            if row["results"].get("train/dead_share") is not None:
                cell.dead[row["seed"]] = row["results"]["train/dead_share"]
        else:
            cell.diverged += row["status"] == "diverged"
            cell.failed += row["status"] == "failed"
    balances, names, multipliers = (set(values) for values in zip(*cells, strict=True))
    order = [*ARMS, *sorted(names - set(ARMS))]
    return Grid(
        cells,
        sorted(balances),
        [arm for arm in order if arm in names],
        sorted(multipliers),
        len({row["seed"] for row in rows}),
    )


def _size(row: Row) -> str:
    config = row["configuration"]
    return str([config["model"], config["loop"], {key: v for key, v in config["data"].items() if key != "seed"}])
