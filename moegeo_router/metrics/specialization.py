"""The Fisher Specialization Index and its family: how concentrated, decisive and specialized a routing is.

Every function takes routing probabilities p (..., E), the router's native scores over all experts normalised to sum 1
(``routing_probabilities``), and is differentiable. All dimensions but the last hold tokens. **Sums first, then the
nonlinearity**: a metric of a large batch is the metric of its reduced sums, never the mean of the metrics of its parts;
the ``*_from_means`` and ``*_from_sums`` forms take what can be added over micro-batches and ranks.

Read ``fsi`` as a *concentration alarm* (keep it low) and ``dispersion``, ``routing_information`` and ``fsi_domain`` as
the *goals* (keep them high): a router that sends all to one expert has the largest ``fsi`` and no specialization.

Shape legend: T tokens, E experts, D domains, N documents. Distances are in radians, information in nats.

FSI is [paper] FI Eq. 4 (arXiv 2604.14500); the others are [ours].
"""

from __future__ import annotations

import math

import torch
from einops import rearrange, reduce
from torch import Tensor

from ..geometry.simplex import entropy, fisher_rao_distance, readable, root, uniform, widen


def fsi_max(num_experts: int) -> float:
    """Return the largest FSI, ``2 arccos(1/√E)`` radians: that of a one-hot distribution over E experts.

    Raises:
        ValueError: fewer than 1 expert.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    return 2 * math.acos(1 / math.sqrt(num_experts))


def fsi(p: Tensor, normalized: bool = False) -> Tensor:
    """Return the Fisher Specialization Index ``d(p̄, u)``: how far the *mean* routing is from uniform.

    0 for a balanced router whatever its experts know, ``fsi_max(E)`` when all goes to one expert. As a regularizer use
    its square: the distance itself has a kink at balance.

    Args:
        p: (..., E) routing probabilities; all dimensions but the last are averaged first.
        normalized: divide by ``fsi_max(E)``, giving [0, 1]; 0 for E = 1.

    Returns:
        A scalar.

    Raises:
        ValueError: no tokens, no experts, or not distributions (checked on their mean, on the CPU only).
    """
    return fsi_from_means(_mean(p), normalized)


def fsi_from_means(mean_p: Tensor, normalized: bool = False) -> Tensor:
    """Return ``d(p̄, u)`` (...) of means p̄ (..., E); leading dimensions: a batch. See ``fsi``."""
    num_experts = mean_p.shape[-1]
    distance = fisher_rao_distance(mean_p, uniform(num_experts, dtype=widen(mean_p).dtype, device=mean_p.device))
    return over_maximum(distance, fsi_max(num_experts)) if normalized else distance


def fsi_load(counts: Tensor, k: int, normalized: bool = False) -> Tensor:
    """Return ``d(f, u)`` for the load shares f = n / Σn: the imbalance that the hardware sees.

    With k distinct experts a token no share exceeds 1/k, so the maximum is ``2 arccos √(k/E)`` (0 at k = E). A balanced
    *random* routing of T tokens reads about √((E-k)/(kT)): alarm on global batches or averages of counts.

    Args:
        counts: (..., E) tokens an expert was chosen for, before any drop; leading dimensions are summed first.
        k: experts chosen per token.
        normalized: divide by the maximum.

    Returns:
        A scalar.

    Raises:
        ValueError: no counts (all zero included, checked on the CPU), no experts, or k not in 1..E.
    """
    _check_tokens("counts", counts)
    load_E = widen(reduce(counts, "... e -> e", "sum"))
    largest, total = fsi_load_max(load_E.shape[-1], k), load_E.sum()
    if readable(counts) and not bool(total > 0):
        raise ValueError(f"counts must have a positive sum, got {total.item():g}")
    distance = fsi_from_means(load_E / total)
    return over_maximum(distance, largest) if normalized else distance


def fsi_load_max(num_experts: int, k: int) -> float:
    """Return the largest ``fsi_load``, ``2 arccos √(k/E)`` radians: that of k experts which take all tokens.

    Raises:
        ValueError: k not in 1..E.
    """
    if not 1 <= k <= num_experts:
        raise ValueError(f"k must be between 1 and the number of experts {num_experts}, got {k}")
    return 2 * math.acos(math.sqrt(k / num_experts))


def fsi_token(p: Tensor) -> Tensor:
    """Return ``mean_t d(p_t, u) / fsi_max``: the decisiveness of single tokens, in [0, 1].

    Raises:
        ValueError: see ``fsi``.
    """
    return fsi_from_means(_tokens(p), normalized=True).mean()


def dispersion(p: Tensor) -> Tensor:
    """Return ``mean_t d(p_t, p̄)² / fsi_max²`` in [0, 1]: specialization proper. 1 only for balanced one-hot routing.

    Needs p̄ first, hence two passes; ``dispersion_from_means`` is the form for running sums.

    Raises:
        ValueError: see ``fsi``.
    """
    p_TE = _tokens(p)
    squared = fisher_rao_distance(p_TE, p_TE.mean(dim=0)).square().mean()
    return over_maximum(squared, fsi_max(p_TE.shape[-1]) ** 2)


def dispersion_from_means(mean_p: Tensor, mean_root_p: Tensor) -> Tensor:
    """Return the one-pass dispersion ``(2 arccos Σ_e √p̄_e mean_t √p_te)² / fsi_max²``.

    The same 0 and 1 as ``dispersion``, and ``(8/π²) dispersion ≤ dispersion_from_means ≤ dispersion``. Finished in
    float64; near 0 its absolute accuracy is that of the means (1e-7 for fp32 sums).

    Args:
        mean_p: (..., E) means of p over tokens; leading dimensions: a batch.
        mean_root_p: (..., E) means of √p over the same tokens.

    Returns:
        (...) float64.

    Raises:
        ValueError: the two do not have the same shape (..., E).
    """
    if mean_p.ndim == 0 or mean_p.shape != mean_root_p.shape:
        raise ValueError(
            f"mean_p and mean_root_p must be (..., E), got {tuple(mean_p.shape)} and {tuple(mean_root_p.shape)}"
        )
    overlap = (root(mean_p.double()) * mean_root_p.double()).sum(dim=-1)
    # 1 - overlap = half the squared chord; arcsin of it is smooth where arccos of the overlap is not.
    half_chord = ((1 - overlap).clamp_min(torch.finfo(torch.float64).tiny) / 2).sqrt()
    return over_maximum((4 * torch.arcsin(half_chord)).square(), fsi_max(mean_p.shape[-1]) ** 2)


def routing_information(p: Tensor, normalized: bool = False) -> Tensor:
    """Return ``I = H(p̄) - mean_t H(p_t)``, the mutual information of token and expert, in nats.

    0 at collapse *and* for uniform soft routing, log E for balanced one-hot routing (at most log T).

    Args:
        p: (..., E) routing probabilities.
        normalized: divide by log E, giving [0, 1]; 0 for E = 1.

    Returns:
        A scalar.

    Raises:
        ValueError: see ``fsi``.
    """
    p_TE = _tokens(p)
    return information_from_means(p_TE.mean(dim=0), entropy(p_TE).mean(), normalized)


def information_from_means(mean_p: Tensor, mean_entropy: Tensor, normalized: bool = False) -> Tensor:
    """Return the routing information (...) from the means of p (..., E) and of the tokens' entropies (...), nats."""
    information = entropy(mean_p) - mean_entropy
    return over_maximum(information, math.log(mean_p.shape[-1])) if normalized else information


