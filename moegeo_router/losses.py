"""Differentiable regularizers on the quantities that are watched, with the right gradient whatever the loop does.

A nonlinear function R of *global* means (FSI² of p̄, a floor under the dispersion) has another gradient when computed
on micro-batches: it is computed once a step from the reduced sums, and every forward pass adds the **linearisation**
``Σ_m <∂R/∂m at m_ref, m_now>`` over the means m it is a function of, m_ref those of the previous optimizer step. Its
gradient does not depend on the number of micro-batches or ranks (of equal token counts). In the first step, where there
is no m_ref, these regularizers are off.

Every regularizer is per layer, and the layers are summed: pooling the layers' counts first hides collapsed layers.

Shape legend: T tokens, E experts, K chosen experts, S sequences. All are [ours] except the load-balance loss (Switch
Transformer) and the z-loss (ST-MoE).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .geometry.simplex import FLOOR, entropy, fisher_rao_distance, root, uniform, widen
from .metrics.heterogeneity import fhs_squared
from .metrics.load import load_share
from .metrics.specialization import dispersion_from_means, fsi_max, information_from_means
from .observe.forward import LayerForward, at_least_1, kept, rows
from .observe.statistics import LayerStatistics
from .routers.gating import ScoreFunction, routing_probabilities

BalanceScope = Literal["global", "micro_batch", "sequence"]


@dataclass(frozen=True, kw_only=True)
class Regularizers:
    """Which regularizers are on, and how strong: the weight of each in the loss; 0 is off.

    On by default: ``fsi`` at 0.01, which holds the mean routing near uniform. All else is off.

    Attributes:
        fsi: ``max(0, d(p̄, u) - fsi_target · fsi_max)²``, radians².
        fsi_target: the share of ``fsi_max`` below which ``fsi`` does nothing; 0 is the plain square.
        fhs: ``FHS²`` of ``t_e = c_e mean_t g_te²``, c_e a running mean of ``Σ g² ‖δ‖² / Σ g²`` (needs the ``outputs``
            traces); no gradient where the gates are constant, as for renormalised top-1.
        dispersion: ``max(0, dispersion_floor - dispersion_1)²``.
        dispersion_floor: in (0, 1].
        information: ``max(0, information_floor - I / log E)²``.
        information_floor: in (0, 1].
        balance: ``E Σ_e f_e p̄_e``, f the load shares (a constant for the gradient); 1 at balance, E/k when k experts
            take everything.
        balance_scope: ``"global"``: f of the global batch of the previous step, which leaves micro-batches free to
            specialize; ``"micro_batch"``: f of the forward itself; ``"sequence"``: one such loss for every sequence,
            averaged over them.
        z: ``mean_t logsumexp(z_t)²``, which holds the logits small.

    Raises:
        ValueError: a negative weight, or a target or floor out of range.
    """

    fsi: float = 0.01
    fsi_target: float = 0.0
    fhs: float = 0.0
    dispersion: float = 0.0
    dispersion_floor: float = 0.5
    information: float = 0.0
    information_floor: float = 0.5
    balance: float = 0.0
    balance_scope: BalanceScope = "global"
    z: float = 0.0

    def __post_init__(self) -> None:
        for name in _WEIGHTS:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"regularizers.{name} must be a weight of at least 0, got {getattr(self, name)}")
        if not 0 <= self.fsi_target < 1:
            raise ValueError(f"regularizers.fsi_target must be in [0, 1), got {self.fsi_target}")
        for name in ("dispersion_floor", "information_floor"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"regularizers.{name} must be in (0, 1], got {getattr(self, name)}")
        scopes = ("global", "micro_batch", "sequence")
        if self.balance_scope not in scopes:
            raise ValueError(f"regularizers.balance_scope must be one of {scopes}, got {self.balance_scope!r}")

    @classmethod
    def none(cls) -> Regularizers:
        """Return the configuration with everything off."""
        return cls(fsi=0.0)

    @property
    def active(self) -> tuple[str, ...]:
        """The names of those that are on."""
        return tuple(name for name in _WEIGHTS if getattr(self, name))


_WEIGHTS = ("fsi", "fhs", "dispersion", "information", "balance", "z")


class Means(NamedTuple):
    """What the regularizers of a layer are functions of: means over tokens, or the slopes along them.

    Attributes:
        p: (E,) mean of p_t.
        root_p: (E,) mean of √p_t.
        entropy: () mean of H(p_t), nats.
        gates_squared: (E,) mean of g_te².
        z_squared: () mean of logsumexp(z_t)².
    """

    p: Tensor
    root_p: Tensor
    entropy: Tensor
    gates_squared: Tensor
    z_squared: Tensor

    @classmethod
    def of(cls, sums: LayerStatistics) -> Means:
        """Return the means of reduced sums, float64; 0 where there are no tokens."""
        tokens, gates = sums.tokens.clamp_min(1), sums.gate_tokens.clamp_min(1)
        per_token = (sums.p / tokens, sums.root_p / tokens, (sums.entropy / tokens).squeeze(0))
        return cls(*per_token, sums.gates_squared / gates, (sums.z_squared / tokens).squeeze(0))


class Linearization(NamedTuple):
    """A layer's regularizers at the means of one step: ``R(m) ≈ offset + <slopes, m>``.

    Attributes:
        value: () the regularizers there; those that every forward computes for itself included, at the global load.
        slopes: ∂R/∂m of those that are linearised.
        offset: () their value less <slopes, m_ref>.
    """

    value: Tensor
    slopes: Means
    offset: Tensor


def linearize(regularizers: Regularizers, sums: LayerStatistics, sensitivity: Tensor | None = None) -> Linearization:
    """Return the regularizers' weighted sum at the means of ``sums``, and its slopes along each mean.

    Args:
        regularizers: the weights.
        sums: one layer's, reduced over ranks.
        sensitivity: (E,) c of ``Regularizers.fhs``; without it that term is off.

    Returns:
        The linearisation, float64; where there are no tokens, only z-loss is on, whose slope is the same everywhere.
    """
    at = Means(*(mean.detach().requires_grad_() for mean in Means.of(sums)))
    with torch.enable_grad():
        linearised, own = _value(regularizers, at, sums.counts, sensitivity)
        slopes = Means(*torch.autograd.grad(linearised, at, materialize_grads=True))
        offset = linearised - sum(((slope * mean).sum() for slope, mean in zip(slopes, at, strict=True)))
    # Without tokens there is nothing to regularize: the value there would be that of p̄ = 0.
    seen = (sums.tokens > 0).squeeze(0)
    value, offset = (torch.where(seen, x.detach(), 0) for x in (linearised + own, offset))
    here = Means(*(torch.where(seen, slope, 0) for slope in slopes))
    return Linearization(value, here._replace(z_squared=slopes.z_squared), offset)


def _value(weights: Regularizers, at: Means, counts: Tensor, sensitivity: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the part that is linearised, and the part that every forward computes for itself."""
    experts = len(at.p)
    p = at.p.clamp_min(FLOOR)  # at 0 the slope would be infinite, and a collapsed p̄ holds zeros
    linearised = 0 * at.p.sum() + weights.z * at.z_squared
    if weights.fsi:
        distance = fisher_rao_distance(p, uniform(experts, dtype=p.dtype, device=p.device))
        linearised = linearised + weights.fsi * (distance - weights.fsi_target * fsi_max(experts)).relu().square()
    if weights.fhs and sensitivity is not None:
        linearised = linearised + weights.fhs * _heterogeneity(at.gates_squared, sensitivity)
    if weights.dispersion and experts > 1:
        gap = weights.dispersion_floor - dispersion_from_means(p, at.root_p)
        linearised = linearised + weights.dispersion * gap.relu().square()
    if weights.information and experts > 1:
        gap = weights.information_floor - information_from_means(p, at.entropy, normalized=True)
        linearised = linearised + weights.information * gap.relu().square()
    balance = weights.balance * experts * (load_share(counts) * at.p).sum()
    if weights.balance_scope == "global":
        return linearised + balance, torch.zeros_like(balance)
    return linearised, balance


