"""transformers' ``Trainer``: its runs with geometry, by a callback."""

from __future__ import annotations

import inspect
import io
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..attach import Geometry, attach
from ..config import GeometryConfig
from ..control.loop import tell
from ..loggers import Logger
from ..losses import Regularizers
from ..observe.build import unwrapped
from ..routers.convert import geometrize_sites
from ..routers.find import RouterSite, find_routers
from ..routers.tag import take_off_manifold
from ..version import __version__

try:
    import accelerate.optimizer  # noqa: F401
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "MoEGeometryCallback needs transformers and accelerate: pip install 'moegeo-router[transformers]'"
    ) from error

from .trainer_log import LoggerOfStep, RunLog
from .trainer_weights import WholeCheckpoints

FORMAT = 1
#: The file in a checkpoint's folder; ranks other than the first have one with their number in it.
STATE = "geometry.pt"

_HOW = "trainer = Trainer(...); trainer.add_callback(mg.MoEGeometryCallback(trainer)); trainer.train()"


class MoEGeometryCallback(TrainerCallback):
    """Trains a MoE model with geometry in transformers' ``Trainer``.

    While ``train()`` runs, the routers are on a manifold and their step is taken over from the Trainer's optimizer
    (``attach``), the regularizers ride on the graph, and the controller sees the loss. Every line of training logs has
    the scalars of the last optimizer step (``geometry/fsi`` …) before any reporter sees it, and every evaluation those
    of its data (``eval_geometry/fsi`` …). Checkpoints hold ``geometry.pt`` beside ``optimizer.pt``, and
    ``train(resume_from_checkpoint=...)`` goes on from it. However ``train()`` ends, the model, the optimizer and the
    trainer are then as they were.

    Args:
        trainer: the trainer that it is added to.
        config: see ``GeometryConfig``. What the trainer knows replaces what it says: ``inject``, ``accumulation``,
            ``grad_scaler``, ``loss``.
        manifold: ``"polar"`` or ``"euclidean"``, for routers that are on none yet. Others change what the model
            computes: ``geometrize`` it before the trainer is made.
        watch: nothing but metrics and alerts: the training is bit for bit the one without the callback.
        logger: gets the controller's readings, alerts and actions, and the pictures of ``config.pictures_every``, from
            the first process, with the Trainer's steps; one that fails is dropped with a warning. It is not closed.
            ``WandbLogger.of(run, step_metric="train/global_step")`` writes them to the run that the Trainer reports to.
            Or a function that makes one when training begins, of the step that it goes on from, None for a new run
            (``lambda step: JSONLLogger("run.jsonl", resume_step=step)``); that one is closed when ``train()`` ends.

    Attributes:
        geometry: what ``attach`` returned (``limit_speed``, ``events`` …) while ``train()`` runs, else None.

    Raises:
        TypeError: no trainer, or something else in its place; no logger.
        ValueError: an unknown manifold; a sharded model, several devices in one process, or an optimizer that steps
            inside of the backward pass; options that the Trainer or ``watch`` rules out.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=dataset)
        >>> trainer.add_callback(mg.MoEGeometryCallback(trainer))
        >>> trainer.train()
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        config: GeometryConfig | None = None,
        *,
        manifold: Literal["polar", "euclidean"] = "polar",
        watch: bool = False,
        logger: Logger | LoggerOfStep | None = None,
    ) -> None:
        if not isinstance(trainer, Trainer):
            got = "" if trainer is None else f", got {type(trainer).__name__}"
            raise TypeError(f"MoEGeometryCallback takes the trainer that it is added to{got}: {_HOW}")
        self._config = _checked(config, manifold, watch)
        self._log = RunLog(logger)
        if self._config.pictures_every and logger is None:
            raise ValueError("pictures_every needs a logger that takes pictures: MoEGeometryCallback(..., logger=...)")
        _refuse(trainer)
        self.geometry: Geometry | None = None
        self._trainer, self._manifold, self._watch = trainer, manifold, watch
        self._running = False
        self._resumed: str | None = None
        self._tagged: list[RouterSite] = []
        # No event of a callback tells where a run is resumed from, or that it was broken off: only the call does.
        trainer.train = wraps(trainer.train)(partial(self._train, trainer.train))  # type: ignore[method-assign]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach, and go on from the checkpoint's state if there is one.

        Raises:
            TypeError: it was made for another trainer.
            ValueError: what ``attach`` and ``geometrize`` refuse, or a state that is not of this model and version.
        """
        if not self._running:
            raise TypeError(f"this MoEGeometryCallback was made for another trainer: {_HOW}")
        self.detach()  # where the Trainer begins anew with a smaller batch
        model, config = self._trainer.model, self._config_of_run()
        assert model is not None
        self._put_on_manifold(model, config)
        self.geometry = attach(model, self._trainer.optimizer, config)
        if self._resumed is not None:
            self._restore(self.geometry, Path(self._resumed))
        if state.is_world_process_zero:
            self._log.begin(state.global_step, resumed=self._resumed is not None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what the controller saw and did, and the pictures, to the logger if there is one."""
        logger = self._log.logger
        if self.geometry is None or logger is None or not state.is_world_process_zero:
            return
        for event in self.geometry.log_control(logger, state.global_step):
            tell(event)
        self.geometry.log_pictures(logger, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the scalars of the last step to the logs of the training (not to those of evaluations or of its end)."""
        if self.geometry is None or logs is None or "loss" not in logs:
            return
        metrics = self.geometry.metrics()
        logs.update(metrics)
        # The Trainer has copied the line into its history just before.
        state.log_history[-1].update(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detach."""
        self.detach()

    def detach(self) -> None:
        """Leave the model and the optimizer as they were found; ``train()`` does it, however it ends."""
        geometry, self.geometry = self.geometry, None
        if geometry is not None:
            geometry.detach()
        for site in self._tagged:
            take_off_manifold(site.weight)
        self._tagged = []

    def _train(self, train: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the trainer's own ``train`` with what no event offers."""
        trainer = self._trainer
        if self not in trainer.callback_handler.callbacks:  # taken out again
            return train(*args, **kwargs)
        own: dict[str, Callable[..., Any]] = {
            "training_step": self._training_step,
            "evaluation_loop": self._evaluation_loop,
            "_save_optimizer_and_scheduler": self._save,
            "_load_optimizer_and_scheduler": self._load,
            **WholeCheckpoints(trainer).around(),
        }
        with _first(trainer, self), _around(trainer, own):
            self._running, self._resumed, exit_code = True, None, 1
            try:
                result = train(*args, **kwargs)
                exit_code = 0
                return result
            finally:
                self._running = False
                self.detach()
                self._log.end(exit_code)

    def _training_step(self, training_step: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        loss = training_step(*args, **kwargs)
        if self.geometry is not None:
            # However it is scaled (by the items of the batch, the ranks, the number of micro-batches): the Trainer adds
            # up what this returns, and takes the mean over ranks. The controller takes the mean of both.
            self.geometry.record_loss(loss.detach() * self._micro_batches())
        return loss

    def _evaluation_loop(self, evaluation_loop: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Add the scalars of the held-out routing to the metrics of an evaluation: ``eval_geometry/fsi`` …."""
        if self.geometry is None:
            return evaluation_loop(*args, **kwargs)
        prefix = inspect.signature(evaluation_loop).bind(*args, **kwargs).arguments.get("metric_key_prefix", "eval")
        with self.geometry.evaluation() as held_out:
            output = evaluation_loop(*args, **kwargs)
        output.metrics.update({f"{prefix}_{name}": value for name, value in held_out.metrics().items()})
        return output

    def _save(self, save: Callable[[str], None], output_dir: str) -> None:
        save(output_dir)
        if self.geometry is None:
            return
        args, geometry = self._trainer.args, self.geometry.state_dict()
        state = {"format": FORMAT, "version": __version__, "ranks": args.world_size, "geometry": geometry}
        # Where each node saves for itself, each has the file that says how many there are.
        for name in {_name(args.process_index)} | ({STATE} if args.should_save else set()):
            _write(Path(output_dir) / name, state)

    def _load(self, load: Callable[[str | None], None], checkpoint: str | None) -> None:
        load(checkpoint)
        self._resumed = checkpoint

    def _restore(self, geometry: Geometry, folder: Path) -> None:
        args = self._trainer.args
        if not (folder / STATE).exists():
            if args.process_index == 0:
                warnings.warn(
                    f"checkpoint {folder} has no {STATE}: the routers' steps and the controller begin anew",
                    stacklevel=2,
                )
            return
        path, saved = folder / STATE, _read(folder / STATE)
        own = folder / _name(args.process_index)
        # What a rank has summed up since the factors of natural steps were computed is its own.
        if saved.get("ranks") == args.world_size and own.exists():
            path, saved = own, _read(own)
        try:
            geometry.load_state_dict(saved.get("geometry", {}))
        except ValueError as error:
            raise ValueError(f"{path} is not of this run: {error}") from error

    def _micro_batches(self) -> int:
        return self._trainer.current_gradient_accumulation_steps

    def _config_of_run(self) -> GeometryConfig:
        """Return the configuration with what the trainer knows."""
        trainer, config = self._trainer, self._config
        config = replace(config, grad_scaler=trainer.accelerator.scaler, loss=_loss_scale(trainer))
        if self._watch:
            return replace(config, inject=False, accumulation=1, step=None, regularizers=Regularizers.none())
        # The ranks' gradients are averaged, and so are regularizers; the Trainer multiplies its own loss only.
        return replace(config, inject=True, accumulation=self._micro_batches)

    def _put_on_manifold(self, model: nn.Module, config: GeometryConfig) -> None:
        model = unwrapped(model)
        sites = find_routers(model, config.select)
        frozen = [site.name for site in sites if site.frozen]
        if frozen and not self._watch:
            warnings.warn(f"the routers {', '.join(frozen)} are frozen: they are watched, not stepped", stacklevel=2)
        if config.step is None:
            return
        self._tagged = [s for s in sites if s.weight.requires_grad and getattr(s.weight, "manifold", None) is None]
        if self._tagged:
            geometrize_sites(model, self._tagged, self._manifold)


def _checked(config: GeometryConfig | None, manifold: str, watch: bool) -> GeometryConfig:
    if config is not None and not isinstance(config, GeometryConfig):
        raise TypeError(f"config must be a GeometryConfig, got {type(config).__name__}")
    config = config or GeometryConfig()
    if manifold not in ("polar", "euclidean"):
        raise ValueError(
            f"manifold must be 'polar' or 'euclidean', got {manifold!r}: those that change what the model computes are "
            "for mg.geometrize(model, ..., allow_change=True) before the trainer is made"
        )
    if not config.hooks:
        raise ValueError("hooks=False is for loops of one's own: in the Trainer nobody records the routing")
    active = config.regularizers is not None and config.regularizers.active
    if watch and (config.controller == "act" or active or config.bias_speed):
        raise ValueError(
            "watch=True changes nothing: it takes no regularizers, no bias_speed and no controller that acts"
        )
    return config


def _refuse(trainer: Trainer) -> None:
    """Raise a ValueError that says why a trainer's model cannot have geometry, if it cannot."""
    sharded = {
        "FSDP": trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "a model sharded at load time": trainer.is_distributed_loading_by_transformers,
        "tensor parallelism": trainer.get_tp_size() > 1,
        "context parallelism": trainer.get_cp_size() > 1 or trainer.get_sp_size() > 1,
    }
    for name, on in sharded.items():
        if on:
            raise ValueError(f"MoEGeometryCallback does not support {name}: data-parallel models only")
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"MoEGeometryCallback does not support {trainer.args.n_gpu} devices in one process (DataParallel): start "
            "one process a device with torchrun, or make one device visible"
        )
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if "lomo" in optim or "layerwise" in optim:
        raise ValueError(f"optim={optim!r} steps inside of the backward pass, where no router's step can be taken over")


def _loss_scale(trainer: Trainer) -> Any:
    """Return whether the losses of a step's micro-batches are means or parts of one sum, as the Trainer decides it."""
    scaled = trainer.loss_is_scaled_for_ga
    if scaled is None:
        scaled = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
    return "sum" if scaled else "mean"


@contextmanager
def _first(trainer: Trainer, callback: TrainerCallback) -> Iterator[None]:
    """Call ``callback`` before the trainer's other callbacks: what it adds to logs must be there when they report."""
    callbacks = trainer.callback_handler.callbacks
    place = callbacks.index(callback)
    callbacks.insert(0, callbacks.pop(place))
    try:
        yield
    finally:
        if callback in callbacks:
            callbacks.remove(callback)
            callbacks.insert(place, callback)


@contextmanager
def _around(trainer: Trainer, own: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Call our functions with the trainer's methods of these names, in their place, inside."""
    before = {name: vars(trainer)[name] for name in own if name in vars(trainer)}
    for name, function in own.items():
        setattr(trainer, name, partial(function, getattr(trainer, name)))
    try:
        yield
    finally:
        for name in own:
            del vars(trainer)[name]
        vars(trainer).update(before)


def _name(rank: int) -> str:
    return STATE if rank == 0 else STATE.replace(".", f"_{rank}.")


def _write(path: Path, state: dict[str, Any]) -> None:
    """Write a state so that a kill at any moment leaves a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # torch hides a full disk behind an internal error when it writes the file itself
    torch.save(state, buffer)
    partial_path = path.with_name(path.name + ".partial")
    with partial_path.open("wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial_path, path)


def _read(path: Path) -> dict[str, Any]:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or holds more than plain data, which could run code") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        version = saved.get("version") if isinstance(saved, dict) else None
        raise ValueError(f"{path} was saved by another version ({version}), which {__version__} does not read")
    return saved
