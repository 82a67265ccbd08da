"""From the readings of the steps to what is wrong: averages, drifts, alerts. Pure functions of readings and state."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from .reading import RUN, LayerReading, Reading
from .thresholds import Threshold
from .track import CALM, CRITICAL, DRIFT, LEVELS, WARNING, Average, Averages, Track

#: Experts with less than this part of the fair share 1/E are dead.
DEAD = 0.1

#: Time constant of the experts' load shares, steps; an expert that is not chosen for ``UNUSED_STEPS`` is never used.
LOAD_STEPS, UNUSED_STEPS = 20, 50

#: What should not be lost, and the metric that says how much of its peak is left; a peak below this is none.
KEPT = {"dispersion_1": "dispersion_kept", "routing_information": "information_kept"}
LEAST_PEAK = 0.03


@dataclass(frozen=True, kw_only=True)
class Alert:
    """A metric that went to another level.

    Attributes:
        step: of the optimizer.
        layer: whose, ``"run"`` for those of the whole run.
        metric: which.
        failure: the failure mode.
        level: ``"drift"``, ``"warning"``, ``"critical"``, or ``"calm"`` again.
        value: the smoothed value.
        line: one line with the numbers that fired it.
    """

    step: int
    layer: str
    metric: str
    failure: str
    level: str
    value: float
    line: str


class LayerSignals:
    """The tracks of one layer, and what they are made of.

    Attributes:
        loads: average share of every expert in the load; empty where choices are not known.
        unused: steps since each expert was last chosen.
        averages: of the mean token entropy (fast, slow), and of what should not be lost.
        peaks: the highest such averages so far.
        tracks: by metric.
    """

    def __init__(self) -> None:
        self.loads = Averages([])
        self.unused: list[int] = []
        self.averages = {name: Average() for name in ("entropy_fast", "entropy_slow", *KEPT)}
        self.peaks = dict.fromkeys(KEPT, LEAST_PEAK)
        self.tracks: dict[str, Track] = {}

    @property
    def load(self) -> tuple[float, ...]:
        """The smoothed load shares."""
        return self.loads.values

    @property
    def dead(self) -> tuple[int, ...]:
        """The experts whose smoothed share is less than a tenth of the fair one."""
        load = self.load
        least = DEAD / max(len(load), 1)
        return tuple([expert for expert, share in enumerate(load) if share < least])

    def values(self, reading: LayerReading) -> dict[str, float]:
        """Return the metrics of the table for one step's reading."""
        found = {name: value for name, value in reading.scalars.items() if math.isfinite(value)}
        if reading.counts and (total := sum(reading.counts)) > 0:
            found |= self._usage(reading.counts, total)
        if "z_loss" in found:
            found["logit_scale"] = math.sqrt(found["z_loss"])
        if "entropy_share" in found:
            found["entropy_slope"] = self._entropy_slope(found["entropy_share"])
        for metric, name in KEPT.items():
            if metric in found:
                self.averages[metric].add(found[metric], 20)
                self.peaks[metric] = max(self.peaks[metric], self.averages[metric].value)
                found[name] = found[metric] / self.peaks[metric]
        return found

    def _usage(self, counts: Sequence[float], total: float) -> dict[str, float]:
        experts = len(counts)
        if len(self.unused) != experts:
            self.loads, self.unused = Averages([[0.0, 0.0]] * experts), [0] * experts
        self.loads.add([count / total for count in counts], LOAD_STEPS)
        self.unused = [0 if count else steps + 1 for count, steps in zip(counts, self.unused, strict=True)]
        never = sum([steps >= UNUSED_STEPS for steps in self.unused])
        return {"dead_fraction": len(self.dead) / experts, "never_used_fraction": never / experts}

    def _entropy_slope(self, entropy: float) -> float:
        fast, slow = self.averages["entropy_fast"], self.averages["entropy_slow"]
        fast.add(entropy, 10)
        slow.add(entropy, 50)
        return fast.value - slow.value


