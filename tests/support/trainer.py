"""Tiny MoE models in the real ``Trainer`` of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import moegeo_router as mg

from . import tiny_transformers
from .tiny_families import VOCABULARY

LENGTH = 8
#: Strong enough to be seen in the weights after a few steps.
STRONG = mg.Regularizers(fsi=1.0, z=0.1)


def build(family: str = "Qwen3Moe", **options: Any) -> Any:
    return tiny_transformers.build(family, **options)


def examples(count: int = 16, padded: bool = False) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1::3, LENGTH // 2 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return [{"input_ids": i, "attention_mask": m, "labels": t} for i, m, t in zip(ids, mask, labels, strict=True)]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    known: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
    }
    return TrainingArguments(**known | options)


def trainer(
    folder: Path,
    model: Any = None,
    data: Any = None,
    callbacks: Any = None,
    cls: type[Trainer] = Trainer,
    **options: Any,
) -> Trainer:
    known = {name: options.pop(name) for name in ("compute_loss_func", "eval_dataset") if name in options}
    model, data = build() if model is None else model, examples() if data is None else data
    return cls(model, arguments(folder, **options), train_dataset=data, callbacks=callbacks, **known)


def with_geometry(
    folder: Path, *args: Any, config: Any = None, **options: Any
) -> tuple[Trainer, mg.MoEGeometryCallback]:
    own = {name: options.pop(name) for name in ("watch", "manifold", "logger") if name in options}
    made = trainer(folder, *args, **options)
    callback = mg.MoEGeometryCallback(made, config, **own)
    made.add_callback(callback)
    return made, callback


class AtStep(TrainerCallback):
    """Calls a function at the end of one optimizer step, or before the one that follows it."""

    def __init__(self, step: int, function: Any, after: bool = False) -> None:
        self.step, self.function, self.after = step, function, after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.after:
            self.function(control)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.after:
            self.function(control)


def gates(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith("gate.weight")}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of any weight; of none with the same names."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def as_found(run: Any) -> None:
    """Check that a run has left the model, the optimizer and the trainer as they were."""
    assert hooks(run.model) == 0
    assert all(type(parameter) is nn.Parameter for parameter in run.model.parameters())
    optimizer = run.optimizer.optimizer
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert not {"training_step", "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler"} & set(vars(run))


def lines(trainer: Trainer) -> list[dict[str, Any]]:
    """The training's lines of the log."""
    return [line for line in trainer.state.log_history if "loss" in line]
