"""The benchmark: geometric routing against what people use, on text, images and planted data.

An arm is a choice of ``configs/arm``, a task one of ``configs/experiment/benchmark``; a tier says how large they are.
Every arm is tuned on the same small budget, with a seed of its own, before its runs begin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from trainers.studies.benchmark_tasks import CANDIDATES, Task, Tier
from trainers.studies.runs import Run

#: The seed of all tuning runs; the runs that are judged have 0, 1, ….
TUNING_SEED = 1000

Setting = dict[str, float]
"""Tuned keys of the configuration and their values."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A router.

    Attributes:
        title: in reports.
        knob: the key that is tuned beside the learning rate, and its two values; without one, twice as many learning
            rates are tried.
        ours: whether it is this library's.
        linear: whether it is a baseline that ours are compared with, if it is the best.
        weight: how long a step takes, in steps of a plain mixture.
        without: the arm that it is without its controller; what tuning finds may differ, so that it is also run
            at this arm's setting.
    """

    title: str
    knob: tuple[str, tuple[float, float]] | None = None
    ours: bool = False
    linear: bool = False
    weight: float = 1.0
    without: str | None = None


_BALANCE = ("geometry.regularizers.balance", (0.001, 0.01))

ARMS: Mapping[str, Arm] = {
    "linear_switch": Arm(title="linear, Switch loss", knob=_BALANCE, linear=True),
    "linear_z": Arm(title="linear, Switch loss and z-loss", knob=_BALANCE, linear=True),
    "linear_bias": Arm(title="linear, loss-free bias", knob=("prior.speed", (0.001, 0.01)), linear=True),
    "polar_riemannian": Arm(title="ours: polar, Riemannian Adam", knob=_BALANCE, ours=True, weight=1.1),
    "polar_natural": Arm(title="ours: polar, natural gradient", knob=_BALANCE, ours=True, weight=1.15),
    "polar_natural_regularized": Arm(title="ours: natural, regularizers", knob=_BALANCE, ours=True, weight=1.2),
    "polar_natural_act": Arm(
        title="ours: natural, controller acting", knob=_BALANCE, ours=True, weight=1.25, without="polar_natural"
    ),
    "polar_natural_prior": Arm(
        title="ours: natural, loss-free prior", knob=("prior.speed", (0.05, 0.2)), ours=True, weight=1.15
    ),
    "cosine": Arm(title="cosine, Switch loss", knob=_BALANCE),
    "hash": Arm(title="hash"),
    "frozen": Arm(title="frozen random"),
    "soft": Arm(title="soft (all experts)", weight=2.5),
    "dense": Arm(title="dense"),
}

#: Those that are tuned and trained first, because the question is about them.
LEADING = tuple(name for name, arm in ARMS.items() if arm.ours or arm.linear)


def settings(arm: Arm, task: Task, candidates: int = CANDIDATES) -> list[Setting]:
    """Return what is tried for an arm: three learning rates by two values of its knob, or six learning rates.

    Args:
        arm: whose knob.
        task: whose learning rates.
        candidates: how many of them.
    """
    if arm.knob is None:
        rates = sorted([*task.rates, *(float(f"{rate / 2**0.5:.2g}") for rate in task.rates)])
        return [{"optimizer.lr": rate} for rate in rates][:candidates]
    key, values = arm.knob
    return [{"optimizer.lr": rate, key: value} for rate in task.rates for value in values][:candidates]


def tuning_runs(tier: Tier, task: str, arm: str) -> list[Run]:
    """Return the tuning runs of an arm in a task."""
    found, chosen = ARMS[arm], tier.tasks[task]
    steps, weight = max(1, round(chosen.share * chosen.steps)), chosen.share * chosen.seconds * found.weight
    return [
        Run(
            f"{task}/tuning/{arm}/{'/'.join(f'{key}={value:g}' for key, value in setting.items())}",
            [*_common(chosen, arm, TUNING_SEED, steps), *chosen.tuning, "probes=[]", *_overrides(setting)],
            {"task": task, "arm": arm, "phase": "tuning", "setting": dict(setting)},
            weight,
        )
        for setting in settings(found, chosen, tier.candidates)
    ]


def seeds_of(tier: Tier, arms: Sequence[str], seeds: int | None = None) -> dict[str, int]:
    """Return how many runs of each arm are judged, in the order in which they begin.

    Args:
        tier: says how many.
        arms: those that are wanted.
        seeds: of those that decide the question; None: the tier's.
    """
    many = tier.seeds if seeds is None else seeds
    return {arm: many if arm in LEADING else min(many, tier.others) for arm in ARMS if arm in arms}


def main_runs(tier: Tier, task: str, choices: Mapping[str, Setting], seeds: Mapping[str, int]) -> list[Run]:
    """Return the runs that are judged, and those without a controller beside them; seeds outermost.

    Args:
        tier: the tier.
        task: one of its tasks.
        choices: the tuned setting of each arm.
        seeds: how many, for each arm in the order in which they begin.
    """
    runs = []
    for arm, seed in _by_seed(seeds):
        runs.append(_main_run(tier.tasks[task], task, arm, arm, choices[arm], seed))
        other = ARMS[arm].without
        if other is not None and choices.get(other) != choices[arm]:
            runs.append(_main_run(tier.tasks[task], task, arm, other, choices[arm], seed))
    return runs


def _main_run(found: Task, task: str, arm: str, trained: str, setting: Setting, seed: int) -> Run:
    """Return a run of an arm, or of the one that it is without its controller, at its setting."""
    return Run(
        main_key(task, arm, seed) if trained == arm else f"{task}/{arm}/without/seed{seed}",
        [*_common(found, trained, seed, found.steps), *_overrides(setting)],
        {"task": task, "arm": arm, "phase": "main" if trained == arm else "without", "setting": dict(setting)},
        found.seconds * ARMS[trained].weight,
    )


def main_key(task: str, arm: str, seed: int) -> str:
    """Return the key of a run that is judged."""
    return f"{task}/{arm}/seed{seed}"


def _by_seed(seeds: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    for seed in range(max(seeds.values(), default=0)):
        yield from ((arm, seed) for arm, count in seeds.items() if seed < count)


def _common(task: Task, arm: str, seed: int, steps: int) -> Sequence[str]:
    return (
        f"experiment=benchmark/{task.experiment}",
        f"arm={arm}",
        *task.size,
        f"loop.steps={steps}",
        f"loop.warmup={max(1, round(0.05 * steps))}",
        f"seed={seed}",
    )


def _overrides(setting: Setting) -> Iterator[str]:
    return (f"{key}={value:g}" for key, value in setting.items())
