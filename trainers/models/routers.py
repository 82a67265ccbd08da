"""Routers that others use, to compare with: cosine scores, hashes of the token ids, a projection that never learns.

Each is a choice of ``configs/router``. Shape suffixes: T tokens, E experts, K chosen, D width, P width of the
projection, V ids.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Logits of the experts that a hash does not choose: their probability is exp(-100), nothing in fp32 beside 1/K.
NOT_CHOSEN = -100.0


class CosineRouter(nn.Module):
    """Scores on a low-dimensional sphere: ``s · cos(projection(x), embedding_e)`` with a learnable scale s.

    The form is that of both X-MoE (arXiv 2204.09179, "On the representation collapse of sparse mixture of experts") and
    Tutel's CosineTopKGate; they differ in constants, and these are Tutel's:

    ==============  ===========================  =============================================
    \\               Tutel (default here)         X-MoE
    ==============  ===========================  =============================================
    P               256; here at most D / 2      E / 2: ``proj_dim``
    projection      with a bias                  without: ``bias=False``
    scale s         exp(log s), log s learnt     1 / τ, τ learnt
    s at first      1 / 0.5                      ``init_temperature``
    s at most       100 (log s clamped)          no bound is given
    embeddings      N(0, 0.01²) at first         (their length has no effect on the scores)
    ==============  ===========================  =============================================

    Both projections and scores are computed in fp32, whatever autocast says.

    Args:
        in_features: D.
        num_experts: E.
        proj_dim: P; None: min(D / 2, 256).
        init_temperature: 1 / s at first.
        max_scale: bound of s.
        bias: of the projection.

    Raises:
        ValueError: a size below 1, or a temperature that is not above 0 or begins beyond the bound.

    Attributes:
        weight: (E, P) the experts' embeddings, which is what finds the module as a router (``find_routers``).
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        proj_dim: int | None = None,
        init_temperature: float = 0.5,
        max_scale: float = 100.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        proj_dim = max(1, min(in_features // 2, 256)) if proj_dim is None else proj_dim
        for name, size in {"in_features": in_features, "num_experts": num_experts, "proj_dim": proj_dim}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not (init_temperature > 0 and max_scale * init_temperature >= 1):
            raise ValueError(
                f"init_temperature must be at least 1 / max_scale and above 0, got {init_temperature} and {max_scale}"
            )
        self.projection = nn.Linear(in_features, proj_dim, bias=bias)
        self.weight = nn.Parameter(torch.empty(num_experts, proj_dim))
        self.log_scale = nn.Parameter(torch.full((1,), -math.log(init_temperature)))
        self.max_log_scale = math.log(max_scale)
        nn.init.normal_(self.weight, std=0.01)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the logits (T, E), fp32."""
        with torch.autocast(x_TD.device.type, enabled=False):
            bias = None if self.projection.bias is None else self.projection.bias.float()
            projected_TP = F.linear(x_TD.float(), self.projection.weight.float(), bias)
            cosines_TE = F.normalize(projected_TP, dim=-1) @ F.normalize(self.weight.float(), dim=-1).T
            return self.log_scale.float().clamp(max=self.max_log_scale).exp() * cosines_TE


class FrozenRouter(nn.Linear):
    """A random ``nn.Linear`` whose weights never learn; the model below it does, through the gates.

    Args:
        in_features: D.
        num_experts: E.
        bias: also frozen.
    """

    def __init__(self, in_features: int, num_experts: int, *, bias: bool = False) -> None:
        super().__init__(in_features, num_experts, bias=bias)
        self.requires_grad_(False)


class HashRouter(nn.Module):
    """Hash layers (arXiv 2106.04426): a token's experts are looked up by its id, in a table that never learns.

    There are K hashes, different for every id, and every chosen expert has the gate 1/K (``routing_probabilities`` are
    1/K and 0). The hashes are random and balanced: ids are placed in the order of how often they occur, each with a
    random expert that still has room for it, so that the load is as even as the ids allow; without counts, or with
    equal ones, every expert has equally many ids. They are drawn from torch's random numbers like the weights of other
    routers: the run's seed decides, and layers differ.

    A language model looks up the token; a vision model has none, and looks up the position of the patch.

    Args:
        in_features: D, of which nothing is used.
        num_experts: E.
        top_k: K.
        id_counts: (V,) how often each id occurs, in any unit.

    Attributes:
        weight: (E, V) log probabilities of the experts: -log K of the chosen ones, ``NOT_CHOSEN`` of others. Frozen.

    Raises:
        ValueError: no id, negative counts, or K not in [1, E].
    """

    needs_ids = True

    def __init__(self, in_features: int, num_experts: int, *, top_k: int, id_counts: Tensor) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must lie in [1, num_experts = {num_experts}], got {top_k}")
        if id_counts.ndim != 1 or not len(id_counts) or bool((id_counts < 0).any()):
            raise ValueError(f"id_counts must be (V,) counts of at least one id, got {tuple(id_counts.shape)}")
        experts_VK = balanced_hashes(id_counts, num_experts, top_k)
        log_p_VE = torch.full((len(id_counts), num_experts), NOT_CHOSEN).scatter(1, experts_VK, -math.log(top_k))
        self.weight = nn.Parameter(log_p_VE.T.contiguous(), requires_grad=False)

    def forward(self, x_TD: Tensor, ids_T: Tensor) -> Tensor:
        """Return the logits (T, E) of tokens with the ids (T,)."""
        return self.weight.T.index_select(0, ids_T)


def balanced_hashes(id_counts: Tensor, num_experts: int, k: int) -> Tensor:
    """Draw K different experts for every id, so that all experts get about equally many tokens.

    Args:
        id_counts: (V,) how often each id occurs; ids that do not occur count as if they did once in all.
        num_experts: E.
        k: K ≤ E.

    Returns:
        (V, K) int64 experts, of torch's global random numbers.
    """
    weights = (id_counts.double() / id_counts.double().sum().clamp_min(1)).tolist()
    least = 1 / max(1.0, float(id_counts.sum()))
    weights = [max(weight, least) for weight in weights]
    fair = k * sum(weights) / num_experts
    loads, chosen = [0.0] * num_experts, [list[int]() for _ in weights]
    for _ in range(k):
        order = torch.randperm(len(weights)).tolist()  # which of equally frequent ids comes first
        for token in sorted(order, key=weights.__getitem__, reverse=True):
            free = [e for e in torch.randperm(num_experts).tolist() if e not in chosen[token]]
            room = [e for e in free if loads[e] + weights[token] <= fair * (1 + 1e-9)]
            expert = room[0] if room else min(free, key=loads.__getitem__)
            chosen[token].append(expert)
            loads[expert] += weights[token]
    return torch.tensor(chosen)
