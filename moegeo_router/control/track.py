"""One metric of one layer over time: averages, drift, and how bad it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .thresholds import Threshold

CALM, DRIFT, WARNING, CRITICAL = range(4)
LEVELS = ("calm", "drift", "warning", "critical")

#: The slow average, which a drift is seen against, has this many times the time constant of the fast one.
SLOW = 5

#: CUSUM: what a step adds is its deviation, in mean absolute deviations, less this; a drift is seen above that.
SLACK, DECISION = 0.5, 8.0

#: A drift is told if, going on, it reaches the warning within this many time constants.
HORIZON = 10


@dataclass
class Average:
    """An exponential average with the bias of its beginning taken out."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, steps: float) -> None:
        """Take in a value; ``steps`` is the time constant."""
        beta = 1 - 1 / steps
        self.total = beta * self.total + (1 - beta) * value
        self.weight = beta * self.weight + (1 - beta)

    @property
    def value(self) -> float:
        """The average; NaN before the first value."""
        return self.total / self.weight if self.weight else math.nan


class Averages:
    """Exponential averages, as ``Average``, of values that always come together.

    Args:
        pairs: total of each and the weight, which is common to all.
    """

    def __init__(self, pairs: Sequence[Sequence[float]]) -> None:
        self._totals = [total for total, _ in pairs]
        self._weight = pairs[0][1] if pairs else 0.0

    def add(self, values: Sequence[float], steps: float) -> None:
        """Take in a value of each; ``steps`` is the time constant."""
        beta = 1 - 1 / steps
        self._totals = [beta * total + (1 - beta) * value for total, value in zip(self._totals, values, strict=True)]
        self._weight = beta * self._weight + (1 - beta)

    @property
    def values(self) -> tuple[float, ...]:
        """The averages; NaN before the first values."""
        weight = self._weight or math.nan
        return tuple([total / weight for total in self._totals])

    @property
    def pairs(self) -> list[list[float]]:
        """Total and weight of each, from which it is made again."""
        return [[total, self._weight] for total in self._totals]


@dataclass
class Track:
    """What is kept of a metric.

    Attributes:
        fast: average over the table's time constant: what is compared with the thresholds.
        slow: average over five times that.
        noise: average absolute deviation from the slow one.
        pace: average of the fast one's changes, a step, over half its time constant: soon to show that a trend turns.
        cusum: sum of the deviations to the bad side beyond the slack, never below 0.
        level: how bad it is: calm, drift, warning or critical.
        since: the step since which it is at least a warning; -1: it is not.
    """

    fast: Average
    slow: Average
    noise: Average
    pace: Average
    cusum: float = 0.0
    level: int = CALM
    since: int = -1

    @classmethod
    def new(cls) -> Track:
        """Return one that has seen nothing."""
        return cls(Average(), Average(), Average(), Average())

    def update(self, value: float, step: int, threshold: Threshold) -> None:
        """Take in the value of a step; one that is not finite is passed over."""
        if not math.isfinite(value):
            return
        before = self.fast.value
        self.fast.add(value, threshold.smoothing)
        if threshold.trend:
            if math.isfinite(before):
                self.pace.add(self.fast.value - before, max(1.0, threshold.smoothing / 2))
            self._drift(value, threshold)
        if step > threshold.warmup:
            self._judge(step, threshold)

    def slope(self, threshold: Threshold) -> float:
        """Return how fast the average moves to the bad side, a step: two averages of a line are apart by their lags."""
        gap = self.fast.value - self.slow.value
        return threshold.sign * gap / (threshold.smoothing * (SLOW - 1))

    def state(self) -> dict[str, Any]:
        """Return plain numbers."""
        return asdict(self)

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> Track:
        """Return the track of ``state()``."""
        averages = {name: Average(**state[name]) for name in ("fast", "slow", "noise", "pace")}
        return cls(**averages, cusum=state["cusum"], level=state["level"], since=state["since"])

    def _drift(self, value: float, threshold: Threshold) -> None:
        before = self.slow.value
        if math.isfinite(before):
            deviation = value - before
            noise = self.noise.value
            if noise > 0:
                moved = self.cusum + threshold.sign * deviation / noise - SLACK
                self.cusum = min(max(0.0, moved), 2 * DECISION)  # bounded: a drift that ends is seen to end
            self.noise.add(abs(deviation), SLOW * threshold.smoothing)
        self.slow.add(value, SLOW * threshold.smoothing)

    def _judge(self, step: int, threshold: Threshold) -> None:
        sign, value = threshold.sign, threshold.sign * self.fast.value
        # A level is left only well below where it began, so that noise does not ring it.
        critical = max(sign * threshold.critical - 0.1 * abs(threshold.critical), sign * threshold.warning)
        if value >= (sign * threshold.critical if self.level < CRITICAL else critical):
            level = CRITICAL
        elif value >= sign * (threshold.warning if self.level < WARNING else threshold.release):
            level = WARNING
        else:
            level = DRIFT if threshold.trend and self._drifts(value, threshold) else CALM
        if level < WARNING:
            self.since = -1
        elif self.since < 0:
            self.since = step
        self.level = level

    def _drifts(self, value: float, threshold: Threshold) -> bool:
        decision, horizon = (DECISION, HORIZON) if self.level < DRIFT else (DECISION / 2, 3 * HORIZON)
        ahead = value + horizon * threshold.smoothing * self.slope(threshold)
        return self.cusum >= decision and ahead >= threshold.sign * threshold.warning
