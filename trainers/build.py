"""From a composed configuration to the objects of a run. Hydra ends here: what is built knows nothing of it."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.optim import Optimizer

import moegeo_router as mg
from moegeo_router.loggers import JSONLLogger, Logger, MultiLogger, TensorBoardLogger, WandbLogger
from trainers.data.base import Data, LanguageData, VisionData
from trainers.faults import Fault
from trainers.loop import Interrupted, NonFiniteError
from trainers.models.language import LanguageModel
from trainers.models.routers import HashRouter
from trainers.models.vision import VisionModel


def plain(config: DictConfig) -> dict[str, Any]:
    """Return the configuration as plain JSON, every interpolation resolved."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def build(config: DictConfig, group: str) -> Any:
    """Return what the group's ``_target_`` makes of its keys.

    Raises:
        ValueError: a number, text or switch where its signature wants another; YAML itself has no types.
    """
    parameters = inspect.signature(get_object(config[group]._target_)).parameters
    for key, value in config[group].items():
        if key in parameters:
            _check_type(f"{group}.{key}", value, parameters[key].annotation)
    return instantiate(config[group])


def _check_type(name: str, value: object, annotation: object) -> None:
    # As text, because a module's annotations may be text, of names that only a type checker imports.
    declared = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    expected, got = set(declared.split(" | ")), type(value).__name__.removesuffix("Type")
    if expected <= {"int", "float", "bool", "str", "None"} and got not in expected:
        if got == "int" and "float" in expected:
            return
        raise ValueError(f"{name} must be {declared.replace('None', 'null').replace(' | ', ' or ')}, got {value!r}")


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
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}: this machine has no CUDA device")
    return device


def build_model(config: DictConfig, data: Data) -> nn.Module:
    """Return the model of ``config.model`` with its routers and priors (``config.router``, ``.prior``) for ``data``.

    Raises:
        ValueError: the model and the data are for different tasks, or sizes do not fit.
    """
    vision = get_object(config.model._target_) is VisionModel
    if vision != (data.task == "vision"):  # asked first: the model's keys may refer to those of its data
        wanted = "vision, e.g. data=digits" if vision else "language, e.g. data=stdlib"
        raise ValueError(f"this model needs data of task {wanted}; {data.name} is of task {data.task}")
    factory: partial[nn.Module] = build(config, "model")
    router = build(config, "router")
    if get_object(config.router._target_) is HashRouter:
        router = partial(router, id_counts=_id_counts(config, data))
    prior = build(config, "prior") if config.get("prior") else None  # none.yaml is empty, old runs have no such group
    if vision:
        images: VisionData = data  # type: ignore[assignment]
        return factory(images.num_classes, images.image_shape, router, prior)
    text: LanguageData = data  # type: ignore[assignment]
    assert factory.func is LanguageModel
    return factory(text.vocab_size, router, prior)