def _heterogeneity(gates_squared: Tensor, sensitivity: Tensor) -> Tensor:
    traces = gates_squared * sensitivity
    signal = traces.sum() > 0
    # FHS is NaN without a signal; both sides are masked, because NaN times 0 would still reach the gradient.
    return torch.where(signal, fhs_squared(torch.where(signal, traces, 1)), 0)


def additive_loss(
    seen: LayerForward,
    regularizers: Regularizers,
    reference: Linearization | None,
    *,
    scores: ScoreFunction = "softmax",
    tokens: int | None = None,
) -> Tensor:
    """Return one forward pass's share of a layer's regularizers, on the graph of its logits and gates.

    Args:
        seen: the forward pass.
        regularizers: the weights.
        reference: ``linearize`` at the previous step's means; None in the first step, where only what needs no
            reference is on (z-loss, and load balance in its own scopes).
        scores: the router's score function.
        tokens: divide the sums over tokens by this; by default by the forward's own unmasked tokens.

    Returns:
        A scalar, fp32 or better.

    Raises:
        ValueError: ``balance_scope="sequence"`` where sequences are not known, or ``"micro_batch"`` without ids.
    """
    # What is masked may hold NaN, which a product with 0 would not stop; nor do broken tokens make the loss NaN.
    z_TE = widen(rows(seen.logits))
    finite_T = z_TE.detach().amax(dim=-1).isfinite() if z_TE.shape[0] else None
    keep_T = finite_T if seen.mask is None else seen.mask if finite_T is None else seen.mask & finite_T
    z_TE = kept(z_TE, keep_T)
    p_TE = routing_probabilities(z_TE, scores)
    own = seen.tokens()
    count = at_least_1(own) if tokens is None else tokens
    per_token = _per_token(z_TE, p_TE, regularizers, None if reference is None else reference.slopes)
    total = kept(per_token, keep_T).sum() / count
    if reference is not None:
        total = total + reference.offset.to(p_TE) * (own / count)
        if regularizers.fhs and seen.gates is not None and seen.ids is not None:
            total = total + _gate_loss(seen, reference.slopes.gates_squared) / count
    if regularizers.balance and regularizers.balance_scope != "global":
        balance = load_balance(seen, p_TE, regularizers.balance_scope)
        total = total + (own / count) * regularizers.balance * balance
    return total


