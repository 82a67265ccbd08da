"""The rows of a task of the benchmark by arm and seed, and what is computed from them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import fmean

from trainers.studies.benchmark import ARMS, seeds_of
from trainers.studies.benchmark_tasks import Task, Tier, rises
from trainers.studies.benchmark_tuning import Choice, choices, reference, unchosen
from trainers.studies.intervals import Equivalence, Interval, Ratio, equivalence, mean_interval, mean_ratio
from trainers.studies.rows import FREE_KEYS, Row, by_seed, is_under
from trainers.train import flat_settings

#: What counts as equal, as a share of the baseline's mean.
MARGIN = 0.005

#: The target loss is that of the baseline after this share of its tokens.
TARGET = 0.75

#: Arms whose experts are not chosen, so that their routing says nothing.
NO_CHOICE = ("soft", "dense")
_ROUTING = ("max_violation", "valid/geometry/", "valid/recovery")

#: After the point, of results and differences.
DIGITS = 4

#: What may differ between runs of an arm. Not the device: it decides how fast they are.
_OF_RUNS = ("seed", "data.seed", *(key for key in FREE_KEYS if key != "device"))

#: What may differ between arms as well: what they are, are tuned in, and what follows from it.
_OF_ARMS = (
    *("router", "prior", "optimizer.lr", "optimizer.routers"),
    *("geometry.step", "geometry.controller", "geometry.fisher", "geometry.regularizers"),
)

#: And between those that choose experts and those that do not: made of size, which is the same for all.
_OF_SIZE = ("model.num_experts", "model.top_k", "model.expert_hidden")

#: Runs that began further apart say nothing of each other's speed: a machine is not equally fast all day.
TOGETHER = timedelta(hours=1)

#: A curve's points are averaged over so many before a target is looked for in them.
WINDOW = 5


@dataclass(frozen=True)
class Results:
    """A task's rows.

    Attributes:
        task: the task.
        rows: all of its rows, those of tuning included; but for those of ``unchosen``.
        choices: what tuning chose, by arm.
        reference: the linear baseline that tuned best; None: none has.
        expected: how many seeds each arm should have, in the order of ``ARMS``.
        unchosen: arms whose runs had another setting than tuning chose, and what differs.
    """

    task: Task
    rows: Sequence[Row]
    choices: Mapping[str, Choice]
    reference: str | None
    expected: Mapping[str, int]
    unchosen: Mapping[str, str]

    @property
    def judged(self) -> list[Row]:
        """The rows that are judged."""
        return [row for row in self.rows if row["labels"]["phase"] == "main"]

    def main(self, arm: str | None) -> list[Row]:
        """The rows that are judged, of an arm; of None, none."""
        return [row for row in self.judged if row["labels"]["arm"] == arm]

    def without(self, arm: str) -> list[Row]:
        """The runs of an arm without its controller, at the same setting: of their own, or another arm's."""
        own = [row for row in self.rows if row["labels"]["phase"] == "without" and row["labels"]["arm"] == arm]
        other = ARMS[arm].without
        settings = [choice.setting for name, choice in self.choices.items() if name in (arm, other)]
        return self.main(other) if not own and len(settings) == 2 and settings[0] == settings[1] else own

    def lost(self, arm: str, to: str | None = None) -> int:
        """How many of an arm's seeds are missing in a comparison because a run came to nothing, its own or the other's.

        Args:
            arm: the arm.
            to: as in ``compared``.
        """
        sides = [self.main(arm), self.main(self.reference if to is None else to)]
        lost = {row["seed"] for rows in sides for row in rows if row["status"] != "done"}
        return len(lost & {row["seed"] for row in sides[0]})

    def effect(self, arm: str, name: str) -> Equivalence | None:
        """What an arm's controller changes in a result, paired over seeds."""
        return equivalence(self.values(arm, name), by_seed(self.without(arm), name), MARGIN)

    def values(self, arm: str, name: str) -> dict[int, float]:
        """A result of an arm by seed: of its finished runs that have it."""
        if arm in NO_CHOICE and name.startswith(_ROUTING):
            return {}
        return _max_violation(self.main(arm)) if name == "max_violation" else by_seed(self.main(arm), name)

    def mean(self, arm: str, name: str) -> Interval | None:
        """The mean of a result over seeds; None without any."""
        values = [*self.values(arm, name).values()]
        return mean_interval(values) if values else None

    def compared(self, arm: str, name: str, to: str | None = None) -> Equivalence | None:
        """A result less that of another arm, paired over seeds; unless told otherwise, of the reference."""
        other = self.reference if to is None else to
        if other is None or arm == other:
            return None
        return equivalence(self.values(arm, name), self.values(other, name), MARGIN)

    def gain(self, arm: str) -> Interval | None:
        """The first result less that of the reference in percent of it, more is better; None without a pair."""
        found = self.compared(arm, self.task.primary)
        if found is None or not found.margin:
            return None
        scale = (1 if rises(self.task.primary) else -1) * 100 * MARGIN / found.margin
        width = abs(scale) * found.difference.half_width
        return Interval(mean=scale * found.difference.mean, half_width=width, n=found.difference.n)

    def best_linear(self) -> str | None:
        """The linear baseline that is best in the runs that are judged, over the seeds that all of them have."""
        name = self.task.primary
        values = {arm: found for arm in ARMS if ARMS[arm].linear and (found := self.values(arm, name))}
        seeds = set.intersection(*(set(found) for found in values.values())) if values else set()
        if not seeds:
            return None
        best = max if rises(name) else min
        return best(values, key=lambda arm: fmean(values[arm][seed] for seed in seeds))

    def step_ratio(self, arm: str) -> Ratio | None:
        """The time of a step in steps of the reference: the geometric mean over seeds whose two runs began together."""
        theirs = {row["seed"]: row for row in self.main(self.reference)}
        near = [row for row in self.main(arm) if row["seed"] in theirs and _together(row, theirs[row["seed"]])]
        return self._ratio(by_seed([*theirs.values()], _SPEED), by_seed(near, _SPEED))

    def tokens_ratio(self, arm: str) -> tuple[Ratio | None, int]:
        """The tokens to the target loss in tokens of the reference, and how many runs never came there."""
        theirs, ours = self.curves(self.reference), self.curves(arm)
        above, below, lost = {}, {}, 0
        for seed in ours.keys() & theirs.keys():
            target = loss_at(theirs[seed], TARGET * theirs[seed][-1][0])
            reached = tokens_to(ours[seed], target)
            lost += reached is None
            if reached is not None:
                above[seed], below[seed] = reached, tokens_to(theirs[seed], target) or theirs[seed][-1][0]
        return self._ratio(above, below), lost

    def curves(self, arm: str | None) -> dict[int, list[tuple[float, float]]]:
        """Training loss over tokens of an arm's runs by seed, smoothed, where rows have it."""
        return {row["seed"]: smoothed(curve) for row in self.main(arm) if (curve := _curve(row))}

    def _ratio(self, above: Mapping[int, float], below: Mapping[int, float]) -> Ratio | None:
        seeds = [seed for seed in above if below.get(seed)]
        return mean_ratio([above[seed] for seed in seeds], [below[seed] for seed in seeds]) if seeds else None


