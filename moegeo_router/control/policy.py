"""What to do, when, and whether it helped. Pure functions of signals and state: the same on every rank and in a replay.

One case at a time in a layer: an intervention is ordered and judged after ``settle`` steps. If it helped it stands, and
is ordered again if it did not suffice; else it is taken back, and the next rung of the ladder follows. A budget ends
this: better a clear report than a loop that oscillates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .config import ControlConfig
from .reading import RUN
from .signals import Signals
from .thresholds import FAILURES
from .track import WARNING

#: An intervention that helped and did not suffice is ordered this often before the next rung.
REPEATS = 3

#: What gets worse at most at this part of its former pace has been slowed: averages still show half of it when the
#: signal itself has stopped at once.
SLOWED = 2 / 3

#: Interventions that make sense only where experts are dead.
NEEDS_DEAD = ("revive",)


@dataclass
class Case:
    """An intervention that waits for its judgement.

    Attributes:
        layer: whose.
        failure: against what.
        name: the intervention's.
        step: since when.
        badness: of the signal, then.
        trend: of the badness, then.
        loss: then.
        strength: how often it was ordered.
        judged: when it was judged last.
        left: the badness at that judgement.
    """

    layer: str
    failure: str
    name: str
    step: int
    badness: float
    trend: float
    loss: float
    strength: int = 1
    judged: int = -1
    left: float = math.inf


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
        released: those that were taken back because all was well.
        needed: those after whose release the failure came back: they are not released again.
        spent: interventions so far.
        given_up: failures that are no longer acted on.
    """

    rungs: dict[str, int] = field(default_factory=dict)
    tried: dict[str, list[str]] = field(default_factory=dict)
    standing: list[list[str]] = field(default_factory=list)
    released: list[list[str]] = field(default_factory=list)
    needed: list[list[str]] = field(default_factory=list)
    spent: int = 0
    given_up: list[str] = field(default_factory=list)


class Policy:
    """Decides, step after step.

    Args:
        config: see ``ControlConfig``.
        available: the interventions that can be applied, by layer.
    """

    def __init__(self, config: ControlConfig, available: Mapping[str, Sequence[str]]) -> None:
        self._config = config
        self.allow(available)
        self._records: dict[str, LayerRecord] = {}
        self._cases: dict[str, Case] = {}
        self._spent, self._calm_since = 0, -1

    def allow(self, available: Mapping[str, Sequence[str]]) -> None:
        """Say anew which interventions can be applied, by layer."""
        self._available = {name: tuple(names) for name, names in available.items()}

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
        """Take note that an order could not be carried out: it costs nothing, and the next rung follows."""
        self._cases.pop(decision.layer, None)
        record = self._record(decision.layer)
        record.spent, self._spent = record.spent - 1, self._spent - 1
        if record.standing[-1:] == [[decision.name, decision.failure]]:
            record.standing.pop()  # that of this order; what stands of earlier ones does stand
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
        rung = self._rung(record, failure, ladder)
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
        badness, trend, (loss, _) = signals.badness(layer, failure), signals.trend(layer, failure), signals.loss
        strength = 1 + sum(entry.startswith(f"{name}: helped") for entry in record.tried.get(failure, []))
        self._cases[layer] = Case(layer, failure, name, step, badness, trend, loss, strength)
        line = f"{name} against {failure} in {layer}: {_numbers(signals, layer, failure)}"
        return Decision(kind="apply", step=step, layer=layer, failure=failure, name=name, strength=strength, line=line)

    def _rung(self, record: LayerRecord, failure: str, ladder: Sequence[str]) -> int:
        """Return the next rung: if a failure is back, what was taken back before, which is noted as needed."""
        missed = [entry for entry in record.released if entry[1] == failure and entry[0] in ladder]
        record.released = [entry for entry in record.released if entry not in missed]
        record.needed += missed
        return ladder.index(missed[-1][0]) if missed else record.rungs.get(failure, 0)

    def _ladder(self, layer: str, failure: str) -> tuple[str, ...]:
        """Return the rungs that can be applied; of a failure of the whole run, in any layer."""
        known = self._available.get(layer)
        if known is None:
            known = tuple(name for names in self._available.values() for name in names)
        return tuple(name for name in self._config.ladder(failure) if name in known)

    def _judge(self, layer: str, step: int, signals: Signals) -> list[Decision]:
        case, config = self._cases[layer], self._config
        if step - max(case.step, case.judged) < config.settle:
            return []
        badness, (loss, noise) = signals.badness(layer, case.failure), signals.loss
        well = signals.severity(layer, case.failure) < WARNING
        # A brake makes nothing better by itself: it has helped if what was getting worse does so clearly more slowly.
        grew = case.trend * config.settle >= config.least_gain
        slowed = grew and signals.trend(layer, case.failure) <= SLOWED * case.trend
        better = slowed or case.badness - badness >= config.least_gain
        # What is not known (no loss was told) is no objection.
        costly = loss - case.loss > config.loss_margin * noise
        numbers = f"{_numbers(signals, layer, case.failure) or 'well'}; loss {case.loss:.4g} -> {loss:.4g}"
        if (well or better) and not costly:
            if not well and case.left - badness >= config.least_gain:  # while it goes on to get better, it may
                case.judged, case.left = step, badness
                return []
            if not well and case.strength < REPEATS:
                record = self._record(layer)
                record.rungs[case.failure] = self._ladder(layer, case.failure).index(case.name)
            return [self._close(case, step, "keep", "helped" if well else "helped, did not suffice", numbers)]
        why = "loss above its forecast" if costly else "did not help"
        return [self._close(case, step, "undo", why, numbers)]

    def _close(self, case: Case, step: int, kind: str, how: str, numbers: str) -> Decision:
        del self._cases[case.layer]
        record = self._record(case.layer)
        record.tried.setdefault(case.failure, []).append(f"{case.name}: {how}")
        if kind == "undo":
            own = [i for i, entry in enumerate(record.standing) if entry == [case.name, case.failure]]
            if own:  # it may have been released in the meantime
                del record.standing[own[-1]]
        line = f"{case.name} in {case.layer} {how}: {numbers}"
        return Decision(kind=kind, step=step, layer=case.layer, failure=case.failure, name=case.name, line=line)

    def _release(self, step: int) -> list[Decision]:
        """Take back the newest standing intervention of every layer; where none stands, all may be tried anew."""
        decisions = []
        for layer, record in self._records.items():
            free = [index for index, entry in enumerate(record.standing) if entry not in record.needed]
            if free:
                name, failure = entry = record.standing.pop(free[-1])
                record.released.append(entry)
                line = f"{name} in {layer} is taken back: {self._config.release_after} steps without a warning"
                decisions.append(
                    Decision(kind="release", step=step, layer=layer, failure=failure, name=name, line=line)
                )
            else:
                for forgotten in (record.rungs, record.given_up, record.released):
                    forgotten.clear()
        return decisions


def _numbers(signals: Signals, layer: str, failure: str) -> str:
    worst = signals.worst(layer, failure)
    return ", ".join(f"{metric} {value:.3g}" for metric, value in worst.items())
