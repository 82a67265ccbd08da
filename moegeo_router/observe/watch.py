"""Watching a model: taps, Fisher traces and sums put together, and what happens when any of it fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import GeometryConfig
from ..routers.find import RouterSite
from ..routers.gating import top_choices
from .build import check_sites, estimator_of, taps_of
from .findings import Findings
from .fisher import TraceEstimator
from .forward import LayerForward, rows
from .hooks import Pausable, recomputing
from .statistics import LayerStatistics, RoutingStatistics
from .taps import LayerTap
from .tokens import TokenTap
from .window import Window


class Watch(Pausable):
    """Collects the sums of every training forward and backward pass, and hands the forwards on.

    Args:
        model: the model itself, out of its wrappers.
        sites: its routers.
        config: of the ``attach``.
        join: see ``LayerTap``.
        sequences: whether the tokens' sequences are wanted.
        on_begin: called with the model's arguments when a forward begins.
        on_forward: called with every forward pass of a layer, and whether it is one of training.
        on_stop: called when the watching stops by itself; returns what that switches off, in words.
        strict: errors that are raised whatever ``config.on_error`` says.

    Raises:
        ValueError: no router found, a router or its experts that cannot be watched.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[RouterSite],
        config: GeometryConfig,
        *,
        join: bool,
        sequences: bool,
        on_begin: Callable[[Mapping[str, Any]], None],
        on_forward: Callable[[LayerForward, bool], None],
        on_stop: Callable[[], str],
        strict: type[Exception],
    ) -> None:
        check_sites(model, sites, config)
        self._config, self._on_forward, self._on_stop, self._strict = config, on_forward, on_stop, strict
        self._sites = list(sites) if config.hooks else []
        self._watching, self._stopped = True, False
        self._aside: Window | None = None
        self._findings = Findings(config)
        self._had_graph: dict[str, bool] = {}
        self._tapped = {site.name for site in self._sites}
        self.window = Window(config.num_domains, config.group)
        self.window.experts = {site.name: site.num_experts for site in self._sites}
        failed = partial(self._fail, "the model")
        self._tokens = TokenTap(model, self._tapped, on_begin, failed, sequences=sequences, active=self._is_training)
        self._taps = taps_of(model, self._sites, self._tokens, self._observe, self._fail, self._counts, join)
        self._estimators: dict[str, TraceEstimator] = {}
        try:
            for tap in self._taps:
                self._estimators[tap.site.name] = self._estimator(tap.site.name, tap)
        except BaseException:
            self.unhook()  # what could not be watched keeps no hooks
            raise

    @property
    def watching(self) -> bool:
        """Whether it has not stopped by itself."""
        return self._watching

    @property
    def stopped(self) -> bool:
        """Whether it has stopped, and every rank knows."""
        return self._stopped

    @property
    def never_seen(self) -> list[str]:
        """The layers whose router has a gradient although no training forward of theirs was ever seen."""
        return [name for name in self._trained if name not in self._findings.seen]

    @property
    def _trained(self) -> list[str]:
        return [site.name for site in self._sites if site.weight.grad is not None]

    def tokens(self, **given: Tensor | None) -> Any:
        """Say what the tokens of the forwards inside are, see ``TokenTap.given``."""
        self._check_domains(given.get("domains"))
        mask = given.get("mask")
        return self._tokens.given(**given | {"mask": None if mask is None else mask > 0})

    def record(self, layer: str, logits: Tensor, **known: Tensor | None) -> None:
        """Take in one forward pass explicitly; see ``Geometry.record``."""
        if self._paused or not self._watching:
            return
        if layer in self._tapped:
            raise ValueError(
                f"layer {layer} is tapped, recording it would count it twice: take GeometryConfig(hooks=False)"
            )
        self._check_domains(known.get("domains"))
        again = recomputing()
        if again and self._had_graph.get(layer, False):
            return
        if not again:
            self._had_graph[layer] = logits.requires_grad
        per_token = {name: known.get(name) for name in ("mask", "domains", "sequences")}
        flat = {name: values.reshape(-1) for name, values in per_token.items() if values is not None}
        if "mask" in flat:
            flat["mask"] = flat["mask"] > 0
        seen = LayerForward(layer=layer, logits=logits, recomputed=again, **(known | flat))  # type: ignore[arg-type]
        experts = self.window.experts.setdefault(layer, seen.num_experts)
        if experts != seen.num_experts:
            raise ValueError(f"layer {layer} has {experts} experts, got logits of {seen.num_experts}")
        if layer not in self._estimators:
            self._findings.recorded(layer)
            self._estimators[layer] = self._estimator(layer, None)
        self._take_in(seen)

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Do with errors inside what is done with those of the hooks."""
        try:
            yield
        except Exception as error:
            self._fail(what, error)

    def before_step(self, stepped: bool) -> None:
        """Take note of the gradients before the optimizer uses them; say so if a trained router was not seen.

        Args:
            stepped: whether an optimizer is about to use them; without one they may be left from before.
        """
        if self._watching:
            for estimator in self._estimators.values():
                estimator.before_step()
            if stepped:
                self._findings.unseen(self.never_seen)
                if not self.window.layers and self._findings.seen:
                    self._findings.unseen_step(self._trained)

    def close(self) -> RoutingStatistics | None:
        """End a step: return its sums, reduced over ranks; None once the watching has stopped. On every rank."""
        if self._stopped or not self.window.experts:
            return None
        # Every rank reads the same sums here, and so stops before the same all-reduce.
        newest = self.window.newest(wait=self.window.distributed)
        if newest is not None and float(newest[0].failures):
            self._stop("on another rank" if self._watching else None)
            return None
        return self.window.close(failed=not self._watching)

    @contextmanager
    def evaluation(self) -> Iterator[Window]:
        """Collect all forward passes inside, whatever their mode, in a window of their own, and without gradients."""
        before, self._aside = self._aside, Window(self._config.num_domains, self._config.group)
        self._aside.experts = dict(self.window.experts)
        try:
            with torch.no_grad():
                yield self._aside
        finally:
            self._aside = before

    def _counts(self, trained: bool) -> bool:
        return self._is_active() and (trained or self._aside is not None)

    def _is_training(self) -> bool:
        return self._is_active() and self._aside is None

    def unhook(self) -> None:
        """Take every hook off."""
        self._tokens.remove()
        for tap in self._taps:
            tap.remove()
        for estimator in self._estimators.values():
            estimator.remove()
        self._taps = []

    def _estimator(self, layer: str, tap: LayerTap | None) -> TraceEstimator:
        add, failed, lost = (partial(call, layer) for call in (self._add_traces, self._fail, self._findings.lost))
        return estimator_of(tap, self._config, add, failed, lost)

    def _add_traces(self, layer: str, traces_E: Tensor) -> None:
        if self._config.grad_scaler is not None and self._config.fisher != "minibatch":
            # After a step that was skipped, the next backward pass has another scale, and the sums of both are added.
            traces_E = traces_E / self._config.grad_scaler.scale(torch.ones_like(traces_E[:1])).square()
        self.window.add_traces(layer, traces_E)

    def _observe(self, seen: LayerForward) -> None:
        if self._watching:
            self._take_in(seen)

    def _take_in(self, seen: LayerForward) -> None:
        if self._aside is not None:
            self._aside.experts.setdefault(seen.layer, seen.num_experts)  # recorded for the first time
            self._aside.add(seen.layer, self._sums(self._with_choices(seen)))
            return
        self._on_forward(seen, self._tokens.trained)
        with torch.no_grad():
            self._findings.of(seen)
            seen = self._with_choices(seen)
            if not seen.recomputed:
                self.window.add(seen.layer, self._sums(seen))
        self._findings.missing(seen)
        self._estimators[seen.layer].forward(seen)

    def _sums(self, seen: LayerForward) -> LayerStatistics:
        return LayerStatistics.of(
            rows(seen.logits.detach()),
            None if seen.ids is None else rows(seen.ids),
            seen.mask,
            self._config.routing.scores,
            gates=None if seen.gates is None else rows(seen.gates.detach()),
            domains=seen.domains,
            num_domains=self._config.num_domains,
        )

    def _with_choices(self, seen: LayerForward) -> LayerForward:
        """Fill in ids and gates where the layer does not show them."""
        config = self._config
        if seen.ids is not None or config.top_k is None:
            return seen
        ids, gates = top_choices(rows(seen.logits), config.top_k, config.routing.scores, config.routing.renormalize)
        return replace(seen, ids=ids, gates=gates)

    def _check_domains(self, domains: Tensor | None) -> None:
        if domains is not None and not self._config.num_domains:
            raise ValueError("domains are given, but how many there are is not: set GeometryConfig(num_domains=...)")

    def _fail(self, where: str, error: Exception) -> None:
        """Switch the watching off, or raise: an error of ours never stops a run that did not ask for it."""
        if self._config.on_error == "raise" or isinstance(error, self._strict):
            raise error
        if self._watching:
            self._stop(where, str(error))
            self._stopped = not self.window.distributed  # the other ranks learn of it in the next all-reduce

    def _stop(self, where: str | None, reason: str = "") -> None:
        self.unhook()
        self.window.forget()
        self._watching, self._stopped = False, True
        lost = self._on_stop()
        if where is not None:
            why = f": {reason}" if reason else ""
            warnings.warn(f"watching {where} failed and is switched off{lost}, training goes on{why}", stacklevel=2)
