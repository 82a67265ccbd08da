"""Where the router row of a revived expert goes: between its donor's and the tokens that the donor serves worst.

Shape legend: n rows (tokens), E experts, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry.simplex import widen
from ..routers.gating import ScoreFunction, routing_probabilities, top_choices

#: Share of a donor's tokens that count as served worst, and the most that a newcomer takes over.
WORST = 0.25

#: Standard deviations of the difference between newcomer and donor that are tried, the steepest first.
STEEPNESS = (1.0, 0.5, 0.25, 0.125)

#: Rounds of bisection: the offset is known to a millionth of its range.
ROUNDS = 20

#: Radians by which a row is turned where nothing is known of the tokens.
ANGLE = 0.1


class Placement(NamedTuple):
    """Where a newcomer's row goes.

    Attributes:
        row: (D,).
        bias: its bias; 0 where the router has none.
        share: of the rows, those that choose the newcomer among their k; None where no rows are known.
        moved: mean over rows of the total variation ``½ Σ|g' - g|`` between the gates before and after; None likewise.
    """

    row: Tensor
    bias: float
    share: float | None
    moved: float | None


def donors_for(dead: Sequence[int], load: Sequence[float]) -> dict[int, int]:
    """Return a donor for each dead expert: one after the other, the live one with most ``load / (1 + copies)``.

    Args:
        dead: dead experts.
        load: (E,) load shares.

    Raises:
        ValueError: a number that is no expert, or no live expert with a load.
    """
    unknown = [expert for expert in dead if not 0 <= expert < len(load)]
    if unknown:
        raise ValueError(f"dead must be experts in 0..{len(load) - 1}, got {unknown[0]}")
    live = [expert for expert in range(len(load)) if expert not in set(dead) and load[expert] > 0]
    if dead and not live:
        raise ValueError("no live expert has a load: there is no donor")
    copies = dict.fromkeys(live, 0)
    donors = {}
    for expert in dead:
        donor = max(live, key=lambda e: (load[e] / (1 + copies[e]), -e))
        copies[donor] += 1
        donors[expert] = donor
    return donors


@torch.no_grad()
def place_row(
    x_ND: Tensor,
    logits_NE: Tensor,
    hurt_NE: Tensor | None,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    *,
    donor: int,
    dead: int,
    k: int,
    scores: ScoreFunction = "softmax",
    most: float,
    renormalize: bool = True,
    merged: bool = True,
    unit: bool = False,
) -> Placement | None:
    """Place the row of a newcomer in the place of a dead expert.

    With μ the mean x over the donor's tokens (those that choose it among their k) and ν that over the quarter of them
    that it serves worst, the newcomer's logit is the donor's plus ``α (ν - μ)·x + c``. α makes the standard deviation
    of the difference over the donor's tokens 1. c is a bias, or ``c μ·x / ‖μ‖²`` where there is none, as large as
    leaves the donor three quarters of its tokens, reaches no more than the newcomer's fair share ``k/E`` of all tokens
    (or a quarter of the donor's), and keeps ``moved`` within ``most``. Where half of the standard deviation (or a
    quarter, or an eighth) gives the newcomer more than twice the gates, it is that: a flatter difference is felt less
    by other tokens.

    Served worst are the tokens whose loss falls most if the donor's logit falls; where no gradient shows that, those
    with the lowest probability of the donor.

    Args:
        x_ND: what the logits are linear in.
        logits_NE: the router's logits, which may hold constants for each expert beside ``x Wᵀ + b`` (a prior).
        hurt_NE: the gradient of the loss in the logits.
        weight_ED: the router's weight.
        bias_E: its bias, if it is to be placed too.
        donor: expert the newcomer stands beside.
        dead: expert whose row it is.
        k: experts chosen per token.
        scores: the router's score function.
        most: bound of ``moved``.
        renormalize: whether a token's gates are divided by their sum. Where they are not, a newcomer beside its donor
            takes probability from it, and ``moved`` counts that.
        merged: the newcomer is a copy of the donor, so gates that move between the two change nothing.
        unit: rows have norm 1.

    Returns:
        The placement; with share 0 and the dead expert's own row where none within the bound reaches a token; None
        where the donor has no tokens that differ, or the logits are not linear in x.

    Raises:
        ValueError: donor and dead are one, or a ``most`` that is not above 0.
    """
    if donor == dead:
        raise ValueError(f"donor and dead must be two experts, got {donor} twice")
    if not most > 0:
        raise ValueError(f"most must be above 0, got {most}")
    x_ND, z_NE, weight_ED = widen(x_ND), widen(logits_NE), widen(weight_ED)
    constants_E = _constants(x_ND, z_NE, weight_ED)
    own_N = (top_choices(z_NE, k, scores)[0] == donor).any(dim=-1)
    if constants_E is None or int(own_N.sum()) < 2:
        return None
    slope_D = _slope(x_ND, _worst(z_NE, hurt_NE, own_N, donor, scores), own_N)
    if slope_D is None:
        return None
    trials = _Trials(x_ND, z_NE, own_N, donor, dead, k, scores, renormalize, merged)
    mu_D = x_ND[own_N].mean(dim=0)
    found: list[_Trial] = []
    for alpha in STEEPNESS:
        newcomer = _Newcomer(weight_ED, bias_E, constants_E, donor, dead, unit, alpha * slope_D, mu_D)
        found += _largest(trials, newcomer, most)
    if not found:
        return Placement(weight_ED[dead].clone(), 0.0 if bias_E is None else float(bias_E[dead]), 0.0, 0.0)
    enough = max(trial.mass for trial in found) / 2
    return next(trial.placement for trial in found if trial.mass >= enough)


def turned_row(
    weight_ED: Tensor, bias_E: Tensor | None, donor: int, generator: torch.Generator, angle: float = ANGLE
) -> Placement:
    """Place a newcomer where nothing is known of the tokens: the donor's row, turned in a random direction.

    Args:
        weight_ED: the router's weight.
        bias_E: its bias, if any.
        donor: expert the newcomer stands beside.
        generator: on the CPU.
        angle: radians.
    """
    row_D = widen(weight_ED[donor].detach())
    size = torch.linalg.vector_norm(row_D)
    away_D = torch.randn(row_D.shape, generator=generator, dtype=row_D.dtype).to(row_D.device)
    if size > 0:
        away_D = away_D - row_D * (away_D @ row_D) / size.square()
    turned_D = math.cos(angle) * row_D + math.sin(angle) * size * torch.nn.functional.normalize(away_D, dim=0)
    return Placement(turned_D, 0.0 if bias_E is None else float(bias_E[donor]), None, None)


@torch.no_grad()
def with_newcomer(
    x_ND: Tensor, logits_NE: Tensor, weight_ED: Tensor, bias_E: Tensor | None, dead: int, placement: Placement
) -> Tensor:
    """Return the logits (n, E) as they are once a newcomer stands in the place of a dead expert.

    Args:
        x_ND: what the logits are linear in.
        logits_NE: before.
        weight_ED: before.
        bias_E: before.
        dead: expert.
        placement: its new row and bias.
    """
    shift = 0.0 if bias_E is None else placement.bias - float(bias_E[dead])
    z_NE = widen(logits_NE).clone()
    # As a difference: what else an expert's logit holds (a prior) stays.
    z_NE[:, dead] += widen(x_ND) @ (placement.row - widen(weight_ED[dead])) + shift
    return z_NE


def dense_gates(logits_NE: Tensor, k: int, scores: ScoreFunction, renormalize: bool = True) -> Tensor:
    """Return the gates (n, E): the k best scores, over their sum if ``renormalize``; 0 elsewhere."""
    ids_NK, weights_NK = top_choices(logits_NE, k, scores, renormalize)
    return torch.zeros_like(widen(logits_NE)).scatter(-1, ids_NK, weights_NK)


class _Line(NamedTuple):
    """A newcomer's logit, ``x·row + constant``, and the bias that makes the constant what it is."""

    row_D: Tensor
    bias: float
    constant: float


