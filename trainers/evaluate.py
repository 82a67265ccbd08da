"""Evaluate a run on any data: ``python -m trainers.evaluate run=runs/demo data=wikitext2``."""

from __future__ import annotations

from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from trainers import build, checkpoint
from trainers.data.base import Data, require_integer
from trainers.evaluation import evaluate
from trainers.report import print_report


@hydra.main(version_base="1.3", config_path="../configs", config_name="evaluate")
def main(config: DictConfig) -> None:
    """Run with the composed configuration."""
    build.run_command(evaluate_run, config)


def evaluate_run(config: DictConfig) -> None:
    """Load the newest intact checkpoint of ``config.run`` and evaluate it on ``config.data``.

    Raises:
        FileNotFoundError: the run has no checkpoint.
        ValueError: every checkpoint is damaged, or the data do not fit the model.
    """
    run = Path(config.run)
    if config.threads is not None:
        torch.set_num_threads(require_integer("threads", config.threads, 1))
    saved, damaged = checkpoint.latest(run / "checkpoints")
    for reason in damaged:
        print(f"damaged checkpoint passed over: {reason}")
    if saved is None:
        raise FileNotFoundError(f"run={run}: no intact checkpoint in {run / 'checkpoints'}")
    trained = OmegaConf.create(saved.meta["config"])
    with open_dict(config):
        # The model's own tokenizer and window, whatever the data's defaults are.
        if "tokenizer" in config.data and (run / "tokenizer.json").is_file():
            config.data.tokenizer = str(run / "tokenizer.json")
        if "length" in config.data and "length" in trained.data:
            config.data.length = trained.data.length
    device = build.build_device(config.device)
    data: Data = build.build(config, "data")
    print(data.describe())
    model = build.build_model(trained, data)
    try:
        model.load_state_dict(saved.model)
    except RuntimeError as error:
        raise ValueError(f"the model of {run} does not fit data={data.name}: {error}") from None
    evaluation = evaluate(model.to(device), data, device, trained.loop.precision)
    print(f"{run} after step {saved.step}, on {data.name}")
    print_report(evaluation, None, tokens_per_second=None, how_to_open=[])


if __name__ == "__main__":
    build.check_overrides("evaluate")
    main()
