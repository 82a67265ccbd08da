"""The fault study: what goes wrong in a training, who notices, and what the controller makes of it.

A fault is the healthy setting with one thing changed, so a load-balance loss is on in all but ``no_balance``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trainers.studies.region import LR, SIZE, SMOKE_SIZE, TOKENS_PER_STEP
from trainers.studies.runs import Run, StudyError

#: The run that the others are compared with.
HEALTHY = "healthy"

#: Of the routers' learning rate, in ``router_lr``.
MULTIPLIER = 64.0

ARMS: Mapping[str, tuple[str, ...]] = {
    "linear_adamw": ("router=linear", "optimizer=adamw"),
    "polar_natural": ("router=polar", "optimizer=natural"),
}
_ROUTER_LR = {
    "linear_adamw": f"optimizer.router_lr={LR * MULTIPLIER:g}",
    "polar_natural": f"geometry.router_lr={MULTIPLIER:g}",
}

VISION_SIZE = (
    "model=vision",
    "data=digits",
    "model.layers=2",
    "model.dim=64",
    "model.heads=4",
    "model.num_experts=8",
    "model.top_k=2",
    "model.expert_hidden=128",
    "data.batch_size=64",
)
VISION_SMOKE_SIZE = (
    *VISION_SIZE,
    "model.dim=16",
    "model.heads=2",
    "model.num_experts=4",
    "model.expert_hidden=16",
    "data.valid_images=64",
)

#: Text that is built in a moment.
SMOKE_DATA = ("data.max_bytes=600000",)

#: Arms of every setting.
SETTINGS: Mapping[str, tuple[str, ...]] = {"language": tuple(ARMS), "vision": ("linear_adamw",)}

#: Faults that are in language only, to save time.
LANGUAGE_ONLY = ("zero_expert", "bf16_logits")

#: Of the runs with and without the controller.
CONTROLLERS: Mapping[str, str] = {"off": "controller=off", "on": "controller=act"}


def faults(setting: str, arm: str, steps: int) -> dict[str, tuple[tuple[str, ...], int]]:
    """Return by name the overrides of every fault of a setting, and the steps before it begins.

    Args:
        setting: a key of ``SETTINGS``.
        arm: a key of ``ARMS``.
        steps: of the run.
    """
    quarter, third, half = steps // 4, steps // 3, steps // 2
    warmup = _warmup(steps)
    # The larger rate only harms small images that a model learns by heart.
    peak = 16 if setting == "vision" else 4
    found = {
        HEALTHY: ((), 0),
        "no_balance": (("geometry.regularizers.balance=0.0",), 0),
        "router_lr": ((_ROUTER_LR[arm],), 0),
        "restarts": (("fault=restarts", f"fault.peak={peak}"), warmup + (steps - warmup) // 4),
        "bad_init": (("fault=bad_init",), 0),
        "row_drift": (("fault=row_drift", f"fault.step={quarter}"), quarter),
        "domain_shift": (("fault=domain_shift", f"fault.step={half}"), half),
        "zero_expert": (("fault=zero_expert", f"fault.step={third}"), third),
        "nan_gradient": (("fault=nan_gradient", f"fault.step={third}", f"fault.again={2 * third}"), third),
        "bf16_logits": (("fault=bf16_logits",), 0),
    }
    return {name: fault for name, fault in found.items() if setting == "language" or name not in LANGUAGE_ONLY}


def healthy(setting: str, *, seed: int, steps: int, smoke: bool = False) -> list[str]:
    """Return the overrides of a healthy run, those of its arm left out.

    Args:
        setting: a key of ``SETTINGS``.
        seed: of the model and of the data's order.
        steps: of the run.
        smoke: a toy model on few data.
    """
    language = (*(SMOKE_SIZE if smoke else SIZE), "data=stdlib", *(SMOKE_DATA if smoke else ()))
    vision = VISION_SMOKE_SIZE if smoke else VISION_SIZE
    return [
        *(language if setting == "language" else vision),
        f"loop.steps={steps}",
        f"loop.warmup={_warmup(steps)}",
        "geometry.regularizers.fsi=0.0",
        "geometry.regularizers.balance=0.01",
        "geometry.regularizers.balance_scope=micro_batch",
        f"seed={seed}",
        f"data.seed={seed}",
    ]


def _warmup(steps: int) -> int:
    return max(1, round(0.05 * steps))


def controllers() -> tuple[str, ...]:
    """Return the choices of ``CONTROLLERS`` that the configuration has; without a controller, it is off."""
    group = Path(__file__).parents[2] / "configs" / "controller"
    return tuple(CONTROLLERS) if group.is_dir() else ("off",)


@dataclass(frozen=True, kw_only=True)
class Faults:
    """The grid.

    Attributes:
        seeds: how many, from 0.
        tokens: of one training.
        smoke: toy models, to see that it all runs.

    Raises:
        StudyError: a value out of range.
    """

    seeds: int = 3
    tokens: int = 300_000
    smoke: bool = False

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.tokens < 4 * TOKENS_PER_STEP:
            least = 4 * TOKENS_PER_STEP
            raise StudyError(f"expected a seed and {least} tokens or more, got {self.seeds}, {self.tokens}")

    @property
    def steps(self) -> int:
        """Optimizer steps of a run; an image batch has as many tokens as one of text."""
        return self.tokens // TOKENS_PER_STEP

    def runs(self) -> list[Run]:
        """Return the runs, seeds outermost."""
        found = []
        for seed in range(self.seeds):
            for setting, arms in SETTINGS.items():
                for arm in arms:
                    found += self._runs(setting, arm, seed)
        return found

    def _runs(self, setting: str, arm: str, seed: int) -> list[Run]:
        return [
            Run(
                f"{setting}/{arm}/{fault}/{controller}/seed{seed}",
                [*self._common(setting, seed), *ARMS[arm], *overrides, *_switched(controller)],
                {"setting": setting, "arm": arm, "fault": fault, "controller": controller, "onset": onset},
            )
            for fault, (overrides, onset) in faults(setting, arm, self.steps).items()
            for controller in controllers()
        ]

    def _common(self, setting: str, seed: int) -> list[str]:
        return healthy(setting, seed=seed, steps=self.steps, smoke=self.smoke)


def _switched(controller: str) -> tuple[str, ...]:
    return () if len(controllers()) == 1 else (CONTROLLERS[controller],)
