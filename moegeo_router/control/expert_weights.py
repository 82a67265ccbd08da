"""The weights of single experts and their optimizer moments: copied, drawn anew, reset, put back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checks import check_not_negative
from ..geometry.simplex import widen
from ..routers.experts import Experts

#: A part of a parameter: one entry of its first dimension, or all of it (None).
Slice = tuple[nn.Parameter, int | None]

#: Moments that say where a parameter is going: 0 for weights that have been nowhere.
DIRECTIONS = ("exp_avg", "momentum_buffer", "grad_avg", "prev")

#: Moments that say how large gradients or steps are.
SIZES = ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum", "variance", "step_size")

#: Those of them that Adam divides by ``1 - β₂ᵗ``.
_BIASED = ("exp_avg_sq", "max_exp_avg_sq")


class ExpertWeights:
    """The parameters of E experts, one by one: those of E modules, or stacked ones (E, …).

    Everything is written in place; arithmetic is fp32 or better whatever the weights' dtype. Random numbers are drawn
    on the CPU, so that the same generator gives the same weights on every rank and device.

    Args:
        experts: as they were found.
        num_experts: E.

    Raises:
        ValueError: the experts cannot be told apart, are not alike, or share parameters.
    """

    def __init__(self, experts: Experts, num_experts: int) -> None:
        pieces = _of_modules if experts.modules else _of_stack
        self._slices = pieces(experts, num_experts)
        for parameter in self.parameters:
            # fp8 is floating point, too, but means nothing without a scale that is kept elsewhere.
            plain = type(parameter.data) is Tensor and parameter.is_floating_point() and parameter.element_size() > 1
            if not plain:
                kind = f"{type(parameter.data).__name__}, {parameter.dtype}"
                raise ValueError(f"the weights of {experts.name} are quantised or sharded ({kind})")

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, each once."""
        return list(dict.fromkeys(parameter for slices in self._slices for parameter, _ in slices))

    def slices(self, expert: int) -> list[Slice]:
        """Return the parts that are one expert's, in the same order for every expert.

        Raises:
            ValueError: no such expert.
        """
        if not 0 <= expert < len(self._slices):
            raise ValueError(f"expert must lie in 0..{len(self._slices) - 1}, got {expert}")
        return self._slices[expert]

    @torch.no_grad()
    def copy(self, source: int, target: int, noise: float, generator: torch.Generator) -> None:
        """Make one expert a copy of another, ``target ← source + noise · rms(source) · N(0, 1)``, tensor by tensor.

        Args:
            source: expert that is copied.
            target: expert that is overwritten.
            noise: relative to the root mean square of each tensor; 0: an exact copy.
            generator: on the CPU.

        Raises:
            ValueError: no such expert, or a negative noise.
        """
        check_not_negative("noise", noise)
        for origin, piece in zip(self.slices(source), self.slices(target), strict=True):
            values = view(origin)
            if noise:
                values = widen(values) + noise * _rms(values) * _normal(values, generator)
            view(piece).copy_(values)

    @torch.no_grad()
    def fresh(self, target: int, like: Sequence[int], generator: torch.Generator) -> None:
        """Draw an expert anew, ``N(0, rms²)`` with the mean rms of other experts' same tensor.

        A tensor that is one number throughout in all of these (a norm's ones, biases of 0) gets that number.

        Args:
            target: expert that is overwritten.
            like: experts it is to be as large as.
            generator: on the CPU.

        Raises:
            ValueError: no such expert, or none to be like.
        """
        if not like:
            raise ValueError("like must name at least one expert, got none")
        for number, piece in enumerate(self.slices(target)):
            others = [view(self.slices(expert)[number]) for expert in like]
            one = others[0].reshape(-1)[0]
            if all(bool((values == one).all()) for values in others):
                view(piece).copy_(one)
                continue
            size = torch.stack([_rms(values) for values in others]).mean()
            view(piece).copy_(size * _normal(others[0], generator))

    def save(self, expert: int) -> list[Tensor]:
        """Return a copy of an expert's tensors."""
        return [view(piece).clone() for piece in self.slices(expert)]

    @torch.no_grad()
    def load(self, expert: int, saved: Sequence[Tensor]) -> None:
        """Put saved tensors back, bit for bit.

        Raises:
            ValueError: they are not as many.
        """
        slices = self.slices(expert)
        if len(saved) != len(slices):
            raise ValueError(f"expert {expert} has {len(slices)} tensors, got {len(saved)}")
        for piece, values in zip(slices, saved, strict=True):
            view(piece).copy_(values)


def moments_reason(parameters: Iterable[nn.Parameter], optimizers: Sequence[Optimizer]) -> str | None:
    """Return why the optimizers' moments of parts of these parameters cannot be reset, None if they can.

    They can where they are of the parameter's shape and known by name, scalars, or not there yet.
    """
    for parameter in parameters:
        optimizer = _optimizer_of(parameter, optimizers)
        for name, value in _state(parameter, optimizers).items():
            if not isinstance(value, Tensor) or value.numel() <= 1 < parameter.numel():
                continue
            owner = type(optimizer).__name__
            if value.shape != parameter.shape:
                if value.ndim == 0:
                    continue
                return f"{owner}'s state {name!r} is {tuple(value.shape)} for a parameter {tuple(parameter.shape)}"
            if name not in DIRECTIONS and name not in SIZES and value.ndim:
                return f"what {owner}'s state {name!r} is to new weights is not known"
    return None


