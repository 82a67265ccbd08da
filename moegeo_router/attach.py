"""``attach``: watch the routing of any MoE model while it trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .metrics.summary import flatten, layer_scalars
from .observe.statistics import LayerStatistics, RoutingStatistics
from .observe.taps import MaskTap, RouterTap
from .routers.find import RouterSite, Select, find_routers
from .routers.gating import ScoreFunction


@dataclass(frozen=True, kw_only=True)
class GeometryConfig:
    """What ``attach`` watches and how.

    Attributes:
        select: which routers, see ``find_routers``; by default those its rules find.
        hooks: tap the routers' forward passes. False: only what ``record`` is given, for loops of one's own.
        scores: the routers' score function, which makes p of their logits.
        top_k: experts chosen per token, for routers that return logits only: their choices are then taken to be the
            k largest logits. Without it such routers have no load metrics.
        per_layer: ``metrics()`` also has every layer's scalars.
        on_error: ``"warn"``: an error while watching switches the watching off, once, with the reason, and never stops
            a run; ``"raise"``.
        group: the data-parallel process group; None is the default group, if there is one.

    Raises:
        ValueError: a value out of range.
    """

    select: Select = None
    hooks: bool = True
    scores: ScoreFunction = "softmax"
    top_k: int | None = None
    per_layer: bool = False
    on_error: Literal["warn", "raise"] = "warn"
    group: Any = None

    def __post_init__(self) -> None:
        if self.scores not in ("softmax", "sigmoid"):
            raise ValueError(f"scores must be 'softmax' or 'sigmoid', got {self.scores!r}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.on_error not in ("warn", "raise"):
            raise ValueError(f"on_error must be 'warn' or 'raise', got {self.on_error!r}")


def attach(model: nn.Module, *, config: GeometryConfig | None = None) -> Geometry:
    """Watch the routers of ``model``: sums over tokens are collected in the forward passes that happen anyway.

    Nothing about the training changes, bit for bit. Not counted: eval mode, the recomputation of activation
    checkpointing, tokens that ``attention_mask`` masks, anything inside ``pause()``.

    Args:
        model: the model that is called (the wrapper, if one wraps it).
        config: see ``GeometryConfig``.

    Returns:
        The watcher: ``metrics()``, ``record(...)``, ``pause()``, ``detach()``.

    Raises:
        ValueError: no router found, or ``top_k`` larger than a router's number of experts.

    Example:
        >>> geometry = mg.attach(model, config=mg.GeometryConfig(top_k=2))
        >>> for batch in data:
        ...     loss = model(batch)
        ...     loss.backward(); optimizer.step(); optimizer.zero_grad()
        ...     wandb.log(geometry.metrics())
        >>> geometry.detach()
    """
    return Geometry(model, config or GeometryConfig())


class Geometry:
    """What ``attach`` returns; see there."""

    def __init__(self, model: nn.Module, config: GeometryConfig) -> None:
        self.config = config
        self._paused = False
        self._told_of_ids = False
        sites = find_routers(model, config.select) if config.hooks else []
        for site in sites:
            self._check_top_k(site)
        self._statistics = RoutingStatistics({})
        self._experts = {site.name: site.num_experts for site in sites}
        self._mask = MaskTap(model)
        self._taps = [RouterTap(site, self._observe) for site in sites]

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that are watched, or were recorded."""
        return tuple(self._experts)

    def record(self, layer: str, logits: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Add one forward pass of a layer explicitly: for loops and models of one's own (``hooks=False``).

        Args:
            layer: its name; a new one is taken up.
            logits: (..., E) router logits.
            ids: (..., K) int64 chosen experts; without them the layer has no load metrics (unless ``top_k`` is set).
            mask: (...) bool, True where a token counts.

        Raises:
            ValueError: shapes that do not fit, or another number of experts than before.
        """
        if not self._paused:
            self._experts.setdefault(layer, logits.shape[-1])
            self._add(layer, logits.detach(), ids, mask)

    def metrics(self) -> dict[str, float]:
        """Return the scalars of all that was seen since the last call, ``geometry/fsi`` …, and start anew.

        Call it once an optimizer step: micro-batches in between add up. With data parallelism every rank must call it
        (one all-reduce), and every rank gets the same numbers. Empty if nothing was seen.
        """
        statistics, self._statistics = self._statistics, RoutingStatistics({})
        if not self._experts:
            return {}
        device = next((layer.p.device for layer in statistics.layers.values()), None)
        complete = RoutingStatistics.zeros(self._experts.items(), device)
        for name, layer in statistics.layers.items():
            complete.add(name, layer)
        reduced = complete.all_reduce(self.config.group).cpu()
        scalars = {name: layer_scalars(layer) for name, layer in reduced.layers.items()}
        return flatten({name: values for name, values in scalars.items() if values}, self.config.per_layer)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Count nothing inside: for probes, generation, anything that is not training."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def detach(self) -> None:
        """Take every hook off; the model is as it was. What was seen can still be asked for."""
        for tap in self._taps:
            tap.remove()
        self._mask.remove()
        self._taps = []

    def _observe(self, layer: str, logits: Tensor, ids: Tensor | None) -> None:
        if self._paused:
            return
        try:
            self._add(layer, logits, ids, self._mask.for_tokens(logits))
        except Exception as error:
            if self.config.on_error == "raise":
                raise
            self.detach()
            warnings.warn(f"watching {layer} failed and is switched off, training goes on: {error}", stacklevel=2)

    @torch.no_grad()
    def _add(self, layer: str, logits: Tensor, ids: Tensor | None, mask: Tensor | None) -> None:
        if logits.shape[-1] != self._experts[layer]:
            raise ValueError(f"layer {layer} has {self._experts[layer]} experts, got logits of {logits.shape[-1]}")
        if ids is None and self.config.top_k is not None:
            ids = logits.topk(self.config.top_k, dim=-1).indices
        if ids is None and not self._told_of_ids:
            self._told_of_ids = True
            message = (
                "shows logits, not the experts chosen: no load metrics (GeometryConfig(top_k=...) takes the k largest)"
            )
            warnings.warn(f"layer {layer} {message}", stacklevel=3)
        if layer not in self._statistics.layers:
            self._statistics.layers[layer] = LayerStatistics.zeros(self._experts[layer], logits.device)
        self._statistics.add(layer, LayerStatistics.of(logits, ids, mask, self.config.scores))

    def _check_top_k(self, site: RouterSite) -> None:
        if self.config.top_k is not None and self.config.top_k > site.num_experts:
            raise ValueError(f"top_k={self.config.top_k}: router {site.name} has {site.num_experts} experts")
