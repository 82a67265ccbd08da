"""Routers that are stepped as one: their weights stacked, so that a step costs as many operations as for one router.

Shape legend: L routers, E experts, D width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..geometry.simplex import widen
from ..routers.find import RouterSite
from ..routers.tag import manifold_of
from .point import Point, StepRule, TiedRouters

#: Makes the rule of a stack: of its stacked weights (L, E, D), their manifold, the routers, and the optimizer's group.
RuleFactory = Callable[[Tensor, Any, Sequence[TiedRouters], Mapping[str, Any]], StepRule]


class RouterStack:
    """L routers of one shape on one kind of manifold, in one group of one optimizer, stepped by one rule.

    Half-precision parameters keep an fp32 master, which follows whatever others write to them.

    Args:
        routers: those that share a weight count as one; all with a bias to be stepped along, or none.
        optimizer: whose group holds the weights.
        group: index of the group.
        rule: makes the rule.
    """

    def __init__(self, routers: Sequence[TiedRouters], optimizer: Optimizer, group: int, rule: RuleFactory) -> None:
        from ..geometry.rows import EuclideanRows

        self.optimizer, self._group, self._routers = optimizer, group, list(routers)
        self._weights = [tied.weight for tied in routers]
        self._biases = [tied.bias for tied in routers if tied.bias is not None]
        # The weights' own manifolds: those of polar rows know what a zero row stands for.
        self._manifolds: list[Any] = [manifold_of(weight) or EuclideanRows() for weight in self._weights]
        self.rule = self._made(rule)
        self._master, self._began, self._fell_back = self._masters(), False, False
        self._gradients: dict[nn.Parameter, Tensor] = {}

    @property
    def names(self) -> list[str]:
        """The routers' names, of those that share a weight the first."""
        return [tied.name for tied in self._routers]

    def index_of(self, name: str) -> int | None:
        """Return the place of a router, of one that shares its weight too; None if it is not here."""
        places = (i for i, tied in enumerate(self._routers) if any(site.name == name for site in tied.sites))
        return next(places, None)

    @property
    def fixed_norm(self) -> bool:
        """Whether the norms of the rows are fixed."""
        from ..geometry.rows import OrthonormalRows, UnitRows

        return isinstance(self._manifolds[0], UnitRows | OrthonormalRows)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is stepped: the weights, then the biases."""
        return [*self._weights, *self._biases]

    def fall_back(self, rule: RuleFactory) -> None:
        """Go on with another rule, for the weights alone: the biases are the optimizer's again."""
        self._routers = [TiedRouters(tied.sites) for tied in self._routers]
        self._biases, self._fell_back = [], True
        self._master = Point(self._master.weight)
        self.rule = self._made(rule)

    def withhold(self) -> None:
        """Take the routers' gradients away from the optimizer; that of a bias goes with its weight's.

        Raises:
            RuntimeError: a router has another weight than at the beginning.
        """
        for tied, weight in zip(self._routers, self._weights, strict=True):
            for site in tied.sites:
                if site.weight is not weight:
                    raise RuntimeError(
                        f"the weight of router {site.name} was replaced since its steps were taken over (to_empty, "
                        "load_state_dict(assign=True)): detach, geometrize and attach again"
                    )
        for tied in self._routers:
            if tied.weight.grad is None:
                continue
            for parameter in (tied.weight, tied.bias):
                if parameter is not None and parameter.grad is not None:
                    self._gradients[parameter], parameter.grad = parameter.grad, None

    def give_back(self) -> None:
        """Give the withheld gradients back."""
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient
        self._gradients = {}

    @torch.no_grad()
    def step(self, grad_scale: Tensor | None = None) -> None:
        """Step the weights that have a withheld gradient.

        Args:
            grad_scale: what the gradients are multiplied by, if anything.
        """
        idle = [index for index, weight in enumerate(self._weights) if weight not in self._gradients]
        if len(idle) == len(self._weights):
            self.rule.rest()
            return
        fixed = [index for index, bias in enumerate(self._biases) if bias not in self._gradients]
        group = self.optimizer.param_groups[self._group]
        before = self._catch_up()
        factor = (-1.0 if group.get("maximize", False) else 1.0) / (1 if grad_scale is None else grad_scale)
        weight, bias = self._gathered()
        gradient = Point(factor * weight, None if bias is None else factor * bias)
        start = Point(before.weight.clone(), None if before.bias is None else before.bias.clone())
        after = self.rule.move(start, gradient, group, idle, fixed)
        # A step of length 0 must not round: a warm-up from 0 changes no bit. And what has no gradient stays as it is.
        still = range(len(self._weights)) if self.rule.rate(group) == 0 else idle
        for index in still:
            for values, old in zip(after, before, strict=True):
                if values is not None and old is not None:
                    values[index] = old[index]
        self._master, self._began = after, True
        for parameters, values in ((self._weights, after.weight), (self._biases, after.bias)):
            if values is not None:
                into: list[Tensor] = list(parameters)
                torch._foreach_copy_(into, list(values.to(parameters[0].dtype).unbind()))

    def state_dict(self) -> dict[str, Any]:
        """Return each router's state, its masters if parameters are in half precision, and whether the rule changed."""
        half = self._weights[0].dtype != self._master.weight.dtype
        return {
            name: self.rule.state(index)
            | {"master": _of_one(self._master, index) if half else None, "fell_back": self._fell_back}
            for index, name in enumerate(self.names)
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the entries of these routers in ``state``."""
        saved = [state[name] for name in self.names]
        self.rule.load(saved)
        self._began = any(bool(entry["step"]) for entry in saved)
        if saved[0]["master"] is not None:
            device = self._weights[0].device
            names = saved[0]["master"]
            masters = {n: torch.stack([entry["master"][n] for entry in saved]).to(device) for n in names}
            self._master = Point(**masters)

    def _made(self, rule: RuleFactory) -> StepRule:
        group = self.optimizer.param_groups[self._group]
        return rule(_stacked(self._weights), self._manifolds[0], self._routers, group)

    def _catch_up(self) -> Point:
        """Return what the parameters are now; on the first step give zero rows their direction."""
        from ..geometry.rows import PolarRows

        now = self._masters()
        weight = _newest(self._weights, now.weight, self._master.weight)
        bias = None if now.bias is None else _newest(self._biases, now.bias, self._master.bias)
        if not self._began and isinstance(self._manifolds[0], PolarRows):
            weight = torch.stack([m.projx(w) for m, w in zip(self._manifolds, weight.unbind(), strict=True)])
        return Point(weight, bias)

    def _masters(self) -> Point:
        return _point(self._weights, self._biases)

    def _gathered(self) -> Point:
        """Return the withheld gradients, 0 where there is none."""
        known = self._gradients
        weights, biases = (
            [known.get(parameter, torch.zeros_like(parameter)) for parameter in parameters]
            for parameters in (self._weights, self._biases)
        )
        return _point(weights, biases)


def _point(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Point:
    weight = _stacked(weights)
    return Point(weight, _stacked(biases).to(weight.dtype) if biases else None)


def _of_one(point: Point, index: int) -> dict[str, Tensor]:
    return {name: values[index].clone() for name, values in point._asdict().items() if values is not None}


def group_alike(
    sites: Sequence[RouterSite],
    place: Callable[[nn.Parameter], Hashable] = lambda _: None,
    bias: Callable[[nn.Parameter, nn.Parameter], bool] = lambda weight, bias: False,
) -> dict[tuple[Any, ...], list[TiedRouters]]:
    """Put routers together that can be stepped as one: the same place, manifold, shape, dtype, device.

    Args:
        sites: the routers.
        place: where a weight belongs, the first item of its key; only what has the same is put together.
        bias: says of a weight and its bias whether they are to be stepped together.
    """
    shared: dict[int, list[RouterSite]] = defaultdict(list)
    for site in sites:
        shared[id(site.weight)].append(site)
    alike: dict[tuple[Any, ...], list[TiedRouters]] = defaultdict(list)
    for same in shared.values():
        weight, biases = same[0].weight, {id(bias_of(site)): bias_of(site) for site in same}
        # Routers that share a weight but not their biases leave these to the optimizer.
        own = next(iter(biases.values())) if len(biases) == 1 else None
        tied = TiedRouters(tuple(same), own if own is not None and bias(weight, own) else None)
        kind = type(manifold_of(weight)), weight.shape, weight.dtype, weight.device, tied.bias is None
        alike[(place(weight), *kind)].append(tied)
    return alike


def bias_of(site: RouterSite) -> nn.Parameter | None:
    """Return the trained bias (E,) that a router adds to its logits, None if it has none."""
    bias = getattr(site.projection, "bias", None)
    fits = isinstance(bias, nn.Parameter) and bias.shape == (site.num_experts,) and bias.requires_grad
    return bias if fits else None


def _newest(parameters: Sequence[nn.Parameter], now: Tensor, master: Tensor | None) -> Tensor:
    """Return the master where the parameters are still its rounding, else what they are now."""
    if master is None or parameters[0].dtype == now.dtype or master.device != now.device:
        return now
    return torch.where(master.to(parameters[0].dtype) == _plain(parameters), master, now)


def _plain(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.detach() for tensor in tensors])


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return (L, …) in fp32 or better."""
    return widen(_plain(tensors))
