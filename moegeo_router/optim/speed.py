"""The geodesic speed limit: the largest part of a step that moves the routing no farther than allowed.

Shape legend: L routers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry.simplex import readable

#: A step counts as at its limit when its KL is above this share of it.
CLOSE = 0.96

#: How often the divergence is looked at, at most: where the result can be read in between, and where it cannot.
MOST_ROUNDS, ROUNDS_UNSEEN = 24, 8


def largest_step(kl: Callable[[Tensor], Tensor], guess_L: Tensor, most_L: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest scales η in (0, 1] with ``kl(η) ≤ most``, to within 4% of the KL, and the KL there.

    The KL grows about as the square of η: a round scales η by ``√(most / kl(η))``, and once it is known both within the
    limit and beyond it, follows the power law between the two. The result is always within: where nothing was found,
    it is 0. (Where the KL is not monotonic, as on a sphere once a step turns rows all around, some scale is found.)

    Args:
        kl: (L,) scales -> (L,) mean KL, nats; the same on every rank.
        guess_L: scales to begin with; those above 1 are cut.
        most_L: the limits r²/2 of the mean KL, nats.

    Returns:
        η (L,) and ``kl(η)`` (L,).
    """
    inside = _Tried(torch.zeros_like(guess_L), torch.zeros_like(guess_L))
    beyond = _Tried(torch.full_like(guess_L, torch.inf), torch.full_like(guess_L, torch.inf))
    eta = guess_L.clamp(max=1)
    host = readable(guess_L)
    # On an accelerator nothing waits for the news that every router is done.
    for turn in range(MOST_ROUNDS if host else ROUNDS_UNSEEN):
        tried = _Tried(eta, kl(eta))
        within = tried.kl <= most_L  # NaN is not
        inside = _chosen(within & (eta > inside.eta), tried, inside)
        beyond = _chosen(~within & (eta < beyond.eta), tried, beyond)
        done = (inside.eta >= 1) | (inside.kl >= CLOSE * most_L) | (guess_L <= 0)
        if host and bool(done.all()):
            break
        eta = torch.where(done, inside.eta, _next(inside, beyond, most_L * (1 + CLOSE) / 2, turn >= 6))
    return inside.eta, inside.kl


class _Tried(NamedTuple):
    """Scales that were tried, and what the KL was there."""

    eta: Tensor
    kl: Tensor


def _chosen(which: Tensor, these: _Tried, others: _Tried) -> _Tried:
    return _Tried(*(torch.where(which, a, b) for a, b in zip(these, others, strict=True)))


def _next(inside: _Tried, beyond: _Tried, aim: Tensor, halve: bool) -> Tensor:
    """Return the next scales to try: strictly between what is within and what is beyond, and at most 1.

    Args:
        inside: the largest scales found within the limit, 0 where none was.
        beyond: the smallest found beyond it, inf where none was.
        aim: the KL wanted.
        halve: halve what is between the two: no law holds there, if it took so long.
    """
    tiny = torch.finfo(aim.dtype).tiny
    # From one side only: the square law, at most a factor of ten at a time (a KL of 0 says nothing of how far to go).
    up = inside.eta * (aim / inside.kl.clamp_min(tiny)).sqrt().clamp(1.01, 10)
    down = beyond.eta * (aim / beyond.kl).sqrt().nan_to_num(0.1).clamp(0.1, 0.99)
    # From both: the power law through them, kept a tenth away from either.
    width = (beyond.eta / inside.eta.clamp_min(tiny)).log()
    rise = (beyond.kl / inside.kl.clamp_min(tiny)).log()
    share = ((aim / inside.kl.clamp_min(tiny)).log() / rise).nan_to_num(0.5).clamp(0.1, 0.9)
    between = inside.eta * torch.exp((0.5 if halve else share) * width)
    return torch.where(inside.eta == 0, down, torch.where(beyond.eta.isinf(), up, between)).clamp(max=1)
