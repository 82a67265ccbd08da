"""Natural-gradient rules for the stacks of a model, and what they are given."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..config import NaturalConfig
from ..observe.forward import LayerForward
from ..observe.statistics import world_size
from ..routers.gating import ScoreFunction
from .natural import Movement, NaturalRule, in_a_row, peak_rate
from .point import TiedRouters
from .rows import RouterRows, RowSample


class NaturalRules:
    """Makes natural-gradient rules for stacks, and hands them what their routers' forward passes show.

    Args:
        config: see ``NaturalConfig``.
        scores: the routers' score function.
        group: the data-parallel process group.
    """

    def __init__(self, config: NaturalConfig, scores: ScoreFunction = "softmax", group: Any = None) -> None:
        self._config, self._scores, self._group = config, scores, group
        self._rules: list[tuple[NaturalRule, Sequence[TiedRouters]]] = []
        self._rows: dict[str, list[RouterRows]] = defaultdict(list)

    def rule(
        self,
        like: Tensor,
        manifold: Any,
        routers: Sequence[TiedRouters],
        options: Mapping[str, Any],
        *,
        scale: float | None,
    ) -> NaturalRule:
        """Return the rule of one stack, in an optimizer's group with ``options``."""
        samples = [RowSample(-(-self._config.rows // world_size(self._group))) for _ in routers]
        for tied, sample in zip(routers, samples, strict=True):
            for site in tied.sites:
                self._rows[site.name].append(RouterRows(site, sample))
        rule = NaturalRule(
            like,
            manifold,
            samples,
            self._config,
            scores=self._scores,
            bias=routers[0].bias is not None,
            scale=scale,
            peak=peak_rate(options),
            group=self._group,
        )
        self._rules.append((rule, routers))
        return rule

    def observe(self, seen: LayerForward) -> None:
        """Take rows of one forward pass of a layer.

        Raises:
            NotLinearError: logits that are not ``x Wᵀ + b``.
            ValueError: an input of another width.
        """
        for router in self._rows.get(seen.layer, ()):
            router.observe(seen)

    def takes(self, name: str) -> bool:
        """Whether a router of this name is known."""
        return any(site.name == name for _, routers in self._rules for tied in routers for site in tied.sites)

    def forget(self, names: Sequence[str]) -> None:
        """Take no more rows of routers, and report nothing of them."""
        for rule, routers in self._rules:
            if any(tied.name in names for tied in routers):
                rule.rest()
                for tied in routers:
                    for site in tied.sites:
                        self._rows.pop(site.name, None)

    def set_limits(self, limits: Mapping[str, float | None]) -> None:
        """Set speed limits by router, radians a step."""
        for rule, routers in self._rules:
            for index, tied in enumerate(routers):
                for site in tied.sites:
                    if site.name in limits:
                        rule.set_limit(index, limits[site.name])

    @property
    def movement(self) -> Movement:
        """What the last steps did, all routers in a row."""
        return in_a_row([rule.movement for rule, _ in self._rules])
