"""The regularizers of a run: what they refer to, how they reach the gradient, and whether they did.

``losses`` has the mathematics; here is the state from step to step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .config import GeometryConfig
from .losses import Linearization, Regularizers, additive_loss, linearize
from .observe.findings import UNSEEN
from .observe.forward import LayerForward, rows
from .observe.statistics import LayerStatistics, RoutingStatistics
from .routers.find import RouterSite
from .routers.gating import top_choices

#: Weight of the past in the running mean of the experts' sensitivities.
SENSITIVITY_DECAY = 0.9


class RegularizerError(RuntimeError):
    """A regularizer that was asked for cannot act; never passed over, whatever ``on_error`` says."""


def regularization_of(
    model: nn.Module, sites: Sequence[RouterSite], config: GeometryConfig, trained: bool
) -> Regularization:
    """Return the regularization of an ``attach``: what was asked for, else the defaults if the model is trained by us.

    A model whose own auxiliary loss is on gets a warning.

    Args:
        model: the model.
        sites: its routers.
        config: of the ``attach``.
        trained: whether there is an optimizer.

    Raises:
        ValueError: regularizers were asked for and a router is frozen.
    """
    asked = config.regularizers
    frozen = [site.name for site in sites if site.frozen]
    if asked is not None and asked.active and frozen:
        raise ValueError(f"regularizers were asked for, but the routers {', '.join(frozen)} are frozen")
    weights = asked if asked is not None else Regularizers() if trained else Regularizers.none()
    if weights.active:
        warn_of_own_loss(model, {})
    return Regularization(weights, asked is not None, config, sites)


class Regularization:
    """Adds the regularizers to the loss, by ``loss()`` or on the graph, and checks that they arrive.

    A layer whose router is frozen gets none.

    Args:
        weights: which are on.
        required: they were asked for by name: not reaching a router is an error, else a warning.
        config: of the ``attach``.
        sites: the routers, where they are known.
    """

    def __init__(
        self, weights: Regularizers, required: bool, config: GeometryConfig, sites: Iterable[RouterSite] = ()
    ) -> None:
        self.weights, self._required, self._config = weights, required, config
        self._sites = {site.name: site for site in sites}
        self._added: dict[str, dict[str, dict[str, float]]] = {}
        self._of_layer: dict[str, Regularizers] = {}
        self._references: dict[str, Linearization] = {}
        self._newest: dict[str, LayerStatistics] = {}
        self._sensitivities: dict[str, Tensor] = {}
        self._pending: list[LayerForward] = []
        self._reached: set[str] = set()
        self._told = False

    @property
    def on(self) -> bool:
        """Whether any regularizer is on."""
        return bool(self.weights.active or self._of_layer)

    def add_weights(self, layer: str, owner: str, weights: Mapping[str, float]) -> None:
        """Add to the weights of one layer, instead of what the same owner added before; nothing takes it back.

        Args:
            layer: whose.
            owner: who adds them.
            weights: by name of the regularizer.
        """
        if not weights and owner not in self._added.get(layer, {}):
            return
        added = self._added.setdefault(layer, {})
        added.pop(owner, None)
        if weights:
            added[owner] = dict(weights)
        total = {name: getattr(self.weights, name) for own in added.values() for name in own}
        for own in added.values():
            for name, weight in own.items():
                total[name] += weight
        self._of_layer.pop(layer, None)
        if total:
            self._of_layer[layer] = replace(self.weights, **total)

    def added(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return what was added, by layer and owner."""
        return {layer: {owner: dict(own) for owner, own in added.items()} for layer, added in self._added.items()}

    def weights_of(self, layer: str) -> Regularizers:
        """Return the weights in force in one layer."""
        return self._of_layer.get(layer, self.weights)

    def begin_forward(self) -> None:
        """Forget forwards that no ``loss()`` asked for: it is about the newest one."""
        self._pending.clear()

    def observe(self, seen: LayerForward, trained: bool) -> None:
        """Take up one forward pass: inject its gradient, or keep it for ``loss()``.

        Args:
            seen: the forward pass.
            trained: whether it leaves a graph, or is to leave one when it is run again.

        Raises:
            RegularizerError: what a regularizer needs is not known.
        """
        if not self.weights_of(seen.layer).active or self._frozen(seen.layer):
            return
        if self._config.inject:
            if seen.logits.requires_grad:
                self._inject(seen)
        elif trained and not seen.recomputed:
            self._pending.append(seen)

    def loss(self, tokens: int | None = None) -> Tensor:
        """Return the regularizers of the forwards since the last one; see ``Geometry.loss``."""
        if self._config.inject:
            raise RuntimeError("the regularizers are injected (inject=True): adding loss() would count them twice")
        pending, self._pending = self._pending, []
        total: Tensor | None = None
        for seen in pending:
            if torch.is_grad_enabled() and not seen.logits.requires_grad:
                raise RegularizerError(
                    f"the logits of layer {seen.layer} carry no gradient (reentrant activation checkpointing?): "
                    "take GeometryConfig(inject=True), which works there, or non-reentrant checkpointing"
                )
            share = self._additive(seen, tokens)
            # Layers may be on several devices.
            total = share if total is None else total + share.to(total.device)
        if total is None:
            return torch.zeros(())
        if total.requires_grad:
            layers = {seen.layer for seen in pending}
            total.register_hook(lambda _: self._reached.update(layers))
        return total

    def check(self, seen: Iterable[str], never_seen: Sequence[str]) -> None:
        """Make sure, before a step, that the regularizers' gradient reached every router that is trained.

        Args:
            seen: the layers that were seen since the last step.
            never_seen: layers whose router has a gradient and that were never seen.

        Raises:
            RegularizerError: it did not, and they were asked for.
        """
        self._pending.clear()
        reached, self._reached = self._reached, set()
        if not self.on:
            return
        missing = [
            name for name in seen if name not in reached and self.weights_of(name).active and not self._frozen(name)
        ]
        if never_seen and self._required and self.weights.active:
            self._complain(never_seen, UNSEEN)
        elif missing and self._config.inject:
            self._complain(missing, "their block does not use the logits that were tapped")
        elif missing:
            self._complain(
                missing, "add geometry.loss() to the loss that is backpropagated, or take GeometryConfig(inject=True)"
            )

    def _complain(self, layers: Sequence[str], why: str) -> None:
        names = ", ".join(self.weights.active or self.weights_of(layers[0]).active)
        message = f"the regularizers ({names}) reached no router of {', '.join(layers)}: {why}"
        if self._required and self.weights.active:  # not for what a controller added
            raise RegularizerError(message)
        if not self._told:
            self._told = True
            off = "GeometryConfig(regularizers=Regularizers.none())"
            warnings.warn(f"{message}, or switch them off with {off}", stacklevel=5)

    def _frozen(self, layer: str) -> bool:
        return layer in self._sites and self._sites[layer].frozen

    def end_step(self, reduced: RoutingStatistics) -> Tensor:
        """Refer to the reduced sums of this step from now on; return the regularizers' value there, (layers,)."""
        if self.weights.fhs:
            for layer, sums in reduced.layers.items():
                self._sensitivities[layer] = _sensitivity(sums, self._sensitivities.get(layer))
        return self._refer_to(reduced)

    def sensitivities(self) -> dict[str, Tensor]:
        """Return the running means that ``fhs`` depends on, by layer, for ``state_dict``."""
        return dict(self._sensitivities)

    def references(self) -> Tensor | None:
        """Return the newest sums of every layer that had tokens, as one vector, for ``state_dict``."""
        return RoutingStatistics(self._newest).flat().cpu() if self._newest else None

    def restore(
        self, reduced: RoutingStatistics, sensitivities: dict[str, Tensor], references: Tensor | None
    ) -> Tensor:
        """Continue from the sums of a step, and ``sensitivities`` and ``references`` after it.

        Returns:
            What ``end_step`` did.
        """
        self._sensitivities = dict(sensitivities)
        if references is not None and len(references) == len(reduced.flat()):
            self._newest = dict(reduced.unflat(references).layers)
        return self._refer_to(reduced)

    def _refer_to(self, reduced: RoutingStatistics) -> Tensor:
        if not self.on:
            self._newest = {}
            return torch.zeros(0)
        # A layer without tokens in this step (the other tower's turn, a block that was skipped) keeps its reference.
        self._newest = {layer: sums.or_else(self._newest.get(layer)) for layer, sums in reduced.layers.items()}
        for layer, sums in self._newest.items():
            weights = Regularizers.none() if self._frozen(layer) else self.weights_of(layer)
            self._references[layer] = linearize(weights, sums, self._sensitivities.get(layer))
        seen = torch.cat([sums.tokens > 0 for sums in reduced.layers.values()])
        return torch.where(seen, torch.stack([self._references[layer].value for layer in reduced.layers]), 0)

    def _additive(self, seen: LayerForward, tokens: int | None) -> Tensor:
        config, weights = self._config, self.weights_of(seen.layer)
        if (weights.fhs or weights.balance) and seen.ids is None and config.top_k is not None:
            ids, gates = top_choices(rows(seen.logits), config.top_k, config.routing.scores, config.routing.renormalize)
            seen = replace(seen, ids=ids, gates=gates)
        if weights.balance and seen.ids is None:
            raise RegularizerError(
                f"layer {seen.layer} does not show the experts chosen, which balance needs: set top_k"
            )
        if weights.fhs and seen.gates is None:
            raise RegularizerError(f"layer {seen.layer} does not show its gates, which fhs needs")
        reference = self._references.get(seen.layer)
        try:
            return additive_loss(seen, weights, reference, scores=self._config.routing.scores, tokens=tokens)
        except ValueError as error:
            raise RegularizerError(str(error)) from None

    def _inject(self, seen: LayerForward) -> None:
        """Let the regularizers' gradient join that of the logits (and gates) when the backward pass gets there."""
        logits = seen.logits.detach().requires_grad_()
        used = seen.gates if seen.gates is not None and seen.gates.requires_grad else None
        gates = None if used is None else used.detach().requires_grad_()
        # A checkpointed region's hooks would take these tensors for its own, and run the region again for them.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            loss = self._additive(replace(seen, logits=logits, gates=gates), None) / self._config.micro_batches
            if self._config.grad_scaler is not None:
                loss = self._config.grad_scaler.scale(loss)
            wanted = [logits] if gates is None else [logits, gates]
            gradients = torch.autograd.grad(loss, wanted, materialize_grads=True)
        if seen.joint is not None:
            seen.joint.logits, seen.joint.gates = gradients if gates is not None else (*gradients, None)
            seen.joint.reached = partial(self._reached.add, seen.layer)
            return
        for tensor, extra in zip([seen.logits, used], gradients, strict=False):
            if tensor is not None:
                tensor.register_hook(partial(self._add, seen.layer, extra))

    def _add(self, layer: str, extra: Tensor, gradient: Tensor) -> Tensor:
        self._reached.add(layer)
        return gradient + extra.to(gradient.dtype)


