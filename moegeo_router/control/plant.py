"""What the controller can move, and what an intervention is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from ..optim import RouterSteps
from ..regularization import Regularization
from ..routers.experts import Experts
from ..routers.find import RouterSite
from ..routers.gating import ScoreFunction
from .damper import Damper

if TYPE_CHECKING:
    from .probe import LayerProbe


@dataclass(kw_only=True)
class Plant:
    """The parts of a training run that interventions act on.

    Attributes:
        model: the model itself, out of its wrappers.
        sites: the routers by name.
        experts: the experts beside each router; None where none are found.
        optimizers: the user's.
        steps: the routers' steps, where they were taken over.
        regularization: the regularizers.
        probes: what was last seen of each layer, for those that an intervention asked to look at.
        damper: brakes routers that are not stepped naturally; None without an optimizer.
        softened: log of the temperature in force, by layer.
        speed_factors: factors on the routers' speed by layer, and by who set them.
        scores: the routers' score function.
        group: the data-parallel process group.
    """

    model: nn.Module
    sites: Mapping[str, RouterSite]
    experts: Mapping[str, Experts | None]
    optimizers: Sequence[Optimizer]
    steps: RouterSteps | None
    regularization: Regularization
    probes: Mapping[str, LayerProbe]
    damper: Damper | None = None
    softened: dict[str, float] = field(default_factory=dict)
    speed_factors: dict[str, dict[str, float]] = field(default_factory=dict)
    scores: ScoreFunction = "softmax"
    group: Any = None
    _limits: dict[str, float | None] = field(default_factory=dict)

    def frozen(self, layer: str) -> str | None:
        """Return why a router cannot be moved, None if it can."""
        site = self.sites[layer]
        if site.adapted:
            return "the router is trained by an adapter (LoRA)"
        return "the router is frozen" if site.frozen else None

    def is_natural(self, layer: str) -> bool:
        """Whether a router is stepped naturally, so that its speed is limited in radians."""
        return self.steps is not None and self.steps.is_natural(layer)

    def speed_of(self, layer: str, owner: str) -> float:
        """Return the factor that someone set; 1 where nobody did."""
        return self.speed_factors.get(layer, {}).get(owner, 1.0)

    def set_speed(self, layer: str, owner: str, factor: float) -> None:
        """Multiply a router's speed: the limit of its natural steps, else its learning rate.

        Where there is neither a limit nor an optimizer to brake, nothing is done.
        """
        owners = self.speed_factors.setdefault(layer, {})
        owners.pop(owner, None)
        if not math.isclose(factor, 1.0, rel_tol=1e-9):  # what was divided and multiplied again ends
            owners[owner] = factor
        self._brake(layer)

    def limit_speed(self, limits: Mapping[str, float | None]) -> None:
        """Take note of the speed limits that the user has set anew, and multiply them by the factors in force."""
        for layer, limit in limits.items():
            self._limits[layer] = limit
            if self.speed_factors.get(layer):
                self._brake(layer)

    def slow(self, layer: str, owner: str, factor: float) -> float:
        """Multiply the factor that someone set, and return it; what others of that name did stays."""
        now = self.speed_of(layer, owner) * factor
        self.set_speed(layer, owner, now)
        return now

    def brakes(self) -> dict[str, Any]:
        """Return temperatures, factors and limits as they were found, plain numbers, for ``state_dict``."""
        factors = {layer: dict(owners) for layer, owners in self.speed_factors.items()}
        return {"limits": dict(self._limits), "factors": factors, "softened": dict(self.softened)}

    def set_brakes(self, state: Mapping[str, Any]) -> None:
        """Continue from ``brakes()``."""
        self._limits, self.softened = dict(state["limits"]), dict(state.get("softened", {}))
        self.speed_factors = {layer: dict(owners) for layer, owners in state["factors"].items()}
        for layer in self.speed_factors:
            self._brake(layer)

    def _brake(self, layer: str) -> None:
        factor = math.prod(self.speed_factors[layer].values())
        if self.steps is not None and self.steps.is_natural(layer):
            if layer not in self._limits:  # reading it waits for an accelerator
                self._limits[layer] = self.steps.speed_limits[layer]
            if (limit := self._limits[layer]) is not None:
                self.steps.limit_speed({layer: limit * factor})
        elif self.damper is not None:
            self.damper.set_factor(layer, factor)


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the policy wants done: a function of the reduced statistics alone, the same on every rank.

    Attributes:
        step: the optimizer step.
        layer: whose.
        failure: the failure mode it is against.
        strength: 1, or more if it was ordered before and did not suffice.
        critical: whether the failure is at the critical level.
        load: (E,) the experts' smoothed load shares.
        values: smoothed values of the layer's metrics.
        dead: the experts that are dead, by number.
        k: experts chosen per token.
    """

    step: int
    layer: str
    failure: str
    strength: int = 1
    critical: bool = False
    load: tuple[float, ...] = ()
    values: Mapping[str, float] = field(default_factory=dict)
    dead: tuple[int, ...] = ()
    k: int = 1


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What an intervention did.

    Attributes:
        done: whether anything was changed.
        detail: what, in numbers and words that JSON can hold; with ``reason`` where nothing was.
        memory: what ``undo`` needs: plain tensors, numbers, texts, and lists and dicts of them.
    """

    done: bool
    detail: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)


class Intervention:
    """Something that is done to a layer, and can be undone. Subclass it for one of your own.

    Attributes:
        name: what ladders and logs call it.
        cost: what it costs, in one line.
        looks: whether it wants to see tokens of the layer (``Plant.probes``) before it is applied.
    """

    name: str
    cost: str
    looks: bool = False

    def unavailable(self, plant: Plant, layer: str) -> str | None:
        """Return why it cannot be applied to a layer of this run, ever; None if it can."""
        return None

    def apply(self, plant: Plant, order: Order) -> Applied:
        """Do it. All ranks call it together, with the same order."""
        raise NotImplementedError

    def advance(self, plant: Plant, layer: str, memory: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Go on with it, after every step while it stands; return what ``undo`` needs from now on, None at its end."""
        return memory

    def undo(self, plant: Plant, layer: str, memory: Mapping[str, Any]) -> None:
        """Take it back, as far as what happened since allows."""

    def release(self, plant: Plant, layer: str, memory: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Take it back because it is no longer needed: at once, or little by little in ``advance``; return as there."""
        self.undo(plant, layer, memory)
        return None
