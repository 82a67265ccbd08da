"""Where a stack of routers stands, and the rule by which it is moved.

Shape legend: L routers, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Point(NamedTuple):
    """Values of L alike routers, or their gradients: ``weight`` (L, E, D) and, where stepped too, ``bias`` (L, E)."""

    weight: Tensor
    bias: Tensor | None = None


class StepRule(Protocol):
    """Moves the weights of L alike routers along their manifold."""

    #: Whether it steps the routers' biases, too.
    steps_bias: bool

    @property
    def ready(self) -> bool:
        """Whether what a step needs is there."""

    def rate(self, group: Mapping[str, Any]) -> float:
        """Return the length factor of a step in an optimizer's group; 0: nothing moves."""

    def move(self, point: Point, gradient: Point, group: Mapping[str, Any], idle: Sequence[int]) -> Point:
        """Return where a step leads; ``idle`` routers have no gradient, and their state is left as it is."""

    def state(self, index: int) -> dict[str, Any]:
        """Return what one router's next steps depend on."""

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue from the states of all routers."""
