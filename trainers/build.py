"""From a composed configuration to the objects of a run. Hydra ends here: what is built knows nothing of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.optim import Optimizer

from moegeo_router.loggers import JSONLLogger, Logger, MultiLogger, WandbLogger
from trainers.data.base import Data, LanguageData, VisionData
from trainers.loop import Interrupted, NonFiniteError
from trainers.models.language import LanguageModel
from trainers.models.vision import VisionModel


def plain(config: DictConfig) -> dict[str, Any]:
    """Return the configuration as plain JSON, every interpolation resolved."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def build_device(name: str) -> torch.device:
    """Return the device called ``name``; ``"auto"`` is the accelerator if there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name}: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}: this machine has no CUDA device")
    return device


def build_model(config: DictConfig, data: Data) -> nn.Module:
    """Return the model of ``config.model`` with the routers of ``config.router`` for the sizes of ``data``.

    Raises:
        ValueError: the model and the data are for different tasks, or sizes do not fit.
    """
    factory: partial[nn.Module] = instantiate(config.model)
    router = instantiate(config.router)
    vision = factory.func is VisionModel
    if vision != (data.task == "vision"):
        wanted = "vision, e.g. data=digits" if vision else "language, e.g. data=stdlib"
        raise ValueError(f"this model needs data of task {wanted}; {data.name} is of task {data.task}")
    if vision:
        images: VisionData = data  # type: ignore[assignment]
        return factory(images.num_classes, images.image_shape, router)
    text: LanguageData = data  # type: ignore[assignment]
    assert factory.func is LanguageModel
    return factory(text.vocab_size, router)


def build_optimizers(config: DictConfig, model: nn.Module) -> list[Optimizer]:
    """Return the optimizers of ``config.optimizer`` for ``model``."""
    return instantiate(config.optimizer)(model)


def build_logger(
    config: DictConfig, directory: Path, *, resume_step: int | None, run_id: str | None
) -> tuple[Logger, list[str], str | None]:
    """Return the loggers of a run: JSON lines always, wandb unless it is disabled.

    Args:
        config: the whole configuration.
        directory: the run's folder.
        resume_step: the step a resumed run continues from; later rows of the killed run are dropped.
        run_id: wandb's id of the run to continue.

    Returns:
        The logger, lines that say how to open the logs, and wandb's run id.
    """
    path = directory / "metrics.jsonl"
    loggers: list[Logger] = [JSONLLogger(path, resume_step=resume_step)]
    how_to_open = [f"{path}: one JSON object a step"]
    if config.logger.wandb == "disabled":
        return loggers[0], how_to_open, run_id
    wandb_logger = WandbLogger(
        project=config.logger.project,
        name=config.name,
        directory=directory,
        config=plain(config),
        mode=config.logger.wandb,
        run_id=run_id,
    )
    return MultiLogger([*loggers, wandb_logger]), [*how_to_open, wandb_logger.how_to_open], wandb_logger.run_id


def run_command(main: Callable[[DictConfig], None], config: DictConfig) -> None:
    """Run ``main`` and turn what a user can cause into one clear line on stderr and an exit status.

    Exit status 2: a wrong setting or file; 3: NaN or inf (saved); 130: stopped by the user (saved).
    """
    try:
        main(config)
    except Interrupted as error:
        _leave(f"{error}. The same command with name={config.name} continues.", 130)
    except NonFiniteError as error:
        _leave(str(error), 3)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError | OSError | TypeError | ImportError):
            _leave(str(cause), 2)
        raise
    except (ValueError, OSError, ImportError, OmegaConfBaseException) as error:
        if os.environ.get("MOEGEO_TRACEBACK"):
            raise
        _leave(str(error), 2)


def _leave(message: str, status: int) -> None:
    print(f"error: {message}" if status == 2 else message, file=sys.stderr)
    sys.exit(status)