def domain_sums(p: Tensor, domains: Tensor, num_domains: int) -> tuple[Tensor, Tensor]:
    """Return what ``fsi_domain_from_sums`` adds up: Σp per domain (D, E) and tokens per domain (D,).

    Args:
        p: (..., E) routing probabilities.
        domains: (...) int64 domain of each token, in 0..D-1 (or documents: any labelling works).
        num_domains: D.

    Raises:
        ValueError: shapes that do not fit, labels that are no integers or (checked on the CPU) out of range; see also
            ``fsi``.
    """
    p_TE = _tokens(p)
    if domains.shape != p.shape[:-1]:
        raise ValueError(f"domains must be {tuple(p.shape[:-1])}, got {tuple(domains.shape)}")
    _check_labels("domains", domains, num_domains)
    labels_T = rearrange(domains, "... -> (...)").long()
    sums_DE = p_TE.new_zeros(num_domains, p_TE.shape[-1]).index_add(0, labels_T, p_TE)
    return sums_DE, p_TE.new_zeros(num_domains).index_add(0, labels_T, p_TE.new_ones(len(p_TE)))


def fsi_domain(p: Tensor, domains: Tensor, num_domains: int | None = None) -> Tensor:
    """Return ``Σ_d w_d d(p̄_d, p̄)`` in radians, w_d the token shares: specialization on *content*.

    Says nothing without its null (``fsi_domain_null``): finite samples of one and the same routing differ, too.

    Args:
        p: (..., E) routing probabilities.
        domains: (...) int64 domain of each token.
        num_domains: D; the largest label + 1 where not given.

    Returns:
        A scalar in [0, ``fsi_domain_max``].

    Raises:
        ValueError: shapes that do not fit; see also ``fsi``.
    """
    if num_domains is None:
        num_domains = int(domains.max()) + 1 if domains.numel() else 1
    return fsi_domain_from_sums(*domain_sums(p, domains, num_domains))


