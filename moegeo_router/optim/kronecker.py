"""The Fisher information of a routing in its router's weight, as a Kronecker product of two small factors.

``F = mean_t G_t ⊗ x_t x_tᵀ ≈ G ⊗ A`` with ``G = mean G_t`` (E, E) and ``A = mean x_t x_tᵀ`` (D, D): exact for one
token, else where G_t and x_t are uncorrelated (K-FAC's approximation, of the routing, not the model's output) [ours].

Shape legend: L routers, E experts, D width (with a bias one more), N rows, B blocks of S columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import NaturalConfig
from ..geometry.simplex import readable
from ..observe.statistics import world_size
from ..routers.gating import ScoreFunction
from .divergence import routing_fisher
from .rows import Rows


class KroneckerFisher:
    """Exponential averages of the two factors of L routers, and their damped inverses.

    A is kept in full up to ``block`` columns; a wider router has the fewest equal diagonal blocks that are no wider
    (1: the diagonal). The averages are those of sums: both factors and their number of tokens fade by ``decay`` a step,
    so early averages are not biased. Sums of a window between two refreshes are reduced over ranks in one all-reduce,
    at the refresh.

    Args:
        like: (L, E, D) the weights: shape, dtype, device.
        block: the most columns of a block of A.
        scores: the router's score function.

    Attributes:
        damped: damping and floor of the inverses (see ``NaturalConfig``); None: there are none yet.
    """

    def __init__(self, like: Tensor, block: int, scores: ScoreFunction) -> None:
        self._scores = scores
        routers, self._experts, self._width = like.shape
        blocks = -(-self._width // block)
        self._blocks, self._size = blocks, -(-self._width // blocks)
        shapes = {
            "A": (blocks, self._size, self._size),
            "G": (self._experts, self._experts),
            "tokens": (),
        }
        # Faded sums up to the last refresh, and those of the window since.
        self._sums = {name: like.new_zeros(routers, *shape) for name, shape in shapes.items()}
        self._window = {name: torch.zeros_like(values) for name, values in self._sums.items()}
        self._inverse_A, self._inverse_G = torch.zeros_like(self._sums["A"]), torch.zeros_like(self._sums["G"])
        self.damped: tuple[float, float] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return all sums, each (L, …)."""
        return self._sums | {f"window_{name}": values for name, values in self._window.items()}

    def to(self, like: Tensor) -> None:
        """Move everything to the device and dtype of ``like``."""
        for sums in (self._sums, self._window):
            sums |= {name: values.to(like) for name, values in sums.items()}
        self._inverse_A, self._inverse_G = self._inverse_A.to(like), self._inverse_G.to(like)

    def add(self, rows: Rows, decay: float) -> None:
        """Add the rows of a step to the window."""
        for values in self._window.values():
            values *= decay
        x_LBNS = self._in_blocks(rows.x)
        self._window["A"] += (x_LBNS * rows.weight[:, None, :, None]).mT @ x_LBNS
        self._window["G"] += routing_fisher(rows.z, rows.weight, self._scores)
        self._window["tokens"] += rows.weight.sum(dim=-1)

    def refresh(self, steps: int, config: NaturalConfig, group: Any = None) -> None:
        """Take the window into the averages and invert them anew.

        Args:
            steps: of the window.
            config: decay, damping and floor.
            group: the data-parallel process group.

        Raises:
            ValueError: a factor is singular (on a CPU, where that can be seen).
        """
        if world_size(group) > 1:
            fused = torch.cat([values.flatten() for values in self._window.values()])
            dist.all_reduce(fused, group=group)
            parts = fused.split([values.numel() for values in self._window.values()])
            for values, part in zip(self._window.values(), parts, strict=True):
                values.copy_(part.view_as(values))
        for name, values in self._window.items():
            self._sums[name] *= config.decay**steps
            self._sums[name] += values
            values.zero_()
        self.damped = config.damping, config.floor
        self.invert()

    def invert(self) -> None:
        """Compute the inverses of the averages, damped as ``damped`` says.

        Raises:
            ValueError: as for ``refresh``.
        """
        if self.damped is None:
            return
        damping, floor = self.damped
        tokens = self._sums["tokens"].clamp_min(torch.finfo(self._sums["tokens"].dtype).tiny)[:, None, None]
        A, G = self._sums["A"] / tokens.unsqueeze(1), self._sums["G"] / tokens
        eye = torch.eye(self._experts, dtype=G.dtype, device=G.device)
        others = max(self._experts - 1, 1)
        tiny = torch.finfo(A.dtype).tiny ** 0.5  # an inverse of nothing must not be infinite
        mean_G = _trace(G) / others
        if self._scores == "softmax":
            # A shift of all logits moves no softmax: a direction without curvature is given the mean one.
            G = G + mean_G / self._experts
        lowest = floor * others / self._experts**2
        self._inverse_G = _inverse(G + (damping * mean_G + lowest + tiny) * eye)
        # The mean over all of A: a block without input would have no damping of its own.
        mean_A = _trace(A).sum(dim=1, keepdim=True) / self._width
        eye = torch.eye(self._size, dtype=A.dtype, device=A.device)
        self._inverse_A = _inverse(A + (damping * mean_A + tiny) * eye)

    def solve(self, gradient_LED: Tensor) -> Tensor:
        """Return ``(G + λ_G)⁻¹ ∇ (A + λ_A)⁻¹``."""
        solved_LBES = self._in_blocks(self._inverse_G @ gradient_LED) @ self._inverse_A
        return solved_LBES.transpose(1, 2).flatten(2)[..., : self._width]

    def _in_blocks(self, values_LND: Tensor) -> Tensor:
        missing = self._blocks * self._size - self._width
        padded = torch.nn.functional.pad(values_LND, (0, missing)) if missing else values_LND
        return padded.unflatten(-1, (self._blocks, self._size)).transpose(1, 2)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]


def _inverse(matrices: Tensor) -> Tensor:
    if matrices.shape[-1] == 1:
        return matrices.reciprocal()
    # Not cholesky, whose check of success would make an accelerator wait.
    factor, failed = torch.linalg.cholesky_ex(matrices)
    if readable(failed) and bool(failed.any()):
        raise ValueError("a factor of the routing's Fisher information is singular: set natural.damping above 0")
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    root = torch.linalg.solve_triangular(factor, eye, upper=False)
    return root.mT @ root
