"""Whether the controller repaired what a fault did: what share of the harm it took back, and which runs it saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trainers.studies.intervals import mean_interval, ratio_of_means
from trainers.studies.rows import Row, by_seed

LEGEND = (
    "Repaired: the share of the harm that the controller took back, (off - on) / (off - healthy): 100% where the loss "
    "is the healthy run's, below 0% where it is worse than without the controller; a ratio of means over the seeds "
    "that have all three, with Fieller's 95% interval in brackets. No harm: the interval of the harm over these seeds "
    "is not above 0. Diverged runs have no loss: of those that diverged off, survived are those that ended on; lost "
    "are those that ended off and diverged on. A harm that is hardly above its interval gives too high a share: off is "
    "in both differences. Together: harms and gains in nats, summed in each seed over all faults, those without "
    "harm included; without the domain shift, whose harm is mostly no damage."
)


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What became of a fault with the controller.

    Attributes:
        harms: by seed, what the fault cost without the controller, in nats.
        gains: by seed, what the controller took back of it.
        diverged: seeds that diverged without the controller, and have a run with it.
        survived: how many of these ended with it.
        lost: seeds that ended without the controller and diverged with it.
    """

    harms: dict[int, float] = field(default_factory=dict)
    gains: dict[int, float] = field(default_factory=dict)
    diverged: int = 0
    survived: int = 0
    lost: int = 0

    @property
    def harmful(self) -> bool:
        """Whether harm was shown: its interval is above 0."""
        return len(self.harms) > 1 and mean_interval([*self.harms.values()]).low > 0

    @property
    def share(self) -> str:
        """The share of the harm that was taken back, with its interval."""
        found = ratio_of_means([*self.gains.values()], [*self.harms.values()])
        if found is None:
            return "-"
        value, low, high = (f"{round(100 * part)}%" for part in (found.value, found.low, found.high))
        return f"{value} [{low}, {high}] ({found.n})"

    def __str__(self) -> str:
        """Return the report's cell."""
        parts = [f"survived {self.survived}/{self.diverged}"] if self.diverged else []
        if self.harmful:
            parts.append(self.share)
        elif len(self.harms) > 1:
            parts.append("no harm")
        parts += [f"lost {self.lost}"] if self.lost else []
        return "; ".join(parts) or "-"


def repair(off: Sequence[Row], on: Sequence[Row], healthy: Sequence[Row]) -> Repair:
    """Return what became of a fault.

    Args:
        off: its runs without the controller.
        on: those with it.
        healthy: runs without fault and controller.
    """
    without, acted, reference = (by_seed(rows, "valid/loss") for rows in (off, on, healthy))
    seeds = without.keys() & acted.keys() & reference.keys()
    broke_off, broke_on = ({row["seed"] for row in rows if row["status"] == "diverged"} for rows in (off, on))
    return Repair(
        harms={seed: without[seed] - reference[seed] for seed in sorted(seeds)},
        gains={seed: without[seed] - acted[seed] for seed in sorted(seeds)},
        diverged=len(broke_off & (acted.keys() | broke_on)),
        survived=len(broke_off & acted.keys()),
        lost=len(broke_on & without.keys()),
    )


def together(repairs: Sequence[Repair]) -> str:
    """Return in a sentence what became of several faults: of their harm, summed in each seed, and of diverged runs."""
    diverged, survived, lost = (sum(getattr(one, name) for one in repairs) for name in ("diverged", "survived", "lost"))
    known = [one for one in repairs if one.harms]
    seeds = sorted(set.intersection(*(set(one.harms) for one in known))) if known else []
    summed = Repair(
        harms={seed: sum(one.harms[seed] for one in known) for seed in seeds},
        gains={seed: sum(one.gains[seed] for one in known) for seed in seeds},
    )
    harm = f"{summed.share} of the harm of {len(known)} faults repaired" if summed.harmful else "no harm in nats"
    return f"{harm}; {survived} of {diverged} diverged runs survived, {lost} lost."
