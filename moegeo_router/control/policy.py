"""What to do, when, and whether it helped. Pure functions of signals and state: the same on every rank and in a replay.

One case at a time in a layer: an intervention is ordered, judged after ``settle`` steps, kept if it helped, else taken
back, and the next rung of the ladder follows. A budget ends this: better a clear report than a loop that oscillates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .config import ControlConfig
from .reading import RUN
from .signals import Signals
from .thresholds import FAILURES
from .track import WARNING

#: Judgements "helping, not yet well" in a row after which a case is closed as not sufficient.
EXTENSIONS = 3

#: Interventions that make sense only where experts are dead.
NEEDS_DEAD = ("revive",)


@dataclass
class Case:
    """An intervention that waits for its judgement."""

    layer: str
    failure: str
    name: str
    step: int
    badness: float
    loss: float
    extensions: int = 0


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the policy decided.

    Attributes:
        kind: ``"apply"``, ``"undo"``, ``"keep"`` (it helped), ``"release"`` (taken back, no longer needed) or
            ``"give up"``.
        step: of the optimizer.
        layer: whose.
        failure: against what.
        name: the intervention's.
        strength: how often it was ordered for this before, plus 1.
        line: one line that says why, with numbers.
    """

    kind: str
    step: int
    layer: str
    failure: str
    name: str = ""
    strength: int = 1
    line: str = ""


@dataclass
class LayerRecord:
    """What was done in a layer.

    Attributes:
        rungs: of each failure's ladder, the next one.
        tried: names of what was done against each failure, and how it ended.
        standing: interventions in force: name and failure, the newest last.
        spent: interventions so far.
        given_up: failures that are no longer acted on.
    """

    rungs: dict[str, int] = field(default_factory=dict)
    tried: dict[str, list[str]] = field(default_factory=dict)
    standing: list[list[str]] = field(default_factory=list)
    spent: int = 0
    given_up: list[str] = field(default_factory=list)


