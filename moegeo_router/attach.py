"""``attach``: watch, regularize and step the routers of any MoE model while it trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .config import GeometryConfig
from .losses import Regularizers
from .metrics.load import load_share
from .metrics.summary import expert_scalars, flatten, layer_scalars, short_names
from .observe.build import (
    check_sites,
    estimator_of,
    say_what_is_missing,
    taps_of,
    unwrapped,
    warn_of_constant_gates,
)
from .observe.fisher import TraceEstimator
from .observe.forward import LayerForward, rows
from .observe.hooks import recomputing
from .observe.statistics import LayerStatistics, RoutingStatistics
from .observe.tokens import TokenTap
from .observe.window import Window
from .regularization import Regularization, regularization_of
from .routers.find import RouterSite, find_routers
from .routers.gating import top_choices

if TYPE_CHECKING:
    from .loggers import Logger
    from .observe.taps import LayerTap
    from .optim import RouterSteps

FORMAT = 1


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    config: GeometryConfig | None = None,
) -> Geometry:
    """Watch the routers of ``model``, regularize them, and step them along their manifolds.

    Without an optimizer it only watches: sums over tokens are collected in the forward and backward passes that happen
    anyway, and nothing about the training changes, bit for bit. With one, the routers' step is taken over from it
    (``RouterSteps``) and the default regularizers are on (``Regularizers``).

    Not counted: eval mode, the recomputation of activation checkpointing, tokens that ``attention_mask`` masks,
    anything inside ``pause()``. A model that is compiled is attached to before its first call.

    Args:
        model: the model, or a data-parallel or compiled wrapper of it.
        optimizer: the optimizer, or several, that step the model; the last one ends a step.
        config: see ``GeometryConfig``.

    Returns:
        ``loss()``, ``metrics()``, ``record(...)``, ``tokens(...)``, ``pause()``, ``detach()`` ….

    Raises:
        ValueError: no router found; ``top_k`` larger than a router's number of experts; a router on no manifold, in no
            optimizer, or frozen while regularizers are asked for; sharded routers; an optimizer that is taken over
            already; experts that the estimator cannot see.

    Example:
        >>> mg.geometrize(model)
        >>> geometry = mg.attach(model, optimizer, mg.GeometryConfig(top_k=2))
        >>> for batch in data:
        ...     loss = model(batch) + geometry.loss()
        ...     loss.backward(); optimizer.step(); optimizer.zero_grad()
        ...     wandb.log(geometry.metrics())
        >>> geometry.detach()
    """
    optimizers = [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    return Geometry(model, optimizers, config or GeometryConfig())


class Geometry:
    """What ``attach`` returns; see there."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], config: GeometryConfig) -> None:
        self.config = config
        model = unwrapped(model)
        sites = find_routers(model, config.select) if config.hooks or (optimizers and config.step) else []
        check_sites(sites, config)
        if config.fisher == "minibatch" and not optimizers:
            raise ValueError("fisher='minibatch' reads gradients when the optimizer steps: give attach the optimizer")
        self._has_optimizer = bool(optimizers)
        self._watching, self._stopped, self._paused = True, False, False
        self._told: set[str] = set()
        self._had_graph: dict[str, bool] = {}
        self._reduced: RoutingStatistics | None = None
        self._window = Window(config.num_domains, config.group)
        self._regularization = regularization_of(model, sites, config, trained=bool(optimizers))
        self._steps: RouterSteps | None = None
        self._estimators: dict[str, TraceEstimator] = {}
        sequences = self._regularization.weights.balance_scope == "sequence"
        self._token_tap = TokenTap(model, self._begin_forward, partial(self._fail, "the model"), sequences)
        self._taps: list[LayerTap] = []
        if config.hooks:
            self._window.experts = {site.name: site.num_experts for site in sites}
            self._taps = taps_of(
                model,
                sites,
                self._token_tap,
                self._observe,
                self._fail,
                active=lambda: not self._paused,
                join=config.inject and self._regularization.on,
            )
        try:
            for tap in self._taps:
                self._estimators[tap.site.name] = self._estimator(tap.site.name, tap)
            self._steps = self._take_over(sites, optimizers)
        except ValueError:
            self._unhook()  # what could not be attached leaves no hooks behind
            raise

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that are watched, or were recorded."""
        return tuple(self._window.experts)

    def loss(self, tokens: int | None = None) -> Tensor:
        """Return the regularizers of the newest forward pass, to be added to the loss before ``backward()``.

        Add it before the division by the number of micro-batches; with equal token counts its gradient is then that of
        the global batch, whatever their number and that of the ranks. With unequal ones, pass ``tokens``.

        Args:
            tokens: the unmasked tokens of all micro-batches of this step on this rank; the sum over the micro-batches
                is then not divided by their number.

        Returns:
            A scalar; 0 where none is on.

        Raises:
            RuntimeError: they are injected already, or the logits carry no gradient (reentrant checkpointing).
        """
        return self._regularization.loss(tokens)

    def record(
        self,
        layer: str,
        logits: Tensor,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        gates: Tensor | None = None,
        output: Tensor | None = None,
        domains: Tensor | None = None,
        sequences: Tensor | None = None,
    ) -> None:
        """Add one forward pass of a layer explicitly: for loops and models of one's own (``hooks=False``).

        What is missing disables what needs it: without ``ids`` (and ``top_k``) there are no load metrics, without
        ``gates`` and ``output`` no FHS by ``outputs``. Pass tensors on their graph: regularizers and traces need it.

        Args:
            layer: its name; a new one is taken up.
            logits: (..., E) router logits.
            ids: (..., K) int64 chosen experts.
            mask: (...) bool, True where a token counts.
            gates: (..., K) weights of the chosen experts.
            output: (..., D) the block's output.
            domains: (...) int64 domain of each token.
            sequences: (...) int64 sequence of each token.

        Raises:
            ValueError: shapes that do not fit, or another number of experts than before.
        """
        if self._paused or not self._watching:
            return
        again = recomputing()
        if again and self._had_graph.get(layer, False):
            return
        if not again:
            self._had_graph[layer] = logits.requires_grad
        seen = LayerForward(
            layer=layer,
            logits=logits,
            ids=ids,
            gates=gates,
            output=output,
            mask=_flat(mask),
            domains=_flat(domains),
            sequences=_flat(sequences),
            recomputed=again,
        )
        self._check_experts(seen)
        if layer not in self._estimators:
            self._estimators[layer] = self._estimator(layer, None)
        self._take_in(seen)

    def step(self) -> None:
        """End an optimizer step: for loops whose optimizer was not given, or has no step hooks. On every rank."""
        if not self._has_optimizer:
            self._before_step()
            self._after_step()

    def metrics(self) -> dict[str, float]:
        """Return the scalars of the last optimizer step, ``geometry/fsi`` …

        Micro-batches add up, and with data parallelism every rank gets the same numbers. Without an optimizer the call
        itself ends a step: make it once a step, on every rank. On an accelerator the numbers are the newest that have
        arrived, a step late. Empty if nothing was seen.
        """
        if not self._has_optimizer:
            self.step()
        newest = self._window.newest(wait=not self._has_optimizer)
        if newest is None or not self._watching:
            return {}
        (reduced, values), before = newest, self._window.previous
        scalars = {
            name: layer_scalars(layer, None if before is None else before.layers.get(name))
            for name, layer in reduced.layers.items()
        }
        scalars = {name: found for name, found in scalars.items() if found}
        experts = None
        if self.config.per_expert:
            experts = {name: expert_scalars(reduced.layers[name]) for name in scalars}
        flat = flatten(scalars, self.config.per_layer, experts)
        return flat | ({"geometry/regularizer": float(values.sum())} if scalars and len(values) else {})

    def log_pictures(self, logger: Logger, step: int) -> None:
        """Write a heatmap of the experts' load and histograms of their shares, every ``pictures_every`` steps.

        Args:
            logger: where to.
            step: the optimizer step.
        """
        newest = self._window.newest(wait=False)
        if newest is None or not self.config.pictures_every or step % self.config.pictures_every:
            return
        layers = {name: layer for name, layer in newest[0].layers.items() if float(layer.choices)}
        short = short_names(layers)
        for name, field in (("load", "counts"), ("fisher", "traces")):
            amounts = {short[n]: getattr(layer, field) for n, layer in layers.items()}
            rows = {n: (len(a) * load_share(a)).tolist() for n, a in amounts.items() if float(a.sum())}
            if rows:
                logger.heatmap(f"geometry/{name}", list(rows.values()), list(rows), step)
                logger.histogram(f"geometry/{name}_shares", [x for row in rows.values() for x in row], step)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Count nothing inside: for probes, generation, anything that is not training."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @contextmanager
    def tokens(
        self, mask: Tensor | None = None, *, segments: Tensor | None = None, domains: Tensor | None = None
    ) -> Iterator[None]:
        """Say what the tokens of the forward passes inside are, for models that are not called with such arguments.

        Args:
            mask: (B, L), or (B,) for whole sequences; True where a token counts.
            segments: (B, L) packed sequence of each token, 0 for padding.
            domains: (B, L) or (B,) domain of each token, in 0..num_domains - 1.
        """
        with self._token_tap.given(mask=mask, segments=segments, domains=domains):
            yield

    def detach(self) -> None:
        """Take every hook off and give the step back; the model is as it was. ``metrics()`` still answers."""
        self._unhook()
        if self._steps is not None:
            self._steps.remove()
            self._steps = None
        self._regularization = Regularization(Regularizers.none(), False, self.config)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, between two optimizer steps: plain tensors and numbers."""
        reduced = {} if self._reduced is None else self._reduced.layers
        return {
            "format": FORMAT,
            "experts": {name: layer.num_experts for name, layer in reduced.items()},
            "sums": None if self._reduced is None else self._reduced.flat().cpu(),
            "sensitivities": {n: c.cpu() for n, c in self._regularization.sensitivities().items()},
            "routers": {} if self._steps is None else self._steps.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``, bit for bit.

        Raises:
            ValueError: the state of another format, other layers or other routers.
        """
        if state.get("format") != FORMAT:
            raise ValueError(f"geometry's state has format {state.get('format')!r}, expected {FORMAT}")
        known = self._window.experts
        if self.config.hooks and state["experts"] and dict(state["experts"]) != known:
            raise ValueError(f"geometry's state is of layers {state['experts']}, this model has {known}")
        if self._steps is not None:
            self._steps.load_state_dict(state["routers"])
        if state["sums"] is not None:
            empty = RoutingStatistics.zeros(dict(state["experts"]).items(), num_domains=self.config.num_domains)
            if len(empty.flat()) != len(state["sums"]):
                raise ValueError(f"geometry's state was saved with another num_domains than {self.config.num_domains}")
            self._window.experts |= dict(state["experts"])
            self._reduced = empty.unflat(state["sums"])
            values = self._regularization.restore(self._reduced, dict(state["sensitivities"]))
            self._window.post(self._reduced, values)

    def _take_over(self, sites: Sequence[RouterSite], optimizers: Sequence[Optimizer]) -> RouterSteps | None:
        if not optimizers:
            return None
        from .optim import RouterSteps  # geoopt loads here, not at import

        stepped = [site for site in sites if self.config.step is not None and site.weight.requires_grad]
        return RouterSteps(
            stepped, optimizers, scale=self.config.router_lr, before=self._before_step, after=self._after_step
        )

    def _estimator(self, layer: str, tap: LayerTap | None) -> TraceEstimator:
        add = partial(self._window.add_traces, layer)
        return estimator_of(tap, self.config, add, partial(self._fail, layer))

    def _begin_forward(self) -> None:
        if not self._paused:
            self._regularization.begin_forward()

    def _observe(self, seen: LayerForward) -> None:
        if self._watching:
            self._take_in(seen)

    def _take_in(self, seen: LayerForward) -> None:
        self._regularization.observe(seen)
        with torch.no_grad():
            seen = self._with_choices(seen)
            if not seen.recomputed:
                self._window.add(seen.layer, self._sums(seen))
        self._estimators[seen.layer].forward(seen)

    def _sums(self, seen: LayerForward) -> LayerStatistics:
        def flat(values: Tensor | None) -> Tensor | None:
            return None if values is None else rows(values.detach())

        return LayerStatistics.of(
            rows(seen.logits.detach()),
            flat(seen.ids),
            seen.mask,
            self.config.scores,
            gates=flat(seen.gates),
            domains=seen.domains,
            num_domains=self.config.num_domains,
        )

    def _with_choices(self, seen: LayerForward) -> LayerForward:
        """Fill in ids and gates where the layer does not show them; say once what is missing or suspicious."""
        first = not self._told
        if seen.layer not in self._told:
            self._told.add(seen.layer)
            warn_of_constant_gates(seen)
        if seen.ids is None and self.config.top_k is not None:
            logits, config = rows(seen.logits), self.config
            ids, gates = top_choices(logits, self.config.top_k, config.scores, config.renormalize)
            seen = replace(seen, ids=ids, gates=gates)
        if first:
            say_what_is_missing(seen, self.config)
        return seen

    def _check_experts(self, seen: LayerForward) -> None:
        known = self._window.experts.setdefault(seen.layer, seen.num_experts)
        if known != seen.num_experts:
            raise ValueError(f"layer {seen.layer} has {known} experts, got logits of {seen.num_experts}")

    def _before_step(self) -> None:
        if self._watching:
            self._regularization.check(self._window.layers)
            for estimator in self._estimators.values():
                estimator.before_step()

    def _after_step(self) -> None:
        if self._stopped or not self._window.experts:
            return
        # Every rank reads the same sums here, and so stops before the same all-reduce.
        newest = self._window.newest(wait=self._window.distributed)
        if newest is not None and float(newest[0].failures):
            self._stop("on another rank" if self._watching else None)
            return
        self._reduced = self._window.close(failed=not self._watching)
        self._window.post(self._reduced, self._regularization.end_step(self._reduced))

    def _fail(self, where: str, error: Exception) -> None:
        """Switch the watching off, or raise: an error of ours never stops a run that did not ask for it."""
        if self.config.on_error == "raise":
            raise error
        if self._watching:
            self._stop(where, str(error))
            self._stopped = not self._window.distributed  # the other ranks learn of it in the next all-reduce

    def _stop(self, where: str | None, reason: str = "") -> None:
        self._unhook()
        self._window.forget()
        self._watching, self._stopped = False, True
        lost = ", its regularizers are off" if self._regularization.on else ""
        self._regularization = Regularization(Regularizers.none(), False, self.config)
        if where is not None:
            why = f": {reason}" if reason else ""
            warnings.warn(f"watching {where} failed and is switched off{lost}, training goes on{why}", stacklevel=2)

    def _unhook(self) -> None:
        self._token_tap.remove()
        for tap in self._taps:
            tap.remove()
        for estimator in self._estimators.values():
            estimator.remove()
        self._taps = []


def _flat(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.reshape(-1)
