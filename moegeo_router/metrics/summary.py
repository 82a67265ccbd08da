"""Named scalars of a routing, from its sums."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry.simplex import fisher_rao_distance, uniform
from ..observe.statistics import LayerStatistics, RoutingStatistics
from .heterogeneity import fhs, signal_metrics
from .load import load_metrics, load_share
from .specialization import (
    dispersion_from_means,
    fsi_domain_from_sums,
    fsi_load_max,
    fsi_max,
    information_from_means,
    over_maximum,
)

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
    return scalars_of_layers({"": statistics}, {} if previous is None else {"": previous})[""]


@torch.inference_mode()
def scalars_of_layers(
    layers: Mapping[str, LayerStatistics], previous: Mapping[str, LayerStatistics]
) -> dict[str, dict[str, float]]:
    """Return ``layer_scalars`` of every layer, each metric computed once for all layers that are alike.

    Args:
        layers: reduced sums by layer, on the CPU.
        previous: those of the step before, of the layers that had some.
    """
    found: dict[str, dict[str, float]] = {}
    alike: dict[_Known, list[str]] = defaultdict(list)
    for name, sums in layers.items():
        if float(sums.tokens):
            alike[_known(sums, previous.get(name))].append(name)
        else:
            # A layer whose every token is broken must not look as if nothing had happened.
            found[name] = {"non_finite": 1.0} if float(sums.non_finite) else {}
    for known, names in alike.items():
        last = [previous[name] for name in names] if known.previous else None
        columns = _of_alike(known, LayerStatistics.stack([layers[name] for name in names]), last)
        rows = torch.stack(list(columns.values())).T.tolist()
        found |= {name: dict(zip(columns, row, strict=True)) for name, row in zip(names, rows, strict=True)}
    return {name: found[name] for name in layers}


class _Known(NamedTuple):
    """What is known of a layer that has tokens.

    Attributes:
        experts: E.
        k: experts chosen per token; 0 where the choices are not known.
        traces: whether there are Fisher traces.
        domains: D.
        labelled: whether any token has one.
        previous: whether the step before had tokens.
    """

    experts: int
    k: int
    traces: bool
    domains: int
    labelled: bool
    previous: bool


def _known(sums: LayerStatistics, previous: LayerStatistics | None) -> _Known:
    choices, domains = float(sums.choices), len(sums.domain_tokens)
    return _Known(
        experts=sums.num_experts,
        k=round(choices / float(sums.k_tokens)) if choices else 0,
        traces=float(sums.traces.sum()) != 0,
        domains=domains,
        labelled=domains > 0 and float(sums.domain_tokens.sum()) > 0,
        previous=previous is not None and float(previous.tokens) > 0,
    )


def _of_alike(known: _Known, sums: LayerStatistics, last: Sequence[LayerStatistics] | None) -> dict[str, Tensor]:
    """Return the scalars (L,) of L layers of which the same is known, from their stacked sums."""
    mean_p_LE = sums.p / sums.tokens
    u_LE = uniform(known.experts, dtype=mean_p_LE.dtype).expand_as(mean_p_LE)
    pairs = {"fsi": (mean_p_LE, u_LE)}
    if last is not None:
        last_p_LE = torch.stack([layer.p for layer in last]) / torch.stack([layer.tokens for layer in last])
        pairs["fsi_velocity"] = mean_p_LE, last_p_LE
    if known.k:
        pairs["fsi_load"] = load_share(sums.counts), u_LE
    scalars = _distances(pairs)
    scalars["fsi"] = over_maximum(scalars["fsi"], fsi_max(known.experts))
    scalars |= _of_tokens(known, sums, mean_p_LE)
    if known.k:
        scalars["fsi_load"] = over_maximum(scalars["fsi_load"], fsi_load_max(known.experts, known.k))
        scalars |= load_metrics(sums.counts)
    if known.traces:
        scalars |= signal_metrics(sums.traces, sums.counts) if known.k else {"fhs": fhs(sums.traces)}
    if known.labelled:
        sums_LDE = sums.domain_p.unflatten(-1, (known.domains, known.experts))
        scalars["fsi_domain"] = fsi_domain_from_sums(sums_LDE, sums.domain_tokens)
    return scalars


def _distances(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return the Fisher-Rao distances (L,) of pairs of distributions (L, E), radians."""
    p, q = (torch.stack(side) for side in zip(*pairs.values(), strict=True))
    return dict(zip(pairs, fisher_rao_distance(p, q).unbind(), strict=True))


def _of_tokens(known: _Known, sums: LayerStatistics, mean_p_LE: Tensor) -> dict[str, Tensor]:
    totals_L4 = torch.cat([sums.distance, sums.entropy, sums.margin, sums.z_squared], dim=-1)
    distance_L, entropy_L, margin_L, z_squared_L = (totals_L4 / sums.tokens).unbind(dim=-1)
    return {
        "fsi_token": over_maximum(distance_L, fsi_max(known.experts)),
        "dispersion_1": dispersion_from_means(mean_p_LE, sums.root_p / sums.tokens),
        "routing_information": information_from_means(mean_p_LE, entropy_L, normalized=True),
        "token_entropy": entropy_L,
        "margin": margin_L,
        "z_loss": z_squared_L,
        "non_finite": (sums.non_finite / (sums.tokens + sums.non_finite)).squeeze(dim=-1),
    }


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
    sums = {name: reduced.layers[name] for name in layers if name in reduced.layers}
    found = scalars_of_layers(sums, {} if before is None else before.layers)
    scalars = {name: values for name, values in found.items() if values}
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
    experts: Mapping[str, LayerStatistics] | None = None,
) -> dict[str, float]:
    """Return flat keys ``geometry/fsi`` …: the mean over the layers that have the scalar, the worst for alarms.

    Args:
        layers: scalars by layer.
        per_layer: also ``geometry/layer0/fsi`` …, see ``short_names``.
        experts: the layers' sums, for ``geometry/layer0/load/3`` …; None: without.
    """
    flat: dict[str, float] = {}
    for name in dict.fromkeys(name for scalars in layers.values() for name in scalars):
        values = [scalars[name] for scalars in layers.values() if name in scalars]
        flat[f"geometry/{name}"] = _over_layers(name, values)
    short = short_names(layers)
    shares = {} if experts is None else {name: expert_scalars(experts[name]) for name in layers}
    for group in (layers if per_layer else {}, shares):
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
