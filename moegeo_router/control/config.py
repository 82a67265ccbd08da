"""How the loop is closed: a frozen dataclass, every number of it with its unit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from ..checks import check_choice, check_not_negative, check_whole
from .thresholds import FAILURES, Threshold, thresholds_with

Mode = Literal["observe", "advise", "act"]
Moves = Literal["balance", "fsi", "dispersion", "information", "speed"]
Scope = Literal["routers", "everything"]

#: From the gentlest to the strongest, by failure mode.
LADDERS: Mapping[str, tuple[str, ...]] = {
    "expert collapse": ("regularizers", "prior", "speed", "router_lr", "revive", "rollback"),
    "silent capacity loss": ("regularizers", "prior", "revive"),
    "routing oscillation": ("speed", "router_lr", "rollback"),
    "brittle specialization": ("temperature", "speed", "router_lr", "rollback"),
    "inference bottleneck": ("regularizers", "prior"),
    "divergence": ("speed", "router_lr", "rollback"),
}


@dataclass(frozen=True, kw_only=True)
class SetPoint:
    """A metric that is held on one side of a target by moving a weight of the regularizers, or the speed limit.

    Dual ascent with a proportional part: with e the violation (positive on the wrong side of the target), the integral
    grows by ``gain · e`` a step and shrinks by as much on the right side, down to 0; the weight is
    ``proportional · max(e, 0)`` plus the integral, in ``[0, most]``, and moves by at most ``rate`` a step. While it is
    at its bound the integral does not grow (anti-windup).

    Attributes:
        metric: of a layer; its smoothed value counts.
        at_most: its target from above; or
        at_least: from below.
        moves: a weight of ``Regularizers``, or ``"speed"``: the speed limit is divided by ``exp`` of the "weight".
        gain: of the integral, a step.
        proportional: the proportional part.
        most: the largest weight.
        rate: the largest change a step.

    Raises:
        ValueError: not exactly one target, an unknown weight, or numbers out of range.
    """

    metric: str
    at_most: float | None = None
    at_least: float | None = None
    moves: Moves = "balance"
    gain: float = 0.0005
    proportional: float = 0.02
    most: float = 0.01
    rate: float = 0.0005

    def __post_init__(self) -> None:
        where = f"set-point of {self.metric}"
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(f"{where}: give at_most or at_least, got {self.at_most} and {self.at_least}")
        if self.moves not in get_args(Moves):
            raise ValueError(f"{where}: moves must be one of {', '.join(get_args(Moves))}, got {self.moves!r}")
        for name, least in (("gain", 0.0), ("proportional", 0.0), ("most", None), ("rate", None)):
            value = getattr(self, name)
            if not (value >= 0 if least is not None else value > 0) or not value < math.inf:
                raise ValueError(
                    f"{where}: {name} must be {'at least' if least is not None else 'above'} 0, got {value}"
                )

    def violation(self, value: float) -> float:
        """Return how far a value is on the wrong side of the target; negative on the right one."""
        return value - self.at_most if self.at_most is not None else (self.at_least or 0.0) - value


SETPOINTS = (
    # As late as the table's warning, so that what is well is left alone.
    SetPoint(metric="fsi_load", at_most=0.45, moves="balance"),
    SetPoint(metric="flip_rate", at_most=0.12, moves="speed", gain=0.05, proportional=1.0, most=2.0, rate=0.1),
)


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """What the controller watches for and what it may do.

    Attributes:
        thresholds: changes to the table, by metric: ``{"fhs": {"warning": 1.5}}``.
        more_thresholds: rows of further metrics; those of ``GeometryConfig(signals=...)`` join them by themselves.
        setpoints: what is held by the continuous control; no two move the same weight.
        ladders: changes to the ladders, by failure mode; an empty one: alerts only.
        every: the controller reads every so many steps.
        patience: steps a warning must last before something is done; a critical level waits a quarter of it.
        settle: steps after which an intervention is judged.
        least_gain: an intervention has helped if the signal is better by this share of the way from its release to
            its critical value.
        loss_margin: and if the loss is not above its forecast by more than this many of its average deviations.
        layer_budget: interventions in one layer.
        run_budget: interventions in one run.
        release_after: steps without any warning after which what was done is taken back, where it can be.
        snapshot_every: healthy steps between two snapshots for the rollback; 0: none.
        snapshots: how many are kept.
        snapshot_scope: ``"routers"`` or ``"everything"`` (model and optimizer: as much memory for each).
        guard: a step with a gradient that is not finite is not taken.

    Raises:
        ValueError: unknown names, numbers out of range, or set-points that contradict each other. The names of metrics
            are checked where all are known, by ``table()``, which ``GeometryConfig`` calls.
    """

    thresholds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    more_thresholds: tuple[Threshold, ...] = ()
    setpoints: tuple[SetPoint, ...] = SETPOINTS
    ladders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    every: int = 1
    patience: int = 40
    settle: int = 25
    least_gain: float = 0.1
    loss_margin: float = 1.0
    layer_budget: int = 8
    run_budget: int = 40
    release_after: int = 200
    snapshot_every: int = 50
    snapshots: int = 2
    snapshot_scope: Scope = "routers"
    guard: bool = True

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            check_whole(f"control.{name}", getattr(self, name), least)
        for name in ("least_gain", "loss_margin"):
            check_not_negative(f"control.{name}", getattr(self, name))
        check_choice("control.snapshot_scope", self.snapshot_scope, get_args(Scope))
        if unknown := set(self.ladders) - set(FAILURES):
            raise ValueError(f"control.ladders: no failure {sorted(unknown)}; there are {', '.join(FAILURES)}")
        _check_setpoints(self.setpoints)

    def table(self) -> tuple[Threshold, ...]:
        """Return the thresholds in force.

        Raises:
            ValueError: a threshold or a set-point of a metric that is not in the table, or two rows of one.
        """
        rows = thresholds_with(self.thresholds, self.more_thresholds)
        known = sorted(row.metric for row in rows)
        if unknown := [point.metric for point in self.setpoints if point.metric not in known]:
            raise ValueError(f"control.setpoints: no metric {unknown[0]!r} in the table; there are {known}")
        return rows

    def ladder(self, failure: str) -> tuple[str, ...]:
        """Return the interventions against a failure mode, the gentlest first."""
        return tuple(self.ladders.get(failure, LADDERS[failure]))

    def to_fields(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)

    @classmethod
    def of_fields(cls, given: Mapping[str, Any]) -> ControlConfig:
        """Return the configuration that ``to_fields`` was called on; keys that are missing keep their defaults.

        Raises:
            ValueError: an unknown key, here or in a row, or one that a row lacks.
        """
        values = dict(given)
        if unknown := set(values) - set(cls.__dataclass_fields__):
            raise ValueError(
                f"control has no {', '.join(sorted(unknown))}; there are {sorted(cls.__dataclass_fields__)}"
            )
        for name, kind in (("setpoints", SetPoint), ("more_thresholds", Threshold)):
            if name in values:
                values[name] = tuple(_row(kind, f"control.{name}", row) for row in values[name])
        if "ladders" in values:
            values["ladders"] = {failure: tuple(ladder) for failure, ladder in values["ladders"].items()}
        return cls(**values)


_LEAST = {
    "every": 1,
    "patience": 0,
    "settle": 1,
    "layer_budget": 0,
    "run_budget": 0,
    "release_after": 1,
    "snapshot_every": 0,
    "snapshots": 1,
}


def _row(kind: type[SetPoint | Threshold], where: str, row: Mapping[str, Any]) -> SetPoint | Threshold:
    known = {one.name: one.default is MISSING for one in fields(kind)}
    if unknown := sorted(set(row) - set(known)):
        raise ValueError(f"{where}: no field {', '.join(unknown)}; there are {', '.join(known)}")
    if missing := sorted(name for name, needed in known.items() if needed and name not in row):
        raise ValueError(f"{where}: {row} lacks {', '.join(missing)}")
    return kind(**row)


def _check_setpoints(setpoints: tuple[SetPoint, ...]) -> None:
    moved: dict[str, SetPoint] = {}
    held: dict[str, SetPoint] = {}
    for point in setpoints:
        if point.moves in moved:
            names = f"{moved[point.moves].metric} and {point.metric}"
            raise ValueError(f"control.setpoints contradict each other: {names} both move {point.moves!r}")
        moved[point.moves] = point
        other = held.setdefault(point.metric, point)
        low, high = point.at_least or other.at_least, point.at_most or other.at_most
        if other is not point and low is not None and high is not None and low > high:
            raise ValueError(
                f"control.setpoints contradict each other: {point.metric} at least {low} and at most {high}"
            )
