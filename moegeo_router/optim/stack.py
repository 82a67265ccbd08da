"""Routers that are stepped as one: their weights stacked, so that a step costs as many operations as for one router.

Shape legend: L routers, E experts, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..geometry.simplex import widen
from ..routers.find import RouterSite


class RouterStack:
    """L routers of one shape on one kind of manifold, in one group of one optimizer, stepped by Riemannian Adam.

    Half-precision weights keep an fp32 master, which follows whatever others write to the weight.

    Args:
        sites: for each weight the routers that share it.
        optimizer: the user's, whose group holds the weights.
        group: index of the group.
        scale: factor on the group's learning rate.
    """

    def __init__(self, sites: Sequence[Sequence[RouterSite]], optimizer: Optimizer, group: int, scale: float) -> None:
        from geoopt import ManifoldParameter
        from geoopt.optim import RiemannianAdam

        self.optimizer, self._group, self._scale = optimizer, group, scale
        self._sites = [list(tied) for tied in sites]
        self._weights = [tied[0].weight for tied in sites]
        # The weights' own manifolds: those of polar rows know what a zero row stands for.
        self._manifolds: list[Any] = [weight.manifold for weight in self._weights]  # type: ignore[attr-defined]
        self._point = ManifoldParameter(_stacked(self._weights), manifold=self._manifolds[0])
        self._stepper = RiemannianAdam([self._point], lr=0.0)
        self._gradients: list[Tensor | None] = [None] * len(self._weights)

    @property
    def names(self) -> list[str]:
        """The routers' names, of those that share a weight the first."""
        return [tied[0].name for tied in self._sites]

    def withhold(self) -> None:
        """Take the weights' gradients away from the optimizer.

        Raises:
            RuntimeError: a router has another weight than at the beginning.
        """
        for tied, weight in zip(self._sites, self._weights, strict=True):
            for site in tied:
                if site.weight is not weight:
                    raise RuntimeError(
                        f"the weight of router {site.name} was replaced since attach (to_empty, "
                        "load_state_dict(assign=True)): detach, geometrize and attach again"
                    )
        for index, weight in enumerate(self._weights):
            self._gradients[index], weight.grad = weight.grad, None

    def give_back(self) -> None:
        """Give the withheld gradients back."""
        for index, weight in enumerate(self._weights):
            if self._gradients[index] is not None:
                weight.grad, self._gradients[index] = self._gradients[index], None

    @torch.no_grad()
    def step(self, grad_scale: Tensor | None = None) -> None:
        """Step the weights that have a withheld gradient.

        Args:
            grad_scale: what the gradients are multiplied by, if anything.
        """
        idle = [index for index, gradient in enumerate(self._gradients) if gradient is None]
        if len(idle) == len(self._weights):
            return
        group, point = self.optimizer.param_groups[self._group], self._point
        self._catch_up()
        gradients = [
            torch.zeros_like(w) if g is None else g for w, g in zip(self._weights, self._gradients, strict=True)
        ]
        sign = -1.0 if group.get("maximize", False) else 1.0
        point.grad = sign * _stacked(gradients) / (1 if grad_scale is None else grad_scale)
        (options,) = self._stepper.param_groups
        options["lr"] = float(group.get("lr", 0.0)) * self._scale * _unit(point)
        options["betas"] = group.get("betas", (0.9, 0.999))
        # A step of length 0 must not round: a warm-up from 0 changes no bit. And what has no gradient stays as it is.
        still = list(range(len(self._weights))) if options["lr"] == 0 else idle
        before = {index: point[index].clone() for index in still}
        moments = {index: self._moments(index) for index in idle}
        self._stepper.step()
        point.grad = None
        for index, values in before.items():
            point.data[index] = values
        for index, saved in moments.items():
            for name, values in saved.items():
                self._stepper.state[point][name][index] = values
        weights: list[Tensor] = list(self._weights)
        torch._foreach_copy_(weights, list(point.data.to(self._weights[0].dtype).unbind()))

    def state_dict(self) -> dict[str, Any]:
        """Return each router's step count, moments and, of a half-precision weight, its master."""
        state = self._stepper.state.get(self._point, {})
        half = self._weights[0].dtype != self._point.dtype
        return {
            name: {
                "step": state.get("step", 0),
                "moments": self._moments(index),
                "master": self._point.detach()[index].clone() if half else None,
            }
            for index, name in enumerate(self.names)
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the entries of these routers in ``state``."""
        saved = [state[name] for name in self.names]
        self._stepper.state.clear()
        if saved[0]["moments"]:
            # Not geoopt's load_state_dict, which turns the count into fp32 and so changes the bias correction.
            moments = {
                name: torch.stack([entry["moments"][name] for entry in saved]).to(self._point.device)
                for name in saved[0]["moments"]
            }
            self._stepper.state[self._point] = {"step": saved[0]["step"], **moments}
        if saved[0]["master"] is not None:
            self._point.data = torch.stack([entry["master"] for entry in saved]).to(self._point.device)

    def _catch_up(self) -> None:
        """Take over what the weights are now, and where; on the first step give zero rows their direction."""
        from ..geometry.rows import PolarRows

        weights, master = _stacked(self._weights), self._point.data
        if self._weights[0].dtype != weights.dtype and master.device == weights.device:
            # The master goes on where the weight is still its rounding.
            weights = torch.where(master.to(self._weights[0].dtype) == _plain(self._weights), master, weights)
        if not self._stepper.state and isinstance(self._manifolds[0], PolarRows):
            weights = torch.stack([m.projx(w) for m, w in zip(self._manifolds, weights.unbind(), strict=True)])
        self._point.data = weights

    def _moments(self, index: int) -> dict[str, Tensor]:
        state = self._stepper.state.get(self._point, {})
        return {name: values[index].clone() for name, values in state.items() if isinstance(values, Tensor)}


def _plain(weights: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight.detach() for weight in weights])


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    """Return (L, E, D) in fp32 or better."""
    return widen(_plain(weights))


def _unit(point: nn.Parameter) -> float:
    """Return √(coordinates under one norm): √D a row, √(E·D) the matrix, 1 for Euclidean rows."""
    from ..geometry.rows import EuclideanRows, OrthonormalRows

    manifold = point.manifold  # type: ignore[attr-defined]
    if isinstance(manifold, EuclideanRows):
        return 1.0
    return math.sqrt(point.shape[-1] * (point.shape[-2] if isinstance(manifold, OrthonormalRows) else 1))
