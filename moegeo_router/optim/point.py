"""Where a stack of routers stands, and the rule by which it is moved.

Shape legend: L routers, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from ..routers.find import RouterSite


class Point(NamedTuple):
    """Values of L alike routers, or their gradients: ``weight`` (L, E, D) and, where stepped too, ``bias`` (L, E)."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class TiedRouters:
    """Routers that share one weight, and so are one to whoever steps it.

    Attributes:
        sites: one or more.
        bias: what they add to their logits, where it is to be stepped with the weight.
    """

    sites: tuple[RouterSite, ...]
    bias: nn.Parameter | None = None

    @property
    def name(self) -> str:
        """That of the first."""
        return self.sites[0].name

    @property
    def weight(self) -> nn.Parameter:
        """Their weight (E, D)."""
        return self.sites[0].weight


class StepRule(Protocol):
    """Moves the weights, and biases where there are any, of L alike routers."""

    def ready(self) -> Sequence[bool]:
        """Return for each router whether what a step needs is there."""

    def rate(self, group: Mapping[str, Any]) -> float:
        """Return the length factor of a step in an optimizer's group; 0: nothing moves."""

    def move(
        self, point: Point, gradient: Point, group: Mapping[str, Any], idle: Sequence[int], fixed: Sequence[int]
    ) -> Point:
        """Return where a step leads.

        Args:
            point: where they are.
            gradient: 0 where there is none.
            group: of the optimizer.
            idle: routers without a gradient, whose state is left as it is.
            fixed: routers whose bias has none.
        """

    def rest(self) -> None:
        """Take note of a step in which no router has a gradient."""

    def forget(self, index: int, experts: Sequence[int]) -> None:
        """Let go of what is known of the last steps of a router's rows: they are others from here on."""

    def state(self, index: int) -> dict[str, Any]:
        """Return what one router's next steps depend on."""

    def load(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue from the states of all routers."""
