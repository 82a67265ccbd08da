"""Signals of one's own: what one is, what it sees, and how it is asked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..observe.statistics import LayerStatistics, RoutingStatistics, world_size
from .reading import LayerReading
from .thresholds import Threshold

if TYPE_CHECKING:
    from .config import ControlConfig
    from .plant import Plant

#: By layer, the numbers of a signal.
Found = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class LayerStep:
    """What a signal sees: one layer in one optimizer step.

    Attributes:
        step: of the optimizer, from 1.
        layer: its name.
        sums: over the tokens of the step, of all micro-batches and ranks, on the host.
        before: those of the step before; None where there is none.
        scalars: the layer's other metrics of the step.
        k: experts chosen per token; 0 where that is not known.
        plant: the model, ``plant.sites[layer].weight`` … as they are now, after the step. On an accelerator the sums
            arrive a step late, and this is one step further; reading it waits for the device.
    """

    step: int
    layer: str
    sums: LayerStatistics
    before: LayerStatistics | None
    scalars: Mapping[str, float]
    k: int
    plant: Plant


class Signal:
    """Metrics of one's own, which the controller watches like those of its table. Subclass it.

    Their rows join the table, so that alerts, set-points, ladders and ``Geometry.metrics()`` know them; their values
    are in the log, from which the decisions can be replayed without the class. A signal that fails is off from then on,
    which is said once, and the training goes on (``GeometryConfig(on_error="raise")``: it does not).

    Attributes:
        name: what messages and the saved state call it; by default as its class.
        thresholds: a row for each of its metrics.
    """

    name: str
    thresholds: tuple[Threshold, ...]

    def values(self, seen: LayerStep) -> Mapping[str, float]:
        """Return the metrics of one layer in one step, numbers or tensors of one element, without gradients.

        Called whenever the controller reads (``ControlConfig.every``), on every rank; of several ranks, the numbers of
        the first count. It changes nothing, neither the model nor the random numbers. A metric that is not known now is
        left out, or not finite: the last value stands.
        """
        raise NotImplementedError

    def state(self) -> Mapping[str, Any]:
        """Return what a resumed run needs to go on alike: plain tensors, numbers, texts, lists and dicts of them."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state()``."""


def with_rows(control: ControlConfig, signals: Sequence[Signal]) -> ControlConfig:
    """Return the configuration with the rows of signals in its table.

    Raises:
        ValueError: something that is no signal, one without rows, two of one name, a metric that the table has already,
            or one whose name does not fit between the slashes of ``geometry/layer0/name``.
    """
    if not isinstance(signals, tuple | list) or not all(isinstance(signal, Signal) for signal in signals):
        raise ValueError(f"signals: expected a tuple of instances of Signal, got {signals!r:.80}")
    for signal in signals:
        rows = getattr(signal, "thresholds", ())
        if not isinstance(rows, tuple | list) or not rows or not all(isinstance(row, Threshold) for row in rows):
            raise ValueError(f"signal {_name(signal)}: thresholds must be a Threshold for each of its metrics")
        if bad := [row.metric for row in rows if not row.metric.isidentifier()]:
            raise ValueError(f"signal {_name(signal)}: metrics are called by letters, digits and '_', got {bad[0]!r}")
    names = [_name(signal) for signal in signals]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"signals: there are two called {sorted(twice)[0]!r}")
    rows_of_signals = [row for signal in signals for row in signal.thresholds]
    return replace(control, more_thresholds=(*control.more_thresholds, *rows_of_signals))