class Signals:
    """Tracks every metric of the table in every layer.

    Args:
        table: the thresholds.
    """

    def __init__(self, table: Sequence[Threshold]) -> None:
        self._table = {row.metric: row for row in table}
        self.layers: dict[str, LayerSignals] = {}
        self._loss = {"level": Average(), "noise": Average()}
        self._first, self._lowest = math.nan, math.inf

    def update(self, reading: Reading) -> list[Alert]:
        """Take in one step's reading; return what went to another level."""
        alerts = []
        for layer_signals, metric in product(self.layers.values(), reading.lost):
            layer_signals.tracks.pop(metric, None)  # an alarm that nobody can call off would be acted on for ever
        for name, layer in reading.layers.items():
            signals = self._layer(name)
            alerts += self._judge(name, signals.values(layer), reading.step)
        return alerts + self._judge(RUN, self._of_run(reading), reading.step)

    def threshold(self, metric: str) -> Threshold:
        """Return the row of a metric."""
        return self._table[metric]

    def severity(self, layer: str, failure: str) -> int:
        """Return the worst level of a failure mode in a layer."""
        tracks = self._of_failure(layer, failure)
        return max((track.level for track in tracks.values()), default=CALM)

    def lasted(self, layer: str, failure: str, step: int) -> int:
        """Return for how many steps a failure mode has been a warning at least, in a layer."""
        since = [track.since for track in self._of_failure(layer, failure).values() if track.since >= 0]
        return step - min(since) + 1 if since else 0

    def badness(self, layer: str, failure: str) -> float:
        """Return how far the worst metric of a failure mode is from its release, in units of release to critical."""
        return max(self._badness(layer, failure), default=(0.0, 0.0))[0]

    def trend(self, layer: str, failure: str) -> float:
        """Return by how much the badness grows a step, if it goes on; 0 where it falls or is not followed."""
        return max(self._badness(layer, failure), default=(0.0, 0.0))[1]

    def _badness(self, layer: str, failure: str) -> list[tuple[float, float]]:
        """Return badness, at least 0, and trend of every metric."""
        found = []
        for metric, track in self._of_failure(layer, failure).items():
            row = self._table[metric]
            width = max(abs(row.critical - row.release), 1e-9)
            if math.isfinite(track.fast.value):
                badness = row.sign * (track.fast.value - row.release) / width
                pace = row.sign * track.pace.value / width if row.trend else 0.0
                found.append((max(0.0, badness), pace if pace > 0 else 0.0))  # NaN, before the second value, is none
        return found

    def worst(self, layer: str, failure: str) -> dict[str, float]:
        """Return the smoothed values of a failure mode's metrics that are at least warnings."""
        tracks = self._of_failure(layer, failure)
        return {metric: track.fast.value for metric, track in tracks.items() if track.level >= WARNING}

    @property
    def calm(self) -> bool:
        """Whether nothing is a warning anywhere."""
        return all(self.calm_in(layer) for layer in self.layers)

    def calm_in(self, layer: str) -> bool:
        """Whether nothing is a warning in a layer."""
        return all(track.level < WARNING for track in self.layers[layer].tracks.values())

    @property
    def loss(self) -> tuple[float, float]:
        """The average loss and its average absolute deviation; NaN where it was not told."""
        return self._loss["level"].value, self._loss["noise"].value

    def state(self) -> dict[str, Any]:
        """Return plain numbers."""
        return {
            "losses": [self._first, self._lowest],
            "loss": {name: [average.total, average.weight] for name, average in self._loss.items()},
            "layers": {name: _layer_state(layer) for name, layer in self.layers.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state()``."""
        self._first, self._lowest = state["losses"]
        self._loss = {name: Average(*pair) for name, pair in state["loss"].items()}
        self.layers = {name: _layer_of(layer, self._table) for name, layer in state["layers"].items()}

    def _layer(self, name: str) -> LayerSignals:
        if name not in self.layers:
            self.layers[name] = LayerSignals()
        return self.layers[name]

    def _of_failure(self, layer: str, failure: str) -> dict[str, Track]:
        if layer not in self.layers:
            return {}
        tracks = self.layers[layer].tracks
        return {metric: track for metric, track in tracks.items() if self._table[metric].failure == failure}

    def _of_run(self, reading: Reading) -> dict[str, float]:
        found = {"non_finite": 1.0 if reading.skipped else 0.0}
        loss, level, noise = reading.loss, self._loss["level"], self._loss["noise"]
        if not math.isfinite(loss):
            return found
        if math.isfinite(noise.value) and noise.value > 0:
            # 1.25 mean absolute deviations are a standard deviation of a normal law.
            found["loss_spike"] = (loss - level.value) / (1.25 * noise.value)
        if math.isfinite(level.value):
            # Clipped, so that a spike does not hide the next one.
            deviation = abs(loss - level.value)
            noise.add(min(deviation, 5 * noise.value) if noise.value > 0 else deviation, 50)
        level.add(loss, 20)
        self._first = loss if math.isnan(self._first) else self._first
        self._lowest = min(self._lowest, level.value)
        progress = self._first - self._lowest
        # Neither the scale of the loss matters to this, nor its zero.
        if progress > 2 * noise.value:
            found["progress_lost"] = (level.value - self._lowest) / progress
        return found

    def _judge(self, layer: str, values: Mapping[str, float], step: int) -> list[Alert]:
        tracks, alerts = self._layer(layer).tracks, []
        for metric, row in self._table.items():
            if metric not in values:
                continue
            if metric not in tracks:
                tracks[metric] = Track.new()
            track = tracks[metric]
            before = track.level
            track.update(values[metric], step, row)
            if track.level != before:
                alerts.append(_alert(step, layer, row, track, before))
        return alerts


def _alert(step: int, layer: str, row: Threshold, track: Track, before: int) -> Alert:
    value, bound = track.fast.value, row.critical if track.level == CRITICAL else row.warning
    name = f"{row.metric} {value:.3g}"
    if track.level == CALM and before == DRIFT:  # which need not be better than where it began
        what = f"{name} no longer drifts towards {bound:g}"
    elif track.level == CALM:
        what = f"{name} is well again (bound {row.warning:g})"
    elif track.level == DRIFT:
        what = (
            f"{name} drifts towards {bound:g}, by {track.slope(row) * row.sign:+.2g} a step (CUSUM {track.cusum:.1f})"
        )
    elif row.sign * value < row.sign * bound:  # from critical, but not yet where a warning ends
        what = f"{name} is no longer critical (bound {row.critical:g}), and well from {row.release:g} on"
    else:
        what = f"{name} is {'above' if row.sign > 0 else 'below'} {bound:g}"
    over = f", average over {row.smoothing} steps" if row.smoothing > 1 else ""
    return Alert(
        step=step,
        layer=layer,
        metric=row.metric,
        failure=row.failure,
        level=LEVELS[track.level],
        value=value,
        line=f"{row.failure}: {layer} {what}{over}",
    )


def _layer_state(layer: LayerSignals) -> dict[str, Any]:
    return {
        "loads": layer.loads.pairs,
        "unused": list(layer.unused),
        "peaks": dict(layer.peaks),
        "averages": {name: [average.total, average.weight] for name, average in layer.averages.items()},
        "tracks": {metric: track.state() for metric, track in layer.tracks.items()},
    }


def _layer_of(state: Mapping[str, Any], known: Collection[str]) -> LayerSignals:
    layer = LayerSignals()
    layer.loads = Averages(state["loads"])
    layer.unused, layer.peaks = list(state["unused"]), dict(state["peaks"])
    layer.averages = {name: Average(*pair) for name, pair in state["averages"].items()}
    tracks = {metric: track for metric, track in state["tracks"].items() if metric in known}  # of a signal that is gone
    layer.tracks = {metric: Track.of_state(track) for metric, track in tracks.items()}
    return layer
