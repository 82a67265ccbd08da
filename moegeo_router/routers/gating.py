"""Gating: from router logits to the chosen experts and their weights.

Shape legend: T tokens (any leading dimensions), E experts, K chosen experts, G groups of experts.
"""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from ..geometry.simplex import widen

ScoreFunction = Literal["softmax", "sigmoid"]


class Gating(NamedTuple):
    """What a gate decided: ``weights`` (T, K), ``ids`` (T, K) int64, ``probs`` (T, E): native scores over their sum."""

    weights: Tensor
    ids: Tensor
    probs: Tensor


def routing_probabilities(logits_TE: Tensor, scores: ScoreFunction = "softmax") -> Tensor:
    """Return p, the router's native scores over all experts normalised to sum 1, in fp32 or better.

    ``softmax(z)`` for softmax routers, ``σ(z) / Σ σ(z)`` for sigmoid ones, before any selection bias and top-k.

    Args:
        logits_TE: (..., E) logits of any float dtype.
        scores: the router's score function.

    Returns:
        (..., E) probabilities.

    Raises:
        ValueError: unknown score function, or no experts.
    """
    if scores == "softmax":
        few = _num_experts(logits_TE) <= 16 and logits_TE.ndim == 2 and logits_TE.device.type == "cpu"
        # Over a last dimension of a handful of numbers torch's softmax is five times slower than over the first.
        return widen(logits_TE).T.contiguous().softmax(dim=0).T if few else widen(logits_TE).softmax(dim=-1)
    return _log_scores(logits_TE, scores).softmax(dim=-1)


def topk_gating(
    logits_TE: Tensor,
    k: int,
    *,
    scores: ScoreFunction = "softmax",
    renormalize: bool = True,
    num_groups: int | None = None,
    top_groups: int | None = None,
    group_top: int = 2,
    selection_bias: Tensor | None = None,
    log_prior: Tensor | None = None,
) -> Gating:
    """Choose k experts a token and weigh them.

    The weights are the chosen experts' native scores, divided by their sum if ``renormalize``. Everything is computed
    on log scores, so neither an underflow nor an ε enters a weight.

    Args:
        logits_TE: (..., E) router logits.
        k: experts chosen per token, 1 ≤ k ≤ E.
        scores: ``"softmax"`` or ``"sigmoid"``.
        renormalize: whether a token's k weights sum to 1. With k = 1 they are then constant and the router gets no
            gradient through them: a warning says so.
        num_groups: the experts form this many equal groups, of which only ``top_groups`` are eligible for a token.
        top_groups: number of eligible groups; required with ``num_groups``.
        group_top: a group is ranked by the sum of its ``group_top`` best selection scores (2: DeepSeek-V3, 1: V2).
        selection_bias: (E,) added to the scores for choosing only; the weights do not see it (loss-free balancing).
        log_prior: (E,) added to the *log* scores for choosing only: a prior that multiplies the scores
            (``ExpertPrior``). Instead of ``selection_bias``.

    Returns:
        ``Gating`` with weights and probabilities in fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: k, the groups, the bias or the prior do not fit the number of experts; a bias *and* a prior.
    """
    num_experts = _num_experts(logits_TE)
    _check_groups(num_experts, k, num_groups, top_groups, group_top)
    _check_additions(num_experts, selection_bias=selection_bias, log_prior=log_prior)
    if k == 1 and renormalize and num_experts > 1 and not torch.compiler.is_compiling():
        warnings.warn(
            "top-1 gating with renormalize=True: every weight is exactly 1, so the router gets no gradient "
            "from the loss; pass renormalize=False",
            stacklevel=2,
        )
    log_scores_TE = _log_scores(logits_TE, scores)
    ranking_TE = log_scores_TE if log_prior is None else log_scores_TE + log_prior.to(log_scores_TE)
    if selection_bias is not None or num_groups is not None:
        ranking_TE = ranking_TE.exp()
    if selection_bias is not None:
        ranking_TE = ranking_TE + selection_bias.to(ranking_TE)
    if num_groups is not None and top_groups is not None:
        ranking_TE = _keep_top_groups(ranking_TE, num_groups, top_groups, group_top)
    ids_TK = ranking_TE.detach().topk(k, dim=-1).indices
    return Gating(_weights(log_scores_TE, ids_TK, renormalize), ids_TK, log_scores_TE.softmax(dim=-1))


