"""A brake on single routers, weight and bias, whatever optimizer steps them: a part of every step is taken back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optim.stack import bias_of
from ..routers.find import RouterSite
from ..routers.tag import manifold_of


class Damper:
    """After a step from W₀ to W₁ the weight is ``W₀ + c (W₁ - W₀)``: what a learning rate times c would have given.

    Schedulers set learning rates anew at every step; this is on top of whatever they say. On a manifold the result is
    projected.

    Args:
        sites: the routers by name.
        optimizers: those that step them.
    """

    def __init__(self, sites: Mapping[str, RouterSite], optimizers: Sequence[Optimizer]) -> None:
        self._sites = sites
        self.factors: dict[str, float] = {}
        self._before: list[tuple[str, nn.Parameter, Tensor]] = []
        self._handles = [optimizer.register_step_pre_hook(self._keep) for optimizer in optimizers]

    def set_factor(self, name: str, factor: float) -> None:
        """Set c of a router; at 1 its steps are left alone."""
        self.factors.pop(name, None)
        if factor != 1:
            self.factors[name] = factor

    def finish(self) -> None:
        """Take back a part of the steps made since the hooks ran."""
        for name, parameter, before in self._before:
            with torch.no_grad():
                manifold = manifold_of(parameter)
                damped = before + self.factors.get(name, 1.0) * (parameter.detach() - before)
                projected = damped if manifold is None else manifold.projx(damped)  # type: ignore[operator]
                parameter.copy_(projected)
        self._before = []

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.factors:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._before = [kept for kept in self._before if id(kept[1]) not in held]  # of a step that ended nowhere
        for name in self.factors:
            for parameter in (self._sites[name].weight, bias_of(self._sites[name])):
                if parameter is not None and id(parameter) in held:
                    self._before.append((name, parameter, parameter.detach().clone()))
