"""Riemannian Adam (geoopt's) as a rule for stacked routers.

Shape legend: L routers, E experts, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .point import Point


class RiemannianAdamRule:
    """A step of length 1 in the manifold's norm is ``lr · scale`` times √(coordinates under one norm).

    √D for polar and unit rows, √(E·D) for orthonormal ones, 1 for Euclidean rows, where the rule *is* Adam. No weight
    decay: on a scale-free manifold it has no meaning.

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

    def ready(self) -> list[bool]:
        """Return True for each router."""
        return [True] * len(self._point)

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
        moments = {index: self._moments(index) for index in idle}
        self._point.data, self._point.grad = point.weight, gradient.weight
        self._stepper.step()
        self._point.grad = None
        for index, saved in moments.items():
            for name, values in saved.items():
                self._stepper.state[self._point][name][index] = values
        return Point(self._point.data)

    def forget(self, index: int, experts: Sequence[int]) -> None:
        """Clear the momentum of a router's rows, and give them the others' mean second moment.

        Not 0: after many steps nothing corrects for an average that begins anew, and the first step would be long.
        """
        state, rows = self._stepper.state.get(self._point, {}), list(experts)
        if "exp_avg" in state:
            state["exp_avg"][index, rows] = 0
        second = state.get("exp_avg_sq")
        if second is not None and second.shape[-2] == self._point.shape[-2]:
            others = [row for row in range(second.shape[-2]) if row not in rows]
            second[index, rows] = second[index, others].mean(dim=0) if others else 0

    def state(self, index: int) -> dict[str, Any]:
        """Return a router's step count and moments."""
        return {
            "step": self._stepper.state.get(self._point, {}).get("step", 0),
            "moments": self._moments(index),
        }

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue from the states of all routers.

        Raises:
            ValueError: the state of another rule.
        """
        if "moments" not in states[0]:
            raise ValueError("the state of a Riemannian step has no moments: it is of natural steps")
        self._stepper.state.clear()
        if states[0]["moments"]:
            # Not geoopt's load_state_dict, which turns the count into fp32 and so changes the bias correction.
            moments = {
                name: torch.stack([entry["moments"][name] for entry in states]).to(self._point.device)
                for name in states[0]["moments"]
            }
            self._stepper.state[self._point] = {"step": states[0]["step"], **moments}

    def _moments(self, index: int) -> dict[str, Tensor]:
        state = self._stepper.state.get(self._point, {})
        return {name: values[index].clone() for name, values in state.items() if isinstance(values, Tensor)}


def _unit(like: Tensor, manifold: Any) -> float:
    from ..geometry.rows import EuclideanRows, OrthonormalRows

    if isinstance(manifold, EuclideanRows):
        return 1.0
    return math.sqrt(like.shape[-1] * (like.shape[-2] if isinstance(manifold, OrthonormalRows) else 1))