def _id_counts(config: DictConfig, data: Data) -> Tensor:
    """Return how often a router meets each id: the tokens of a text, and equally often the positions of an image."""
    if data.task == "vision":
        _, height, width = data.image_shape  # type: ignore[attr-defined]
        return torch.ones(max(1, (height // config.model.patch) * (width // config.model.patch)))
    return data.token_counts()  # type: ignore[attr-defined]


def build_optimizer(config: DictConfig, model: nn.Module) -> Optimizer:
    """Return the optimizer of ``config.optimizer`` for ``model``."""
    return build(config, "optimizer")(model)


def build_fault(config: DictConfig) -> Fault | None:
    """Return the fault of ``config.fault``, None without one."""
    return build(config, "fault") if config.get("fault") else None  # as with the prior


def control(**fields: Any) -> mg.ControlConfig:
    """Return the controller's configuration; what is null is as by default, rows and set-points are dicts.

    (An empty dict in YAML could not be replaced on the command line.)

    Raises:
        ValueError: an unknown key, or as in ``ControlConfig``, ``Threshold`` and ``SetPoint``.
    """
    return mg.ControlConfig.of_fields({name: value for name, value in fields.items() if value is not None})


def build_logger(
    config: DictConfig, directory: Path, *, resume_step: int | None, run_id: str | None
) -> tuple[Logger, list[str], str | None]:
    """Return the loggers of a run: JSON lines always, TensorBoard if it is wanted, wandb unless it is disabled.

    Args:
        config: the whole configuration.
        directory: the run's folder.
        resume_step: the step a resumed run continues from; later rows of the killed run are dropped.
        run_id: wandb's id of the run to continue.

    Returns:
        The logger, lines that say how to open the logs, and wandb's run id.

    Raises:
        ValueError: ``logger.tensorboard`` is not true or false, or as in the loggers.
    """
    _check_type("logger.tensorboard", config.logger.tensorboard, "bool")
    path = directory / "metrics.jsonl"
    loggers: list[Logger] = [JSONLLogger(path, resume_step=resume_step)]
    how_to_open = [f"{path}: one JSON object a step"]
    try:
        if config.logger.tensorboard:
            loggers.append(tensorboard := TensorBoardLogger(directory / "tensorboard", resume_step=resume_step))
            how_to_open.append(tensorboard.how_to_open)
        if config.logger.wandb != "disabled":
            wandb_logger = WandbLogger(
                project=config.logger.project,
                name=config.name,
                directory=directory,
                config=plain(config),
                mode=config.logger.wandb,
                run_id=run_id,
            )
            loggers.append(wandb_logger)
            how_to_open.append(wandb_logger.how_to_open)
            run_id = wandb_logger.run_id
    except BaseException:
        MultiLogger(loggers).close(exit_code=1)
        raise
    return loggers[0] if len(loggers) == 1 else MultiLogger(loggers), how_to_open, run_id


def check_overrides(config_name: str) -> None:
    """Say a mistaken key or choice on the command line in one line, and exit with status 2; hydra takes ten.

    What only hydra itself understands (flags, sweeps) is left to it.
    """
    arguments = sys.argv[1:]
    if any(argument.startswith("-") for argument in arguments):
        return
    folder = str(Path(__file__).parents[1] / "configs")
    with initialize_config_dir(folder, version_base="1.3"):
        try:
            compose(config_name, arguments)
        except HydraException as error:
            lines = [str(error), *([str(error.__cause__)] if error.__cause__ else [])]
            unknown = re.search(r"Could not override '([^']+)'", lines[0])
            if unknown is None:
                _leave(lines[0].split("Config search path")[0], 2)
            else:
                _leave(f"unknown key {unknown[1]}{_nearest(unknown[1], plain_keys(compose(config_name)))}", 2)


def plain_keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Return every key of a configuration with its dots, interpolations unresolved."""
    keys = []
    for key in map(str, config):
        keys.append(f"{prefix}{key}")
        if OmegaConf.is_dict(config._get_node(key)):
            keys += plain_keys(config[key], f"{prefix}{key}.")
    return keys


def _nearest(key: str, keys: list[str]) -> str:
    close = difflib.get_close_matches(key, keys, n=1)
    return f"; did you mean {close[0]}?" if close else "; --help lists the keys"


def run_command(main: Callable[[DictConfig], None], config: DictConfig) -> None:
    """Run ``main`` and turn what a user can cause into one clear line on stderr and an exit status.

    Exit status 2: a wrong setting or file; 3: NaN or inf (saved); 130: stopped by the user (saved, if it was the
    first Ctrl-C of the training).
    """
    try:
        main(config)
    except KeyboardInterrupt:
        _leave("interrupted; what was saved before is intact", 130)
    except Interrupted as error:
        _leave(f"{error}. The same command with name={config.name} continues.", 130)
    except NonFiniteError as error:
        _leave(str(error), 3)
    except InstantiationException as error:
        cause = error.__cause__
        if os.environ.get("MOEGEO_TRACEBACK"):
            raise
        if isinstance(cause, ValueError | OSError | TypeError | ImportError):
            _leave(str(cause), 2)
        raise
    except (ValueError, OSError, ImportError, OmegaConfBaseException) as error:
        if os.environ.get("MOEGEO_TRACEBACK"):
            raise
        # OmegaConf appends the key's type and its parents' in lines of their own.
        _leave(str(error).splitlines()[0] if isinstance(error, OmegaConfBaseException) else str(error), 2)


def _leave(message: str, status: int) -> None:
    line = " ".join(message.split())
    print(f"error: {line}" if status == 2 else line, file=sys.stderr)
    sys.exit(status)
