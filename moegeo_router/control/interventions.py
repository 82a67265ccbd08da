"""The gentle interventions: weights of regularizers, a prior, temperature, speed, learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry import simplex
from ..integrations import peft
from ..optim.stack import bias_of
from ..routers.prior import ExpertPrior
from ..routers.router import GeometricRouter
from ..routers.tag import manifold_of
from .plant import Applied, Intervention, Order, Plant


class MoreRegularization(Intervention):
    """Adds to a layer's weights of the load-balance loss and, if it is critical, of FSI².

    FSI² acts on the probabilities of all experts, chosen or not: that is the stronger, and it costs some loss.

    Each order adds its own, so that they end in any order.

    Args:
        balance: added, four times as much at the critical level.
        fsi: added at the critical level, or where the choices are not known.
    """

    name, cost = "regularizers", "nothing but the regularizers themselves"

    def __init__(self, balance: float = 0.005, fsi: float = 0.04) -> None:
        self._balance, self._fsi = balance, fsi

    def unavailable(self, plant: Plant, layer: str) -> str | None:
        """Return why not."""
        return plant.frozen(layer)

    def apply(self, plant: Plant, order: Order) -> Applied:
        """Add to the weights, the more the worse it is."""
        more = {}
        if order.load:  # the balance loss needs the choices
            more["balance"] = self._balance * (4 if order.critical else 1)
        if order.critical or not order.load:
            more["fsi"] = self._fsi
        owner = f"{self.name} against {order.failure}, step {order.step}"
        plant.regularization.add_weights(order.layer, owner, more)
        return Applied(done=True, detail=more, memory={"owner": owner})

    def undo(self, plant: Plant, layer: str, memory: Mapping[str, Any]) -> None:
        """Take them away again."""
        plant.regularization.add_weights(layer, memory["owner"], {})


class PriorStep(Intervention):
    """One step of a prior over the experts along the Fisher-Rao geodesic from the load towards balance.

    It moves the layer's ``ExpertPrior`` or, where there is none, the router's bias b by ``log(E π)``, π the prior that
    such a step from the uniform one makes.

    Args:
        length: the longest step, radians.
    """

    name, cost = "prior", "one step; tokens change their experts at once"

    def __init__(self, length: float = 0.2) -> None:
        self._length = length

    def unavailable(self, plant: Plant, layer: str) -> str | None:
        """Return why not."""
        site = plant.sites[layer]
        if _prior(plant, layer) is None and bias_of(site) is None:
            return "the router has no prior that follows the load, and no trained bias"
        return plant.frozen(layer)

    @torch.no_grad()
    def apply(self, plant: Plant, order: Order) -> Applied:
        """Take the step."""
        if not order.load:
            return Applied(done=False, detail={"reason": "the load is not known"})
        change_E = self._log_prior(torch.tensor(order.load, dtype=torch.float64))
        self._move(plant, order.layer, change_E)
        detail = {"largest_change": float(change_E.abs().max())}
        return Applied(done=True, detail=detail, memory={"change": change_E})

    @torch.no_grad()
    def undo(self, plant: Plant, layer: str, memory: Mapping[str, Any]) -> None:
        """Take the step back; what the prior, or the training, has moved since stays."""
        self._move(plant, layer, -memory["change"])

    def _move(self, plant: Plant, layer: str, change_E: Tensor) -> None:
        prior, bias = _prior(plant, layer), bias_of(plant.sites[layer])
        if prior is not None:
            moved_E = prior.pi.double() * change_E.to(prior.pi.device).exp()
            prior.pi.copy_(moved_E / moved_E.sum())
        elif bias is not None:
            bias.add_(change_E.to(bias))

    def _log_prior(self, load_E: Tensor) -> Tensor:
        uniform_E = simplex.uniform(len(load_E), dtype=load_E.dtype)
        v_E = -simplex.log_map(uniform_E, load_E / load_E.sum())
        length = float(simplex.inner(uniform_E, v_E, v_E).sqrt())
        if not length > 0:
            return torch.zeros_like(load_E)
        moved_E = simplex.exp_map(uniform_E, min(1.0, self._length / length) * v_E).clamp_min(1e-6)
        return (moved_E / moved_E.sum() * len(load_E)).log()


class Temperature(Intervention):
    """Softens a router: its logits are divided by τ; no longer needed, τ goes back to 1 little by little.

    A temperature is the common scale of the rows (and the bias): that is what is divided, so nothing is put into the
    forward pass. A cosine router has a temperature of its own. As under a division in the forward pass, an optimizer's
    step of some length then changes the logits τ times less: without that, the rate that has made them large would do
    so again. Natural steps are measured in what they change, those of polar rows by Riemannian Adam in the rows' own
    length, and the rows of a cosine router are divided in the forward pass: these stay as they are.

    Args:
        scale: τ is such that ``logit_scale``, where it is known, comes down to this,
        least: at least,
        most: and at most.
        anneal: steps over which it goes back.
    """

    name, cost = "temperature", "routing is less decided for a while"

    def __init__(self, scale: float = 5.0, least: float = 2.0, most: float = 16.0, anneal: int = 100) -> None:
        self._scale, self._least, self._most, self._anneal = scale, least, most, anneal

    def unavailable(self, plant: Plant, layer: str) -> str | None:
        """Return why not."""
        if _scaled(plant, layer) is None:
            return "rows of fixed norm, and no temperature"
        return plant.frozen(layer)

    def apply(self, plant: Plant, order: Order) -> Applied:
        """Divide the logits by τ."""
        factor = min(max(order.values.get("logit_scale", 0.0) / self._scale, self._least), self._most)
        memory: dict[str, Any] = {"slows": _slows(plant, order.layer)}
        memory["log_factor"] = self._soften(plant, order.layer, math.log(factor), memory)
        return Applied(done=True, detail={"factor": math.exp(memory["log_factor"])}, memory=memory)

    def advance(self, plant: Plant, layer: str, memory: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Go one step of the way back, if it is on it."""
        left, rest = memory.get("left"), memory["log_factor"]
        if left is None:
            return memory
        self._soften(plant, layer, -rest / left, memory)
        return {**memory, "log_factor": rest - rest / left, "left": left - 1} if left > 1 else None

    def undo(self, plant: Plant, layer: str, memory: Mapping[str, Any]) -> None:
        """Go the whole way back."""
        self._soften(plant, layer, -memory["log_factor"], memory)

    def release(self, plant: Plant, layer: str, memory: Mapping[str, Any]) -> Mapping[str, Any]:
        """Begin the way back."""
        return {**memory, "left": self._anneal}

    def _soften(self, plant: Plant, layer: str, log_factor: float, memory: Mapping[str, Any]) -> float:
        """Divide the logits by ``exp`` of this, and the speed with them if it was so from the beginning.

        Returns:
            How far it got: the temperature of a cosine router has bounds.
        """
        log_factor = math.log(divide_logits(plant, layer, math.exp(log_factor)))
        plant.softened[layer] = plant.softened.get(layer, 0.0) + log_factor
        if memory.get("slows", not plant.is_natural(layer)):
            plant.slow(layer, self.name, math.exp(-log_factor))
        return log_factor


