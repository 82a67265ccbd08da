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

from ..geometry.simplex import readable
from ..observe.statistics import world_size
from ..routers.gating import ScoreFunction
from .divergence import routing_fisher
from .rows import Rows


class KroneckerFisher:
    """Exponential averages of the two factors of L routers, and their damped inverses.

    A is kept in full up to ``block`` columns; a wider router has the fewest equal diagonal blocks that are no wider
    (``block=1``: the diagonal). The averages are those of sums: both factors and their number of tokens fade by
    ``decay`` a step, so early averages are not biased. Sums of a window between two refreshes are reduced over ranks
    in one all-reduce, at the refresh.

    Args:
        like: (L, E, D) the weights: shape, dtype, device.
        decay: what remains of a step's sums after one more step.
        damping: λ of either factor, as a share of its mean eigenvalue.
        floor: a share of the mean eigenvalue that G has at uniform routing, added to λ_G: G vanishes as p saturates.
        block: the most columns of a block of A.
        scores: the router's score function.
    """

    def __init__(
        self, like: Tensor, *, decay: float, damping: float, floor: float, block: int, scores: ScoreFunction
    ) -> None:
        self._decay, self._damping, self._scores = decay, damping, scores
        routers, experts, width = like.shape
        self._floor = floor * max(experts - 1, 1) / experts**2
        self._width, self._experts = width, experts
        blocks = -(-width // block)
        self._blocks, self._size = blocks, -(-width // blocks)
        shapes = {"A": (blocks, self._size, self._size), "G": (experts, experts), "tokens": ()}
        # Faded sums up to the last refresh, and those of the window since.
        self._sums = {name: like.new_zeros(routers, *shape) for name, shape in shapes.items()}
        self._window = {name: torch.zeros_like(values) for name, values in self._sums.items()}
        self._inverse_A, self._inverse_G = self._sums["A"], self._sums["G"]

    def tensors(self) -> dict[str, Tensor]:
        """Return all sums, each (L, …)."""
        return self._sums | {f"window_{name}": values for name, values in self._window.items()}

    def add(self, rows: Rows) -> None:
        """Add the rows of a step to the window."""
        self._fade(self._window)
        x_LBNS = self._in_blocks(rows.x)
        self._window["A"] += (x_LBNS * rows.weight[:, None, :, None]).mT @ x_LBNS
        self._window["G"] += routing_fisher(rows.z, rows.weight, self._scores)
        self._window["tokens"] += rows.weight.sum(dim=-1)

    def refresh(self, steps: int, group: Any = None) -> None:
        """Take the window into the averages and invert them anew.

        Args:
            steps: of the window.
            group: the data-parallel process group.
        """
        if world_size(group) > 1:
            fused = torch.cat([values.flatten() for values in self._window.values()])
            dist.all_reduce(fused, group=group)
            parts = fused.split([values.numel() for values in self._window.values()])
            for values, part in zip(self._window.values(), parts, strict=True):
                values.copy_(part.view_as(values))
        self._fade(self._sums, steps)
        for name, values in self._window.items():
            self._sums[name] += values
            values.zero_()
        self.invert()

    def invert(self) -> None:
        """Compute the damped inverses of the averages."""
        tokens = self._sums["tokens"].clamp_min(torch.finfo(self._sums["tokens"].dtype).tiny)[:, None, None]
        A, G = self._sums["A"] / tokens.unsqueeze(1), self._sums["G"] / tokens
        eye = torch.eye(self._experts, dtype=G.dtype, device=G.device)
        tiny = torch.finfo(A.dtype).tiny ** 0.5  # an inverse of nothing must not be infinite
        mean_G = _trace(G) / max(self._experts - 1, 1)
        # Along 1 a softmax G is 0, and a direction there is nothing of the natural step: any curvature will do.
        along_1 = mean_G + self._floor if self._scores == "softmax" else torch.zeros_like(mean_G)
        G = G + (self._damping * mean_G + self._floor + tiny) * eye + along_1 / self._experts
        self._inverse_G = _inverse(G)
        # The mean over all of A: a block without input would have no damping of its own.
        mean_A = _trace(A).sum(dim=1, keepdim=True) / self._width
        lam_A = self._damping * mean_A + tiny
        self._inverse_A = _inverse(A + lam_A * torch.eye(self._size, dtype=A.dtype, device=A.device))

    def solve(self, gradient_LED: Tensor) -> Tensor:
        """Return ``(G + λ_G)⁻¹ ∇ (A + λ_A)⁻¹``; of softmax routers the mean over experts stays as it is.

        The mean moves no softmax, so the Fisher information knows no length for it (z-loss and decay have one).
        """
        mean_L1D = gradient_LED.mean(dim=-2, keepdim=True) if self._scores == "softmax" else gradient_LED.new_zeros(())
        half_LED = self._inverse_G @ (gradient_LED - mean_L1D)
        solved_LBES = self._in_blocks(half_LED) @ self._inverse_A
        return solved_LBES.transpose(1, 2).flatten(2)[..., : self._width] + mean_L1D

    def _in_blocks(self, values_LND: Tensor) -> Tensor:
        missing = self._blocks * self._size - self._width
        padded = torch.nn.functional.pad(values_LND, (0, missing)) if missing else values_LND
        return padded.unflatten(-1, (self._blocks, self._size)).transpose(1, 2)

    def _fade(self, sums: dict[str, Tensor], steps: int = 1) -> None:
        for values in sums.values():
            values *= self._decay**steps


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
