"""How far a change of the logits moves the routing: the Fisher metric of p in the logits, and exact KL divergences.

``p`` are the router's native scores over their sum (``routers.gating``). With ``D = 1`` for softmax scores and
``D = diag σ(-z)`` for sigmoid ones, ``d log p = D dz - <p, D dz>``, so the Fisher metric is
``G = D (diag p - p pᵀ) D`` [standard; the sigmoid form ours].

Shape legend: L routers (any leading dimensions), E experts, N rows (tokens). Experts come before rows: with few
experts, sums over the last dimension would run over a handful of numbers each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routers.gating import ScoreFunction


def routing_fisher(z_LEN: Tensor, weight_LN: Tensor, scores: ScoreFunction = "softmax") -> Tensor:
    """Return the weighted sum over rows of the Fisher metric of p in the logits, (L, E, E).

    Args:
        z_LEN: logits.
        weight_LN: how many tokens each row stands for.
        scores: the router's score function.
    """
    p_LEN = _probabilities(z_LEN, scores)
    scaled_LEN = p_LEN if scores == "softmax" else p_LEN * torch.sigmoid(-z_LEN)
    weighted_LEN = scaled_LEN * weight_LN.unsqueeze(-2)
    own_LEN = weighted_LEN if scores == "softmax" else weighted_LEN * torch.sigmoid(-z_LEN)
    return torch.diag_embed(own_LEN.sum(dim=-1)) - weighted_LEN @ scaled_LEN.mT


class Divergence:
    """The KL divergence of the routing at given logits from that at changed ones, ``KL(p(z) ‖ p(z + dz))``.

    Args:
        z_LEN: logits.
        weight_LN: how many tokens each row stands for.
        scores: the router's score function.
    """

    def __init__(self, z_LEN: Tensor, weight_LN: Tensor, scores: ScoreFunction = "softmax") -> None:
        self._weight_LN = weight_LN
        self._p_LEN = _probabilities(z_LEN, scores)
        self._z_LEN = None if scores == "softmax" else z_LEN

    def sums(self, dz_LEN: Tensor) -> Tensor:
        """Return the weighted sums over rows, (L,), nats.

        ``Σ p (e^r - 1 - r)`` with ``r = log q - log p``: every term is positive, so nothing cancels for small steps.
        """
        ds_LEN = dz_LEN if self._z_LEN is None else _log_sigmoid_change(self._z_LEN, dz_LEN)
        below_LEN = ds_LEN - ds_LEN.amax(dim=-2, keepdim=True)
        r_LEN = below_LEN - _log_mean_exp(below_LEN, self._p_LEN)
        return self._weighted(self._p_LEN * _exponential_beyond_first_order(r_LEN))

    def quadratic_sums(self, dz_LEN: Tensor) -> Tensor:
        """Return the second-order form, ``½ Σ_t w_t dz_tᵀ G_t dz_t``, (L,), nats."""
        ds_LEN = dz_LEN if self._z_LEN is None else dz_LEN * torch.sigmoid(-self._z_LEN)
        centred_LEN = ds_LEN - (self._p_LEN * ds_LEN).sum(dim=-2, keepdim=True)
        return self._weighted(self._p_LEN * centred_LEN.square()) / 2

    def _weighted(self, values_LEN: Tensor) -> Tensor:
        return (values_LEN.sum(dim=-2) * self._weight_LN).sum(dim=-1)


def _probabilities(z_LEN: Tensor, scores: ScoreFunction) -> Tensor:
    return (z_LEN if scores == "softmax" else F.logsigmoid(z_LEN)).softmax(dim=-2)


def _log_mean_exp(below_LEN: Tensor, p_LEN: Tensor) -> Tensor:
    """Return ``log Σ p e^b`` over experts, (L, 1, N), for b ≤ 0: all digits for small b, and for large ones."""
    near = (p_LEN * torch.expm1(below_LEN)).sum(dim=-2, keepdim=True)
    far = (p_LEN * below_LEN.exp()).sum(dim=-2, keepdim=True)
    tiny = torch.finfo(far.dtype).tiny  # the probability of what is left may have underflowed
    return torch.where(near > -0.5, torch.log1p(near.clamp_min(-0.5)), far.clamp_min(tiny).log())


def _log_sigmoid_change(z: Tensor, dz: Tensor) -> Tensor:
    """Return ``log σ(z + dz) - log σ(z) = -log(1 + σ(-z) (e^-dz - 1))``, which keeps the digits of small dz."""
    near = -torch.log1p(torch.sigmoid(-z) * torch.expm1(-dz.clamp(-1, 1)))
    return torch.where(dz.abs() <= 1, near, F.logsigmoid(z + dz) - F.logsigmoid(z))


def _exponential_beyond_first_order(r: Tensor) -> Tensor:
    """Return ``e^r - 1 - r`` without cancellation."""
    small = r.square() * (0.5 + r * (1 / 6 + r / 24))
    return torch.where(r.abs() < 1e-2, small, torch.expm1(r) - r)
