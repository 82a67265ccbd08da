"""The training loop: step after step, watched, saved, and continued after a kill as if nothing had happened."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import moegeo_router as mg
from moegeo_router.loggers import Logger
from trainers import checkpoint as checkpoints
from trainers.checkpoint import Checkpoint
from trainers.data.base import Batch, Data
from trainers.evaluation import Evaluation, autocast, evaluate, target_losses
from trainers.faults import Fault
from trainers.models.moe import ModelOutput
from trainers.observation import token_values
from trainers.optimizers import set_learning_rates
from trainers.priors import update_priors
from trainers.progress import Progress

PRECISIONS = ("fp32", "tf32", "bf16")

#: Steps in a row that the controller's guard may skip, before the run stops.
MAX_SKIPPED = 10


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how a run trains.

    Attributes:
        steps: optimizer steps of the whole run.
        warmup: steps of linear warm-up of the learning rates.
        final_lr: factor on the learning rates at the end of the cosine.
        clip_norm: the gradient's norm is clipped to this.
        precision: ``"fp32"``, ``"tf32"`` (fp32 with TF32 products on an accelerator) or ``"bf16"`` (autocast).
        eval_every: validate every so many steps; 0: only at the end.
        checkpoint_every: save every so many steps; 0: only at the start, the end and when stopped.
        keep_checkpoints: how many checkpoints stay.

    Raises:
        ValueError: a value out of range.
    """

    steps: int = 1000
    warmup: int = 50
    final_lr: float = 0.1
    clip_norm: float = 1.0
    precision: str = "fp32"
    eval_every: int = 0
    checkpoint_every: int = 200
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("warmup", 0), ("eval_every", 0), ("checkpoint_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"loop.{name} must be at least {least}, got {getattr(self, name)}")
        if self.keep_checkpoints < 1:
            raise ValueError(f"loop.keep_checkpoints must be at least 1, got {self.keep_checkpoints}")
        if not (self.clip_norm > 0 and 0 <= self.final_lr <= 1):
            raise ValueError(
                f"loop needs clip_norm > 0 and 0 <= final_lr <= 1, got {self.clip_norm} and {self.final_lr}"
            )
        if self.precision not in PRECISIONS:
            raise ValueError(f"loop.precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")


class NonFiniteError(RuntimeError):
    """NaN or inf in a step, which was not taken, or in the weights after one."""


class Interrupted(RuntimeError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved itself."""


class Trainer:
    """Trains a model and keeps everything a resumed run needs.

    Args:
        model: a model of ``trainers.models``, on ``device``.
        data: what it trains on; a batch is a pure function of the step.
        optimizer: as ``trainers.optimizers`` builds it.
        config: the loop.
        geometry: what is watched and regularized, and who steps the routers.
        logger: where scalars and events go.
        directory: the run's folder; checkpoints go to ``directory/checkpoints``.
        device: where to train.
        meta: plain JSON that a resumed run must find unchanged or wants to keep (configuration, wandb's run id).
        fault: is put into the run on purpose; None: none.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        optimizer: Optimizer,
        config: LoopConfig,
        *,
        geometry: mg.GeometryConfig,
        logger: Logger,
        directory: Path,
        device: torch.device,
        meta: Mapping[str, Any] | None = None,
        fault: Fault | None = None,
    ) -> None:
        self.model, self.data, self.optimizer, self.config = model, data, optimizer, config
        self.logger, self.directory, self.device, self.meta = logger, directory, device, dict(meta or {})
        self.step, self.fault = 0, fault or Fault()
        self._skipped = 0
        self.fault.prepare(model, data)
        self.geometry = mg.attach(model, optimizer, replace(geometry, num_domains=len(data.domains)))
        torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")

    def run(self, progress: Progress) -> Evaluation:
        """Train to the last step, then evaluate; a finished run is only evaluated.

        Raises:
            NonFiniteError: NaN or inf in the loss, a layer's logits, the gradient or the weights; the state is saved.
            Interrupted: asked to stop; the state is saved.
            Exception: whatever the data, the model or the logger raise; the state is saved.
        """
        if self.step >= self.config.steps:
            return self._validated()
        if self.step == 0:
            self.save()  # from here on the folder says what it holds, and a kill before the next save loses little
        with stop_requests() as stop, progress:
            try:
                self._train(stop, progress)
                evaluation = self._evaluate()
            except (NonFiniteError, Interrupted):
                raise  # saved where they belong
            except Exception:
                with suppress(Exception):  # the first error is the one to tell
                    self.save()
                raise
            # Last: a checkpoint of the last step says that the log is complete.
            self.save()
        return evaluation

    def _train(self, stop: threading.Event, progress: Progress) -> None:
        while self.step < self.config.steps:
            started = time.perf_counter()
            try:
                batch = self.fault.batch(self.step, self.data.train_batch(self.step), self.data)
                scalars = self.train_step(batch)
            except NonFiniteError as error:
                raise self._saved_non_finite(str(error)) from None
            scalars["train/tokens_per_second"] = scalars["train/tokens"] / (time.perf_counter() - started)
            self.logger.log(scalars, self.step)
            self.geometry.log_pictures(self.logger, self.step)
            for event in self.geometry.log_control(self.logger, self.step):
                progress.mark(self.step, event.line)
            progress.update(self.step, scalars)
            if self.step == self.config.steps:
                return
            if self._due(self.config.eval_every):
                self._evaluate()
            if self._due(self.config.checkpoint_every):
                self.save()
            if stop.is_set():
                raise Interrupted(f"stopped after step {self.step}; saved {self.save()}")

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Take one optimizer step on ``batch`` and return its scalars.

        Raises:
            ValueError: the batch has no target that is not padding.
            NonFiniteError: NaN or inf; nothing was changed.
        """
        if not bool(batch.mask.any()):
            raise ValueError(f"step {self.step}: the batch has no targets, every position is padding")
        padded = not bool(batch.mask.all())
        batch = batch.to(self.device)
        scale = self.fault.learning_rate(
            self.step, steps=self.config.steps, warmup=self.config.warmup, final=self.config.final_lr
        )
        set_learning_rates(self.optimizer, scale)
        mask = batch.mask if padded else None
        with autocast(self.config.precision, self.device), self.geometry.tokens(mask, domains=batch.domains):
            output: ModelOutput = self.model(batch.inputs)
        loss = (target_losses(output, batch) * batch.mask).sum() / batch.mask.sum()
        self.geometry.record_loss(loss)
        total = loss if self.geometry.config.inject else loss + self.geometry.loss()
        total.backward()
        self.fault.after_backward(self.step, self.model)
        norm = nn.utils.get_total_norm(p.grad for p in self.model.parameters() if p.grad is not None)
        scalars = {"train/loss": float(loss.detach()), "train/grad_norm": float(norm)}
        broken = not all(map(_is_finite, scalars.values()))
        self._skipped = self._skipped + 1 if broken else 0
        if broken and not self._may_skip():
            place = _non_finite_place(output, scalars, self.model)
            self._zero_grad()
            raise NonFiniteError(f"{place} at step {self.step}; the step was not taken")
        nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip_norm, norm)
        self.optimizer.step()
        if not broken:
            update_priors(self.model, output.routing, mask, lr_scale=scale)
        self._zero_grad()
        self.fault.after_step(self.step, self.model, self.optimizer)
        self.step += 1
        # Of an image, the model sees a token a patch.
        tokens = len(next(iter(output.routing.values())).logits)
        seen = tokens if mask is None else int(token_values(mask, tokens).sum())
        scalars |= {"train/tokens": float(seen), "train/lr_scale": scale}
        return scalars | self.geometry.metrics()

    def _may_skip(self) -> bool:
        """Return whether a broken step can be passed over: the controller guards, and the weights are sound."""
        few = self._skipped <= MAX_SKIPPED
        return self.geometry.guarded and few and _first_non_finite(self.model.named_parameters()) is None

    def save(self) -> Path:
        """Save everything a resumed run needs; return the checkpoint's folder.

        Raises:
            NonFiniteError: the weights hold NaN or inf; they are saved, but not where a resumed run looks.
        """
        name = _first_non_finite(self.model.named_parameters())
        if name is not None:
            raise self._saved_non_finite(f"NaN or inf in {name} after step {self.step}")
        return self._write("checkpoints")

    def _write(self, folder: str) -> Path:
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        state = Checkpoint(
            step=self.step,
            model=self.model.state_dict(),
            training={
                "optimizer": self.optimizer.state_dict(),
                "geometry": self.geometry.state_dict(),
                "rng": rng,
            },
            meta=self.meta | {"data": self.data.fingerprint},
        )
        return checkpoints.save(self.directory / folder, state, keep=self.config.keep_checkpoints)

    def restore(self, state: Checkpoint) -> None:
        """Continue from a checkpoint of the same model, optimizers and data.

        Raises:
            ValueError: the checkpoint is of another corpus, model or optimizer.
        """
        if state.meta.get("data") != self.data.fingerprint:
            raise ValueError(
                f"the checkpoint of step {state.step} was trained on other data than {self.data.name} is now"
            )
        try:
            self.model.load_state_dict(state.model)
            checkpoints.load_optimizer(self.optimizer, state.training["optimizer"])
            self.geometry.load_state_dict(state.training["geometry"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"the checkpoint of step {state.step} is of another model or optimizer: {reason}"
            ) from None
        torch.set_rng_state(state.training["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state.training["rng"]:
            torch.cuda.set_rng_state(state.training["rng"]["cuda"], self.device)
        self.step = state.step

    def _evaluate(self) -> Evaluation:
        evaluation = self._validated()
        self.logger.log(evaluation.scalars(self.geometry.config.per_layer), self.step)
        return evaluation

    def _validated(self) -> Evaluation:
        data = self.fault.validation(self.step, self.data)
        return evaluate(self.model, data, self.device, self.config.precision)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _saved_non_finite(self, reason: str) -> NonFiniteError:
        """Save the state, log the event, and return the error to raise."""
        # Weights that hold NaN themselves must not become the checkpoint a resumed run starts from.
        healthy = _first_non_finite(self.model.named_parameters()) is None
        saved = self._write("checkpoints" if healthy else "non_finite")
        self.logger.event("non_finite", {"reason": reason, "checkpoint": str(saved)}, self.step)
        return NonFiniteError(f"{reason}; saved {saved}")


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event, so that the running step can end; a second one interrupts."""
    event = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)

    def request(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(number, former[number])

    if threading.current_thread() is not threading.main_thread():
        yield event  # Python delivers signals to the main thread only
        return
    former: dict[int, Any] = {number: signal.signal(number, request) for number in signals}
    try:
        yield event
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _is_finite(value: float) -> bool:
    return value - value == 0


def _first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    return next((name for name, tensor in tensors if not bool(tensor.isfinite().all())), None)


def _non_finite_place(output: ModelOutput, scalars: Mapping[str, float], model: nn.Module) -> str:
    layer = _first_non_finite((name, record.logits) for name, record in output.routing.items())
    if layer is not None:
        return f"NaN or inf in the router logits of {layer}"
    if not _is_finite(scalars["train/loss"]):
        return f"the loss is {scalars['train/loss']}, with finite router logits,"
    name = _first_non_finite((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    if name is not None:
        return f"the loss is finite, NaN or inf in the gradient of {name}"
    return f"the gradient norm is {scalars['train/grad_norm']}, with finite gradients,"
