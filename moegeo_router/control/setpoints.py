"""Continuous control: a weight per layer and set-point, moved by dual ascent within bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .config import SetPoint


class SetPointControl:
    """Moves the weights; see ``SetPoint`` for the law. Pure: the next weights are a function of values and state.

    Args:
        points: what is held.
    """

    def __init__(self, points: Sequence[SetPoint]) -> None:
        self._points = tuple(points)
        self._integral: dict[str, dict[str, float]] = {}
        self._weights: dict[str, dict[str, float]] = {}

    def update(self, layer: str, values: Mapping[str, float]) -> dict[str, float]:
        """Return the weights of a layer for the next step, by what they move; a metric that is not known moves none."""
        integrals, weights = self._integral.setdefault(layer, {}), self._weights.setdefault(layer, {})
        for point in self._points:
            value = values.get(point.metric, math.nan)
            if not math.isfinite(value):
                continue
            violation, before = point.violation(value), weights.get(point.moves, 0.0)
            integral = integrals.get(point.moves, 0.0)
            wanted = point.proportional * max(violation, 0.0) + integral
            if violation < 0 or wanted < point.most:  # anti-windup
                integral = min(max(integral + point.gain * violation, 0.0), point.most)
            wanted = min(point.proportional * max(violation, 0.0) + integral, point.most)
            integrals[point.moves] = integral
            weights[point.moves] = before + min(max(wanted - before, -point.rate), point.rate)
        return dict(weights)

    def state(self) -> dict[str, Any]:
        """Return plain numbers."""
        return {"integral": _copy(self._integral), "weights": _copy(self._weights)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state()``."""
        self._integral, self._weights = _copy(state["integral"]), _copy(state["weights"])


def _copy(of: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {name: dict(values) for name, values in of.items()}
