"""How far changes of routers' weights move the routing of their kept rows, in radians and nats.

Shape legend: L routers, E experts, D width (with a bias one more), N rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..observe.statistics import world_size
from ..routers.gating import ScoreFunction
from .divergence import Divergence
from .rows import Rows


class KeptRouting:
    """The routing of the kept rows of L routers; means are over the tokens of all ranks, inf where there are none.

    Args:
        rows: the kept rows of this rank.
        scores: the routers' score function.
        group: the data-parallel process group.

    Attributes:
        tokens: (L,) how many there are.
    """

    def __init__(self, rows: Rows, scores: ScoreFunction, group: Any) -> None:
        self._rows, self._scores, self._group = rows, scores, group
        self._x_LDN = rows.x.mT
        self._here = Divergence(rows.z, rows.weight, scores)
        self.tokens = self._over_ranks(rows.weight.sum(dim=-1))

    def kl(self, change_LED: Tensor) -> Tensor:
        """Return the mean KL of the routing from that after a change, (L,) nats: exact."""
        return self._mean(self._here.sums(change_LED @ self._x_LDN))

    def squared_length(self, change_LED: Tensor) -> Tensor:
        """Return ``vec(Δ)ᵀ F vec(Δ)``, (L,) squared radians: twice the KL, to second order."""
        return 2 * self._mean(self._here.quadratic_sums(change_LED @ self._x_LDN))

    def squared_shift(self, change_L1D: Tensor) -> Tensor:
        """Return the mean square of a change of all logits together, (L,)."""
        dz_LN = (change_L1D @ self._x_LDN).squeeze(-2)
        return self._mean((dz_LN.square() * self._rows.weight).sum(dim=-1))

    def kl_of_the_last(self, change_LED: Tensor) -> Tensor:
        """Return the mean KL of the routing before the change that led here from the routing now, (L,) nats."""
        dz_LEN = change_LED @ self._x_LDN
        return self._mean(Divergence(self._rows.z - dz_LEN, self._rows.weight, self._scores).sums(dz_LEN))

    def flipped(self, change_LED: Tensor) -> Tensor:
        """Return the share of tokens whose most likely expert is another one after a change, (L,)."""
        z_LEN = self._rows.z
        after_LEN = z_LEN + change_LED @ self._x_LDN
        # Two argmax over experts would cost ten times as much on a CPU.
        first_LN = torch.where(z_LEN < z_LEN.amax(dim=-2, keepdim=True), -torch.inf, after_LEN).amax(dim=-2)
        return self._mean(((first_LN < after_LEN.amax(dim=-2)) * self._rows.weight).sum(dim=-1))

    def _mean(self, sums_L: Tensor) -> Tensor:
        sums_L = self._over_ranks(sums_L)
        return torch.where(self.tokens > 0, sums_L / self.tokens.clamp_min(1), torch.inf)

    def _over_ranks(self, sums_L: Tensor) -> Tensor:
        if world_size(self._group) > 1:
            dist.all_reduce(sums_L, group=self._group)
        return sums_L
