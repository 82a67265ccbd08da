"""The loop itself: readings to the controller, its orders to the interventions, all of it to the log."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..observe.forward import LayerForward
from ..observe.statistics import RoutingStatistics, world_size
from ..observe.window import Window
from .config import ControlConfig, Mode
from .controller import Controller, Event
from .own_signals import OwnSignals
from .plant import Intervention, Order, Plant
from .policy import Decision
from .reading import RUN, LayerReading, Reading
from .rollback import Snapshots

if TYPE_CHECKING:
    from ..loggers import Logger

#: Readings and events that nobody asks for are kept up to this many.
KEEP = 1000

ScalarsOf = Callable[[RoutingStatistics, RoutingStatistics | None, Mapping[str, Tensor]], dict[str, dict[str, float]]]

_LOG = logging.getLogger("moegeo_router")


@dataclass
class Standing:
    """An intervention in force.

    Attributes:
        layer: in which.
        cause: the layer it was decided for: that one, or the whole run.
        failure: against what.
        name: the intervention's.
        memory: what undoing it needs.
        released: whether it is on its way back, of which no decision follows.
    """

    layer: str
    cause: str
    failure: str
    name: str
    memory: Mapping[str, Any]
    released: bool = False


class ControlLoop:
    """Runs a ``Controller`` beside a training.

    Args:
        config: of the control.
        mode: see ``Controller``.
        plant: what it can move.
        interventions: that it knows.
        snapshots: are taken of healthy states, while it acts.
        own: the signals of one's own.

    Attributes:
        scalars: of the layers in the newest step, where that needs no waiting.
        own: as given.
    """

    def __init__(
        self,
        config: ControlConfig,
        mode: Mode,
        plant: Plant,
        interventions: Sequence[Intervention],
        snapshots: Snapshots,
        own: OwnSignals,
    ) -> None:
        self._plant, self._snapshots, self.own = plant, snapshots, own
        self._warm = max(row.warmup for row in config.table())
        self._known = {intervention.name: intervention for intervention in interventions}
        self.available, self.reasons = _availability(plant, interventions)
        self.controller = Controller(config, mode, self.available)
        self.step, self._looking = 0, {one.name for one in interventions if one.looks}
        self.scalars: dict[str, dict[str, float]] | None = None
        self._standing: list[Standing] = []
        self._events: deque[Event] = deque(maxlen=KEEP)
        self._readings: deque[Reading] = deque(maxlen=KEEP)
        self._said = self._heard = False
        self._losses: list[Tensor] = []

    @property
    def acts(self) -> bool:
        """Whether it does anything but watch."""
        return self.controller.mode == "act"

    def record_loss(self, loss: Tensor) -> None:
        """Take in the loss of a micro-batch."""
        self._losses.append(loss.detach())

    def end_step(
        self,
        window: Window,
        reduced: RoutingStatistics,
        numbers: Mapping[str, Tensor],
        skipped: bool,
        scalars: ScalarsOf,
    ) -> dict[str, Tensor]:
        """Hand a step to the controller: this one, or on an accelerator the one before, which has arrived by now.

        Args:
            window: holds the steps before, their numbers as here with what this returned.
            reduced: the sums of the step.
            numbers: others of it.
            skipped: whether it was not taken.
            scalars: makes those of the layers, of the sums of a step, those of the step before, and its numbers.

        Returns:
            What the next call on an accelerator needs.
        """
        device = reduced.failures.device
        own = {"loss": self._loss_sums(device), "skipped": torch.full((1,), float(skipped), device=device)}
        self._go_on()
        if device.type != "cuda":
            newest = window.newest(wait=False)
            before = None if newest is None else newest[0]
            self.scalars = scalars(reduced, before, numbers)
            self._turn(reduced, before, self.scalars, own)
        elif (newest := window.newest(wait=True)) is not None:
            before = window.previous
            self._turn(newest[0], before, scalars(newest[0], before, newest[1]), newest[1])
        return own

    def _loss_sums(self, device: torch.device) -> Tensor:
        """Return sum and number of the losses since the last call, over all ranks, (2,) on ``device``."""
        losses, self._losses = self._losses, []
        empty = torch.zeros(0, dtype=torch.float64, device=device)
        values = torch.cat([empty, *(loss.reshape(1).to(empty) for loss in losses)])
        sums = torch.stack([values, torch.ones_like(values)]).sum(dim=-1)
        if world_size(self._plant.group) > 1:
            dist.all_reduce(sums, group=self._plant.group)
        return sums

    def _go_on(self) -> None:
        """Go on with what stands, after every step."""
        if self._plant.damper is not None:
            self._plant.damper.finish()
        for standing in self._standing:
            memory = self._known[standing.name].advance(self._plant, standing.layer, standing.memory)
            self._set_memory(standing, memory)

    def limit_speed(self, limits: Mapping[str, float | None]) -> None:
        """Go on from the speed limits that the user has set; what brakes multiplies them."""
        self._plant.limit_speed(limits)

    def remove(self) -> None:
        """Take the hooks off."""
        for probe in self._plant.probes.values():
            probe.off()
        if self._plant.damper is not None:
            self._plant.damper.remove()

    def _turn(
        self,
        reduced: RoutingStatistics,
        before: RoutingStatistics | None,
        scalars: Mapping[str, Mapping[str, float]],
        numbers: Mapping[str, Tensor],
    ) -> None:
        """Take in what the next step came to, and do what the controller says.

        Args:
            reduced: its sums, on the host.
            before: those of the step before.
            scalars: its scalars by layer.
            numbers: ``loss``, sum and number of its losses, and ``skipped``, whether it was not taken; on the host.
        """
        self.step += 1
        if self.step == 1:
            self._survey()
        if self.step % self.controller.config.every:
            return
        total, count = numbers["loss"].tolist()
        layers = {name: _reading(scalars[name], reduced, name) for name in scalars}
        layers, lost = self.own.read(self.step, layers, reduced, before)
        reading = Reading(
            step=self.step,
            loss=total / count if count else math.nan,
            skipped=bool(numbers["skipped"]),
            layers=layers,
            lost=lost,
        )
        self._readings.append(reading)
        turn = self.controller.update(reading)
        details: dict[tuple[str, str], dict[str, Any]] = {}
        refusals: list[Event] = []
        for decision, orders in turn.orders:
            if decision.kind == "apply":
                details[decision.layer, decision.name], refused = self._apply(decision, orders)
                refusals += refused
            elif decision.kind in ("undo", "release"):
                self._undo(decision)
        for event in turn.events:
            applied = event.detail.get("kind") == "apply"
            done = details.get((event.layer, str(event.detail.get("name")))) if applied else None
            self._tell(event if done is None else replace(event, detail={**event.detail, "done": done}))
        for event in refusals:
            self._tell(event)
        if turn.weights:
            self._move(turn.weights)
        self._look()
        self._keep(reading)

    def observe(self, seen: LayerForward) -> None:
        """Show a training forward of a layer to those who look."""
        if (probe := self._plant.probes.get(seen.layer)) is not None:
            probe.see(seen)

    def events(self) -> list[Event]:
        """Return the events since the last call."""
        self._heard = True
        events = list(self._events)
        self._events.clear()
        return events

    def log(self, logger: Logger, step: int) -> list[Event]:
        """Write readings and events since the last call; return the events."""
        if not self._said and self.step:  # on an accelerator the first turn, which surveys, comes a step later
            self._said = True
            controller = self.controller
            fields = {
                "mode": controller.mode,
                "config": controller.config.to_fields(),
                "available": {layer: list(names) for layer, names in self.available.items()},
                "reasons": {layer: dict(reasons) for layer, reasons in self.reasons.items()},
            }
            logger.record("controller", fields, step)
        while self._readings:
            logger.record("reading", self._readings.popleft().to_fields(), step)
        events = self.events()
        for event in events:
            logger.alert(event.kind, event.title, event.line, event.level, event.fields, step)
        return events

    def state(self) -> dict[str, Any]:
        """Return plain tensors, numbers and words."""
        return {
            "step": self.step,
            "said": self._said,
            "available": {layer: list(names) for layer, names in self.available.items()},
            "controller": self.controller.state(),
            "added": self._plant.regularization.added(),
            "brakes": self._plant.brakes(),
            "snapshots": self._snapshots.state(),
            "signals": self.own.state(),
            "standing": [asdict(standing) for standing in self._standing],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state()``: with the decisions of the unbroken run.

        Raises:
            ValueError: an intervention is in force that this run does not know.
        """
        if unknown := {standing["name"] for standing in state["standing"]} - set(self._known):
            raise ValueError(f"geometry's state has interventions in force that are not given: {sorted(unknown)}")
        self._said = state["said"]
        self.available = {
            layer: tuple(name for name in names if name in self._known) for layer, names in state["available"].items()
        }
        self.controller.allow(self.available)
        self.step, self.scalars = state["step"], None
        self.controller.load(state["controller"])
        self._plant.set_brakes(state["brakes"])
        for layer, owners in state["added"].items():
            for owner, weights in owners.items():
                self._plant.regularization.add_weights(layer, owner, weights)
        self._snapshots.load(state["snapshots"])
        if "signals" in state:  # not in those from before there were some
            self.own.load(state["signals"])
        self._standing = [Standing(**standing) for standing in state["standing"]]
        self._look()

    def _undo(self, decision: Decision) -> None:
        """Take back the newest of its kind, in every layer; each goes back to what it found."""
        newest = {standing.layer: standing for standing in self._standing if _is_of(standing, decision)}
        for standing in newest.values():
            intervention, memory = self._known[standing.name], None
            standing.released = True
            if decision.kind == "release":
                memory = intervention.release(self._plant, standing.layer, standing.memory)
            else:
                intervention.undo(self._plant, standing.layer, standing.memory)
            self._set_memory(standing, memory)

    def _survey(self) -> None:
        """Look again at what can be done, when optimizers have made their moments, and say once what cannot."""
        self.available, self.reasons = _availability(self._plant, list(self._known.values()))
        self.controller.allow(self.available)
        if self.controller.mode != "observe" and (notice := self._notice()) is not None:
            self._tell(notice)

    def _notice(self) -> Event | None:
        missing: dict[str, list[str]] = {}
        for reasons in self.reasons.values():
            for name, reason in reasons.items():
                missing.setdefault(name, []).append(reason)
        if not missing:
            return None
        layers = len(self.available)
        lines = [f"{name} in {len(why)} of {layers} layers ({why[0]})" for name, why in missing.items()]
        line = f"the controller does without {'; '.join(lines)}"
        return Event(
            kind="notice", level="info", step=self.step, layer=RUN, title="what the controller cannot do", line=line
        )

    def _set_memory(self, standing: Standing, memory: Mapping[str, Any] | None) -> None:
        if memory is None:
            self._standing = [other for other in self._standing if other is not standing]
        else:
            standing.memory = memory

    def _apply(self, decision: Decision, orders: Sequence[Order]) -> tuple[dict[str, Any], list[Event]]:
        """Carry out orders; return what was done, by layer, and an event where nothing could be."""
        intervention, done, reasons = self._known[decision.name], dict[str, Any](), []
        for order in orders:
            applied = intervention.apply(self._plant, order)
            if not applied.done:
                reasons.append(str(applied.detail.get("reason", "nothing to do")))
                continue
            done[order.layer] = dict(applied.detail)
            self._standing.append(
                Standing(order.layer, decision.layer, decision.failure, decision.name, applied.memory)
            )
        return done, [] if done else [self.controller.refuse(decision, reasons[0] if reasons else "no layer allows it")]

    def _keep(self, reading: Reading) -> None:
        """Take a snapshot of a healthy state, now and then."""
        every = self.controller.config.snapshot_every
        due = self.acts and every and self.step % every == 0 and self.step > self._warm
        if due and self.controller.signals.calm and not reading.skipped:
            self._snapshots.take(self.step)

    def _look(self) -> None:
        """Look at the tokens of layers in which an intervention may soon want to see them."""
        for layer, probe in self._plant.probes.items():
            signals = self.controller.signals.layers.get(layer)
            wanted = signals is not None and signals.dead and self._looking.intersection(self.available[layer])
            (probe.on if wanted else probe.off)()

    def _move(self, weights: Mapping[str, Mapping[str, float]]) -> None:
        for layer, moved in weights.items():
            speed = moved.get("speed", 0.0)
            if math.exp(-speed) != self._plant.speed_of(layer, "set-point"):
                self._plant.set_speed(layer, "set-point", math.exp(-speed))
            regularizers = {name: weight for name, weight in moved.items() if name != "speed" and weight}
            self._plant.regularization.add_weights(layer, "set-point", regularizers)

    def _tell(self, event: Event) -> None:
        self._events.append(event)
        # Who takes the events shows them; to others they are told.
        if not self._heard and (not dist.is_initialized() or dist.get_rank() == 0):
            tell(event)


