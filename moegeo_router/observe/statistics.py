"""Sums over tokens: all that the metrics of a routing need, additive over micro-batches and ranks.

First the sums, reduced; then the nonlinearity. The mean of the FSI of 16 micro-batches is not the FSI of the batch.

Shape legend: T tokens, E experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from ..geometry.simplex import entropy, fisher_rao_distance, root, uniform
from ..routers.gating import ScoreFunction, routing_probabilities


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """The sums of one layer, float64 on the router's device; scalars have shape (1,).

    Attributes:
        tokens: T, unmasked tokens.
        p: (E,) Σ p_t, the router's native scores over all experts, before selection.
        root_p: (E,) Σ √p_t.
        entropy: Σ H(p_t), nats.
        distance: Σ d(p_t, u), radians.
        margin: Σ (largest - second largest of p_t); 0 for E = 1.
        z_squared: Σ logsumexp(z_t)², the sum of the z-loss.
        counts: (E,) tokens each expert was chosen for, before drops; 0 where the choices are not known.
        choices: chosen (token, expert) pairs; 0 where the choices are not known.
        k_tokens: tokens whose choices are known, so k = choices / k_tokens.
    """

    tokens: Tensor
    p: Tensor
    root_p: Tensor
    entropy: Tensor
    distance: Tensor
    margin: Tensor
    z_squared: Tensor
    counts: Tensor
    choices: Tensor
    k_tokens: Tensor

    @classmethod
    def zeros(cls, num_experts: int, device: torch.device | None = None) -> LayerStatistics:
        """Return the sums over no tokens."""
        wide = {"p", "root_p", "counts"}
        return cls(
            **{
                field.name: torch.zeros(num_experts if field.name in wide else 1, dtype=torch.float64, device=device)
                for field in fields(cls)
            }
        )

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        logits: Tensor,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        scores: ScoreFunction = "softmax",
    ) -> LayerStatistics:
        """Return the sums of one batch.

        Args:
            logits: (..., E) router logits.
            ids: (..., K) int64 chosen experts.
            mask: (...) bool, True where a token counts; all do where not given.
            scores: the router's score function.

        Raises:
            ValueError: shapes or dtypes that do not fit.
        """
        num_experts = logits.shape[-1]
        z_TE = rearrange(logits, "... e -> (...) e")
        p_TE = routing_probabilities(z_TE, scores)
        weight_T = _weights(mask, logits, p_TE)
        weight_T1 = weight_T.unsqueeze(-1)
        top_T2 = p_TE.topk(min(2, num_experts), dim=-1).values
        margin_T = top_T2[:, 0] - top_T2[:, 1] if num_experts > 1 else torch.zeros_like(top_T2[:, 0])
        u_E = uniform(num_experts, dtype=p_TE.dtype, device=p_TE.device)
        per_token = {
            "tokens": torch.ones_like(margin_T),
            "entropy": entropy(p_TE),
            "distance": fisher_rao_distance(p_TE, u_E),
            "margin": margin_T,
            "z_squared": z_TE.to(p_TE.dtype).logsumexp(dim=-1).square(),
        }
        sums = {name: _sum(values_T, weight_T) for name, values_T in per_token.items()}
        sums |= {"p": _sum(p_TE, weight_T1), "root_p": _sum(root(p_TE), weight_T1)}
        return cls(**sums, **_choices(ids, logits, weight_T))

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        """Return the sums over the tokens of both."""
        return LayerStatistics(
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        )

    def flat(self) -> Tensor:
        """Return all sums in one vector, in the order of the fields."""
        return torch.cat([getattr(self, field.name) for field in fields(self)])

    def unflat(self, vector: Tensor) -> LayerStatistics:
        """Return the statistics whose ``flat()`` is ``vector``."""
        names = [field.name for field in fields(self)]
        parts = vector.split([len(getattr(self, name)) for name in names])
        return LayerStatistics(**dict(zip(names, parts, strict=True)))


class RoutingStatistics:
    """The sums of all layers of a model; ``+=`` over micro-batches, one fused all-reduce over ranks.

    Args:
        layers: the layers' sums by name; every rank has the same layers in the same order.
    """

    def __init__(self, layers: dict[str, LayerStatistics]) -> None:
        self.layers = layers

    @classmethod
    def zeros(cls, experts: Iterable[tuple[str, int]], device: torch.device | None = None) -> RoutingStatistics:
        """Return the sums over no tokens of layers ``(name, number of experts)``."""
        return cls({name: LayerStatistics.zeros(count, device) for name, count in experts})

    def add(self, layer: str, statistics: LayerStatistics) -> None:
        """Add one batch's sums to a layer.

        Raises:
            ValueError: a layer that is not known, or another number of experts.
        """
        if layer not in self.layers:
            raise ValueError(f"layer must be one of {', '.join(self.layers)}, got {layer!r}")
        known, new = len(self.layers[layer].p), len(statistics.p)
        if known != new:
            raise ValueError(f"layer {layer} has {known} experts, got sums over {new}")
        self.layers[layer] = self.layers[layer] + statistics

    def all_reduce(self, group: Any = None) -> RoutingStatistics:
        """Return the sums over all ranks of ``group``, by one all-reduce; itself where nothing is distributed."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
            return self
        vector = self._flat()
        dist.all_reduce(vector, group=group)
        return self._unflat(vector)

    def cpu(self) -> RoutingStatistics:
        """Return the sums on the CPU, read back at once."""
        return self._unflat(self._flat().cpu())

    def _flat(self) -> Tensor:
        return torch.cat([layer.flat() for layer in self.layers.values()])

    def _unflat(self, vector: Tensor) -> RoutingStatistics:
        parts = vector.split([len(layer.flat()) for layer in self.layers.values()])
        return RoutingStatistics(
            {name: layer.unflat(part) for (name, layer), part in zip(self.layers.items(), parts, strict=True)}
        )


def _weights(mask: Tensor | None, logits: Tensor, p_TE: Tensor) -> Tensor:
    if mask is None:
        return p_TE.new_ones(len(p_TE))
    if mask.shape != logits.shape[:-1]:
        raise ValueError(f"mask must be {tuple(logits.shape[:-1])}, got {tuple(mask.shape)}")
    return mask.reshape(-1).to(p_TE.dtype)


def _sum(values: Tensor, weight: Tensor) -> Tensor:
    # where, not only a product: what is masked may hold NaN.
    kept = torch.where(weight > 0, values, 0) * weight
    return kept.sum(dim=0, dtype=torch.float64).reshape(-1)


def _choices(ids: Tensor | None, logits: Tensor, weight_T: Tensor) -> dict[str, Tensor]:
    counts_E = torch.zeros(logits.shape[-1], dtype=torch.float64, device=logits.device)
    if ids is None:
        none = counts_E.new_zeros(1)
        return {"counts": counts_E, "choices": none, "k_tokens": none}
    if ids.shape[:-1] != logits.shape[:-1] or ids.is_floating_point():
        raise ValueError(f"ids must be {(*logits.shape[:-1], 'K')} integers, got {ids.dtype} {tuple(ids.shape)}")
    ids_TK = rearrange(ids, "... k -> (...) k").long()
    weight_TK = weight_T.double().unsqueeze(-1).expand_as(ids_TK)
    counts_E = counts_E.index_add(0, ids_TK.reshape(-1), weight_TK.reshape(-1))
    return {"counts": counts_E, "choices": weight_TK.sum().reshape(1), "k_tokens": weight_T.double().sum().reshape(1)}
