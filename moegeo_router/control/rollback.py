"""Healthy states in bounded memory, and the way back to them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import Scope
from .plant import Applied, Intervention, Order, Plant


class Snapshots:
    """The last healthy states: routers and what their steps depend on, or the whole model and its optimizers.

    Learning rates are no part of it: schedules go on. A snapshot of the routers is as large as they and their moments
    are, one of everything as large as the model and its optimizers' state.

    Args:
        plant: what is kept.
        scope: ``"routers"`` or ``"everything"``.
        keep: how many stay.
    """

    def __init__(self, plant: Plant, scope: Scope, keep: int) -> None:
        self._plant, self._scope, self._keep = plant, scope, keep
        self._taken: list[dict[str, Any]] = []
        self._used: tuple[int, dict[str, Any]] | None = None

    def take(self, step: int) -> None:
        """Keep the state of now."""
        self._taken = [*self._taken, self.now(step)][-self._keep :]

    def now(self, step: int) -> dict[str, Any]:
        """Return the state of now: plain tensors, numbers, words."""
        steps = self._plant.steps
        return {
            "step": step,
            "modules": {name: _cloned(module.state_dict()) for name, module in self._modules().items()},
            "moments": {name: self._moments(module) for name, module in self._modules().items()},
            "steps": {} if steps is None else copy.deepcopy(steps.state_dict()),
        }

    def newest(self, step: int) -> dict[str, Any] | None:
        """Return the newest snapshot, in one step the same for all; the next time an older one, if there is."""
        if self._used is not None and self._used[0] == step:
            return self._used[1]
        if not self._taken:
            return None
        state = self._taken.pop() if len(self._taken) > 1 else self._taken[0]
        self._used = (step, state)
        return state

    @torch.no_grad()
    def put_back(self, state: Mapping[str, Any], layers: Iterable[str]) -> None:
        """Put a state back in place: of the whole model, or of some routers."""
        wanted = set(layers) if self._scope == "routers" else {""}
        for name, module in self._modules().items():
            if name not in wanted:
                continue
            own = module.state_dict()
            for key, values in state["modules"][name].items():
                own[key].copy_(values)
            self._load_moments(module, state["moments"][name])
        steps = self._plant.steps
        if steps is not None:
            now, saved = steps.state_dict(), copy.deepcopy(state["steps"])
            chosen = {key for key in now if self._scope == "everything" or key in wanted}
            steps.load_state_dict({key: saved[key] if key in chosen else value for key, value in now.items()})

    def state(self) -> list[dict[str, Any]]:
        """Return the snapshots, for ``state_dict``."""
        return list(self._taken)

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        """Continue from ``state()``."""
        self._taken = list(state)

    def _modules(self) -> dict[str, nn.Module]:
        if self._scope == "everything":
            return {"": self._plant.model}
        return {name: site.module for name, site in self._plant.sites.items()}

    def _moments(self, module: nn.Module) -> dict[str, dict[str, Any]]:
        found = {}
        for name, parameter in module.named_parameters():
            for number, optimizer in enumerate(self._plant.optimizers):
                if parameter in optimizer.state:
                    found[f"{number}/{name}"] = _cloned(optimizer.state[parameter])
        return found

    def _load_moments(self, module: nn.Module, saved: Mapping[str, Mapping[str, Any]]) -> None:
        for name, parameter in module.named_parameters():
            for number, optimizer in enumerate(self._plant.optimizers):
                known = saved.get(f"{number}/{name}")
                if known is not None:
                    optimizer.state[parameter] = _cloned(known)
                elif parameter in optimizer.state:
                    del optimizer.state[parameter]  # it had not been stepped yet


class Rollback(Intervention):
    """Goes back to the last healthy snapshot, with half the speed or learning rate, so that not the same follows."""

    name, cost = "rollback", "what was learnt since the snapshot; memory for the snapshots"

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots

    def unavailable(self, plant: Plant, layer: str) -> str | None:
        """Return why not."""
        if not plant.optimizers:
            return "no optimizer was given to attach"
        return None if plant.sites[layer].weight.requires_grad else "the router is frozen"

    def apply(self, plant: Plant, order: Order) -> Applied:
        """Go back."""
        before = self._snapshots.now(order.step)
        state = self._snapshots.newest(order.step)
        if state is None:
            return Applied(done=False, detail={"reason": "there is no healthy snapshot yet"})
        self._snapshots.put_back(state, [order.layer])
        slowed = self._slow(plant, order.layer, 0.5)
        detail = {"snapshot_of": state["step"], "slowed": slowed}
        return Applied(done=True, detail=detail, memory={"before": before, "slowed": slowed})

    def undo(self, plant: Plant, layer: str, memory: Mapping[str, Any]) -> None:
        """Bring back what was there before."""
        self._snapshots.put_back(memory["before"], [layer])
        self._slow(plant, layer, 1.0)

    def _slow(self, plant: Plant, layer: str, factor: float) -> str:
        if plant.steps is not None and plant.steps.is_natural(layer):
            plant.set_speed(layer, self.name, factor)
            return "speed limit"
        if plant.damper is None:
            return "nothing"
        plant.damper.factors.pop(layer, None)
        if factor < 1:
            plant.damper.factors[layer] = factor
        return "learning rate"


def _cloned(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in values.items()}