def fsi_domain_from_sums(sums: Tensor, tokens: Tensor) -> Tensor:
    """Return ``fsi_domain`` from Σp per domain (..., D, E) and tokens per domain (..., D); leading: a batch."""
    if sums.shape[:-1] != tokens.shape:
        raise ValueError(f"tokens must be {tuple(sums.shape[:-1])}, got {tuple(tokens.shape)}")
    total = tokens.sum(dim=-1, keepdim=True)
    mean_E = sums.sum(dim=-2) / total
    # A domain without tokens has weight 0; any distribution will do for its mean, and p̄ has a finite gradient.
    seen = tokens > 0
    means_DE = sums / torch.where(seen, tokens, 1).unsqueeze(-1)
    means_DE = torch.where(seen.unsqueeze(-1), means_DE, mean_E.unsqueeze(-2))
    return (tokens / total * fisher_rao_distance(means_DE, mean_E.unsqueeze(-2))).sum(dim=-1)


def fsi_domain_max(tokens: Tensor) -> Tensor:
    """Return the bound ``Σ_d w_d 2 arccos √w_d`` on ``fsi_domain`` for tokens per domain (..., D): disjoint experts."""
    share = widen(tokens) / tokens.sum(dim=-1, keepdim=True)
    return (share * 2 * torch.arccos(share.sqrt().clamp_max(1))).sum(dim=-1)


