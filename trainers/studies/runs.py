"""A run of a study: the configuration of ``trainers.train``, trained in this process, and the numbers it leaves."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal, TypedDict

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moegeo_router.loggers import Logger, NullLogger
from moegeo_router.loggers.base import Level
from trainers import build
from trainers.data.base import Data
from trainers.loop import Interrupted, NonFiniteError, Trainer
from trainers.probes import build_probes, evaluate_probes, probe_scalars
from trainers.progress import Progress, Silent
from trainers.studies.setpoints import largest_weights

#: What every run of a study begins with; a run's own overrides come after and win.
BASE = (
    "name=study",
    "directory=study",
    "resume=never",
    "device=cpu",
    "threads=1",
    "logger=jsonl",
    "loop.checkpoint_every=0",
    "controller=off",
    "geometry.per_layer=true",
    "geometry.pictures_every=0",
    "geometry.on_error=raise",
)

#: Steps at the end of a run that its training numbers are the mean of.
LAST_STEPS = 20

#: Points of a run's curve, at most.
CURVE_POINTS = 100

#: Columns of a curve, and the scalars of the log that they are means of.
CURVE = {
    "loss": "train/loss",
    "max_violation": "geometry/max_violation",
    "dead_fraction": "geometry/dead_fraction",
    "dispersion": "geometry/dispersion_1",
}

#: Scalars whose mean over the whole training is kept, where the log has them.
OVER_TRAINING = ("geometry/movement", "geometry/movement_next", "geometry/limited")


class StudyError(ValueError):
    """A study that cannot be run or continued as it was asked for."""


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        key: its name in the rows file, unique in the study.
        overrides: of the configuration, as on the command line of ``trainers.train``.
        labels: what the study's report sorts it by.
        weight: how long it takes, in any unit that the runs of a study share: for the time left.
    """

    key: str
    overrides: Sequence[str]
    labels: Mapping[str, Any]
    weight: float = 1.0


class Outcome(TypedDict):
    """What became of a run: part of its row."""

    status: Literal["done", "diverged", "failed"]
    reason: str | None
    results: dict[str, float | None]
    curve: dict[str, list[float | None]]
    events: list[dict[str, Any]]
    warnings: list[str]
    data: str | None
    started: str
    seconds: float


