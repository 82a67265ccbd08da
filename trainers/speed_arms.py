"""What each router of the benchmark costs: rows of ``python -m trainers.speed``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

import moegeo_router as mg
from moegeo_router.loggers import NullLogger
from trainers import build
from trainers.loop import Trainer
from trainers.pairs import Comparison
from trainers.studies.benchmark import ARMS
from trainers.studies.runs import Run, configurations, trainer_of

#: Between two inversions of natural gradients' factors, one of them included.
STEPS = mg.NaturalConfig().refresh_every

#: The language task's size, on text that every installation can make.
SIZE = (
    *("experiment=benchmark/planted", "model.dim=96", "size.expert_hidden=192", "size.dense_hidden=384"),
    *("data.alphabet=256", "loop.steps=1560"),
)


def rows(device: torch.device, size: tuple[str, ...] = SIZE) -> Iterator[Comparison]:
    """Yield a row for each arm but the first: training steps of the benchmark's language model against the first's.

    Args:
        device: where.
        size: overrides, the same for all arms.
    """
    configs = configurations([Run(arm, [*size, f"arm={arm}", f"device={device.type}"], {}) for arm in ARMS])
    base, *others = (OmegaConf.create(config) for config in configs)
    first, *arms = ARMS
    theirs = _steps(base)
    for arm, config in zip(arms, others, strict=True):
        name = f"arm: {STEPS} training steps, {ARMS[arm].title} vs {ARMS[first].title}"
        yield Comparison(name=name, ours=_steps(config), theirs=theirs)


def _steps(config: DictConfig) -> Callable[[], None]:
    """Return what takes ``STEPS`` steps of a run; the run itself is made at the first call."""

    @functools.cache
    def trainer() -> Trainer:
        return trainer_of(config, build.build(config, "data"), NullLogger(), Path())

    def steps() -> None:
        run = trainer()
        for _ in range(STEPS):
            run.train_step(run.data.train_batch(run.step))

    return steps
