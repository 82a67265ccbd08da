"""The study of healthy runs: does the controller leave alone what needs no repair?

Pairs of runs that differ in the controller alone: those of the fault study without a fault, and a few of other kinds,
because thresholds may fit one kind only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trainers.studies.faults import ARMS, CONTROLLERS, SETTINGS, healthy
from trainers.studies.region import TOKENS_PER_STEP
from trainers.studies.runs import Run, StudyError

#: The first seed. The controller was tuned on 0 … 2, which say nothing here.
FIRST_SEED = 1000

#: The kind of run that the fault study compares with.
SAME = "as in the fault study"

#: Kinds of healthy runs: what they change, and how many times as long they are.
KINDS: Mapping[str, tuple[tuple[str, ...], int]] = {
    SAME: ((), 1),
    "16 experts": (("model.num_experts=16",), 1),
    "top-1": (("model.top_k=1", "model.renormalize=false"), 1),
    # What mg.attach does by default.
    "FSI in place of balance": (("geometry.regularizers.fsi=0.01", "geometry.regularizers.balance=0.0"), 1),
    "twice as long": ((), 2),
}

#: Pairs of every kind but the first, in each arm.
OTHERS = 2


@dataclass(frozen=True, kw_only=True)
class Healthy:
    """The grid.

    Attributes:
        seeds: pairs of the first kind in each arm; of the others there are ``OTHERS`` at most.
        tokens: of one training.
        smoke: toy models, to see that it all runs.

    Raises:
        StudyError: a value out of range.
    """

    seeds: int = 28
    tokens: int = 370_000
    smoke: bool = False

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.tokens < TOKENS_PER_STEP:
            raise StudyError(f"expected a seed and {TOKENS_PER_STEP} tokens or more, got {self.seeds}, {self.tokens}")

    def runs(self) -> list[Run]:
        """Return the runs, the two of a pair side by side."""
        return [
            Run(
                f"{setting}/{arm}/{kind}/{controller}/seed{seed}",
                [*self._overrides(setting, kind, seed), *ARMS[arm], switch],
                {"setting": setting, "arm": arm, "kind": kind, "controller": controller},
            )
            for setting, arm, kind, seed in self._pairs()
            for controller, switch in CONTROLLERS.items()
        ]

    def _pairs(self) -> Iterator[tuple[str, str, str, int]]:
        """Yield setting, arm, kind and seed: no seed twice, so that pairs are independent, whatever they are of.

        The first kind comes first: a study that is broken off has what its claims are about.
        """
        places = [(setting, arm, kind) for kind in KINDS for setting, arms in SETTINGS.items() for arm in arms]
        numbered = [(number, *place) for number in range(self.seeds) for place in enumerate(places)]
        for number, index, (setting, arm, kind) in sorted(numbered, key=lambda entry: entry[2][2] != SAME):
            if kind == SAME or number < OTHERS:
                yield setting, arm, kind, FIRST_SEED + number * len(places) + index

    def _overrides(self, setting: str, kind: str, seed: int) -> list[str]:
        changes, times = KINDS[kind]
        steps = times * self.tokens // TOKENS_PER_STEP
        return [*healthy(setting, seed=seed, steps=steps, smoke=self.smoke), *changes]