class SlowDown(Intervention):
    """Halves the speed limit of a router's natural steps."""

    name, cost = "speed", "the router learns more slowly"

    def unavailable(self, plant: Plant, layer: str) -> str | None:
        """Return why not."""
        if (reason := plant.frozen(layer)) is not None:
            return reason
        if plant.steps is None or not plant.is_natural(layer):
            return "not stepped naturally"
        return None if plant.steps.speed_limits[layer] is not None else "there is no speed limit to lower"

    def apply(self, plant: Plant, order: Order) -> Applied:
        """Halve it, again if it was ordered before."""
        return Applied(done=True, detail={"factor": plant.slow(order.layer, self.name, 1 / 2)})

    def undo(self, plant: Plant, layer: str, memory: Mapping[str, Any]) -> None:
        """Double it again, whatever others of its kind stand."""
        plant.slow(layer, self.name, 2)


class CutRate(Intervention):
    """Quarters the learning rate of a router, whatever steps it (``Damper``)."""

    name, cost = "router_lr", "the router learns more slowly; a copy of its weight a step"

    def unavailable(self, plant: Plant, layer: str) -> str | None:
        """Return why not."""
        if plant.damper is None:
            return "no optimizer was given to attach"
        if plant.is_natural(layer):
            return "stepped naturally: the speed limit is lowered instead"
        return plant.frozen(layer)

    def apply(self, plant: Plant, order: Order) -> Applied:
        """Quarter it, again if it was ordered before."""
        return Applied(done=True, detail={"factor": plant.slow(order.layer, self.name, 1 / 4)})

    def undo(self, plant: Plant, layer: str, memory: Mapping[str, Any]) -> None:
        """Bring it back four times, whatever others of its kind stand."""
        plant.slow(layer, self.name, 4)


def _prior(plant: Plant, layer: str) -> ExpertPrior | None:
    """Return the prior of a layer: the router's own, or that of its block."""
    name = layer.rpartition(".")[0]
    for module in (plant.sites[layer].module, peft.submodule(plant.model, name) if name else None):
        prior = None if module is None else module._modules.get("prior")
        if isinstance(prior, ExpertPrior) and prior.rule == "balance":
            return prior
    return None


def _scaled(plant: Plant, layer: str) -> list[nn.Parameter] | None:
    """Return what a temperature divides, beside that of a cosine router: weight and bias; None if nothing can be."""
    from ..geometry.rows import OrthonormalRows, UnitRows

    site = plant.sites[layer]
    bias = [bias for bias in (bias_of(site),) if bias is not None]
    if _cosine(plant, layer) is not None:
        return bias
    return None if isinstance(manifold_of(site.weight), UnitRows | OrthonormalRows) else [site.weight, *bias]


def _slows(plant: Plant, layer: str) -> bool:
    """Whether steps are to be slowed with the logits: not those that change them less by themselves."""
    from ..geometry.rows import PolarRows

    scale_free = plant.steps is not None and layer in plant.steps.names
    scale_free = scale_free and isinstance(manifold_of(plant.sites[layer].weight), PolarRows)
    return not (plant.is_natural(layer) or scale_free or _cosine(plant, layer) is not None)


def _cosine(plant: Plant, layer: str) -> GeometricRouter | None:
    module = plant.sites[layer].module
    return module if isinstance(module, GeometricRouter) and module.manifold == "sphere" else None


@torch.no_grad()
def divide_logits(plant: Plant, layer: str, factor: float) -> float:
    """Divide what makes a router's logits: weight, or the temperature of a cosine router, and bias.

    Returns:
        By how much they were divided, as far as that temperature's bounds allow.
    """
    cosine = _cosine(plant, layer)
    if cosine is not None:
        before = float(cosine.temperature)
        cosine.set_temperature(cosine.temperature * factor)
        factor = float(cosine.temperature) / before
    for parameter in _scaled(plant, layer) or ():
        parameter.div_(factor)
    return factor
