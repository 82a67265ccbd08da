"""How tokens and Fisher information are shared among the experts, as pictures in a log."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..metrics.load import load_share
from ..metrics.summary import short_names

if TYPE_CHECKING:
    from ..observe.statistics import RoutingStatistics
    from .base import Logger


def log_shares(logger: Logger, reduced: RoutingStatistics, names: Iterable[str], step: int) -> None:
    """Write a heatmap of the experts' load and Fisher traces, a row a layer, and histograms of their shares.

    Args:
        logger: where to.
        reduced: the sums of a step.
        names: of the layers, in their order; those without tokens are left out.
        step: the optimizer step.
    """
    layers = {n: reduced.layers[n] for n in names if n in reduced.layers and float(reduced.layers[n].choices)}
    short = short_names(layers)
    for name, field in (("load", "counts"), ("fisher", "traces")):
        amounts = {short[n]: getattr(layer, field) for n, layer in layers.items()}
        rows = {n: (len(a) * load_share(a)).tolist() for n, a in amounts.items() if float(a.sum())}
        if rows:
            logger.heatmap(f"geometry/{name}", list(rows.values()), list(rows), step)
            logger.histogram(f"geometry/{name}_shares", [x for row in rows.values() for x in row], step)
