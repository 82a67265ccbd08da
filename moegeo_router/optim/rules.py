"""Which rule moves a stack of routers, and what it is given."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import NaturalConfig
from ..observe.forward import LayerForward
from ..observe.statistics import world_size
from ..routers.find import RouterSite
from ..routers.gating import ScoreFunction
from .natural import Movement, NaturalRule
from .riemannian import RiemannianAdamRule
from .rows import RouterRows, RowSample
from .stack import bias_of


def riemannian_rule(
    like: Tensor, manifold: Any, sites: Sequence[Sequence[RouterSite]], *, scale: float
) -> RiemannianAdamRule:
    """Return Riemannian Adam for a stack."""
    return RiemannianAdamRule(like, manifold, scale)


class NaturalRules:
    """Makes natural-gradient rules for stacks, and hands them what their routers' forward passes show.

    Args:
        scores: the routers' score function.
        group: the data-parallel process group.
    """

    def __init__(self, config: NaturalConfig, scores: ScoreFunction = "softmax", group: Any = None) -> None:
        self._config, self._scores, self._group = config, scores, group
        self._rules: list[tuple[NaturalRule, list[set[str]]]] = []
        self._rows: dict[str, list[RouterRows]] = defaultdict(list)

    def rule(
        self, like: Tensor, manifold: Any, sites: Sequence[Sequence[RouterSite]], *, scale: float | None
    ) -> NaturalRule:
        """Return the rule of one stack."""
        samples = [RowSample(-(-self._config.rows // world_size(self._group))) for _ in sites]
        for tied, sample in zip(sites, samples, strict=True):
            for site in tied:
                self._rows[site.name].append(RouterRows(site, sample))
        rule = NaturalRule(
            like,
            manifold,
            samples,
            self._config,
            scores=self._scores,
            bias=bias_of(sites[0][0]) is not None,
            scale=scale,
            group=self._group,
        )
        self._rules.append((rule, [{site.name for site in tied} for tied in sites]))
        return rule

    def set_limit(self, names: Mapping[str, float | None]) -> None:
        """Set the speed limits of routers by name, radians a step."""
        for rule, own in self._rules:
            for index, tied in enumerate(own):
                for name in names.keys() & tied:
                    rule.set_limit(index, names[name])

    def observe(self, seen: LayerForward) -> None:
        """Take rows of one forward pass of a layer."""
        for router in self._rows.get(seen.layer, ()):
            router.observe(seen)

    @property
    def movement(self) -> Movement | None:
        """What the last steps did, all routers in a row; None before the first."""
        done = [rule.movement for rule, _ in self._rules if rule.movement is not None]
        return Movement(*(torch.cat(parts) for parts in zip(*done, strict=True))) if done else None
