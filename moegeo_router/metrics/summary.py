"""Named scalars of a routing, from its sums."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..geometry.simplex import fisher_rao_distance
from ..observe.statistics import LayerStatistics, RoutingStatistics
from .heterogeneity import fhs, fhs_per_token, starved_fraction
from .load import coefficient_of_variation, dead_fraction, gini, load_share, max_violation, utilization_entropy
from .specialization import dispersion_from_means, fsi, fsi_domain_from_sums, fsi_load, fsi_max, information_from_means

#: How a scalar of the layers becomes one of the model; the others are averaged.
WORST_LAYER = ("fhs", "max_violation", "dead_fraction", "starved_fraction", "non_finite")

#: The fields of ``optim.Movement``, and the names of their scalars.
MOVEMENT = {
    "limit": "speed_limit",
    "moved": "movement",
    "moved_next": "movement_next",
    "limited": "limited",
    "flipped": "flip_rate",
}


def layer_scalars(statistics: LayerStatistics, previous: LayerStatistics | None = None) -> dict[str, float]:
    """Return the scalars of one layer: those of the load only where the choices are known, of the Fisher traces only
    where there are some, of domains only where they are; none without tokens.

    ``fsi``, ``fsi_load`` and ``fsi_token`` are over their maxima, ``routing_information`` over log E, ``dispersion_1``
    is the one-pass form of ``dispersion`` (never above it, never below 8/π² of it), ``token_entropy`` is in nats,
    ``fsi_velocity`` and ``fsi_domain`` in radians, ``non_finite`` a share of the tokens.

    Args:
        statistics: reduced sums, on the CPU.
        previous: those of the step before.
    """
    tokens, num_experts = statistics.tokens, statistics.num_experts
    if not float(tokens):
        # A layer whose every token is broken must not look as if nothing had happened.
        return {"non_finite": 1.0} if float(statistics.non_finite) else {}
    mean_p = statistics.p / tokens
    largest = fsi_max(num_experts)
    scalars: dict[str, Tensor] = {
        "fsi": fsi(mean_p, normalized=True),
        "fsi_token": statistics.distance / tokens / largest if largest else torch.zeros(1),
        "dispersion_1": dispersion_from_means(mean_p, statistics.root_p / tokens),
        "routing_information": information_from_means(mean_p, statistics.entropy / tokens, normalized=True),
        "token_entropy": statistics.entropy / tokens,
        "margin": statistics.margin / tokens,
        "z_loss": statistics.z_squared / tokens,
        "non_finite": statistics.non_finite / (tokens + statistics.non_finite),
    }
    if previous is not None and float(previous.tokens):
        scalars["fsi_velocity"] = fisher_rao_distance(mean_p, previous.p / previous.tokens)
    return {name: float(value) for name, value in (scalars | _load(statistics) | _signal(statistics)).items()}


def _load(statistics: LayerStatistics) -> dict[str, Tensor]:
    if not float(statistics.choices):
        return {}
    counts, k = statistics.counts, round(float(statistics.choices / statistics.k_tokens))
    return {
        "fsi_load": fsi_load(counts, k, normalized=True),
        "max_violation": max_violation(counts),
        "load_cv": coefficient_of_variation(counts),
        "load_gini": gini(counts),
        "load_entropy": utilization_entropy(counts),
        "dead_fraction": dead_fraction(counts),
    }


def _signal(statistics: LayerStatistics) -> dict[str, Tensor]:
    scalars = {}
    if float(statistics.traces.sum()):
        scalars["fhs"] = fhs(statistics.traces)
        if float(statistics.choices):
            scalars["fhs_per_token"] = fhs_per_token(statistics.traces, statistics.counts)
            scalars["starved_fraction"] = starved_fraction(statistics.traces, statistics.counts)
    if float(statistics.domain_tokens.sum()):
        sums_DE = statistics.domain_p.view(-1, statistics.num_experts)
        scalars["fsi_domain"] = fsi_domain_from_sums(sums_DE, statistics.domain_tokens)
    return scalars


def movement_scalars(numbers: Mapping[str, Tensor]) -> list[dict[str, float]]:
    """Return of each router that is stepped naturally the scalars of ``MOVEMENT``.

    Args:
        numbers: the fields of ``optim.Movement`` on the host, if there are any.
    """
    known = {name: numbers[field].tolist() for field, name in MOVEMENT.items() if field in numbers}
    rows = zip(*known.values(), strict=True)
    # NaN is the next batch of a first step, inf a limit that does not exist.
    return [{n: v for n, v in zip(known, row, strict=True) if math.isfinite(v)} for row in rows]


def model_scalars(
    layers: Iterable[str],
    reduced: RoutingStatistics,
    before: RoutingStatistics | None,
    stepped: Sequence[str] = (),
    numbers: Mapping[str, Tensor] | None = None,
) -> dict[str, dict[str, float]]:
    """Return the scalars of every layer that has some, those of its router's step included.

    Args:
        layers: their names.
        reduced: the sums of a step, on the CPU.
        before: those of the step before.
        stepped: the routers in the order of the numbers that their steps report.
        numbers: see ``movement_scalars``.
    """
    known = [name for name in layers if name in reduced.layers]
    previous = {} if before is None else before.layers
    scalars = {name: layer_scalars(reduced.layers[name], previous.get(name)) for name in known}
    scalars = {name: found for name, found in scalars.items() if found}
    for name, moved in zip(stepped, movement_scalars(numbers or {}), strict=False):
        if name in scalars:
            scalars[name] |= moved
    return scalars


def expert_scalars(statistics: LayerStatistics) -> dict[str, float]:
    """Return ``load/0``, ``p/0``, ``trace/0`` …: each expert's share of the load, of p̄ and of the Fisher traces."""
    shares = {"load": statistics.counts, "p": statistics.p, "trace": statistics.traces}
    return {
        f"{name}/{expert}": value
        for name, amounts in shares.items()
        if float(amounts.sum())
        for expert, value in enumerate(load_share(amounts).tolist())
    }


