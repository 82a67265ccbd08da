"""The geodesic speed limit: the largest part of a step that moves the routing no farther than allowed.

Shape legend: L routers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..geometry.simplex import readable

#: A step counts as at its limit when its KL is above this share of it.
CLOSE = 0.96


def largest_step(
    kl: Callable[[Tensor], Tensor], guess_L: Tensor, most: Tensor, rounds: int = 8
) -> tuple[Tensor, Tensor]:
    """Return the largest scales η in (0, 1] with ``kl(η) ≤ most``, to within 4% of the KL, and the KL there.

    The KL grows with η about as its square: every round scales η by ``√(most / kl(η))`` and keeps it in the bracket of
    what is known to be within the limit and beyond it. The result is always within: where nothing was found, it is 0.

    Args:
        kl: (L,) scales -> (L,) mean KL, nats; the same on every rank.
        guess_L: scales to begin with; those above 1 are cut.
        most: the limit r²/2 of the mean KL, nats.
        rounds: at most; on a CPU it ends as soon as every router is done, on an accelerator nothing waits for that.

    Returns:
        η (L,) and ``kl(η)`` (L,).
    """
    inside, kl_inside = torch.zeros_like(guess_L), torch.zeros_like(guess_L)
    beyond = torch.full_like(guess_L, torch.inf)
    eta = guess_L.clamp(max=1)
    aim = most * (1 + CLOSE) / 2
    for _ in range(rounds):
        found = kl(eta)
        within = found <= most  # NaN is not
        better = within & (eta > inside)
        inside, kl_inside = torch.where(better, eta, inside), torch.where(better, found, kl_inside)
        beyond = torch.where(within, beyond, torch.minimum(eta, beyond))
        done = (inside >= 1) | (kl_inside >= CLOSE * most) | (guess_L <= 0)
        if readable(done) and bool(done.all()):
            break
        eta = torch.where(done, inside, _next(eta, found, aim, inside, beyond))
    return inside, kl_inside


def _next(eta: Tensor, found: Tensor, aim: Tensor, inside: Tensor, beyond: Tensor) -> Tensor:
    """Return the next scales to try."""
    # A step without any KL says nothing about how far it may go: ten times farther, then.
    scaled = (eta * (aim / found.clamp_min(torch.finfo(found.dtype).tiny)).sqrt().clamp(max=10)).clamp(max=1)
    middle = torch.where(beyond.isfinite(), torch.where(inside > 0, (inside * beyond).sqrt(), beyond / 10), 1)
    return torch.where((scaled > inside) & (scaled < beyond), scaled, middle)
