"""The natural-gradient step of stacked routers, along their manifold and within a geodesic speed limit.

Shape legend: L routers, E experts, D width (with a bias one more), N kept rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import NaturalConfig
from ..observe.statistics import world_size
from ..routers.gating import ScoreFunction
from .kept import KeptRouting
from .kronecker import KroneckerFisher
from .point import Point
from .rows import Rows, RowSample, stack_rows
from .speed import largest_step


class Movement(NamedTuple):
    """What the last step of L routers did, each (L,).

    Attributes:
        limit: radians.
        moved: √(2 KL) of the step on the rows it was computed from, radians.
        moved_next: the same on the rows of the next batch; of the step before; NaN before the second.
        limited: 1 where the step was shortened.
    """

    limit: Tensor
    moved: Tensor
    moved_next: Tensor
    limited: Tensor


class NaturalRule:
    """Moves L routers by ``exp_W(-η Δ)``, ``Δ = (G + λ_G)⁻¹ ∇W (A + λ_A)⁻¹`` and η from the speed limit.

    Args:
        like: (L, E, D) the weights.
        manifold: they are on.
        samples: the kept rows of each router.
        config: see ``NaturalConfig``.
        scores: the routers' score function.
        bias: whether they have one.
        scale: the learning rate is this, times the schedule of the group (``lr / initial_lr``). None: the group is one
            of ``NaturalGradient``, and its own ``lr``, ``limit`` and ``weight_decay`` hold.
        group: the data-parallel process group.
    """

    steps_bias = True

    def __init__(
        self,
        like: Tensor,
        manifold: Any,
        samples: Sequence[RowSample],
        config: NaturalConfig,
        *,
        scores: ScoreFunction = "softmax",
        bias: bool = False,
        scale: float | None = None,
        group: Any = None,
    ) -> None:
        self.samples, self._config = list(samples), config
        self._manifold, self._scores, self._bias, self._scale, self._group = manifold, scores, bias, scale, group
        routers, experts, self._width = like.shape
        self._fisher = KroneckerFisher(
            like.new_empty(routers, experts, self._width + bias),
            decay=config.decay,
            damping=config.damping,
            floor=config.floor,
            block=config.block + bias,
            scores=scores,
        )
        self._step, self._window = 0, 0
        self._tensors = {
            "limit": like.new_full((routers,), math.inf if config.limit is None else config.limit),
            "count": like.new_zeros(routers),
            "momentum": like.new_zeros(routers, experts, self._width + bias),
            "change": like.new_zeros(routers, experts, self._width + bias),
        }
        if config.second_moment:
            self._tensors["length"] = like.new_zeros(routers)
        self.movement: Movement | None = None

    @property
    def ready(self) -> bool:
        """Whether any token was seen; with ranks, one without tokens takes part all the same."""
        return world_size(self._group) > 1 or any(sample.known for sample in self.samples)

    def rate(self, group: Mapping[str, Any]) -> float:
        """Return the learning rate."""
        return float(group["lr"]) if self._scale is None else self._scale * _schedule(group)

    def move(self, point: Point, gradient: Point, group: Mapping[str, Any], idle: Sequence[int]) -> Point:
        """Return where the step leads.

        A router stays where it is if its gradient holds NaN or inf, or if it never saw a token: how far the step would
        move the routing is not known then.
        """
        slope_LED = _joined(gradient)
        active_L = slope_LED.isfinite().all(dim=-1).all(dim=-1)
        for index in idle:
            active_L[index] = False
        rows = stack_rows(self.samples, point.weight, self._bias)
        kept = KeptRouting(rows, self._scores, self._group)
        self._update_fisher(rows)
        delta_LED = self._fisher.solve(torch.where(_wide(active_L), slope_LED, 0))
        delta_LED = self._tangent(point, delta_LED)
        direction_LED = self._averaged(delta_LED, active_L)
        if "length" in self._tensors:
            squared_L = kept.squared_length(delta_LED)
            direction_LED = self._normalized(direction_LED, squared_L, self._peak_limit(group), active_L)
        if self._scale is None:
            direction_LED = direction_LED + group["weight_decay"] * _joined(point)
        step_LED = torch.where(_wide(active_L), -self.rate(group) * direction_LED, 0)
        after = self._limited(point, step_LED, kept, self._limit(group))
        momentum = self._tensors["momentum"]
        carried = self._manifold.transp(point.weight, after.weight, momentum[..., : self._width])
        momentum[..., : self._width] = torch.where(_wide(active_L), carried, momentum[..., : self._width])
        return after

    def state(self, index: int) -> dict[str, Any]:
        """Return the state of one router: averages, factors, momentum, and the last change of its weight."""
        tensors = self._tensors | self._fisher.tensors()
        return {
            "step": self._step,
            "window": self._window,
            "rows_seen": self.samples[index].passes,
            **{name: values[index].clone() for name, values in tensors.items()},
        }

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue from the states of all routers.

        Raises:
            ValueError: states of other shapes or of another rule.
        """
        tensors = self._tensors | self._fisher.tensors()
        for name, values in tensors.items():
            saved = [entry.get(name) for entry in states]
            if any(not isinstance(value, Tensor) or value.shape != values.shape[1:] for value in saved):
                raise ValueError(f"the state of a natural step has another {name} than {tuple(values.shape[1:])}")
            values.copy_(torch.stack(saved))  # type: ignore[arg-type]
        self._step, self._window = states[0]["step"], states[0]["window"]
        for sample, entry in zip(self.samples, states, strict=True):
            sample.passes = entry["rows_seen"]
        self._fisher.invert()

    def set_limit(self, index: int, limit: float | None) -> None:
        """Set the speed limit of one router, radians (of a group of ``NaturalGradient`` it is the group's)."""
        self._tensors["limit"][index] = math.inf if limit is None else limit

    def _peak_limit(self, group: Mapping[str, Any]) -> Tensor:
        if self._scale is None:
            self._tensors["limit"].fill_(math.inf if group["limit"] is None else group["limit"])
        return self._tensors["limit"]

    def _limit(self, group: Mapping[str, Any]) -> Tensor:
        # Not times 0: there may be no limit.
        follows = self._config.limit_follows_lr and self.rate(group) > 0
        return self._peak_limit(group) * (_schedule(group) if follows else 1.0)

    def _update_fisher(self, rows: Rows) -> None:
        self._fisher.add(rows)
        self._window += 1
        early = self._step < self._config.refresh_every and self._step.bit_count() <= 1
        if early or self._step % self._config.refresh_every == 0:
            self._fisher.refresh(self._window, self._group)
            self._window = 0
        self._step += 1

    def _tangent(self, point: Point, delta_LED: Tensor) -> Tensor:
        tangent_LED = self._manifold.proju(point.weight, delta_LED[..., : self._width])
        return torch.cat([tangent_LED, delta_LED[..., self._width :]], dim=-1)

    def _averaged(self, delta_LED: Tensor, active_L: Tensor) -> Tensor:
        """Take the natural gradients into the momentum, and return the direction it gives."""
        beta, state = self._config.momentum, self._tensors
        state["count"] += active_L
        state["momentum"] = _faded(state["momentum"], delta_LED, beta, _wide(active_L))
        return state["momentum"] / (1 - beta ** _wide(state["count"].clamp_min(1)))

    def _normalized(self, direction_LED: Tensor, squared_L: Tensor, limit_L: Tensor, active_L: Tensor) -> Tensor:
        """Return the direction over the root of the natural gradients' mean squared length, times the limit.

        Lengths are in the Fisher metric, and so in no coordinates: where gradients agree the result is as long as the
        limit, where they are noise it is shorter.
        """
        beta, state = self._config.second_moment, self._tensors
        state["length"] = _faded(state["length"], squared_L, beta, active_L)
        mean_L = state["length"] / (1 - beta ** state["count"].clamp_min(1))
        unit_L = torch.where(limit_L.isinf(), 1.0, limit_L) / mean_L.sqrt().clamp_min(torch.finfo(mean_L.dtype).tiny)
        return direction_LED * _wide(unit_L)

    def _limited(self, point: Point, step_LED: Tensor, kept: KeptRouting, limit_L: Tensor) -> Point:
        """Return where the largest allowed part of a step leads."""

        def kl(eta_L: Tensor) -> Tensor:
            return kept.kl(self._change(point, self._moved(point, _wide(eta_L) * step_LED)))

        most_L = limit_L.square() / 2
        standing = (step_LED == 0).all(dim=-1).all(dim=-1)
        guess_L = (0.98 * 2 * most_L / kept.squared_length(step_LED)).sqrt().nan_to_num(1.0, posinf=1.0)
        eta_L, kl_L = largest_step(kl, torch.where(standing, 0, guess_L), most_L)
        after = _chosen(eta_L > 0, self._moved(point, _wide(eta_L) * step_LED), point)
        last, self._tensors["change"] = self._tensors["change"], self._change(point, after)
        # Of the rows that came in, the routing before the last step is known, too: how far did that move *them*?
        moved_next = (2 * kept.kl_of_the_last(last)).sqrt()
        self.movement = Movement(
            limit=limit_L.clone(),
            moved=(2 * kl_L).sqrt(),
            moved_next=torch.where(self._tensors["count"] <= 1, torch.nan, moved_next),
            limited=((eta_L < 1) & ~standing).to(kl_L),
        )
        return after

    def _moved(self, point: Point, step_LED: Tensor) -> Point:
        move = self._manifold.retr if self._manifold.name == "Orthonormal rows" else self._manifold.expmap
        weight = move(point.weight, step_LED[..., : self._width])
        return Point(weight, None if point.bias is None else point.bias + step_LED[..., self._width])

    def _change(self, before: Point, after: Point) -> Tensor:
        return _joined(after) - _joined(before)


def _schedule(group: Mapping[str, Any]) -> float:
    """Return where a group is in its learning-rate schedule: lr over its peak, at most 1; 1 where there is none."""
    lr, peak = float(group.get("lr", 0.0)), group.get("max_lr") or group.get("initial_lr")
    return min(1.0, lr / float(peak)) if peak else float(lr > 0)


def _joined(point: Point) -> Tensor:
    """Return weights and biases as one (L, E, D + 1)."""
    return point.weight if point.bias is None else torch.cat([point.weight, point.bias.unsqueeze(-1)], dim=-1)


def _chosen(which_L: Tensor, these: Point, others: Point) -> Point:
    bias = None
    if these.bias is not None and others.bias is not None:
        bias = torch.where(which_L.unsqueeze(-1), these.bias, others.bias)
    return Point(torch.where(_wide(which_L), these.weight, others.weight), bias)


def _faded(average: Tensor, values: Tensor, beta: float, active: Tensor) -> Tensor:
    return torch.where(active, beta * average + (1 - beta) * values, average)


def _wide(values_L: Tensor) -> Tensor:
    return values_L[:, None, None]