_SPEED = "train/tokens_per_second"


def _together(one: Row, other: Row) -> bool:
    began, others = (datetime.fromisoformat(row["started"]) for row in (one, other))
    return abs(began - others) <= TOGETHER


def results_of(tier: Tier, task: str, rows: Sequence[Row], seeds: int | None = None) -> Results:
    """Return the rows of a task, and what should be there.

    Args:
        tier: the tier.
        task: one of its tasks.
        rows: of the task.
        seeds: as in ``seeds_of``.
    """
    found = choices(tier, task, rows)
    wrong = unchosen(rows, found)
    valid = [row for row in rows if row["labels"]["phase"] == "tuning" or row["labels"]["arm"] not in wrong]
    return Results(tier.tasks[task], valid, found, reference(found), seeds_of(tier, tuple(ARMS), seeds), wrong)


def mixed(rows: Sequence[Row]) -> str | None:
    """Return what differs between rows of a task that should not, ``"planted/hash/seed1: model.dim 18, not 16"``.

    All runs of an arm that are judged have one configuration but for the seed; all arms one but for what they are, and
    in a seed the same data; all runs one version of each library. None: nothing differs.

    Args:
        rows: of a task.
    """
    first: dict[tuple[object, ...], dict[str, object]] = {}
    for row in rows:
        for group, own in _alike(row):
            then = first.setdefault(group, {})
            for name, value in sorted(own.items()):
                if then.setdefault(name, value) != value:  # a key that came later did not exist then
                    return f"{row['key']}: {name} {value}, not {then[name]}"
    return None