class OwnSignals:
    """Asks signals step after step, and does without those that fail.

    Args:
        signals: see ``Signal``.
        plant: is shown to them.
        strict: whether an error is raised.

    Attributes:
        newest: the newest numbers, by layer.
    """

    def __init__(self, signals: Sequence[Signal], plant: Plant, strict: bool) -> None:
        self._signals = {_name(signal): signal for signal in signals}
        self._plant, self._strict = plant, strict
        self._off: dict[str, str] = {}
        self.newest: Found = {}

    def read(
        self,
        step: int,
        layers: Mapping[str, LayerReading],
        reduced: RoutingStatistics,
        before: RoutingStatistics | None,
    ) -> tuple[dict[str, LayerReading], tuple[str, ...]]:
        """Ask for the numbers of a step. On every rank.

        Args:
            step: of the optimizer.
            layers: what else is read of it.
            reduced: its sums, on the host.
            before: those of the step before.

        Returns:
            The readings with the numbers, and the metrics that are lost from now on.

        Raises:
            RuntimeError: a signal failed, and it is strict.
        """
        if len(self._off) == len(self._signals):
            return dict(layers), ()
        seen = [self._seen(step, layer, reading, reduced, before) for layer, reading in layers.items()]
        numbers, errors = self._asked(seen)
        for name, why in errors.items():
            self._turn_off(name, why)
        self.newest = {}
        for found in (found for name, found in numbers.items() if name not in errors):
            for layer, values in found.items():
                self.newest.setdefault(layer, {}).update(values)
        more = {name: replace(r, scalars={**r.scalars, **self.newest.get(name, {})}) for name, r in layers.items()}
        return more, tuple(row.metric for name in errors for row in self._signals[name].thresholds)

    def state(self) -> dict[str, Any]:
        """Return plain tensors, numbers and words."""
        states = {name: dict(signal.state()) for name, signal in self._signals.items() if name not in self._off}
        return {"states": states, "off": dict(self._off), "newest": {n: dict(v) for n, v in self.newest.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state()``; what was off stays off, so that the decisions are those of the unbroken run."""
        self._off = {name: why for name, why in state["off"].items() if name in self._signals}
        for name, why in self._off.items():
            warnings.warn(f"signal {name} stays off, as in the run that goes on: {why}", stacklevel=2)
        self.newest = {layer: dict(values) for layer, values in state["newest"].items()}
        for name, saved in state["states"].items():
            if name in self._signals:
                self._signals[name].load(saved)

    def _seen(
        self,
        step: int,
        layer: str,
        reading: LayerReading,
        reduced: RoutingStatistics,
        before: RoutingStatistics | None,
    ) -> LayerStep:
        return LayerStep(
            step=step,
            layer=layer,
            sums=reduced.layers[layer],
            before=None if before is None else before.layers.get(layer),
            scalars=reading.scalars,
            k=reading.k,
            plant=self._plant,
        )

    def _asked(self, seen: Sequence[LayerStep]) -> tuple[dict[str, Found], dict[str, str]]:
        """Return what the signals say, by their names, and what went wrong: the same on every rank."""
        numbers, causes = dict[str, Found](), dict[str, Exception]()
        for name, signal in self._signals.items():
            if name in self._off:
                continue
            try:
                with torch.no_grad():
                    numbers[name] = {one.layer: _checked(signal, signal.values(one), one.scalars) for one in seen}
            except Exception as cause:
                causes[name] = cause
        errors = {name: f"{type(cause).__name__}: {cause}" for name, cause in causes.items()}
        if (ranks := world_size(self._plant.group)) > 1:
            said: list[Any] = [None] * ranks
            dist.all_gather_object(said, (numbers, errors), group=self._plant.group)
            numbers, errors = said[0][0], {name: why for _, failed in said for name, why in failed.items()}
        if self._strict and errors:  # only now: a rank that left before would be waited for
            name, why = next(iter(errors.items()))
            raise RuntimeError(f"signal {name} failed: {why}") from causes.get(name)
        return numbers, errors

    def _turn_off(self, name: str, why: str) -> None:
        self._off[name] = why
        hint = "GeometryConfig(on_error='raise') shows where"
        warnings.warn(f"signal {name} failed and is off, training goes on: {why} ({hint})", stacklevel=2)


def _name(signal: Signal) -> str:
    return str(getattr(signal, "name", type(signal).__name__))


def _checked(signal: Signal, values: Mapping[str, float], taken: Mapping[str, float]) -> dict[str, float]:
    """Return the numbers that are finite.

    Raises:
        ValueError: metrics without a row, or that the layer has already; or what is no number.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"values() must return numbers by metric, got {values!r:.80}")
    own = [row.metric for row in signal.thresholds]
    found: dict[str, float] = {}
    for metric, value in values.items():
        if metric not in own:
            raise ValueError(f"metric {metric!r} has no row in its thresholds; there are {', '.join(own)}")
        if metric in taken:
            raise ValueError(f"a layer has a metric {metric!r} already: take another name")
        if not (isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)):
            raise ValueError(f"metric {metric!r} must be a number, got {value!r:.80}")
        if math.isfinite(number := float(value)):
            found[metric] = number
    return found
