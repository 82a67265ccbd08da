"""The controller: readings in, events, orders and weights out. No tensors, no model: what it does can be replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from .config import ControlConfig, Mode
from .plant import Order
from .policy import Decision, Policy
from .reading import LayerReading, Reading
from .setpoints import SetPointControl
from .signals import Alert, LayerSignals, Signals
from .track import CRITICAL


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something a person should hear of.

    Attributes:
        kind: ``"alert"``, ``"action"``, ``"outcome"``, or once ``"notice"``: what cannot be done in this run.
        level: ``"info"``, ``"warning"`` or ``"error"``.
        step: of the optimizer.
        layer: whose.
        title: in a few words.
        line: in one line, with the numbers.
        detail: all of it, as JSON can hold it.
    """

    kind: str
    level: Literal["info", "warning", "error"]
    step: int
    layer: str
    title: str
    line: str
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fields(self) -> dict[str, Any]:
        """What a log has of it beside title, line and level, whose names are taken there."""
        own = {("severity" if name == "level" else name): value for name, value in self.detail.items()}
        own = {name: value for name, value in own.items() if name not in ("step", "line")}
        return own | {"optimizer_step": self.step, "layer": self.layer}


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one reading leads to.

    Attributes:
        events: alerts, and what was decided.
        orders: what is to be applied or taken back now: decisions, each with an order for every layer it is for.
        weights: of the set-points, by layer and what they move; empty unless the controller acts.
    """

    events: Sequence[Event] = ()
    orders: Sequence[tuple[Decision, Sequence[Order]]] = ()
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Controller:
    """Signals, set-points and policy, step after step; see ``ControlConfig``.

    Args:
        config: thresholds, set-points, ladders, budgets.
        mode: ``"observe"``: alerts only; ``"advise"``: also what it would do; ``"act"``.
        available: the interventions that can be applied, by layer.
    """

    def __init__(self, config: ControlConfig, mode: Mode, available: Mapping[str, Sequence[str]]) -> None:
        self.config, self.mode, self._available = config, mode, available
        self.signals = Signals(config.table())
        self.policy = Policy(config, available)
        self._setpoints = SetPointControl(config.setpoints)
        self._held = dict.fromkeys(point.metric for point in config.setpoints)

    def update(self, reading: Reading) -> Turn:
        """Take in one step's reading."""
        alerts = self.signals.update(reading)
        events = [_alert_event(alert) for alert in alerts]
        if self.mode == "observe":
            return Turn(events=events)
        decisions = self.policy.decide(reading.step, self.signals)
        events += [_decision_event(decision, taken=self.mode == "act") for decision in decisions]
        if self.mode == "advise":
            return Turn(events=events)
        orders = [(decision, self._orders(decision, reading)) for decision in decisions if decision.name]
        return Turn(events=events, orders=orders, weights=self._weights(reading))

    def allow(self, available: Mapping[str, Sequence[str]]) -> None:
        """Say anew which interventions can be applied, by layer."""
        self._available = available
        self.policy.allow(available)

    def refuse(self, decision: Decision, reason: str) -> Event:
        """Take note that an order could not be carried out."""
        self.policy.refuse(decision, reason)
        return Event(
            kind="outcome",
            level="warning",
            step=decision.step,
            layer=decision.layer,
            title=f"{decision.name} was not done",
            line=f"{decision.name} in {decision.layer} was not done: {reason}",
            detail=asdict(decision) | {"reason": reason},
        )

    def state(self) -> dict[str, Any]:
        """Return plain numbers and words, from which ``load`` goes on with the same decisions."""
        parts = {"signals": self.signals, "policy": self.policy, "setpoints": self._setpoints}
        return {name: part.state() for name, part in parts.items()}  # type: ignore[attr-defined]

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state()``."""
        self.signals.load(state["signals"])
        self.policy.load(state["policy"])
        self._setpoints.load(state["setpoints"])

    def _orders(self, decision: Decision, reading: Reading) -> list[Order]:
        """Return the order for a layer or, against a failure of the whole run, for all where it can be applied."""
        if decision.layer in self._available:
            return [self._order(decision, decision.layer, reading)]
        layers = [name for name, names in self._available.items() if decision.name in names]
        return [self._order(decision, name, reading) for name in layers]

    def _order(self, decision: Decision, name: str, reading: Reading) -> Order:
        layer = self.signals.layers.get(name, LayerSignals())
        return Order(
            step=decision.step,
            layer=name,
            failure=decision.failure,
            strength=decision.strength,
            critical=self.signals.severity(decision.layer, decision.failure) == CRITICAL,
            load=layer.load,
            values={metric: track.fast.value for metric, track in layer.tracks.items()},
            dead=layer.dead,
            k=max(1, reading.layers.get(name, LayerReading(scalars={})).k),
        )

    def _weights(self, reading: Reading) -> dict[str, dict[str, float]]:
        weights = {}
        for name in reading.layers:
            tracks = self.signals.layers[name].tracks
            # A metric that is not judged yet is not held, either.
            values = {
                metric: tracks[metric].fast.value
                for metric in self._held
                if metric in tracks and reading.step > self.signals.threshold(metric).warmup
            }
            weights[name] = self._setpoints.update(name, values)
        return weights


def _alert_event(alert: Alert) -> Event:
    level: Literal["info", "warning", "error"] = "info"
    if alert.level in ("warning", "critical"):
        level = "warning" if alert.level == "warning" else "error"
    title = f"{alert.failure}: {alert.level}" if alert.level != "calm" else f"{alert.failure}: over"
    return Event(
        kind="alert",
        level=level,
        step=alert.step,
        layer=alert.layer,
        title=f"{title} ({alert.layer})",
        line=alert.line,
        detail={name: value for name, value in asdict(alert).items() if name != "line"},
    )


def _decision_event(decision: Decision, taken: bool) -> Event:
    kind = "action" if decision.kind in ("apply", "undo", "release") else "outcome"
    line = decision.line if taken or kind == "outcome" else f"advice: {decision.line}"
    return Event(
        kind=kind,
        level="error" if decision.kind == "give up" else "info" if decision.kind == "keep" else "warning",
        step=decision.step,
        layer=decision.layer,
        title=f"{decision.kind} {decision.name or decision.failure} ({decision.layer})",
        line=line,
        detail=asdict(decision) | {"taken": taken},
    )