def _per_token(z_TE: Tensor, p_TE: Tensor, regularizers: Regularizers, slopes: Means | None) -> Tensor:
    if slopes is None:
        per_token = 0 * p_TE[:, 0]  # the first step is on the graph, too: loss().backward() works
        return per_token + regularizers.z * z_TE.logsumexp(dim=-1).square() if regularizers.z else per_token
    # Products and sums, not matrix products: those are what autocast would round to bf16.
    per_token = (p_TE * slopes.p.to(p_TE)).sum(dim=-1)
    if regularizers.dispersion:
        per_token = per_token + (root(p_TE) * slopes.root_p.to(p_TE)).sum(dim=-1)
    if regularizers.information:
        per_token = per_token + entropy(p_TE) * slopes.entropy.to(p_TE)
    if regularizers.z:
        per_token = per_token + z_TE.logsumexp(dim=-1).square() * slopes.z_squared.to(p_TE)
    return per_token


def _gate_loss(seen: LayerForward, slopes_E: Tensor) -> Tensor:
    """Return ``Σ_tk slope_{ids} g²``, the linearised sum over the chosen gates."""
    assert seen.gates is not None
    assert seen.ids is not None
    g_TK = widen(rows(seen.gates))
    slope_TK = slopes_E.to(g_TK)[seen.ids.reshape(g_TK.shape).long()]
    return kept(slope_TK * kept(g_TK, seen.mask).square(), seen.mask).sum()


def load_balance(seen: LayerForward, p_TE: Tensor, scope: BalanceScope = "micro_batch") -> Tensor:
    """Return ``E Σ_e f_e p̄_e`` of one forward pass, or its mean over the sequences (Switch Transformer, Eq. 4-6).

    Args:
        seen: the forward pass, with ids.
        p_TE: its routing probabilities.
        scope: ``"micro_batch"`` or ``"sequence"``.

    Returns:
        A scalar: 1 at balance, E/k when k experts take everything.

    Raises:
        ValueError: ids or sequences that are needed and not known.
    """
    if seen.ids is None:
        raise ValueError(f"layer {seen.layer}: the load-balance loss needs the chosen experts (or top_k)")
    experts, p_TE = seen.num_experts, kept(p_TE, seen.mask)
    ids_TK = rows(seen.ids).long()
    if scope == "micro_batch":
        counted_TK = torch.ones_like(ids_TK) if seen.mask is None else seen.mask.unsqueeze(-1).expand_as(ids_TK).long()
        counts_E = counted_TK.new_zeros(experts).index_add(0, ids_TK.reshape(-1), counted_TK.reshape(-1))
        mean_E = p_TE.sum(dim=0) / at_least_1(seen.tokens())
        return experts * (load_share(counts_E).to(p_TE) * mean_E).sum()
    if seen.sequences is None:
        raise ValueError(
            f"layer {seen.layer}: balance_scope='sequence' needs the sequences: call the model with (B, L) input or "
            "segment_ids"
        )
    return _sequence_balance(seen, p_TE, ids_TK)


def _sequence_balance(seen: LayerForward, p_TE: Tensor, ids_TK: Tensor) -> Tensor:
    assert seen.sequences is not None
    experts, k = seen.num_experts, ids_TK.shape[-1]
    counted_T = torch.ones_like(p_TE[:, 0]) if seen.mask is None else seen.mask.to(p_TE)
    _, index_T = seen.sequences.to(p_TE.device).unique(return_inverse=True)
    sequences = int(index_T.max()) + 1 if len(index_T) else 0
    tokens_S = counted_T.new_zeros(sequences).index_add(0, index_T, counted_T)
    cell_TK = index_T.unsqueeze(-1) * experts + ids_TK
    weight_TK = counted_T.unsqueeze(-1).expand_as(ids_TK)
    counts_SE = counted_T.new_zeros(sequences * experts).index_add(0, cell_TK.reshape(-1), weight_TK.reshape(-1))
    sums_SE = p_TE.new_zeros(sequences, experts).index_add(0, index_T, p_TE)
    used_S1 = tokens_S.clamp_min(1).unsqueeze(-1)
    per_sequence_S = experts * (counts_SE.view(sequences, experts) / (k * used_S1) * sums_SE / used_S1).sum(dim=-1)
    return per_sequence_S.sum() / (tokens_S > 0).sum().clamp_min(1)