def flatten(
    layers: Mapping[str, Mapping[str, float]],
    per_layer: bool = False,
    experts: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, float]:
    """Return flat keys ``geometry/fsi`` …: the mean over the layers that have the scalar, the worst for alarms.

    Args:
        layers: scalars by layer.
        per_layer: also ``geometry/layer0/fsi`` …, see ``short_names``.
        experts: scalars of the experts by layer, for ``geometry/layer0/load/3`` ….
    """
    flat: dict[str, float] = {}
    for name in dict.fromkeys(name for scalars in layers.values() for name in scalars):
        values = [scalars[name] for scalars in layers.values() if name in scalars]
        flat[f"geometry/{name}"] = _over_layers(name, values)
    short = short_names(layers)
    for group in ([layers] if per_layer else []) + ([experts] if experts else []):
        for layer, scalars in group.items():
            flat |= {f"geometry/{short[layer]}/{name}": value for name, value in scalars.items()}
    return flat


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return a short name for each layer: without the parts that all names share at their ends.

    ``model.layers.0.mlp.gate``, ``model.layers.1.mlp.gate`` become ``layer0``, ``layer1``. A single layer is called by
    its number, if its name has one, and else keeps its name.
    """
    split = {name: name.split(".") for name in names}
    if len(split) == 1:
        ((name, parts),) = split.items()
        numbers = [part for part in parts if part.isdecimal()]
        return {name: f"layer{numbers[-1]}" if numbers else name}
    head = _common(list(split.values()))
    tail = _common([parts[head:][::-1] for parts in split.values()])
    short = {name: parts[head : len(parts) - tail] for name, parts in split.items()}
    return {
        name: f"layer{parts[0]}" if len(parts) == 1 and parts[0].isdecimal() else ".".join(parts) or name
        for name, parts in short.items()
    }


def _common(sequences: Sequence[Sequence[str]]) -> int:
    """Return how many leading items all sequences share."""
    same = 0
    for items in zip(*sequences, strict=False):
        if len(set(items)) > 1:
            break
        same += 1
    return same


def _over_layers(name: str, values: Sequence[float]) -> float:
    return max(values) if name in WORST_LAYER else sum(values) / len(values)
