"""Studies that compare arms with a reference, in one or several settings; each an entry of ``COMPARISONS``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from trainers.studies.region import SIZE, SMOKE_SIZE, TOKENS_PER_STEP
from trainers.studies.runs import Run, StudyError

#: What all arms of all comparisons have in common: nothing but the training loss and what an arm adds.
ALONE = ("geometry.fisher=null", "geometry.regularizers.fsi=0.0", "geometry.regularizers.balance_scope=micro_batch")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arms, each in every setting and with every seed.

    Attributes:
        title: heading of the report.
        question: what it is to say, a sentence.
        arms: overrides by name; the first is the reference.
        settings: overrides by name.
        seeds: how many, from 0.
        smoke: a toy model and few steps, to see that it all runs.

    Raises:
        StudyError: fewer than one seed.
    """

    title: str
    question: str
    arms: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, tuple[str, ...]]
    seeds: int = 4
    smoke: bool = False

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise StudyError(f"expected a seed or more, got {self.seeds}")

    @property
    def reference(self) -> str:
        """The arm that the others are compared with."""
        return next(iter(self.arms))

    def runs(self) -> list[Run]:
        """Return the runs, seeds outermost."""
        size = SMOKE_SIZE if self.smoke else SIZE
        short = ("loop.steps=16", "loop.warmup=2") if self.smoke else ()
        return [
            Run(
                f"{setting}/{arm}/seed{seed}",
                [*size, *ALONE, f"seed={seed}", f"data.seed={seed}", *where, *how, *short],
                {"setting": setting, "arm": arm},
            )
            for seed in range(self.seeds)
            for setting, where in self.settings.items()
            for arm, how in self.arms.items()
        ]


def comparison(name: str, *, seeds: int | None = None, smoke: bool = False) -> Comparison:
    """Return a comparison by name.

    Args:
        name: a key of ``COMPARISONS``.
        seeds: how many; None: as many as it has (1 for a smoke run).
        smoke: see ``Comparison``.
    """
    found = COMPARISONS[name]
    return replace(found, seeds=seeds or (1 if smoke else found.seeds), smoke=smoke)


def _length(steps: int) -> tuple[str, ...]:
    return (f"loop.steps={steps}", f"loop.warmup={max(1, round(0.05 * steps))}")


def _natural(limit: float) -> tuple[str, ...]:
    return ("router=polar", "optimizer=natural", f"geometry.natural.limit={limit:g}")


_STEPS = 400_000 // TOKENS_PER_STEP

LIMITS = Comparison(
    title="Speed limits",
    question="Which speed limit of natural steps is best, and whether that depends on the length of the training, the "
    "number of experts or how many a token visits. (With load-balance loss 0.01.)",
    arms={
        "linear + AdamW": ("router=linear", "optimizer=adamw"),
        "polar + Riemannian Adam": ("router=polar", "optimizer=riemannian"),
        **{f"natural, limit {limit:g}": _natural(limit) for limit in (0.004, 0.0075, 0.015, 0.03, 0.06)},
    },
    settings={
        name: ("geometry.regularizers.balance=0.01", *where)
        for name, where in {
            "8 experts, top-2, 150 steps": _length(150),
            f"8 experts, top-2, {_STEPS} steps": _length(_STEPS),
            "8 experts, top-2, 1200 steps": _length(1200),
            f"32 experts, top-2, {_STEPS} steps": ("model.num_experts=32", "model.expert_hidden=64", *_length(_STEPS)),
            f"8 experts, top-1, {_STEPS} steps": ("model.top_k=1", "model.renormalize=false", *_length(_STEPS)),
        }.items()
    },
    seeds=3,
)

PRIORS = Comparison(
    title="Priors over experts",
    question="Loss-free balancing by geodesic steps of a prior on the Fisher-Rao simplex against DeepSeek's sign rule, "
    "both over a range of speeds, and against a load-balance loss.",
    arms={
        "nothing": (),
        "balance loss 0.01": ("geometry.regularizers.balance=0.01",),
        **{f"sign rule, u = {u:g}": ("prior=sign", f"prior.speed={u:g}") for u in (1e-4, 1e-3, 1e-2, 1e-1)},
        **{f"prior, speed {speed:g}": ("prior=balance", f"prior.speed={speed:g}") for speed in (0.0125, 0.05, 0.2)},
    },
    settings={
        "polar + Riemannian Adam": ("router=polar", "optimizer=riemannian", *_length(_STEPS)),
        "linear + AdamW, 16 times the routers' learning rate": (
            "router=linear",
            "optimizer=adamw",
            "optimizer.router_lr=0.032",
            *_length(_STEPS),
        ),
    },
    seeds=4,
)

COMPARISONS: Mapping[str, Comparison] = {"limits": LIMITS, "priors": PRIORS}