class _Newcomer:
    """The rows a newcomer may have: the donor's logit plus ``slope·(x - μ) + offset`` for the donor's tokens.

    Args:
        weight_ED: the router's weight.
        bias_E: its bias, if it is placed too.
        constants_E: what each expert's logits hold beside ``x Wᵀ``: the bias and a prior.
        donor: expert.
        dead: expert.
        unit: rows have norm 1.
        slope_D: tells the donor's tokens apart.
        mu_D: their mean.
    """

    def __init__(
        self,
        weight_ED: Tensor,
        bias_E: Tensor | None,
        constants_E: Tensor,
        donor: int,
        dead: int,
        unit: bool,
        slope_D: Tensor,
        mu_D: Tensor,
    ) -> None:
        self._begin_D, self._unit, self._with_bias = weight_ED[donor] + slope_D, unit, bias_E is not None
        # x·level is about 1 for the donor's tokens: where there is no bias, it stands for one.
        self._level_D = mu_D / mu_D.square().sum().clamp_min(torch.finfo(mu_D.dtype).tiny)
        self._centre = -float(slope_D @ mu_D) + float(constants_E[donor])
        self._fixed = float(constants_E[dead] - (0 if bias_E is None else bias_E[dead]))

    def at(self, offset: float) -> _Line:
        """Return the line at an offset."""
        # A bias makes up for a lower prior of the dead expert exactly, a row for its donor's tokens.
        level = self._centre + offset - self._fixed
        row_D = self._begin_D if self._with_bias else self._begin_D + level * self._level_D
        row_D = row_D / torch.linalg.vector_norm(row_D) if self._unit else row_D
        bias = level if self._with_bias else 0.0
        return _Line(row_D, bias, bias + self._fixed)