def top_choices(
    logits_TE: Tensor, k: int, scores: ScoreFunction = "softmax", renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Return what plain ``topk_gating`` chooses, ids (..., K) and weights (..., K): to watch a gating, not to do it."""
    log_scores_TE = _log_scores(logits_TE, scores)
    ids_TK = log_scores_TE.detach().topk(k, dim=-1).indices
    return ids_TK, _weights(log_scores_TE, ids_TK, renormalize)


def gate_errors(logits_TE: Tensor, ids_TK: Tensor, gates_TK: Tensor, scores: ScoreFunction) -> Tensor:
    """Return (T, K): how far the shares of a token's gates are from those that a score function makes of its logits.

    Of both only the ratios count, whatever their scale.

    Args:
        logits_TE: (T, E) router logits.
        ids_TK: (T, K) chosen experts.
        gates_TK: (T, K) their gates, in fp32 or better.
        scores: the score function.
    """
    p_TK = routing_probabilities(logits_TE, scores).gather(-1, ids_TK.long())
    return (p_TK / p_TK.sum(dim=-1, keepdim=True) - gates_TK / gates_TK.sum(dim=-1, keepdim=True)).abs()


def _weights(log_scores_TE: Tensor, ids_TK: Tensor, renormalize: bool) -> Tensor:
    chosen_TK = log_scores_TE.gather(-1, ids_TK)
    return chosen_TK.softmax(dim=-1) if renormalize else chosen_TK.exp()


def _log_scores(logits_TE: Tensor, scores: ScoreFunction) -> Tensor:
    _num_experts(logits_TE)
    wide = widen(logits_TE)
    if scores == "softmax":
        return wide.log_softmax(dim=-1)
    if scores == "sigmoid":
        return F.logsigmoid(wide)
    raise ValueError(f"scores must be 'softmax' or 'sigmoid', got {scores!r}")


def _num_experts(logits_TE: Tensor) -> int:
    if logits_TE.ndim == 0 or logits_TE.shape[-1] == 0:
        raise ValueError(f"logits must be (..., E) with E >= 1 experts, got shape {tuple(logits_TE.shape)}")
    if not logits_TE.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits_TE.dtype}")
    return logits_TE.shape[-1]


def _check_additions(num_experts: int, **additions: Tensor | None) -> None:
    given = {name: addition for name, addition in additions.items() if addition is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are two ways to shift the same choice: give one of them")
    for name, addition in given.items():
        if addition.shape != (num_experts,):
            raise ValueError(f"{name} must be ({num_experts},), got {tuple(addition.shape)}")


def _check_groups(num_experts: int, k: int, num_groups: int | None, top_groups: int | None, group_top: int) -> None:
    if not 1 <= k <= num_experts:
        raise ValueError(f"k must be between 1 and the number of experts {num_experts}, got {k}")
    if (num_groups is None) != (top_groups is None):
        raise ValueError(f"num_groups and top_groups go together, got {num_groups} and {top_groups}")
    if num_groups is None or top_groups is None:
        return
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups must divide the number of experts {num_experts}, got {num_groups}")
    if not 1 <= top_groups <= num_groups:
        raise ValueError(f"top_groups must be between 1 and num_groups {num_groups}, got {top_groups}")
    if k > top_groups * (num_experts // num_groups):
        raise ValueError(f"k must be at most the eligible experts {top_groups * num_experts // num_groups}, got {k}")
    if not 1 <= group_top <= num_experts // num_groups:
        raise ValueError(f"group_top must be between 1 and the group size {num_experts // num_groups}, got {group_top}")


def _keep_top_groups(ranking_TE: Tensor, num_groups: int, top_groups: int, group_top: int) -> Tensor:
    """Put the experts outside each token's best groups at -inf."""
    grouped_TGS = rearrange(ranking_TE, "... (g s) -> ... g s", g=num_groups)
    group_score_TG = grouped_TGS.topk(group_top, dim=-1).values.sum(dim=-1)
    best_TN = group_score_TG.topk(top_groups, dim=-1).indices
    eligible_TG = torch.zeros_like(group_score_TG, dtype=torch.bool).scatter(-1, best_TN, True)
    eligible_TE = repeat(eligible_TG, "... g -> ... (g s)", s=grouped_TGS.shape[-1])
    return ranking_TE.masked_fill(~eligible_TE, -torch.inf)
