"""Named scalars of a routing, from its sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..observe.statistics import LayerStatistics
from .load import coefficient_of_variation, dead_fraction, gini, max_violation
from .specialization import dispersion_from_means, fsi, fsi_load, fsi_max, information_from_means

#: How a scalar of the layers becomes one of the model; the others are averaged.
WORST_LAYER = ("max_violation", "dead_fraction")


def layer_scalars(statistics: LayerStatistics) -> dict[str, float]:
    """Return the scalars of one layer; those of the load only where the choices are known, none without tokens.

    ``fsi``, ``fsi_load`` and ``fsi_token`` are over their maxima, ``routing_information`` over log E, ``dispersion_1``
    is the one-pass form of ``dispersion`` (never above it, never below 8/π² of it), ``token_entropy`` is in nats.

    Args:
        statistics: reduced sums, on the CPU.
    """
    tokens, num_experts = statistics.tokens, len(statistics.p)
    if not float(tokens):
        return {}
    mean_p = statistics.p / tokens
    largest = fsi_max(num_experts)
    scalars: dict[str, Tensor] = {
        "fsi": fsi(mean_p, normalized=True),
        "fsi_token": statistics.distance / tokens / largest if largest else torch.zeros(1),
        "dispersion_1": dispersion_from_means(mean_p, statistics.root_p / tokens),
        "routing_information": information_from_means(mean_p, statistics.entropy / tokens, normalized=True),
        "token_entropy": statistics.entropy / tokens,
        "margin": statistics.margin / tokens,
    }
    if float(statistics.choices):
        k = round(float(statistics.choices / statistics.k_tokens))
        scalars |= {
            "fsi_load": fsi_load(statistics.counts, k, normalized=True),
            "max_violation": max_violation(statistics.counts),
            "load_cv": coefficient_of_variation(statistics.counts),
            "load_gini": gini(statistics.counts),
            "dead_fraction": dead_fraction(statistics.counts),
        }
    return {name: float(value) for name, value in scalars.items()}


def flatten(layers: Mapping[str, Mapping[str, float]], per_layer: bool = False) -> dict[str, float]:
    """Return flat keys ``geometry/fsi`` …: the mean over the layers that have the scalar, the worst for alarms.

    Args:
        layers: scalars by layer.
        per_layer: also ``geometry/LAYER/fsi`` ….
    """
    flat: dict[str, float] = {}
    for name in dict.fromkeys(name for scalars in layers.values() for name in scalars):
        values = [scalars[name] for scalars in layers.values() if name in scalars]
        flat[f"geometry/{name}"] = _over_layers(name, values)
    if per_layer:
        flat |= {
            f"geometry/{layer}/{name}": value for layer, scalars in layers.items() for name, value in scalars.items()
        }
    return flat


def _over_layers(name: str, values: Sequence[float]) -> float:
    return max(values) if name in WORST_LAYER else sum(values) / len(values)
