"""The routing of forward passes that train nothing: held-out data."""

from __future__ import annotations

from collections.abc import Sequence

from .metrics.summary import flatten, model_scalars
from .observe.statistics import RoutingStatistics


class Evaluation:
    """What ``geometry.evaluation()`` measures, complete when its block has ended.

    Args:
        per_layer: whether ``metrics`` has every layer's scalars, too.
        per_expert: whether it has every expert's shares, too.
    """

    def __init__(self, per_layer: bool, per_expert: bool) -> None:
        self._per_layer, self._per_expert = per_layer, per_expert
        self._reduced: RoutingStatistics | None = None
        self._layers: Sequence[str] = ()

    def end(self, reduced: RoutingStatistics, layers: Sequence[str]) -> None:
        """Take the sums of all forward passes, on the host, and the layers in their order."""
        self._reduced, self._layers = reduced, tuple(layers)

    def metrics(self) -> dict[str, float]:
        """Return the scalars of the routing, named as in ``Geometry.metrics``; none of steps and of gradients.

        Empty if nothing was seen, or if a rank can no longer watch: the sums lack its share. With data parallelism
        every rank has the same numbers.

        Raises:
            RuntimeError: the block has not ended, or was left by an error.
        """
        if self._reduced is None:
            raise RuntimeError("the block of geometry.evaluation() has not ended: ask for its metrics() after it")
        if float(self._reduced.failures):
            return {}
        scalars = model_scalars(self._layers, self._reduced, None)
        return flatten(scalars, self._per_layer, self._reduced.layers if self._per_expert else None)
