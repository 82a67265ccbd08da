"""The stable-region study: how far each way of stepping the routers can be pushed before experts die.

The learning rate of the routers is multiplied by 1 … 256, with and without a load-balance loss, and everything else
stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainers.studies.runs import Run, StudyError

#: Speed limits of the natural step of polar rows, in radians a step.
NATURAL_LIMITS = {"a": 0.0075, "b": 0.015, "c": 0.03}
SPHERE_LIMIT = 0.015

#: Peak learning rate of configs/optimizer; AdamW's routers have this times the multiplier.
LR = 0.002

MULTIPLIERS = (1.0, 4.0, 16.0, 64.0, 256.0)
BALANCES = (0.0, 0.01)

#: What the others are compared with.
REFERENCE = "linear_adamw"

SIZE = (
    "model=language",
    "model.layers=2",
    "model.dim=96",
    "model.heads=4",
    "model.num_experts=8",
    "model.top_k=2",
    "model.expert_hidden=192",
    "data.batch_size=8",
    "data.length=128",
    "data.valid_tokens=32768",
)
TOKENS_PER_STEP = 8 * 128

SMOKE_SIZE = (
    "model=language",
    "model.layers=2",
    "model.dim=16",
    "model.heads=2",
    "model.num_experts=4",
    "model.top_k=2",
    "model.expert_hidden=16",
    "data.batch_size=8",
    "data.length=128",
    "data.valid_tokens=4096",
)


def arms(multiplier: float) -> dict[str, tuple[str, ...]]:
    """Return the overrides of every arm for a multiplier of the routers' learning rate."""

    def stepped(router: str, optimizer: str, limit: float | None = None) -> tuple[str, ...]:
        limits = () if limit is None else (f"geometry.natural.limit={limit:g}",)
        return (f"router={router}", f"optimizer={optimizer}", f"geometry.router_lr={multiplier:g}", *limits)

    return {
        REFERENCE: ("router=linear", "optimizer=adamw", f"optimizer.router_lr={LR * multiplier:g}"),
        "polar_riemannian": stepped("polar", "riemannian"),
        "sphere_riemannian": stepped("sphere", "riemannian"),
        **{f"polar_natural_{name}": stepped("polar", "natural", limit) for name, limit in NATURAL_LIMITS.items()},
        "sphere_natural": stepped("sphere", "natural", SPHERE_LIMIT),
    }


ARMS = tuple(arms(1.0))


@dataclass(frozen=True, kw_only=True)
class Region:
    """The grid.

    Attributes:
        seeds: how many, from 0.
        tokens: of one training.
        arms: names of ``arms``.
        multipliers: of the routers' learning rate.
        balances: weights of the load-balance loss.
        data: a language data set of configs/data.
        smoke: a toy model, to see that it all runs.

    Raises:
        StudyError: a value out of range.
    """

    seeds: int = 4
    tokens: int = 400_000
    arms: Sequence[str] = ARMS
    multipliers: Sequence[float] = MULTIPLIERS
    balances: Sequence[float] = BALANCES
    data: str = "stdlib"
    smoke: bool = False

    def __post_init__(self) -> None:
        if unknown := [arm for arm in self.arms if arm not in ARMS]:
            raise StudyError(f"there is no arm {unknown[0]}; the arms are {', '.join(ARMS)}")
        if self.seeds < 1 or self.tokens < TOKENS_PER_STEP:
            raise StudyError(f"expected a seed and {TOKENS_PER_STEP} tokens or more, got {self.seeds}, {self.tokens}")
        if min(self.multipliers) <= 0 or min(self.balances) < 0:
            raise StudyError("multipliers must be above 0 and balances at least 0")

    def runs(self) -> list[Run]:
        """Return the runs, seeds outermost."""
        return [
            Run(
                f"{arm}/x{multiplier:g}/balance{balance:g}/seed{seed}",
                self._overrides(arm, multiplier, balance, seed),
                {"arm": arm, "multiplier": multiplier, "balance": balance},
            )
            for seed in range(self.seeds)
            for balance in dict.fromkeys(self.balances)
            for multiplier in dict.fromkeys(self.multipliers)
            for arm in dict.fromkeys(self.arms)
        ]

    def _overrides(self, arm: str, multiplier: float, balance: float, seed: int) -> list[str]:
        steps = self.tokens // TOKENS_PER_STEP
        return [
            *(SMOKE_SIZE if self.smoke else SIZE),
            f"data={self.data}",
            f"loop.steps={steps}",
            f"loop.warmup={round(0.05 * steps)}",
            "geometry.fisher=null",
            "geometry.regularizers.fsi=0.0",
            f"geometry.regularizers.balance={balance:g}",
            "geometry.regularizers.balance_scope=micro_batch",
            f"seed={seed}",
            f"data.seed={seed}",
            *arms(multiplier)[arm],
        ]
