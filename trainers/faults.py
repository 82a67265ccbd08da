"""Faults that are put into a training run on purpose, to see who notices and what helps.

``step`` counts from 0, as in ``Trainer.step``: a fault with ``step: 150`` leaves 150 steps alone.

Shape suffixes: E experts, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moegeo_router.routers import manifold_of
from trainers.data.base import Batch, Data, generator
from trainers.models.moe import MoELayer
from trainers.optimizers import learning_rate_scale


class Fault:
    """Does nothing: the points of a run at which faults act. Faults override those they need."""

    def prepare(self, model: nn.Module, data: Data) -> None:
        """Change a model before its first step; a resumed run then loads its weights over it."""

    def batch(self, step: int, batch: Batch, data: Data) -> Batch:
        """Return what ``step`` trains on in place of ``batch``; a pure function."""
        return batch

    def validation(self, step: int, data: Data) -> Data:
        """Return what a model of ``step`` steps is validated on in place of ``data``."""
        return data

    def learning_rate(self, step: int, *, steps: int, warmup: int, final: float) -> float:
        """Return the factor on the peak learning rates, in place of ``learning_rate_scale``."""
        return learning_rate_scale(step, steps=steps, warmup=warmup, final=final)

    def after_backward(self, step: int, model: nn.Module) -> None:
        """Change the gradients of ``step``."""

    def after_step(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Change the weights that ``step`` has left, or the optimizer's state."""


class Restarts(Fault):
    """The learning rates restart: after the warm-up, several equal cosines from ``peak`` to the end's factor.

    The first cosine begins at 1, as without the fault.

    Args:
        restarts: how many.
        peak: factor on all peak learning rates at each restart.

    Raises:
        ValueError: no restart, or a peak that is not above 0.
    """

    def __init__(self, *, restarts: int = 3, peak: float = 4.0) -> None:
        _require(restarts >= 1, "restarts", "at least 1", restarts)
        _require(peak > 0, "peak", "above 0", peak)
        self.restarts, self.peak = restarts, peak

    def learning_rate(self, step: int, *, steps: int, warmup: int, final: float) -> float:
        """Return the factor of the cosine that ``step`` is in."""
        if step < warmup:
            return super().learning_rate(step, steps=steps, warmup=warmup, final=final)
        length = max(1.0, (steps - warmup) / (self.restarts + 1))
        cycle = min(self.restarts, int((step - warmup) / length))
        within = (step - warmup - cycle * length) / length
        scale = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * within))
        return scale * (self.peak if cycle else 1.0)


