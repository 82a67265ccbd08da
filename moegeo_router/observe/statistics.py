"""Sums over tokens: all that the metrics of a routing need, additive over micro-batches and ranks.

First the sums, reduced; then the nonlinearity. The mean of the FSI of 16 micro-batches is not the FSI of the batch.

Shape legend: T tokens, E experts, K chosen, D domains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..geometry.simplex import readable, widen
from ..routers.gating import ScoreFunction


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """The sums of one layer, float64 on the router's device; scalars have shape (1,). ``stack`` holds several layers.

    Attributes:
        tokens: T, unmasked tokens with finite logits.
        non_finite: unmasked tokens left out of all sums, because a logit is NaN or inf.
        p: (E,) Σ p_t, the router's native scores over all experts, before selection.
        root_p: (E,) Σ √p_t.
        entropy: Σ H(p_t), nats.
        distance: Σ d(p_t, u), radians.
        margin: Σ (largest - second largest of p_t); 0 for E = 1.
        z_squared: Σ logsumexp(z_t)², the sum of the z-loss.
        counts: (E,) tokens each expert was chosen for, before drops; 0 where the choices are not known.
        choices: chosen (token, expert) pairs; 0 where the choices are not known.
        k_tokens: tokens whose choices are known, so k = choices / k_tokens.
        gates_squared: (E,) Σ g_te², the squared weights of the chosen experts.
        gate_tokens: tokens whose gates are known.
        traces: (E,) Fisher traces t_e up to a common factor, which the backward pass adds (see ``fisher``).
        domain_p: (D·E,) Σ p_t per domain, row by row; empty where domains are not asked for.
        domain_tokens: (D,) tokens per domain.
    """

    tokens: Tensor
    non_finite: Tensor
    p: Tensor
    root_p: Tensor
    entropy: Tensor
    distance: Tensor
    margin: Tensor
    z_squared: Tensor
    counts: Tensor
    choices: Tensor
    k_tokens: Tensor
    gates_squared: Tensor
    gate_tokens: Tensor
    traces: Tensor
    domain_p: Tensor
    domain_tokens: Tensor

    @property
    def num_experts(self) -> int:
        """E."""
        return self.p.shape[-1]

    @classmethod
    def zeros(cls, num_experts: int, device: torch.device | None = None, num_domains: int = 0) -> LayerStatistics:
        """Return the sums over no tokens."""
        sizes = dict.fromkeys(("p", "root_p", "counts", "gates_squared", "traces"), num_experts)
        sizes |= {"domain_p": num_domains * num_experts, "domain_tokens": num_domains}
        return cls(
            **{
                field.name: torch.zeros(sizes.get(field.name, 1), dtype=torch.float64, device=device)
                for field in fields(cls)
            }
        )

    @classmethod
    def stack(cls, layers: Sequence[LayerStatistics]) -> LayerStatistics:
        """Return the sums of L layers of the same sizes as one, with a leading dimension L."""
        return cls(
            **{field.name: torch.stack([getattr(layer, field.name) for layer in layers]) for field in fields(cls)}
        )

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        logits: Tensor,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        scores: ScoreFunction = "softmax",
        *,
        gates: Tensor | None = None,
        domains: Tensor | None = None,
        num_domains: int = 0,
    ) -> LayerStatistics:
        """Return the sums of one batch.

        Args:
            logits: (..., E) router logits.
            ids: (..., K) int64 chosen experts.
            mask: (...) bool, True where a token counts; all do where not given.
            scores: the router's score function.
            gates: (..., K) weights of the chosen experts.
            domains: (...) int64 domain of each token, in 0..D-1.
            num_domains: D; 0 where domains are not asked for.

        Raises:
            ValueError: shapes or dtypes that do not fit.
        """
        tokens = logits.numel() // logits.shape[-1]
        weight_T = _weights(mask, logits)
        finite_T, z_ET = _clean(logits)
        asked = tokens if weight_T is None else weight_T.sum()
        weight_T = finite_T if weight_T is None else weight_T * finite_T
        own, sums = _of_tokens(z_ET, weight_T, scores)
        sums |= {"non_finite": (asked - own).reshape(1), "tokens": own.reshape(1)}
        sums |= _choices(ids, gates, logits, weight_T)
        p_ET = sums.pop("every_p")
        sums["domain_p"], sums["domain_tokens"] = _domains(domains, num_domains, logits, p_ET, weight_T)
        wide = {name: value.double() for name, value in sums.items()}
        return cls(**wide, traces=torch.zeros_like(wide["p"]))

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        """Return the sums over the tokens of both."""
        return LayerStatistics(
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        )

    def or_else(self, other: LayerStatistics | None) -> LayerStatistics:
        """Return these sums, or the other ones if these are over no tokens (which is not read: it would wait)."""
        if other is None:
            return self
        return self.unflat(torch.where(self.tokens > 0, self.flat(), other.to(self.p.device).flat()))

    def to(self, device: torch.device | None) -> LayerStatistics:
        """Return the same sums on another device."""
        return self if device is None or self.p.device == device else self.unflat(self.flat().to(device))

    def with_traces(self, traces: Tensor) -> LayerStatistics:
        """Return the same sums with other Fisher traces (E,)."""
        return replace(self, traces=traces)

    @property
    def parts(self) -> list[Tensor]:
        """The sums in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    def flat(self) -> Tensor:
        """Return all sums in one vector."""
        return torch.cat(self.parts)

    def unflat(self, vector: Tensor) -> LayerStatistics:
        """Return the statistics whose ``flat()`` is ``vector``."""
        parts = vector.split([len(part) for part in self.parts])
        return LayerStatistics(**{field.name: part for field, part in zip(fields(self), parts, strict=True)})