class Policy:
    """Decides, step after step.

    Args:
        config: see ``ControlConfig``.
        available: the interventions that can be applied, by layer.
    """

    def __init__(self, config: ControlConfig, available: Mapping[str, Sequence[str]]) -> None:
        self._config, self._available = config, {name: tuple(names) for name, names in available.items()}
        self._records: dict[str, LayerRecord] = {}
        self._cases: dict[str, Case] = {}
        self._spent, self._calm_since = 0, -1

    def decide(self, step: int, signals: Signals) -> list[Decision]:
        """Return what is to be done now, in this order."""
        decisions = [decision for layer in list(self._cases) for decision in self._judge(layer, step, signals)]
        self._calm_since = -1 if not signals.calm else step if self._calm_since < 0 else self._calm_since
        if self._calm_since >= 0 and step - self._calm_since >= self._config.release_after:
            decisions += self._release(step)
            self._calm_since = step
        for layer in (*self._available, RUN):
            if layer not in self._cases and layer in signals.layers and not signals.calm_in(layer):
                decisions += self._open(layer, step, signals)
        return decisions

    def refuse(self, decision: Decision, reason: str) -> None:
        """Take note that an order could not be carried out: it is not judged, and the next rung follows."""
        self._cases.pop(decision.layer, None)
        record = self._record(decision.layer)
        record.standing = [entry for entry in record.standing if entry != [decision.name, decision.failure]]
        record.tried.setdefault(decision.failure, []).append(f"{decision.name}: not done ({reason})")

    def state(self) -> dict[str, Any]:
        """Return plain numbers and words."""
        return {
            "records": {layer: asdict(record) for layer, record in self._records.items()},
            "cases": {layer: asdict(case) for layer, case in self._cases.items()},
            "spent": self._spent,
            "calm_since": self._calm_since,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state()``."""
        self._records = {layer: LayerRecord(**record) for layer, record in state["records"].items()}
        self._cases = {layer: Case(**case) for layer, case in state["cases"].items()}
        self._spent, self._calm_since = state["spent"], state["calm_since"]

    def _record(self, layer: str) -> LayerRecord:
        return self._records.setdefault(layer, LayerRecord())

    def _open(self, layer: str, step: int, signals: Signals) -> list[Decision]:
        """Order the next rung against the worst failure of a layer that has waited long enough."""
        record, patience = self._record(layer), self._config.patience
        due = []
        for failure in FAILURES:
            level = signals.severity(layer, failure)
            wait = patience if level == WARNING else patience // 4
            if level >= WARNING and failure not in record.given_up and signals.lasted(layer, failure, step) > wait:
                due.append((-level, FAILURES.index(failure), failure))
        for _, _, failure in sorted(due):
            decision = self._next_rung(layer, failure, step, signals)
            if decision is not None:
                return [decision]
        return []

    def _next_rung(self, layer: str, failure: str, step: int, signals: Signals) -> Decision | None:
        record, config = self._record(layer), self._config
        ladder = self._ladder(layer, failure)
        if not ladder:
            return None
        dead = signals.layers[layer].dead
        rung = record.rungs.get(failure, 0)
        while rung < len(ladder) and ladder[rung] in NEEDS_DEAD and not dead:
            rung += 1
        why = None
        if rung >= len(ladder):
            why = "the ladder is at its end"
        elif record.spent >= config.layer_budget or self._spent >= config.run_budget:
            why = f"the budget is spent ({record.spent} in this layer, {self._spent} in the run)"
        if why is not None:
            record.given_up.append(failure)
            tried = "; ".join(record.tried.get(failure, [])) or "nothing could be done"
            line = f"gives up on {failure} in {layer}: {why}. Tried: {tried}. Now: {_numbers(signals, layer, failure)}"
            return Decision(kind="give up", step=step, layer=layer, failure=failure, line=line)
        name = ladder[rung]
        record.rungs[failure] = rung + 1
        record.spent, self._spent = record.spent + 1, self._spent + 1
        record.standing.append([name, failure])
        badness, (loss, _) = signals.badness(layer, failure), signals.loss
        self._cases[layer] = Case(layer, failure, name, step, badness, loss)
        strength = 1 + sum(entry.startswith(f"{name}:") for entry in record.tried.get(failure, []))
        line = f"{name} against {failure} in {layer}: {_numbers(signals, layer, failure)}"
        return Decision(kind="apply", step=step, layer=layer, failure=failure, name=name, strength=strength, line=line)

    def _ladder(self, layer: str, failure: str) -> tuple[str, ...]:
        """Return the rungs that can be applied; of a failure of the whole run, in any layer."""
        known = self._available.get(layer)
        if known is None:
            known = tuple(name for names in self._available.values() for name in names)
        return tuple(name for name in self._config.ladder(failure) if name in known)

    def _judge(self, layer: str, step: int, signals: Signals) -> list[Decision]:
        case, config = self._cases[layer], self._config
        if step - case.step < config.settle * (case.extensions + 1):
            return []
        badness, (loss, noise) = signals.badness(layer, case.failure), signals.loss
        well = signals.severity(layer, case.failure) < WARNING
        better = case.badness - badness >= config.least_gain
        # What is not known (no loss was told) is no objection.
        costly = loss - case.loss > config.loss_margin * noise
        numbers = f"{_numbers(signals, layer, case.failure) or 'well'}; loss {case.loss:.4g} -> {loss:.4g}"
        if (well or better) and not costly:
            if not well and case.extensions < EXTENSIONS:
                case.extensions += 1
                return []
            return [self._close(case, step, "keep", "helped" if well else "helped, did not suffice", numbers)]
        why = "loss above its forecast" if costly else "did not help"
        return [self._close(case, step, "undo", why, numbers)]

    def _close(self, case: Case, step: int, kind: str, how: str, numbers: str) -> Decision:
        del self._cases[case.layer]
        record = self._record(case.layer)
        record.tried.setdefault(case.failure, []).append(f"{case.name}: {how}")
        if kind == "undo" and [case.name, case.failure] in record.standing:
            record.standing.remove([case.name, case.failure])
        line = f"{case.name} in {case.layer} {how}: {numbers}"
        return Decision(kind=kind, step=step, layer=case.layer, failure=case.failure, name=case.name, line=line)

    def _release(self, step: int) -> list[Decision]:
        """Take back the newest standing intervention of every layer, and begin ladders anew where none stands."""
        decisions = []
        for layer, record in self._records.items():
            if record.standing:
                name, failure = record.standing.pop()
                line = f"{name} in {layer} is taken back: {self._config.release_after} steps without a warning"
                decisions.append(
                    Decision(kind="release", step=step, layer=layer, failure=failure, name=name, line=line)
                )
            else:
                record.rungs.clear()
        return decisions


def _numbers(signals: Signals, layer: str, failure: str) -> str:
    worst = signals.worst(layer, failure)
    return ", ".join(f"{metric} {value:.3g}" for metric, value in worst.items())