class _Trial(NamedTuple):
    """A placement, the mean gate it gives the newcomer, and whether it leaves others their tokens."""

    placement: Placement
    mass: float
    fair: bool

    def within(self, most: float) -> bool:
        """Whether it also moves the gates by no more than that."""
        moved = self.placement.moved
        return self.fair and moved is not None and moved <= most


class _Trials:
    """What a newcomer would do to the gates of the rows."""

    def __init__(
        self,
        x_ND: Tensor,
        z_NE: Tensor,
        own_N: Tensor,
        donor: int,
        dead: int,
        k: int,
        scores: ScoreFunction,
        renormalize: bool,
        merged: bool,
    ) -> None:
        self._x_ND, self._z_NE, self._own_N, self._donor, self._dead = x_ND, z_NE, own_N, donor, dead
        self._k, self._merged = k, merged
        self._gates = partial(dense_gates, k=k, scores=scores, renormalize=renormalize)
        self._before_NE = self._gates(z_NE)
        self._fair = max(k / z_NE.shape[-1], WORST * float(own_N.double().mean()))

    def of(self, line: _Line) -> _Trial:
        """Try a line."""
        z_NE = self._z_NE.clone()
        z_NE[:, self._dead] = self._logit(line)
        after_NE = self._gates(z_NE)
        share = float((after_NE[:, self._dead] > 0).double().mean())
        mass = float(after_NE[:, self._dead].mean())
        if self._merged:
            after_NE[:, self._donor] += after_NE[:, self._dead]
            after_NE[:, self._dead] = 0
        moved = float((after_NE - self._before_NE).abs().sum(dim=-1).mean()) / 2
        taken = float((z_NE[:, self._dead] > z_NE[:, self._donor])[self._own_N].double().mean())
        fair = taken <= WORST and share <= self._fair
        return _Trial(Placement(line.row_D, line.bias, share, moved), mass, fair)

    def reach(self, line: _Line) -> float:
        """Return by how much the logit of a newcomer must fall for no row to choose it, and a little more."""
        others_NE = self._z_NE.clone()
        others_NE[:, self._dead] = -torch.inf
        least_N = others_NE.topk(min(self._k, others_NE.shape[-1] - 1), dim=-1).values[:, -1]
        return max(float((self._logit(line) - least_N).max()), 0.0) + 1.0

    def _logit(self, line: _Line) -> Tensor:
        return self._x_ND @ line.row_D + line.constant


def _constants(x_ND: Tensor, z_NE: Tensor, weight_ED: Tensor) -> Tensor | None:
    """Return what each expert's logits hold beside ``x Wᵀ``, (E,); None if that is not constant."""
    if not len(x_ND):
        return None
    rest_NE = z_NE - x_ND @ weight_ED.T
    constants_E = rest_NE.mean(dim=0)
    size = float(torch.linalg.vector_norm(z_NE - z_NE.mean(dim=0)))
    # Rounding of half precision and jitter of the input are some percent. NaN fails.
    return constants_E if float(torch.linalg.vector_norm(rest_NE - constants_E)) <= 0.1 * size else None


def _worst(z_NE: Tensor, hurt_NE: Tensor | None, own_N: Tensor, donor: int, scores: ScoreFunction) -> Tensor:
    """Return the rows that the donor serves worst, (m,) int64, a quarter of its own."""
    own = own_N.nonzero().squeeze(-1)
    badness = -routing_probabilities(z_NE, scores)[own, donor]
    if hurt_NE is not None:
        gradient = widen(hurt_NE)[own, donor]
        # A gate that is 1 whatever the logits are has no gradient: that says nothing.
        badness = gradient if bool(gradient.isfinite().all()) and bool(gradient.any()) else badness
    order = badness.argsort(descending=True, stable=True)
    return own[order[: max(1, round(WORST * len(own)))]]


def _slope(x_ND: Tensor, worst: Tensor, own_N: Tensor) -> Tensor | None:
    """Return the direction from the donor's tokens to those it serves worst, so long that its x·slope have std 1."""
    own_ND = x_ND[own_N]
    away_D = x_ND[worst].mean(dim=0) - own_ND.mean(dim=0)
    spread = (own_ND @ away_D).std(correction=0)
    size = torch.linalg.vector_norm(away_D) * torch.linalg.vector_norm(own_ND, dim=-1).mean()
    return away_D / spread if float(spread) > 1e-6 * float(size) else None


def _largest(trials: _Trials, newcomer: _Newcomer, most: float) -> list[_Trial]:
    """Return the trial with the largest gates within the bounds that a bisection over the offset meets, if any."""
    reach = trials.reach(newcomer.at(0.0))
    low, high = -reach, reach
    tried = [trials.of(newcomer.at(high)), trials.of(newcomer.at(low))]
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        tried.append(trials.of(newcomer.at(middle)))
        low, high = (middle, high) if tried[-1].within(most) else (low, middle)
    reached = [trial for trial in tried if trial.within(most) and trial.mass > 0]
    return sorted(reached, key=lambda trial: trial.mass, reverse=True)[:1]