class RoutingStatistics:
    """The sums of all layers of a model; they add up over micro-batches, and over ranks by one fused all-reduce.

    Args:
        layers: the layers' sums by name; every rank has the same layers in the same order.
        failures: (1,) how many ranks can no longer watch: a sum like the others, so that all learn of it together.
    """

    def __init__(self, layers: dict[str, LayerStatistics], failures: Tensor | None = None) -> None:
        self.layers = layers
        device = next((layer.p.device for layer in layers.values()), None)
        self.failures = torch.zeros(1, dtype=torch.float64, device=device) if failures is None else failures

    @classmethod
    def zeros(
        cls, experts: Iterable[tuple[str, int]], device: torch.device | None = None, num_domains: int = 0
    ) -> RoutingStatistics:
        """Return the sums over no tokens of layers ``(name, number of experts)``."""
        return cls({name: LayerStatistics.zeros(count, device, num_domains) for name, count in experts})

    def all_reduce(self, group: Any = None) -> RoutingStatistics:
        """Return the sums over all ranks of ``group``, by one all-reduce; itself where nothing is distributed."""
        if world_size(group) == 1:
            return self
        vector = self.flat()
        dist.all_reduce(vector, group=group)
        return self.unflat(vector)

    def to_host(self) -> RoutingStatistics:
        """Return the same sums on the CPU, in one copy."""
        return self.unflat(self.flat().cpu())

    def flat(self) -> Tensor:
        """Return all sums in one vector."""
        return torch.cat([*(part for layer in self.layers.values() for part in layer.parts), self.failures])

    def unflat(self, vector: Tensor) -> RoutingStatistics:
        """Return the statistics of these layers whose ``flat()`` is ``vector``."""
        sizes = [sum(len(part) for part in layer.parts) for layer in self.layers.values()]
        *parts, failures = vector.split([*sizes, 1])
        layers = {name: layer.unflat(part) for (name, layer), part in zip(self.layers.items(), parts, strict=True)}
        return RoutingStatistics(layers, failures)


def without_traces(statistics: RoutingStatistics) -> RoutingStatistics:
    """Return the same sums with Fisher traces of 0: those of a backward pass that broke say nothing."""
    layers = {name: layer.with_traces(torch.zeros_like(layer.traces)) for name, layer in statistics.layers.items()}
    return RoutingStatistics(layers, statistics.failures)


def world_size(group: Any = None) -> int:
    """Return the number of ranks of a process group; 1 where nothing is distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def _weights(mask: Tensor | None, logits: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if mask.shape != logits.shape[:-1]:
        raise ValueError(f"mask must be {tuple(logits.shape[:-1])}, got {tuple(mask.shape)}")
    return mask.reshape(-1).to(widen(logits[:0]).dtype)


def _clean(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return (T,) 1 where a token's logits make a distribution, else 0, and logits (E, T) that are finite everywhere.

    Experts first: with few experts, sums over the last dimension would run over a handful of numbers each.
    """
    z_ET = widen(rearrange(logits, "... e -> e (...)")).contiguous()
    # -inf is an expert that cannot be chosen; NaN, inf, or nothing but -inf is a broken token.
    finite_T = z_ET.amax(dim=0).isfinite()
    weight_T = finite_T.to(z_ET.dtype)
    if readable(z_ET) and bool(z_ET.isfinite().all()):
        return weight_T, z_ET
    # One bad token must not spoil the sums of a step, which others read after it.
    return weight_T, torch.where(finite_T, z_ET, 0).clamp_min(torch.finfo(z_ET.dtype).min)