def tell(event: Event) -> None:
    """Tell Python's logger ``moegeo_router`` what happened, unless it is for information only."""
    if event.level != "info":
        _LOG.log(logging.WARNING if event.level == "warning" else logging.ERROR, "step %d: %s", event.step, event.line)


def _is_of(standing: Standing, decision: Decision) -> bool:
    same = (standing.cause, standing.failure, standing.name) == (decision.layer, decision.failure, decision.name)
    return same and not standing.released


def _availability(
    plant: Plant, interventions: Sequence[Intervention]
) -> tuple[dict[str, tuple[str, ...]], dict[str, dict[str, str]]]:
    """Return by layer which interventions can be applied, and why the others cannot."""
    available, reasons = {}, {}
    for layer in plant.sites:
        found = {one.name: one.unavailable(plant, layer) for one in interventions}
        available[layer] = tuple(name for name, reason in found.items() if reason is None)
        reasons[layer] = {name: reason for name, reason in found.items() if reason is not None}
    return available, reasons


def _reading(scalars: Mapping[str, float], reduced: RoutingStatistics, name: str) -> LayerReading:
    sums, found = reduced.layers[name], dict(scalars)
    experts, choices = sums.num_experts, float(sums.choices)
    k = round(choices / float(sums.k_tokens)) if choices else 0
    if "token_entropy" in found and experts > 1:
        found["entropy_share"] = found["token_entropy"] / math.log(experts)
    if "max_violation" in found and 0 < k < experts:
        found["max_violation_share"] = found["max_violation"] / (experts / k - 1)
    return LayerReading(scalars=found, counts=tuple(sums.counts.tolist()) if choices else (), k=k)