@torch.no_grad()
def reset_moments(target: Sequence[Slice], donors: Sequence[Sequence[Slice]], optimizers: Sequence[Optimizer]) -> None:
    """Give new weights the moments of weights that have been nowhere.

    Their direction is 0 and their size that of the donors' moments (the mean, of several). Not 0: late in a run the
    bias correction of Adam is over, and its first steps from a second moment of 0 would be ``(1 - β₁) / √(1 - β₂)``
    (three) times too long. Step counts are left alone; where those of target and donor differ, Adam's second moments
    are taken over as its bias correction sees them.

    Args:
        target: the parts whose weights are new.
        donors: the same parts of one or more experts.
        optimizers: those that may hold moments; weights without any get none.
    """
    for number, piece in enumerate(target):
        moments = _moments(piece, optimizers)
        for name in (name for name in DIRECTIONS if name in moments):
            moments[name].zero_()
        for name in (name for name in SIZES if name in moments):
            others = [_seen_by(piece, donor[number], name, optimizers) for donor in donors]
            known = [values for values in others if values is not None]
            if known:
                # An exact copy where there is one donor: no rounding by way of a mean.
                moments[name].copy_(known[0] if len(known) == 1 else torch.stack(known).mean(dim=0))


def save_moments(slices: Sequence[Slice], optimizers: Sequence[Optimizer]) -> list[dict[str, Tensor]]:
    """Return a copy of the known moments of parts of parameters."""
    return [{name: values.clone() for name, values in _moments(piece, optimizers).items()} for piece in slices]


@torch.no_grad()
def load_moments(
    slices: Sequence[Slice], saved: Sequence[Mapping[str, Tensor]], optimizers: Sequence[Optimizer]
) -> None:
    """Put saved moments back, bit for bit; those that an optimizer no longer has are passed over."""
    for piece, values in zip(slices, saved, strict=True):
        for name, moment in _moments(piece, optimizers).items():
            if name in values:
                moment.copy_(values[name])


def view(piece: Slice) -> Tensor:
    """Return a part of a parameter, detached: what is written to it is written to the parameter."""
    parameter, index = piece
    return parameter.detach() if index is None else parameter.detach()[index]


def _of_modules(experts: Experts, num_experts: int) -> list[list[Slice]]:
    if len(experts.modules) != num_experts:
        raise ValueError(f"{experts.name} has {len(experts.modules)} modules, the router {num_experts} experts")
    named = [dict(module.named_parameters()) for module in experts.modules]
    shapes = [{name: parameter.shape for name, parameter in each.items()} for each in named]
    for expert, own in enumerate(shapes):
        if own != shapes[0] or not own:
            raise ValueError(f"expert {expert} of {experts.name} has other parameters than expert 0, or none")
    if any(buffer.is_floating_point() for module in experts.modules for buffer in module.buffers()):
        raise ValueError(f"the experts of {experts.name} have buffers, whose meaning to new weights is not known")
    owners = [id(parameter) for each in named for parameter in each.values()]
    if len(set(owners)) < len(owners):
        raise ValueError(f"experts of {experts.name} share parameters with each other")
    return [[(parameter, None) for parameter in each.values()] for each in named]


def _of_stack(experts: Experts, num_experts: int) -> list[list[Slice]]:
    own = dict(experts.container.named_parameters(recurse=False))
    if not any(p.ndim >= 2 and len(p) == num_experts for p in own.values()):
        raise ValueError(f"the weights of {experts.name} are laid out in a way of their own, not as (E, …)")
    for name, parameter in own.items():
        if not parameter.ndim or len(parameter) != num_experts:
            raise ValueError(
                f"parameter {name} of {experts.name} must be ({num_experts}, …), got {tuple(parameter.shape)}"
            )
    inside = [p for child in experts.container.children() for p in child.parameters()]
    # The container may be the whole block, whose router has a weight (E, D): two dimensions are not an expert's.
    if any(p.ndim >= 3 and len(p) == num_experts for p in inside):
        raise ValueError(f"the weights of {experts.name} are spread over modules inside of it")
    return [[(parameter, expert) for parameter in own.values()] for expert in range(num_experts)]


def _optimizer_of(parameter: nn.Parameter, optimizers: Sequence[Optimizer]) -> Optimizer | None:
    return next((optimizer for optimizer in optimizers if optimizer.state.get(parameter)), None)


def _state(parameter: nn.Parameter, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    optimizer = _optimizer_of(parameter, optimizers)
    return {} if optimizer is None else optimizer.state[parameter]


def _moments(piece: Slice, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Return the known moments of a part of a parameter, as views of the optimizer's state."""
    parameter, index = piece
    return {
        name: value if index is None else value[index]
        for name, value in _state(parameter, optimizers).items()
        if name in (*DIRECTIONS, *SIZES) and isinstance(value, Tensor) and value.shape == parameter.shape
    }


def _seen_by(piece: Slice, donor: Slice, name: str, optimizers: Sequence[Optimizer]) -> Tensor | None:
    """Return a donor's moment as the step count of another parameter makes it what it is to the donor."""
    values = _moments(donor, optimizers).get(name)
    if values is None or name not in _BIASED:
        return values
    steps = [float(_state(parameter, optimizers).get("step", 0)) for parameter, _ in (piece, donor)]
    betas = _options(donor[0], optimizers).get("betas")
    if steps[0] == steps[1] or 0 in steps or betas is None:
        return values
    own, others = (1 - float(betas[1]) ** step for step in steps)
    return values * (own / others)


def _options(parameter: nn.Parameter, optimizers: Sequence[Optimizer]) -> Mapping[str, Any]:
    optimizer = _optimizer_of(parameter, optimizers)
    groups: list[dict[str, Any]] = [] if optimizer is None else optimizer.param_groups
    return next((group for group in groups if any(p is parameter for p in group["params"])), {})


def _rms(values: Tensor) -> Tensor:
    return widen(values).square().mean().sqrt()


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    wide = widen(like[:0] if like.ndim else like)
    return torch.randn(like.shape, generator=generator, dtype=wide.dtype).to(like.device)