def _of_tokens(z_ET: Tensor, weight_T: Tensor, scores: ScoreFunction) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the number of tokens and the sums over them; ``every_p`` is p (E, T) itself.

    Written out on (E, T): each line is one pass over memory (the definitions are in ``metrics`` and ``geometry``).
    """
    score_ET = z_ET if scores == "softmax" else F.logsigmoid(z_ET)
    best_T, first_T = score_ET.max(dim=0)
    below_ET = score_ET - best_T
    ratio_ET = torch.exp(below_ET)  # of p to the largest p
    total_T = ratio_ET.sum(dim=0)
    p_ET = ratio_ET / total_T
    root_ET = p_ET.sqrt()
    # Not 2 - 2 Σ√(p u), whose small values are rounding.
    chord_T = (root_ET - math.sqrt(1 / len(z_ET))).square().sum(dim=0).sqrt()
    second_T = ratio_ET.scatter(0, first_T.unsqueeze(0), 0).amax(dim=0)
    lse_T = best_T + total_T.log() if scores == "softmax" else z_ET.logsumexp(dim=0)
    per_token = {
        "entropy": total_T.log() - (p_ET * below_ET).sum(dim=0),
        "distance": 4 * torch.arcsin(chord_T / 2),
        "margin": (1 - second_T) / total_T if len(z_ET) > 1 else torch.zeros_like(total_T),
        "z_squared": lse_T.square(),
    }
    sums = {name: (values_T * weight_T).sum().reshape(1) for name, values_T in per_token.items()}
    sums |= {"p": (p_ET * weight_T).sum(dim=1), "root_p": (root_ET * weight_T).sum(dim=1), "every_p": p_ET}
    return weight_T.sum(dtype=torch.float64), sums


def _choices(ids: Tensor | None, gates: Tensor | None, logits: Tensor, weight_T: Tensor) -> dict[str, Tensor]:
    zeros_E = torch.zeros(logits.shape[-1], dtype=torch.float64, device=logits.device)
    none = zeros_E.new_zeros(1)
    sums = {"counts": zeros_E, "choices": none, "k_tokens": none, "gates_squared": zeros_E, "gate_tokens": none}
    if ids is None:
        return sums
    if ids.shape[:-1] != logits.shape[:-1] or ids.is_floating_point():
        raise ValueError(f"ids must be {(*logits.shape[:-1], 'K')} integers, got {ids.dtype} {tuple(ids.shape)}")
    ids_N = ids.reshape(-1).long()
    weight_TK = weight_T.double().unsqueeze(-1).expand(-1, ids.shape[-1])
    tokens = weight_T.sum(dtype=torch.float64).reshape(1)
    sums["counts"] = zeros_E.index_add(0, ids_N, weight_TK.reshape(-1))
    sums |= {"choices": ids.shape[-1] * tokens, "k_tokens": tokens}
    if gates is not None:
        if gates.shape != ids.shape:
            raise ValueError(f"gates must be {tuple(ids.shape)} like ids, got {tuple(gates.shape)}")
        squares_TK = torch.where(weight_TK > 0, gates.reshape(weight_TK.shape), 0).double().square()
        sums |= {"gates_squared": zeros_E.index_add(0, ids_N, squares_TK.reshape(-1)), "gate_tokens": tokens}
    return sums


def _domains(
    domains: Tensor | None, num_domains: int, logits: Tensor, p_ET: Tensor, weight_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Return Σp (D·E) and tokens (D,) per domain."""
    sums_DE = torch.zeros(num_domains, len(p_ET), dtype=torch.float64, device=p_ET.device)
    tokens_D = sums_DE.new_zeros(num_domains)
    if domains is not None and num_domains:
        if domains.shape != logits.shape[:-1] or domains.is_floating_point():
            expected = f"{tuple(logits.shape[:-1])} integers"
            raise ValueError(f"domains must be {expected}, got {domains.dtype} {tuple(domains.shape)}")
        labels_T = domains.reshape(-1).long()
        if readable(labels_T) and bool(((labels_T < 0) | (labels_T >= num_domains)).any()):
            found = f"{int(labels_T.min())}..{int(labels_T.max())}"
            raise ValueError(f"domains must be in 0..{num_domains - 1}, got {found}")
        kept_TE = (p_ET * weight_T).T.double()
        sums_DE, tokens_D = sums_DE.index_add(0, labels_T, kept_TE), tokens_D.index_add(0, labels_T, weight_T.double())
    return sums_DE.reshape(-1), tokens_D