def _sensitivity(sums: LayerStatistics, before: Tensor | None) -> Tensor:
    """Return the running mean of ``Σ g² ‖δ‖² / Σ g²`` over its mean: a factor common to the experts cancels in FHS."""
    seen = sums.gates_squared > 0
    now = torch.where(seen, sums.traces, 0) / torch.where(seen, sums.gates_squared, 1)
    mean = now.sum() / seen.sum().clamp_min(1)
    past = torch.ones_like(now) if before is None else before.to(now.device)
    # An expert that was not used, or a step without a signal, keeps what is known.
    known = torch.where(seen & (mean > 0), now / torch.where(mean > 0, mean, 1), past)
    return known if before is None else SENSITIVITY_DECAY * past + (1 - SENSITIVITY_DECAY) * known


def warn_of_own_loss(model: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Warn if a transformers model adds an auxiliary loss of its own; returns whether it does.

    Args:
        model: the model.
        arguments: those of its call.
    """
    config = getattr(model, "config", None)
    asked = arguments.get("output_router_logits")
    if not (getattr(config, "output_router_logits", False) if asked is None else asked):
        return False
    places = (config, getattr(config, "text_config", None), getattr(config, "ffn_config", None))
    names = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
    weights = {name: getattr(place, name) for place in places for name in names if getattr(place, name, 0)}
    if weights:
        said = ", ".join(f"{name}={value}" for name, value in weights.items())
        warnings.warn(
            f"the model adds an auxiliary loss of its own, too (output_router_logits=True, {said}): switch one of the "
            "two off",
            stacklevel=6,
        )
    return bool(weights)