def configurations(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Return the whole resolved configuration of each run.

    Raises:
        StudyError: an override that hydra refuses, or a key that is missing.
    """
    folder = str(Path(__file__).parents[2] / "configs")
    found = []
    with initialize_config_dir(folder, version_base="1.3"):
        for run in runs:
            try:
                found.append(json.loads(_composed(tuple(run.overrides))))
            except (HydraException, OmegaConfBaseException) as error:
                reason = str(error).split("Config search path")[0].split("To append to your config")[0]
                raise StudyError(f"{run.key}: {' '.join(reason.split())}") from None
    return found


@cache  # a study in several stages asks more than once, and hydra takes a fifth of a second
def _composed(overrides: tuple[str, ...]) -> str:
    return json.dumps(build.plain(compose("train", [*BASE, *overrides])))


class DataCache:
    """Keeps the data of the last run: the next one mostly trains on the same."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._data: Data | None = None

    def get(self, config: DictConfig) -> Data:
        """Return the data of ``config.data``."""
        key = json.dumps(OmegaConf.to_container(config.data, resolve=True), sort_keys=True)
        if self._data is None or key != self._key:
            self._data = None  # two data sets at once might not fit
            self._data, self._key = build.build(config, "data"), key
        return self._data


class MemoryLogger(NullLogger):
    """Keeps the rows of numbers, those for programs and the alerts, and nothing else.

    Attributes:
        rows: of numbers.
        records: the rows for programs, with their kind as ``event``.
        events: the alerts: ``event`` (their kind), ``step``, ``level``, ``title``, and of their fields the texts,
            numbers and switches, plain JSON.
    """

    def __init__(self) -> None:
        self.rows: list[Mapping[str, float]] = []
        self.records: list[Mapping[str, Any]] = []
        self.events: list[dict[str, Any]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Keep one row of numbers."""
        self.rows.append(dict(metrics))

    def record(self, kind: str, fields: Mapping[str, object], step: int) -> None:
        """Keep a row for programs."""
        self.records.append({**fields, "event": kind})

    def alert(self, kind: str, title: str, text: str, level: Level, fields: Mapping[str, object], step: int) -> None:
        """Keep an alert, without its text."""
        plain = {key: value for key, value in fields.items() if value is None or isinstance(value, str | int | float)}
        numbers = {key: compact(value) for key, value in plain.items() if isinstance(value, float)}
        self.events.append({**plain, **numbers, "event": kind, "step": step, "level": level, "title": title})


def train_run(config: Mapping[str, Any], directory: Path, data: DataCache, progress: Progress | None = None) -> Outcome:
    """Train and validate one run; whatever goes wrong in it is its outcome.

    Args:
        config: its whole resolved configuration.
        directory: an empty folder for its checkpoints, to be deleted afterwards.
        data: gives its data.
        progress: is told every step.

    Returns:
        ``done`` with its results; ``diverged`` (NaN or inf) with those of the training up to there; or ``failed``.

    Raises:
        Interrupted: Ctrl-C or SIGTERM.
        Exception: the disk is full (``disk_is_full``), which is not the run's fault.
    """
    logger, began, outcome = MemoryLogger(), time.perf_counter(), _begun()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            validation = _trained(OmegaConf.create(dict(config)), directory, data, logger, progress, outcome)
            outcome["results"] = {**validation, **_of_training(logger)}
        except Interrupted:
            raise
        except NonFiniteError as error:
            outcome["status"], outcome["reason"] = "diverged", _reason(error, directory)
            outcome["results"] = dict(_of_training(logger))
        except Exception as error:
            if disk_is_full(error):
                raise
            outcome["status"], outcome["reason"] = "failed", _reason(error, directory)
    outcome["results"] = {name: compact(value) for name, value in outcome["results"].items()}
    outcome["curve"] = training_curve(logger.rows)
    outcome["events"] = logger.events
    outcome["warnings"] = _said(caught)
    outcome["seconds"] = round(time.perf_counter() - began, 2)
    return outcome


def disk_is_full(error: BaseException) -> bool:
    """Return whether it is the disk's fault; hydra wraps such errors, and other libraries have their own."""
    texts = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
    return any(text in str(error) for text in texts)


def _begun() -> Outcome:
    return {
        "status": "done",
        "reason": None,
        "results": {},
        "curve": {},
        "events": [],
        "warnings": [],
        "data": None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": 0.0,
    }


def failure(reason: str) -> Outcome:
    """Return the outcome of a run that could not tell its own."""
    outcome = _begun()
    outcome["status"], outcome["reason"] = "failed", reason
    return outcome


def _trained(
    config: DictConfig,
    directory: Path,
    cache: DataCache,
    logger: MemoryLogger,
    progress: Progress | None,
    outcome: Outcome,
) -> dict[str, float]:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data = cache.get(config)
    outcome["data"] = content(data)
    probes = build_probes(config, data)
    trainer = trainer_of(config, data, logger, directory)
    evaluation = trainer.run(progress or Silent())
    if not math.isfinite(evaluation.loss):
        raise NonFiniteError(f"the validation loss is {evaluation.loss}")
    probed = evaluate_probes(trainer.model, probes, trainer.device, config.loop.precision)
    targets = {f"valid/domain/{name}/targets": count for name, count in evaluation.domain_targets.items() if count}
    return evaluation.scalars(per_layer=True) | targets | probe_scalars(probed)


def content(data: Data) -> str:
    """Return what a row says of its data: their name, and a fingerprint of what is in them."""
    return f"{data.name} {data.fingerprint[:16]}"


def trainer_of(config: DictConfig, data: Data, logger: Logger, directory: Path) -> Trainer:
    """Return the trainer of a run from its beginning; its seed decides all but the data.

    Args:
        config: the run's, resolved.
        data: that of ``config.data``.
        logger: takes its numbers.
        directory: for its checkpoints.
    """
    device = build.build_device(config.device)
    torch.manual_seed(config.seed)  # after the data, which may or may not have been built in this run
    model = build.build_model(config, data).to(device)
    return Trainer(
        model,
        data,
        build.build_optimizer(config, model),
        build.build(config, "loop"),
        geometry=build.build(config, "geometry"),
        logger=logger,
        directory=directory,
        device=device,
        fault=build.build_fault(config),
    )


def _of_training(logger: MemoryLogger) -> dict[str, float]:
    return {**training_results(logger.rows), **largest_weights(logger.records)}


def training_results(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return what the log of a training comes to.

    Args:
        rows: of the log, in the order of the steps; those of validations are passed over.

    Returns:
        ``train/steps``; ``train/loss`` and, of the layers' ``dead_fraction``, ``train/dead_share`` (the share of all
        pairs of layer and expert that is dead), means over the last 20 steps; ``train/loss_spike``, the largest rise
        of a step's loss above the mean of the up to 20 steps before it; ``train/tokens_per_second`` and
        ``train/step_ms``, medians; ``train/tokens_seen``, all that were trained on; and ``train/mean/…`` over all steps
        for the names of ``OVER_TRAINING``.
    """
    rows = [row for row in rows if "train/loss" in row]
    results: dict[str, float] = {"train/steps": len(rows)}
    if not rows:
        return results
    losses = [row["train/loss"] for row in rows]
    results["train/loss"] = fmean(losses[-LAST_STEPS:])
    results["train/loss_spike"] = max(
        (loss - fmean(losses[max(0, i - LAST_STEPS) : i]) for i, loss in enumerate(losses) if i), default=0.0
    )
    results["train/tokens_per_second"] = median(row["train/tokens_per_second"] for row in rows)
    timed = [row for row in rows if "train/tokens" in row]
    if timed:
        results["train/step_ms"] = median(1000 * row["train/tokens"] / row["train/tokens_per_second"] for row in timed)
        results["train/tokens_seen"] = sum(row["train/tokens"] for row in timed)
    dead = [value for row in rows[-LAST_STEPS:] for key, value in row.items() if _is_dead_fraction_of_a_layer(key)]
    if dead:
        results["train/dead_share"] = fmean(dead)
    for name in OVER_TRAINING:
        if values := [row[name] for row in rows if name in row]:
            results[f"train/mean/{name}"] = fmean(values)
    return results


def training_curve(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float | None]]:
    """Return the course of a training at up to 100 points, in columns.

    Args:
        rows: of the log, in the order of the steps; those of validations are passed over.

    Returns:
        ``steps`` and ``tokens`` seen up to the point, and the means since the point before of ``CURVE``: ``loss``;
        ``max_violation`` and ``dead_fraction``, those of the worst layer; ``dispersion`` (in its form of one pass,
        ``dispersion_1``). None where the log has none. Empty without a step.
    """
    rows = [row for row in rows if "train/loss" in row]
    points = min(CURVE_POINTS, len(rows))
    curve: dict[str, list[float | None]] = {} if not points else {name: [] for name in ("steps", "tokens", *CURVE)}
    begin, tokens = 0, 0.0
    for point in range(points):
        end = round((point + 1) * len(rows) / points)
        since, begin = rows[begin:end], end
        tokens += sum(row.get("train/tokens", 0.0) for row in since)
        curve["steps"].append(end)
        curve["tokens"].append(round(tokens))
        for name, scalar in CURVE.items():
            values = [row[scalar] for row in since if math.isfinite(row.get(scalar, math.nan))]
            curve[name].append(round(fmean(values), 5) if values else None)
    return curve


def _is_dead_fraction_of_a_layer(key: str) -> bool:
    # Not geometry/dead_fraction, which is that of the worst layer.
    return re.fullmatch(r"geometry/[^/]+/dead_fraction", key) is not None


def compact(value: float | None) -> float | None:
    """Return a number with the seven digits that fp32 has; JSON knows no NaN and no inf, they become None."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.7g}")


def _reason(error: BaseException, directory: Path) -> str:
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    kind = "" if isinstance(error, NonFiniteError) else f"{type(error).__name__}: "
    # The folder is gone when somebody reads this.
    text = re.sub(rf"; saved {re.escape(str(directory))}\S*", "", str(error)).replace(
        str(directory), "the run's folder"
    )
    return f"{kind}{' '.join(text.split())}"[:500]


def _said(caught: Iterable[warnings.WarningMessage]) -> list[str]:
    passing = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)  # of libraries, not of this run
    lines = [str(entry.message).splitlines()[0][:300] for entry in caught if not issubclass(entry.category, passing)]
    return list(dict.fromkeys(lines))