def fsi_domain_null(
    sums: Tensor,
    tokens: Tensor,
    domains: Tensor,
    num_domains: int,
    *,
    permutations: int = 200,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return ``fsi_domain`` under labels shuffled *by document*: what it reads when routing ignores the domain.

    Tokens of one document are alike, so shuffling tokens would make the null far too small.

    Args:
        sums: (N, E) Σp per document.
        tokens: (N,) tokens per document.
        domains: (N,) domain of each document.
        num_domains: D.
        permutations: how many shuffles.
        generator: source of randomness (CPU).

    Returns:
        (permutations,) values.

    Raises:
        ValueError: shapes that do not fit, or fewer than 1 permutation.
    """
    if sums.ndim != 2 or tokens.shape != sums.shape[:1] or domains.shape != sums.shape[:1]:
        raise ValueError(
            "sums must be (N, E), tokens and domains (N,), got "
            f"{tuple(sums.shape)}, {tuple(tokens.shape)} and {tuple(domains.shape)}"
        )
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    values = []
    for _ in range(permutations):
        order = torch.randperm(len(domains), generator=generator).to(domains.device)
        labels_N = domains[order]
        shuffled_DE = sums.new_zeros(num_domains, sums.shape[1]).index_add(0, labels_N, sums)
        values.append(fsi_domain_from_sums(shuffled_DE, tokens.new_zeros(num_domains).index_add(0, labels_N, tokens)))
    return torch.stack(values)


def fsi_velocity(p: Tensor, previous: Tensor) -> Tensor:
    """Return ``d(p̄, p̄_prev)`` in radians: how far the mean routing moved. The two may differ in tokens, not in E."""
    return fisher_rao_distance(_mean(p), _mean(previous))


def probe_velocity(p: Tensor, previous: Tensor) -> Tensor:
    """Return ``mean_x d(p(x), p_prev(x))`` in radians on a fixed probe batch: churn without sampling noise.

    Raises:
        ValueError: the two are not of the same shape; see also ``fsi``.
    """
    _check_same_batch(p, previous)
    return fisher_rao_distance(_tokens(p), _tokens(previous)).mean()


def flip_rate(p: Tensor, previous: Tensor) -> Tensor:
    """Return the share of a probe batch's tokens whose first choice changed (not differentiable).

    Raises:
        ValueError: the two are not of the same shape; see also ``fsi``.
    """
    _check_same_batch(p, previous)
    return (_tokens(p).argmax(dim=-1) != _tokens(previous).argmax(dim=-1)).float().mean()


def expert_counts(ids: Tensor, num_experts: int) -> Tensor:
    """Return n (E,) int64, how many (token, choice) pairs went to each expert, from chosen ids (..., K) int64.

    Raises:
        ValueError: ids that are no integers or (checked on the CPU) out of range.
    """
    _check_labels("ids", ids, num_experts)
    flat = ids.reshape(-1).long()
    # Not bincount: it would grow for an id out of range, and wait for an accelerator.
    return flat.new_zeros(num_experts).index_add(0, flat, torch.ones_like(flat))


def _check_same_batch(p: Tensor, previous: Tensor) -> None:
    if p.shape != previous.shape:
        raise ValueError(f"p and previous must have one shape, got {tuple(p.shape)} and {tuple(previous.shape)}")


def over_maximum(value: Tensor, maximum: float) -> Tensor:
    """Divide by a maximum, which is 0 where nothing can vary (E = 1, k = E): the value is 0 there too."""
    return value / maximum if maximum > 0 else value * 0


def _mean(p: Tensor) -> Tensor:
    return _tokens(p).mean(dim=0)


def _tokens(p: Tensor) -> Tensor:
    """Flatten to (T, E) in fp32 or better and check what can be checked without waiting for an accelerator."""
    _check_tokens("p", p)
    if not p.is_floating_point():
        raise ValueError(f"p must be floating point, got {p.dtype}")
    p_TE = rearrange(widen(p), "... e -> (...) e")
    if readable(p):
        total = float(p_TE.detach().mean(dim=0).sum())
        tolerance = 1e-3 if p.dtype in (torch.float32, torch.float64) else 5e-2
        if abs(total - 1) > tolerance or bool((p_TE.detach().mean(dim=0) < 0).any()):
            raise ValueError(
                f"p must hold distributions (its rows sum to {total:.4g} on average): pass probabilities, "
                "e.g. routing_probabilities(logits)"
            )
    return p_TE


def _check_labels(name: str, labels: Tensor, size: int) -> None:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {labels.dtype}")
    if readable(labels) and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < size:
        raise ValueError(f"{name} must be in 0..{size - 1}, got {int(labels.min())}..{int(labels.max())}")


def _check_tokens(name: str, x: Tensor) -> None:
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"{name} must be (..., E) with at least one token and one expert, got {tuple(x.shape)}")