def _alike(row: Row) -> Iterator[tuple[tuple[object, ...], dict[str, object]]]:
    """Yield groups of rows that a row belongs to, and what is the same in all of a group."""
    arm, phase, flat = row["labels"]["arm"], row["labels"]["phase"], flat_settings(row["configuration"])
    settings = {name: value for name, value in flat.items() if not is_under(name, _OF_RUNS)}
    of_arms = (*_OF_ARMS, *(_OF_SIZE if arm in NO_CHOICE else ()))
    yield (), {name: version for name, version in row["versions"].items() if name != "python"}
    yield (phase == "tuning",), {name: value for name, value in settings.items() if not is_under(name, of_arms)}
    if phase != "tuning":
        yield (phase, arm), settings
    if row["data"] is not None:  # else the run failed before it had any
        seed = row["seed"] if ".planted." in flat["data._target_"] else None  # planted data are drawn by it
        yield (phase == "tuning", "data", seed), {"data": row["data"]}


def _max_violation(rows: Sequence[Row]) -> dict[int, float]:
    """The busiest expert's load over the fair one, less 1: the mean over layers, on the held-out split."""
    found = {}
    for row in rows:
        results = row["results"] if row["status"] == "done" else {}
        loads = [
            float(value)
            for name, value in results.items()
            if value is not None and name.startswith("valid/geometry/layer") and name.endswith("/max_load")
        ]
        if loads:
            found[row["seed"]] = fmean(loads) - 1
    return found


def _curve(row: Row) -> list[tuple[float, float]]:
    columns = row.get("curve") or {} if row["status"] == "done" else {}
    points = zip(columns.get("tokens", ()), columns.get("loss", ()), strict=True)
    return [(float(tokens), float(loss)) for tokens, loss in points if loss is not None]


def smoothed(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return a curve whose losses are means of a point and the four before it, as far as there are so many."""
    return [
        (tokens, fmean(loss for _, loss in curve[max(0, index + 1 - WINDOW) : index + 1]))
        for index, (tokens, _) in enumerate(curve)
    ]


def loss_at(curve: Sequence[tuple[float, float]], tokens: float) -> float:
    """Return the loss of a curve after so many tokens, between its points on a straight line.

    Args:
        curve: tokens and loss, tokens ascending; one point or more.
        tokens: within it; outside, the nearest point counts.
    """
    if tokens <= curve[0][0]:
        return curve[0][1]
    for (before, high), (after, low) in itertools.pairwise(curve):
        if tokens <= after:
            return high + (low - high) * (tokens - before) / (after - before)
    return curve[-1][1]


def tokens_to(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Return after how many tokens a curve is first at a loss or below it; None: it never is.

    Args:
        curve: as in ``loss_at``.
        loss: the target.
    """
    if curve[0][1] <= loss:
        return curve[0][0]
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= loss:
            return before + (after - before) * (high - loss) / (high - low)
    return None
