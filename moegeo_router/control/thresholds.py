"""The one table of thresholds: what is watched, what it would mean, and from where on it is said.

Alerts and controller read it, ``ControlConfig(thresholds=...)`` overrides it. Layers of any number of experts share it:
the metrics are over their maxima where these depend on E or k.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

Bad = Literal["high", "low"]

#: The failure modes that alerts name, causes before what mostly follows from them: of equally bad ones the first is
#: acted on first.
FAILURES = (
    "divergence",
    "brittle specialization",
    "routing oscillation",
    "expert collapse",
    "silent capacity loss",
    "inference bottleneck",
)


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """From where on a metric is an alert.

    Attributes:
        metric: of a layer, or of the run.
        failure: the failure mode it is a sign of.
        bad: which side is the bad one.
        warning: from here on a warning.
        critical: from here on critical.
        warmup: steps at the beginning in which it is not judged.
        smoothing: time constant of its average, in steps; 1: the newest value itself.
        trend: whether a drift towards the warning is told before it is reached.
        source: where the numbers come from.

    Raises:
        ValueError: an unknown failure or side, a critical value on the good side of the warning, or a time below 1.
    """

    metric: str
    failure: str
    bad: Bad = "high"
    warning: float
    critical: float
    warmup: int = 50
    smoothing: int = 20
    trend: bool = True
    source: str = ""

    def __post_init__(self) -> None:
        where = f"threshold of {self.metric}"
        if self.failure not in FAILURES:
            raise ValueError(f"{where}: failure must be one of {', '.join(FAILURES)}, got {self.failure!r}")
        if self.bad not in ("high", "low"):
            raise ValueError(f"{where}: bad must be 'high' or 'low', got {self.bad!r}")
        if not self.sign * self.warning <= self.sign * self.critical:
            side = "at least" if self.bad == "high" else "at most"
            raise ValueError(f"{where}: critical must be {side} warning, got {self.critical} and {self.warning}")
        if type(self.warmup) is not int or self.warmup < 0 or type(self.smoothing) is not int or self.smoothing < 1:
            raise ValueError(
                f"{where}: warmup and smoothing must be whole steps, at least 0 and 1, got {self.warmup} and "
                f"{self.smoothing}"
            )

    @cached_property
    def sign(self) -> int:
        """1 where high is bad, -1 where low is."""
        return 1 if self.bad == "high" else -1

    @cached_property
    def release(self) -> float:
        """The value at which a warning ends: a fifth of it on the good side, so that noise does not ring it."""
        return self.warning - self.sign * 0.2 * abs(self.warning)


def _table(*rows: tuple[Any, ...]) -> tuple[Threshold, ...]:
    names = ("metric", "failure", "bad", "warning", "critical", "warmup", "smoothing", "trend", "source")
    return tuple(Threshold(**dict(zip(names, row, strict=True))) for row in rows)


_PILOT = "6 runs of a byte model and of a vision model, 300 steps (docs/log.md): between healthy and collapsing ones"
_CHOSEN = "chosen"
_KEPT = "healthy runs keep 0.75"

THRESHOLDS = _table(
    # metric, failure, bad side, warning, critical, warm-up, smoothing, trend, source
    ("fsi", "expert collapse", "high", 0.25, 0.45, 50, 20, True, _PILOT),
    ("fsi_load", "expert collapse", "high", 0.45, 0.6, 50, 20, True, _PILOT),
    ("fhs", "expert collapse", "high", 1.4, 2.0, 50, 20, True, f"{_PILOT}; FI's abstract has 1 at 10% of training"),
    ("dead_fraction", "silent capacity loss", "high", 0.01, 0.25, 50, 1, False, f"{_CHOSEN}: any expert; a quarter"),
    ("never_used_fraction", "silent capacity loss", "high", 0.01, 0.25, 50, 1, False, f"{_CHOSEN}: as above"),
    ("starved_fraction", "silent capacity loss", "high", 0.3, 0.6, 50, 20, True, _CHOSEN),
    ("max_violation_share", "inference bottleneck", "high", 0.7, 0.85, 50, 20, True, _PILOT),
    ("fsi_velocity", "routing oscillation", "high", 0.6, 0.9, 50, 20, True, f"{_PILOT}; top-1 healthy 0.5"),
    ("flip_rate", "routing oscillation", "high", 0.15, 0.4, 50, 20, True, _CHOSEN),
    ("entropy_share", "brittle specialization", "low", 0.05, 0.01, 20, 20, False, _PILOT),
    ("entropy_slope", "brittle specialization", "low", -0.25, -0.5, 20, 1, False, _PILOT),
    ("dispersion_kept", "brittle specialization", "low", 0.5, 0.25, 50, 20, True, f"{_CHOSEN}; {_KEPT}"),
    ("information_kept", "brittle specialization", "low", 0.5, 0.25, 50, 20, True, f"{_CHOSEN}; {_KEPT}"),
    ("logit_scale", "brittle specialization", "high", 12.0, 20.0, 10, 20, True, f"{_PILOT}: 2.5 and 13 to 60"),
    ("progress_lost", "divergence", "high", 0.1, 0.3, 50, 1, False, f"{_CHOSEN}: of the fall of the loss so far"),
    ("loss_spike", "divergence", "high", 6.0, 12.0, 50, 1, False, f"{_CHOSEN}: in standard deviations"),
    ("non_finite", "divergence", "high", 1e-9, 1e-9, 0, 1, False, "any"),
)


def thresholds_with(changes: Mapping[str, Mapping[str, Any]], more: Iterable[Threshold] = ()) -> tuple[Threshold, ...]:
    """Return the table with changes, and rows of metrics of one's own.

    Args:
        changes: by metric, the fields of ``Threshold`` to set anew.
        more: further rows.

    Raises:
        ValueError: an unknown metric or field, a second row of a metric, or a row that does not fit.
    """
    rows = {row.metric: row for row in THRESHOLDS}
    for row in more:
        if row.metric in rows:
            raise ValueError(f"thresholds: there is a row for {row.metric!r} already; change it by name")
        rows[row.metric] = row
    known = {field.name for field in fields(Threshold)} - {"metric"}
    for metric, change in changes.items():
        if metric not in rows:
            raise ValueError(f"thresholds: no metric {metric!r}; there are {', '.join(rows)}")
        if unknown := set(change) - known:
            raise ValueError(f"threshold of {metric}: no field {', '.join(sorted(unknown))}; there are {sorted(known)}")
        rows[metric] = replace(rows[metric], **change)
    return tuple(rows.values())