class BadInit(Fault):
    """Routers begin with the rows of half their experts nearly alike and one row that most tokens like.

    The second half of the rows is multiplied by ``small``; to row 0 is added what gives it ``favour`` more logit at the
    mean input of the router (of the untrained model on the first batch).

    Args:
        small: factor on the rows of half the experts.
        favour: logits.

    Raises:
        ValueError: a factor that is not above 0.
    """

    def __init__(self, *, small: float = 0.01, favour: float = 20.0) -> None:
        _require(small > 0, "small", "above 0", small)
        self.small, self.favour = small, favour

    @torch.no_grad()
    def prepare(self, model: nn.Module, data: Data) -> None:
        """Change the weights of the routers."""
        means = _mean_inputs(model, data.train_batch(0))
        for layer, mean_D in zip(_layers(model), means, strict=True):
            weight_ED = _weight(layer)
            weight_ED[layer.num_experts // 2 :] *= self.small
            weight_ED[0] += self.favour * mean_D / mean_D.square().sum()
            _put_back(weight_ED)


class RowDrift(Fault):
    """One row of every router is pushed a little every step, so that its expert starves.

    ``w ← w - speed · x̄ / ‖x̄‖²``, x̄ the mean input of the router in the step: the expert's logit there falls by
    ``speed``.

    Args:
        step: from here on.
        speed: logits a step.
        row: the expert, by number.

    Raises:
        ValueError: a negative step or row.
    """

    def __init__(self, *, step: int = 100, speed: float = 0.2, row: int = 0) -> None:
        _require_natural(step=step, row=row)
        self.step, self.speed, self.row = step, speed, row
        self._means: dict[MoELayer, Tensor] = {}

    def prepare(self, model: nn.Module, data: Data) -> None:
        """Have the routers tell their mean inputs."""
        for layer in _layers(model):
            _check_expert("row", self.row, layer)
            layer.register_forward_pre_hook(self._remember)

    def _remember(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if layer.training and isinstance(layer, MoELayer):
            self._means[layer] = _mean_input(inputs)

    @torch.no_grad()
    def after_step(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Push."""
        if step < self.step:
            return
        for layer in _layers(model):
            weight_ED, mean_D = _weight(layer), self._means[layer]
            weight_ED[self.row] -= self.speed * mean_D / mean_D.square().sum()
            _put_back(weight_ED)


class DomainShift(Fault):
    """From a step on, training and validation see data of another kind, of the same targets.

    Language: a share of the token ids is permuted among itself, always in the same way. Images: turned by 90 degrees
    and inverted.

    Args:
        step: from here on.
        share: of the token ids.

    Raises:
        ValueError: a negative step, or a share that is not above 0 and at most 1.
    """

    def __init__(self, *, step: int = 150, share: float = 1.0) -> None:
        _require_natural(step=step)
        _require(0 < share <= 1, "share", "above 0 and at most 1", share)
        self.step, self.share = step, share

    def batch(self, step: int, batch: Batch, data: Data) -> Batch:
        """Return the batch, or that of the other kind."""
        if step < self.step:
            return batch
        if data.task == "vision":
            changed = {"inputs": -batch.inputs.rot90(dims=(-2, -1)), "targets": batch.targets}
        else:
            table = self._permutation(data.vocab_size)  # type: ignore[attr-defined]
            changed = {"inputs": table[batch.inputs], "targets": table[batch.targets]}
        return _replaced(batch, **changed)

    def validation(self, step: int, data: Data) -> Data:
        """Return the data, or those of the other kind."""
        if step < self.step:
            return data
        shifted = copy(data)
        shifted.valid_batches = lambda: self._shifted(step, data)  # type: ignore[method-assign]
        return shifted

    def _shifted(self, step: int, data: Data) -> Iterator[Batch]:
        return (self.batch(step, batch, data) for batch in data.valid_batches())

    def _permutation(self, vocab_size: int) -> Tensor:
        draw = generator(0, "domain_shift", vocab_size)
        chosen = torch.randperm(vocab_size, generator=draw)[: round(self.share * vocab_size)]
        table = torch.arange(vocab_size)
        table[chosen] = chosen.roll(1)  # one cycle: every chosen id becomes another one
        return table


class ZeroExpert(Fault):
    """All weights of one expert of every layer become 0, and so does what the optimizer knows of them.

    Args:
        step: after this one; once.
        expert: by number.

    Raises:
        ValueError: a negative step or expert.
    """

    def __init__(self, *, step: int = 150, expert: int = 0) -> None:
        _require_natural(step=step, expert=expert)
        self.step, self.expert = step, expert
        self._done = False

    def prepare(self, model: nn.Module, data: Data) -> None:
        """Refuse an expert that is not there."""
        for layer in _layers(model):
            _check_expert("expert", self.expert, layer)

    @torch.no_grad()
    def after_step(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Set them to 0."""
        if step != self.step or self._done:
            return
        self._done = True  # an accident: not again if the run is taken back to before it
        for layer in _layers(model):
            for weight in layer.experts.parameters():
                states = optimizer.state.get(weight, {}).values()
                for tensor in (weight, *(t for t in states if isinstance(t, Tensor) and t.shape == weight.shape)):
                    tensor[self.expert] = 0


class NanGradient(Fault):
    """A NaN in a gradient, twice: of the first layer's router, and of the last layer's experts.

    Args:
        step: of the router's; once.
        again: of the experts'; once.

    Raises:
        ValueError: a negative step.
    """

    def __init__(self, *, step: int = 100, again: int = 200) -> None:
        _require_natural(step=step, again=again)
        self.step, self.again = step, again
        self._done: set[int] = set()

    @torch.no_grad()
    def after_backward(self, step: int, model: nn.Module) -> None:
        """Put it there."""
        if step in self._done or step not in (self.step, self.again):
            return
        self._done.add(step)  # an accident: not again if the run is taken back to before it
        layers = list(_layers(model))
        weight = _weight(layers[0]) if step == self.step else layers[-1].experts.w_gate
        if weight.grad is not None:
            weight.grad.view(-1)[0] = torch.nan


class Bf16Logits(Fault):
    """Large router logits, rounded to bfloat16: 8 bits of them are left.

    Args:
        scale: factor on the weights of the routers at the beginning.

    Raises:
        ValueError: a factor that is not above 0.
    """

    def __init__(self, *, scale: float = 30.0) -> None:
        _require(scale > 0, "scale", "above 0", scale)
        self.scale = scale

    @torch.no_grad()
    def prepare(self, model: nn.Module, data: Data) -> None:
        """Scale the weights, and have the logits rounded from here on."""
        for layer in _layers(model):
            weight_ED = _weight(layer)
            weight_ED.mul_(self.scale)
            _put_back(weight_ED)
            layer.router.register_forward_hook(_rounded)


def _rounded(router: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
    return logits.to(torch.bfloat16).to(logits.dtype)


def _layers(model: nn.Module) -> Iterator[MoELayer]:
    return (module for module in model.modules() if isinstance(module, MoELayer))


def _weight(layer: MoELayer) -> nn.Parameter:
    weight = layer.router.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _put_back(weight_ED: nn.Parameter) -> None:
    manifold = manifold_of(weight_ED)
    if manifold is not None:
        weight_ED.copy_(manifold.projx(weight_ED))  # type: ignore[operator]


def _mean_input(inputs: tuple[Tensor, ...]) -> Tensor:
    return inputs[0].detach().flatten(0, -2).float().mean(0)


def _mean_inputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Return the mean input (D,) of every MoE layer, in their order."""
    means: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs: means.append(_mean_input(inputs))) for layer in _layers(model)
    ]
    training = model.training
    model.eval()
    try:
        model(batch.inputs.to(next(iter(model.parameters())).device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return means


def _replaced(batch: Batch, inputs: Tensor, targets: Tensor) -> Batch:
    """Return the batch with other inputs and targets; padding stays 0."""
    if targets.ndim > 1:
        inputs = inputs.masked_fill(~batch.mask, 0)
    else:
        inputs = inputs.masked_fill(~batch.mask.view(-1, *[1] * (inputs.ndim - 1)), 0)
    return Batch(
        inputs=inputs,
        targets=targets.masked_fill(~batch.mask, 0),
        mask=batch.mask,
        domains=batch.domains,
        documents=batch.documents,
    )


def _check_expert(name: str, expert: int, layer: MoELayer) -> None:
    _require(expert < layer.num_experts, name, f"below num_experts = {layer.num_experts}", expert)


def _require_natural(**options: int) -> None:
    for name, value in options.items():
        _require(value >= 0, name, "at least 0", value)


def _require(right: bool, name: str, expected: str, got: object) -> None:
    if not right:
        raise ValueError(f"fault.{name} must be {expected}, got {got}")
