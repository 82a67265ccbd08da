"""What a run reports of its routing: scalars of one batch, and of a whole validation split.

Shape legend: B batch, T tokens of a layer, E experts, K chosen, L layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

import moegeo_router as mg
from moegeo_router.metrics import (
    dead_fraction,
    domain_sums,
    expert_counts,
    fsi_domain_from_sums,
    fsi_domain_null,
    max_load,
)
from trainers.data.base import Batch
from trainers.models.moe import Routing

#: Of a layer's scalars, those that compare its routing with planted domains.
RECOVERY = ("recovery", "recovery_ami")


def token_values(values_B: Tensor, tokens: int) -> Tensor:
    """Repeat one value per position (B, L) or per image (B,) for each of the T tokens a layer saw."""
    flat = values_B.reshape(-1)
    return flat.repeat_interleave(tokens // len(flat)) if tokens != len(flat) else flat


def routing_scalars(p_TE: Tensor, ids_TK: Tensor) -> dict[str, Tensor]:
    """Return the scalars of one layer's routing.

    Args:
        p_TE: routing probabilities of the unmasked tokens.
        ids_TK: the experts they went to.

    Returns:
        ``fsi``, ``fsi_load``, ``fsi_token`` (each over its maximum), ``dispersion``, ``routing_information`` (over
        log E), ``max_load`` (largest share over the fair one, 1 = balanced) and ``dead_experts`` (a count).
    """
    num_experts, k = p_TE.shape[-1], ids_TK.shape[-1]
    counts_E = expert_counts(ids_TK, num_experts).float()
    return {
        "fsi": mg.fsi(p_TE, normalized=True),
        "fsi_load": mg.fsi_load(counts_E, k, normalized=True),
        "fsi_token": mg.fsi_token(p_TE),
        "dispersion": mg.dispersion(p_TE),
        "routing_information": mg.routing_information(p_TE, normalized=True),
        "max_load": max_load(counts_E),
        "dead_experts": (num_experts * dead_fraction(counts_E)).round(),
    }


def over_layers(name: str, values: Sequence[float]) -> float:
    """Return one number for the layers: the mean, for dead experts the sum, for max_load the largest."""
    if name == "dead_experts":
        return sum(values)
    return max(values) if name == "max_load" else fmean(values)


class RoutingRecord:
    """The routing of a whole validation split, kept token by token so that every metric is exact."""

    def __init__(self) -> None:
        self._p: dict[str, list[Tensor]] = defaultdict(list)
        self._ids: dict[str, list[Tensor]] = defaultdict(list)
        self._domains: dict[str, list[Tensor]] = defaultdict(list)
        self._documents: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, routing: Mapping[str, Routing], batch: Batch) -> None:
        """Add the unmasked tokens of one batch."""
        for layer, record in routing.items():
            tokens = len(record.logits)
            mask_T = token_values(batch.mask, tokens)
            self._p[layer].append(record.probs[mask_T].cpu())
            self._ids[layer].append(record.ids[mask_T].cpu())
            self._domains[layer].append(token_values(batch.domains, tokens)[mask_T].cpu())
            self._documents[layer].append(token_values(batch.documents, tokens)[mask_T].cpu())

    def layers(self, num_domains: int, *, planted: bool = False) -> dict[str, dict[str, float]]:
        """Return the scalars of every layer: those of ``routing_scalars``, and ``fsi_domain`` with its null.

        Where the domains are ``planted``, the truth that a router can find, also those of ``recovery_scalars``.

        ``fsi_domain_null`` is the 95% quantile of 200 shuffles of the labels by document: what is above it is
        specialization on content.
        """
        result = {}
        for layer in self._p:
            p_TE, ids_TK = torch.cat(self._p[layer]), torch.cat(self._ids[layer])
            scalars = {name: float(value) for name, value in routing_scalars(p_TE, ids_TK).items()}
            domains_T, documents_T = torch.cat(self._domains[layer]), torch.cat(self._documents[layer])
            result[layer] = scalars | _domain_scalars(p_TE, domains_T, documents_T, num_domains)
            if planted:
                result[layer] |= recovery_scalars(ids_TK[:, 0], domains_T)
        return result


def recovery_scalars(expert_T: Tensor, source_T: Tensor) -> dict[str, float]:
    """Compare where tokens go with where they are from.

    There are mostly more experts than sources, and a router that gives each source two experts of its own has found
    them. So experts may share a source: each is named after the source that it sees most, which is the best of all
    maps of experts to sources. With fewer experts than sources some sources have no expert, and that counts against
    the router, as it does under a one-to-one assignment. (One to one, half of the tokens of such a router would be
    wrong.) One expert for all tokens, and any routing without regard to the source, give the share of the largest
    source, and a few tokens' chance above it; the adjusted mutual information is 0 there.

    Args:
        expert_T: each token's first choice: its most likely expert, unless a prior takes part in the choice.
        source_T: its planted domain.

    Returns:
        ``recovery``, the share of tokens whose expert is named after their source, and ``recovery_ami``, the adjusted
        mutual information of expert and source (1: they determine each other; splitting a source among experts costs).
    """
    from sklearn.metrics import adjusted_mutual_info_score

    counts_ES = torch.zeros(int(expert_T.max()) + 1, int(source_T.max()) + 1, dtype=torch.long)
    counts_ES.index_put_((expert_T, source_T), torch.ones((), dtype=torch.long), accumulate=True)
    return {
        "recovery": float(counts_ES.amax(dim=1).sum() / len(expert_T)),
        "recovery_ami": float(adjusted_mutual_info_score(source_T.numpy(), expert_T.numpy())),
    }


def _domain_scalars(p_TE: Tensor, domains_T: Tensor, documents_T: Tensor, num_domains: int) -> dict[str, float]:
    seen_N, index_T = documents_T.unique(return_inverse=True)
    sums_NE, tokens_N = domain_sums(p_TE, index_T, len(seen_N))
    domains_N = torch.zeros(len(seen_N), dtype=torch.long).scatter(0, index_T, domains_T)
    null = fsi_domain_null(sums_NE, tokens_N, domains_N, num_domains, generator=torch.Generator().manual_seed(0))
    return {
        "fsi_domain": float(fsi_domain_from_sums(*domain_sums(p_TE, domains_T, num_domains))),
        "fsi_domain_null": float(null.quantile(0.95)),
    }
