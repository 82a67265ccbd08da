"""Train a mixture-of-experts model: ``python -m trainers.train [router=polar] [data=stdlib] [model=language] …``."""

from __future__ import annotations

import importlib.metadata
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import hydra
import torch
from omegaconf import DictConfig

import moegeo_router as mg
from moegeo_router.loggers.jsonl import read_jsonl
from trainers import build, checkpoint
from trainers.checkpoint import Checkpoint
from trainers.data.base import Data, require_integer
from trainers.loop import Trainer
from trainers.probes import build_probes, evaluate_probes, probe_lines, probe_scalars
from trainers.progress import for_terminal
from trainers.report import print_report

#: A run's name is that of its folder.
NAME = re.compile(r"\w[\w.-]*")

#: What may differ between a run and its continuation.
FREE_KEYS = (
    "name",
    "directory",
    "resume",
    "device",
    "threads",
    "logger",
    "loop.checkpoint_every",
    "loop.keep_checkpoints",
    "loop.eval_every",
    # Where the data lie; what they are is in their fingerprint.
    "data.root",
    "data.path",
    # A finished run can be asked for more of them.
    "probes",
)


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(config: DictConfig) -> None:
    """Run with the composed configuration."""
    build.run_command(train, config)


def train(config: DictConfig) -> None:
    """Build, resume if there is something to resume, train, and print the final table.

    Raises:
        ValueError: settings that do not fit each other, or a run folder that holds another run.
    """
    if not NAME.fullmatch(str(config.name)):
        raise ValueError(f"name must be letters, digits, '.', '_' or '-', got {config.name!r}")
    config.name = str(config.name)  # YAML reads 7 and nan as numbers
    directory = Path(config.directory)
    if config.threads is not None:
        torch.set_num_threads(require_integer("threads", config.threads, 1))
    torch.manual_seed(require_integer("seed", config.seed, 0))
    device = build.build_device(config.device)
    loop = build.build(config, "loop")
    data: Data = build.build(config, "data")
    print(data.describe())
    baseline = data.baseline()  # before anything is written: it wants a train split, as the run does
    probes = build_probes(config, data)
    model = build.build_model(config, data).to(device)
    optimizer = build.build_optimizer(config, model)
    geometry = build.build(config, "geometry")
    saved = _saved_run(directory / "checkpoints", config.resume)
    if saved is not None:
        _check_same_run(build.plain(config), saved.meta["config"])
        if saved.meta["data"] != data.fingerprint:
            raise ValueError(f"the run folder holds a run on other data than {data.name} is now: take another name=")
    _keep_tokenizer(directory, data)
    logger, how_to_open, run_id = build.build_logger(
        config,
        directory,
        resume_step=None if saved is None else saved.step,
        run_id=None if saved is None else saved.meta["wandb_run_id"],
    )
    exit_code = 1
    try:
        meta = {"config": build.plain(config), "wandb_run_id": run_id, "versions": _versions()}
        trainer = Trainer(
            model,
            data,
            optimizer,
            loop,
            geometry=geometry,
            logger=logger,
            directory=directory,
            device=device,
            meta=meta,
            fault=build.build_fault(config),
        )
        if saved is not None:
            trainer.restore(saved)
            print(f"continuing {config.name} after step {saved.step}")
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{parameters:,} parameters, {loop.steps} steps, on {device}; run folder {directory}")
        finished = trainer.step >= loop.steps
        evaluation = trainer.run(for_terminal(loop.steps, trainer.step))
        probed = evaluate_probes(model, probes, device, loop.precision)
        if probed and not finished:
            logger.log(probe_scalars(probed), trainer.step)
        exit_code = 0
    finally:
        logger.close(exit_code)
    rows = read_jsonl(directory / "metrics.jsonl")
    print_report(
        evaluation,
        baseline,
        tokens_per_second=_median_speed(rows),
        how_to_open=how_to_open,
        heterogeneity=_last_heterogeneity(rows),
        probes=probe_lines(probed),
    )


def _saved_run(directory: Path, resume: str) -> Checkpoint | None:
    if resume not in ("auto", "never"):
        raise ValueError(f"resume must be auto or never, got {resume!r}")
    saved, damaged = checkpoint.latest(directory)
    for reason in damaged:
        print(f"damaged checkpoint passed over: {reason}")
    if resume == "never" and (saved is not None or damaged):
        raise ValueError(f"resume=never, but {directory} holds checkpoints: take another name=")
    if saved is None and damaged:
        raise ValueError(f"every checkpoint in {directory} is damaged: take another name= to start anew")
    return saved


def _check_same_run(config: dict[str, Any], saved: dict[str, Any]) -> None:
    now, then = flat_settings(config), flat_settings(saved)
    changed = [
        f"{key}: {then.get(key)} then, {now.get(key)} now"
        for key in sorted(then)  # a key that came later did not exist then
        if now.get(key) != then.get(key) and not any(key == k or key.startswith(f"{k}.") for k in FREE_KEYS)
    ]
    if changed:
        raise ValueError(
            f"the run folder holds a run with other settings ({'; '.join(changed[:5])}): take another name="
        )


def flat_settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a configuration with names like ``loop.steps``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _keep_tokenizer(directory: Path, data: Data) -> None:
    tokenizer_json = getattr(data, "tokenizer_json", None)
    if tokenizer_json is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(tokenizer_json)


def _versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "geoopt")}
    return versions | {"moegeo_router": mg.__version__}


def _last_heterogeneity(rows: list[dict[str, Any]], steps: int = 20) -> dict[str, float]:
    """Return the mean FHS of each layer over the last training steps, where the log has it."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in [row for row in rows if "train/loss" in row][-steps:]:
        for key, value in row.items():
            if match := re.fullmatch(r"geometry/([^/]+)/fhs", key):
                found[match[1]].append(value)
    return {layer: fmean(values) for layer, values in found.items()}


def _median_speed(rows: list[dict[str, Any]]) -> float | None:
    speeds = [row["train/tokens_per_second"] for row in rows if "train/tokens_per_second" in row]
    return None if not speeds else sorted(speeds)[len(speeds) // 2]


if __name__ == "__main__":
    build.check_overrides("train")
    main()
