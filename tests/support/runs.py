"""Tiny runs of the trainers: the real configuration with small numbers, and what a test reads of a run folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from moegeo_router.loggers import read_jsonl
from trainers import train as train_module
from trainers.progress import Silent

CONFIGS = Path(__file__).parents[2] / "configs"

TINY_MODEL = (
    "model.dim=16",
    "model.layers=2",
    "model.heads=2",
    "model.num_experts=4",
    "model.expert_hidden=16",
)
TINY = {
    "language": (
        *TINY_MODEL,
        "data=planted",
        "data.alphabet=8",
        "data.documents=40",
        "data.document_length=33",
        "data.batch_size=4",
        "data.length=32",
    ),
    "vision": (
        *TINY_MODEL,
        "model=vision",
        "data=planted_images",
        "data.images=96",
        "data.size=4",
        "data.batch_size=8",
        "model.patch=2",
    ),
    # Of texts that `write_texts` writes; data.path is still to be given.
    "folder": (
        *TINY_MODEL,
        "data=folder",
        "data.length=32",
        "data.batch_size=4",
        "data.valid_fraction=0.4",
        "data.tokenizer=bpe",
        "data.vocab_size=262",
    ),
}
TINY_LOOP = ("loop.steps=12", "loop.warmup=2", "loop.checkpoint_every=4", "threads=1", "device=cpu")

#: What differs between two runs that train the same.
CLOCKS = ("time", "train/tokens_per_second")


def tiny_overrides(directory: Path, *overrides: str, task: str = "language") -> list[str]:
    """The command line of a tiny run in ``directory``; later overrides win."""
    run = (f"name={directory.name}", f"directory={directory}", "logger=jsonl")
    return [*TINY[task], *TINY_LOOP, *run, *overrides]


def configuration(*overrides: str, name: str = "train") -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        return compose(name, list(overrides))


def tiny(directory: Path, *overrides: str, task: str = "language") -> DictConfig:
    return configuration(*tiny_overrides(directory, *overrides, task=task))


def write_texts(folder: Path, words: str) -> Path:
    for domain in ("a", "b"):
        (folder / domain).mkdir(parents=True, exist_ok=True)
        for number in range(4):
            (folder / domain / f"{number}.txt").write_text(f"{domain}{number} {words} " * 40)
    return folder


class Hook(Silent):
    """A progress that calls ``action`` after the rows of ``step`` are logged."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action
        self.steps: list[int] = []

    def update(self, step: int, scalars: Any) -> None:
        self.steps.append(step)
        if step == self.step:
            self.action()


class Killed(BaseException):
    """Stands for kill -9: nothing in the run may handle it by saving."""


def kill() -> None:
    raise Killed


@contextmanager
def after_step(step: int, action: Any) -> Iterator[Hook]:
    """Have runs in this context call ``action`` after ``step``."""
    hook = Hook(step, action)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "for_terminal", lambda steps, done: hook)
        yield hook


def rows(directory: Path) -> list[dict[str, Any]]:
    """The log without its clocks."""
    return [
        {key: value for key, value in row.items() if key not in CLOCKS}
        for row in read_jsonl(directory / "metrics.jsonl")
    ]


def train_rows(directory: Path) -> list[dict[str, Any]]:
    return [row for row in rows(directory) if "train/loss" in row]
