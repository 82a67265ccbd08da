"""Riemannian Adam (geoopt's) as a rule for stacked routers.

Shape legend: L routers, E experts, D width.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .point import Point


class RiemannianAdamRule:
    """A step of length 1 in the manifold's norm is ``lr · scale`` times √(coordinates under one norm).

    √D for polar and unit rows, √(E·D) for orthonormal ones, 1 for Euclidean rows, where the rule *is* Adam. The bias of
    the averages is corrected for the steps that a router has made itself, as torch does for each parameter: one that is
    thawed late makes no longer steps for it. No weight decay, see ``RouterSteps``.

    Args:
        like: (L, E, D) the weights.
        manifold: they are on.
        scale: factor on the group's learning rate.
    """

    def __init__(self, like: Tensor, manifold: Any, scale: float) -> None:
        from geoopt import ManifoldParameter
        from geoopt.optim import RiemannianAdam

        self._point = ManifoldParameter(like.clone(), manifold=manifold)
        self._stepper = RiemannianAdam([self._point], lr=0.0)
        self._unit, self._scale = _unit(like, manifold), scale
        self._steps = [0] * len(like)
        self._moments = {name: torch.zeros_like(like) for name in ("exp_avg", "exp_avg_sq")}

    def ready(self) -> list[bool]:
        """Return True for each router."""
        return [True] * len(self._steps)

    def rest(self) -> None:
        """Do nothing."""

    def rate(self, group: Mapping[str, Any]) -> float:
        """Return the length of a step."""
        return float(group.get("lr", 0.0)) * self._scale * self._unit

    def move(
        self, point: Point, gradient: Point, group: Mapping[str, Any], idle: Sequence[int], fixed: Sequence[int]
    ) -> Point:
        """Return where the step leads."""
        (options,) = self._stepper.param_groups
        options["lr"], options["betas"] = self.rate(group), group.get("betas", (0.9, 0.999))
        self._moments = {name: values.to(point.weight) for name, values in self._moments.items()}
        after = point.weight.clone()
        for routers in self._alike(idle):
            # All of them without indices, which would have to be sent to an accelerator.
            which = slice(None) if len(routers) == len(self._steps) else routers
            after[which] = self._moved(point.weight[which], gradient.weight[which], which, self._steps[routers[0]])
            for index in routers:
                self._steps[index] += 1
        return Point(after)

    def forget(self, index: int, experts: Sequence[int]) -> None:
        """Clear the momentum of a router's rows, and give them the others' mean second moment.

        Not 0: after many steps nothing corrects for an average that begins anew, and the first step would be long.
        """
        rows, second = list(experts), self._moments["exp_avg_sq"]
        others = [row for row in range(second.shape[-2]) if row not in rows]
        self._moments["exp_avg"][index, rows] = 0
        second[index, rows] = second[index, others].mean(dim=0) if others else 0

    def state(self, index: int) -> dict[str, Any]:
        """Return a router's step count and moments."""
        moments = {name: values[index].clone() for name, values in self._moments.items()}
        return {"step": self._steps[index], "moments": moments if self._steps[index] else {}}

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue from the states of all routers.

        Raises:
            ValueError: the state of another rule.
        """
        if "moments" not in states[0]:
            raise ValueError("the state of a Riemannian step has no moments: it is of natural steps")
        self._steps = [int(entry["step"]) for entry in states]
        for name, values in self._moments.items():
            values.zero_()
            for index, entry in enumerate(states):
                if entry["moments"]:
                    values[index] = entry["moments"][name]

    def _alike(self, idle: Sequence[int]) -> list[list[int]]:
        """Return the routers to be stepped, those together that have made as many steps: geoopt counts for all."""
        alike: dict[int, list[int]] = defaultdict(list)
        for index, steps in enumerate(self._steps):
            if index not in idle:
                alike[steps].append(index)
        return list(alike.values())

    def _moved(self, weight: Tensor, gradient: Tensor, which: slice | list[int], steps: int) -> Tensor:
        """Return where the next step leads of routers that have made ``steps`` so far."""
        moments = {name: values[which] for name, values in self._moments.items()}
        self._point.data, self._point.grad = weight, gradient
        self._stepper.state[self._point] = {"step": steps, **moments}
        self._stepper.step()
        self._point.grad = None
        for name, values in moments.items():
            self._moments[name][which] = values
        return self._point.data


def _unit(like: Tensor, manifold: Any) -> float:
    from ..geometry.rows import EuclideanRows, OrthonormalRows

    if isinstance(manifold, EuclideanRows):
        return 1.0
    return math.sqrt(like.shape[-1] * (like.shape[-2] if isinstance(manifold, OrthonormalRows) else 1))
