"""The natural-gradient step of stacked routers, along their manifold and within a geodesic speed limit.

Shape legend: L routers, E experts, D width (with a bias one more).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import NaturalConfig
from ..observe.statistics import world_size
from ..routers.gating import ScoreFunction
from .kept import KeptRouting
from .kronecker import KroneckerFisher
from .point import Point
from .rows import Rows, RowSample, stack_rows
from .speed import largest_step

#: A learning rate that exceeds its known peak so many times is on its way up.
CLIMBS = 5

#: The names of the options that a group of ``NaturalGradient`` has.
OPTIONS = tuple(field.name for field in fields(NaturalConfig))


class Movement(NamedTuple):
    """What the last step of L routers did, each (L,); NaN for a router that was not stepped.

    Attributes:
        limit: radians; inf: none.
        moved: √(2 KL) of the step on the rows it was computed from, radians.
        moved_next: the same of the step before, on the rows of this batch, which is its next.
        limited: 1 where the step was shortened.
        flipped: the share of those rows whose most likely expert is another one after the step.
    """

    limit: Tensor
    moved: Tensor
    moved_next: Tensor
    limited: Tensor
    flipped: Tensor


def in_a_row(parts: Sequence[Movement]) -> Movement:
    """Return the movements of several stacks, which may be on several devices, as one."""
    device = parts[0].moved.device
    return Movement(*(torch.cat([part.to(device) for part in column]) for column in zip(*parts, strict=True)))


class NaturalRule:
    """Moves L routers by ``exp_W(-η Δ)``, ``Δ = (G + λ_G)⁻¹ ∇W (A + λ_A)⁻¹`` and η from the speed limit.

    Args:
        like: (L, E, D) the weights.
        manifold: they are on.
        samples: the kept rows of each router.
        config: see ``NaturalConfig``.
        scores: the routers' score function.
        bias: whether they have one.
        scale: the learning rate is this, times the schedule of the group. None: the group is one of
            ``NaturalGradient``, and its own ``lr``, ``weight_decay`` and options hold.
        peak: the largest learning rate that the group is known to have, before the first step.
        group: the data-parallel process group.
    """

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
        peak: float = 0.0,
        group: Any = None,
    ) -> None:
        from ..geometry.rows import OrthonormalRows

        self.samples, self._config = list(samples), config
        self._manifold, self._scores, self._scale, self._group = manifold, scores, scale, group
        # The geodesics of orthonormal rows are matrix exponentials; their retraction is one QR.
        self._travel = manifold.retr if isinstance(manifold, OrthonormalRows) else manifold.expmap
        routers, experts, self._width = like.shape
        joined = like.new_zeros(routers, experts, self._width + bias)
        # The column of 1 that a bias adds does not make a full factor into two blocks.
        self._fisher = KroneckerFisher(joined, config.block + (bias and config.block > 1), scores)
        self._bias, self._step, self._window, self._known = bias, 0, 0, False
        self._peak, self._climbs = peak, 0
        self._tensors = {
            "limit": like.new_full((routers,), math.nan),  # NaN: the configured one
            "count": like.new_zeros(routers),
            "momentum": joined,
            "length": like.new_zeros(routers),
            "change": torch.zeros_like(joined),
        }
        self.rest()

    movement: Movement

    def ready(self) -> list[bool]:
        """Return for each router whether it ever saw a token, on any rank."""
        known = [self._known or sample.known for sample in self.samples]
        if world_size(self._group) > 1 and not self._known:
            count = torch.tensor(known, dtype=torch.float32, device=self._tensors["count"].device)
            dist.all_reduce(count, group=self._group)
            known = [bool(value) for value in count.tolist()]
        self._known = all(known)
        return known

    def rate(self, group: Mapping[str, Any]) -> float:
        """Return the learning rate."""
        return float(group["lr"]) if self._scale is None else self._scale * self._schedule(group)

    def set_limit(self, index: int, limit: float | None) -> None:
        """Set the speed limit of one router, radians, in place of the configured one."""
        self._tensors["limit"][index] = math.inf if limit is None else limit

    def forget(self, index: int, experts: Sequence[int]) -> None:
        """Clear the momentum of a router's rows, and their last change."""
        for name in ("momentum", "change"):
            self._tensors[name][index, list(experts)] = 0

    @property
    def limits(self) -> list[float | None]:
        """The speed limits in force, radians; None: no limit. Reads them back from the device."""
        return [None if math.isinf(limit) else limit for limit in self._limits(self._config).tolist()]

    def rest(self) -> None:
        """Take note of a step in which no router has a gradient: its tokens are not kept for the next."""
        for sample in self.samples:
            sample.take()
        self._tensors["change"].zero_()
        self.movement = Movement(*(torch.full_like(self._tensors["count"], math.nan) for _ in Movement._fields))

    def move(
        self, point: Point, gradient: Point, group: Mapping[str, Any], idle: Sequence[int], fixed: Sequence[int]
    ) -> Point:
        """Return where the step leads.

        A router stays where it is if its gradient holds NaN or inf, or if there is no token to hold a step against: how
        far it would move the routing is not known then.
        """
        self._follow(point.weight)
        config, slope_LED = self._options(group), _joined(gradient)
        self._follow_rate(group)
        rows = stack_rows(self.samples, point.weight, self._bias)
        kept = KeptRouting(rows, self._scores, self._group)
        self._update_fisher(rows, config)
        active_L = slope_LED.isfinite().all(dim=-1).all(dim=-1) & (kept.tokens > 0)
        for index in idle:
            active_L[index] = False
        delta_LED = self._tangent(point, self._fisher.solve(torch.where(_wide(active_L), slope_LED, 0)), fixed)
        active_L &= delta_LED.isfinite().all(dim=-1).all(dim=-1)
        direction_LED = self._averaged(torch.where(_wide(active_L), delta_LED, 0), kept, config, active_L)
        if self._scale is None:
            direction_LED = direction_LED + group["weight_decay"] * _joined(point)
        step_LED = torch.where(_wide(active_L), -self.rate(group) * self._tangent(point, direction_LED, fixed), 0)
        limit_L = self._limits(config) * (self._schedule(group) if config.limit_follows_lr else 1.0)
        after = self._limited(point, self._bounded(step_LED, kept, limit_L), kept, limit_L, active_L)
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
            "peak": self._peak,
            "rows_seen": self.samples[index].steps,
            "damped": self._fisher.damped,
            **{name: values[index].clone() for name, values in tensors.items()},
        }

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue from the states of all routers.

        Raises:
            ValueError: states of other shapes or of another rule.
        """
        tensors = self._tensors | self._fisher.tensors()
        for name, values in tensors.items():
            known = [entry[name] for entry in states if isinstance(entry.get(name), Tensor)]
            saved = [value for value in known if value.shape == values.shape[1:]]
            if len(saved) < len(states):
                raise ValueError(f"the state of a natural step has another {name} than {tuple(values.shape[1:])}")
            values.copy_(torch.stack(saved))
        self._step, self._window, self._peak = (states[0][name] for name in ("step", "window", "peak"))
        for sample, entry in zip(self.samples, states, strict=True):
            sample.steps = entry["rows_seen"]
        # As at the last refresh: the options may have changed since. A state of before does not say.
        self._fisher.damped = states[0].get("damped", (self._config.damping, self._config.floor))
        self._fisher.invert()

    def _options(self, group: Mapping[str, Any]) -> NaturalConfig:
        if self._scale is None:
            self._config = NaturalConfig(**{name: group[name] for name in OPTIONS})
        return self._config

    def _schedule(self, group: Mapping[str, Any]) -> float:
        """Return where a group is in its learning-rate schedule: lr over the largest it had or will have."""
        peak = max(self._peak, peak_rate(group))
        return float(group.get("lr", 0.0)) / peak if peak else 0.0

    def _follow_rate(self, group: Mapping[str, Any]) -> None:
        """Take note of a new peak, and say it once when the rate is on its way to one that nobody knew."""
        if (peak := peak_rate(group)) <= self._peak:
            return
        self._peak, self._climbs = peak, self._climbs + 1
        if self._climbs == CLIMBS:
            warnings.warn(
                f"the learning rate of a group of routers has passed all that was known of its peak {CLIMBS} times: "
                "all of the way up, natural steps are as long as at the peak. Attach while the group has its peak "
                "learning rate, leave the schedule to a scheduler of torch, or set group['max_lr']",
                stacklevel=2,
            )

    def _limits(self, config: NaturalConfig) -> Tensor:
        own_L = self._tensors["limit"]
        return torch.where(own_L.isnan(), math.inf if config.limit is None else config.limit, own_L)

    def _update_fisher(self, rows: Rows, config: NaturalConfig) -> None:
        self._fisher.add(rows, config.decay)
        self._window += 1
        early = self._step < config.refresh_every and self._step.bit_count() <= 1
        if early or self._step % config.refresh_every == 0:
            self._fisher.refresh(self._window, config, self._group)
            self._window = 0
        self._step += 1

    def _tangent(self, point: Point, delta_LED: Tensor, fixed: Sequence[int]) -> Tensor:
        tangent_LED = self._manifold.proju(point.weight, delta_LED[..., : self._width])
        joined_LED = torch.cat([tangent_LED, delta_LED[..., self._width :]], dim=-1)
        for index in fixed:
            joined_LED[index, :, self._width :] = 0
        return joined_LED

    def _averaged(self, delta_LED: Tensor, kept: KeptRouting, config: NaturalConfig, active_L: Tensor) -> Tensor:
        """Take the natural gradients into the averages, and return the direction they give.

        With ``second_moment`` it is the momentum over the root of the mean squared length, times the limit. Lengths are
        in the Fisher metric, and so in no coordinates: where gradients agree the result is as long as the limit, where
        they are noise it is shorter.
        """
        state, beta = self._tensors, config.momentum
        state["count"] += active_L
        count_L = state["count"].clamp_min(1)
        state["momentum"] = _faded(state["momentum"], delta_LED, beta, _wide(active_L))
        direction_LED = state["momentum"] / (1 - beta ** _wide(count_L))
        beta = config.second_moment
        if not beta:
            return direction_LED
        state["length"] = _faded(state["length"], kept.squared_length(delta_LED), beta, active_L)
        length_L = (state["length"] / (1 - beta**count_L)).sqrt()
        limit_L = self._limits(config)
        unit_L = torch.where(limit_L.isinf(), 1.0, limit_L) / length_L
        # What has no length at all (one expert) is left as it is.
        return direction_LED * _wide(torch.where(length_L > 0, unit_L, 1.0))

    def _bounded(self, step_LED: Tensor, kept: KeptRouting, limit_L: Tensor) -> Tensor:
        """Hold the shift of all logits together, which moves no softmax and so no KL, to the limit too (RMS)."""
        if self._scores != "softmax":
            return step_LED
        shift_L1D = step_LED.mean(dim=-2, keepdim=True)
        size_L = kept.squared_shift(shift_L1D).sqrt().clamp_min(torch.finfo(step_LED.dtype).tiny)
        return step_LED + _wide((limit_L / size_L).clamp(max=1) - 1) * shift_L1D

    def _limited(self, point: Point, step_LED: Tensor, kept: KeptRouting, limit_L: Tensor, active_L: Tensor) -> Point:
        """Return where the largest allowed part of a step leads."""

        def kl(eta_L: Tensor) -> Tensor:
            return kept.kl(self._change(point, self._moved(point, _wide(eta_L) * step_LED)))

        most_L = limit_L.square() / 2
        standing_L = (step_LED == 0).all(dim=-1).all(dim=-1)
        guess_L = (0.98 * 2 * most_L / kept.squared_length(step_LED)).sqrt().nan_to_num(1.0, posinf=1.0)
        eta_L, kl_L = largest_step(kl, torch.where(standing_L, 0, guess_L), most_L)
        after = _chosen(eta_L > 0, self._moved(point, _wide(eta_L) * step_LED), point)
        change = self._change(point, after)
        last, self._tensors["change"] = self._tensors["change"], change
        # Of the rows that came in, the routing before the last step is known, too: how far did that move *them*?
        stood_L = (last == 0).all(dim=-1).all(dim=-1)
        moved_next_L = torch.where(stood_L, math.nan, (2 * kept.kl_of_the_last(last)).sqrt())
        limited_L = ((eta_L < 1) & ~standing_L).to(kl_L)
        found = (limit_L, (2 * kl_L).sqrt(), moved_next_L, limited_L, kept.flipped(change))
        self.movement = Movement(*(torch.where(active_L, values, math.nan) for values in found))
        return after

    def _moved(self, point: Point, step_LED: Tensor) -> Point:
        weight = self._travel(point.weight, step_LED[..., : self._width])
        return Point(weight, None if point.bias is None else point.bias + step_LED[..., self._width])

    def _change(self, before: Point, after: Point) -> Tensor:
        return _joined(after) - _joined(before)

    def _follow(self, like: Tensor) -> None:
        """Move the state to where the weights are now."""
        if self._tensors["count"].device != like.device or self._tensors["count"].dtype != like.dtype:
            self._tensors = {name: values.to(like) for name, values in self._tensors.items()}
            self._fisher.to(like)


def peak_rate(group: Mapping[str, Any]) -> float:
    """Return the largest learning rate that a group has, or is known to have."""
    return max(float(group.get(name) or 0.0) for name in ("lr", "initial_lr", "max_lr"))


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
