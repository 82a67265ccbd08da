"""Healthy states in bounded memory, and the way back to them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import Scope
from .interventions import divide_logits
from .plant import Applied, Intervention, Order, Plant

#: What a natural step has in common with those of the routers that are stepped with it: it cannot go back alone.
SHARED = ("step", "window", "peak", "damped")

#: What others set in it.
SETTINGS = ("limit",)


class Snapshots:
    """The last healthy states: routers and what their steps depend on, or the whole model and its optimizers.

    Settings are no part of it, neither learning rates nor speed limits: schedules and other interventions go on. A
    snapshot of the routers is as large as they and their moments are, one of everything as large as the model and its
    optimizers' state.

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
        self._taken = self._taken[max(0, len(self._taken) + 1 - self._keep) :]  # before there is one more
        self._taken.append(self.now(step))

    def now(self, step: int, layers: Iterable[str] | None = None) -> dict[str, Any]:
        """Return the state of now, of some routers or of all that snapshots are of: plain tensors, numbers, words."""
        modules, steps = self._modules(layers), self._plant.steps
        state = {} if steps is None else steps.state_dict()
        return {
            "step": step,
            "modules": {name: _tensors(module) for name, module in modules.items()},
            "moments": {name: self._moments(module) for name, module in modules.items()},
            "steps": {name: state[name] for name in self._stepped(state, layers)},
            "softened": dict(self._plant.softened),
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

    def is_back(self, step: int) -> bool:
        """Whether everything went back in this step already, for another layer."""
        return self._scope == "everything" and self._used is not None and self._used[0] == step

    @torch.no_grad()
    def put_back(self, state: Mapping[str, Any], layers: Iterable[str]) -> None:
        """Put a state back in place, of the whole model or of some routers, at the temperatures of now."""
        steps, layers = self._plant.steps, list(layers)
        for name, module in self._modules(layers).items():
            own = module.state_dict()
            for key, values in state["modules"][name].items():
                own[key].copy_(values)
            self._load_moments(module, state["moments"][name])
        if steps is not None:
            steps.load_state_dict(self._with_saved(state["steps"], steps.state_dict(), layers))
        self._soften(state.get("softened", {}), self._plant.sites if self._scope == "everything" else layers)

    def state(self) -> list[dict[str, Any]]:
        """Return the snapshots, for ``state_dict``."""
        return list(self._taken)

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        """Continue from ``state()``."""
        self._taken = list(state)

    def _soften(self, saved: Mapping[str, float], layers: Iterable[str]) -> None:
        """Make up for temperatures that a snapshot's weights lack, or hold although they are over."""
        for name in layers:
            missing = self._plant.softened.get(name, 0.0) - saved.get(name, 0.0)
            if not math.isclose(missing, 0.0, abs_tol=1e-9):
                divide_logits(self._plant, name, math.exp(missing))

    def _modules(self, layers: Iterable[str] | None) -> dict[str, nn.Module]:
        if self._scope == "everything":
            return {"": self._plant.model}
        return {name: self._plant.sites[name].module for name in (self._plant.sites if layers is None else layers)}

    def _moments(self, module: nn.Module) -> dict[str, dict[str, Any]]:
        found = {}
        for name, parameter in module.named_parameters():
            for number, optimizer in enumerate(self._plant.optimizers):
                if parameter in optimizer.state:
                    found[f"{number}/{name}"] = {key: _copied(v) for key, v in optimizer.state[parameter].items()}
        return found

    def _load_moments(self, module: nn.Module, saved: Mapping[str, Mapping[str, Any]]) -> None:
        for name, parameter in module.named_parameters():
            for number, optimizer in enumerate(self._plant.optimizers):
                known = saved.get(f"{number}/{name}")
                if known is not None:
                    _fill(optimizer.state[parameter], known, parameter.device)
                elif parameter in optimizer.state:
                    del optimizer.state[parameter]  # it had not been stepped yet

    def _stepped(self, names: Iterable[str], layers: Iterable[str] | None) -> list[str]:
        """Return those of ``RouterSteps.names`` that are of some layers; of a shared weight it has the first alone."""
        if self._scope == "everything" or layers is None:
            return list(names)
        sites = self._plant.sites
        weights = {id(sites[layer].weight) for layer in layers}
        return [name for name in names if id(sites[name].weight) in weights]

    def _with_saved(
        self, saved: Mapping[str, Any], state: dict[str, dict[str, Any]], layers: Sequence[str]
    ) -> dict[str, Any]:
        """Return the state of all steps with that of some routers as it was."""
        for name in self._stepped(state, layers):
            now = state[name]
            if saved[name]["fell_back"] != now["fell_back"]:
                continue  # Riemannian Adam cannot go on from the state of a natural step
            state[name] = _placed(saved[name], now) | {key: now[key] for key in SETTINGS if key in now}
            if self._scope != "everything" and "moments" not in now:  # Riemannian Adam counts each router's own steps
                state[name] |= {key: now[key] for key in SHARED if key in now}
        return state


class Rollback(Intervention):
    """Goes back to the last healthy snapshot, at half the speed or learning rate, so that not the same follows."""

    name, cost = "rollback", "what was learnt since the snapshot; memory for the snapshots"

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots

    def unavailable(self, plant: Plant, layer: str) -> str | None:
        """Return why not."""
        if not plant.optimizers:
            return "no optimizer was given to attach"
        return plant.frozen(layer)

    def apply(self, plant: Plant, order: Order) -> Applied:
        """Go back, and be slower, the more the more often it was ordered."""
        is_back = self._snapshots.is_back(order.step)
        state = self._snapshots.newest(order.step)
        if state is None:
            return Applied(done=False, detail={"reason": "there is no healthy snapshot yet"})
        memory: dict[str, Any] = {}
        if not is_back:
            memory["before"] = self._snapshots.now(order.step, [order.layer])
            self._snapshots.put_back(state, [order.layer])
        speed = plant.slow(order.layer, self.name, 1 / 2)
        return Applied(done=True, detail={"snapshot_of": state["step"], "speed": speed}, memory=memory)

    def undo(self, plant: Plant, layer: str, memory: Mapping[str, Any]) -> None:
        """Bring back what was there before."""
        if "before" in memory:
            self._snapshots.put_back(memory["before"], [layer])
        plant.slow(layer, self.name, 2)

    def release(self, plant: Plant, layer: str, memory: Mapping[str, Any]) -> None:
        """Be as fast as before; what was broken does not come back, and what was learnt since stays."""
        plant.slow(layer, self.name, 2)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of a module's parameters and buffers; extra state, which may be anything, is left out."""
    return {name: _copied(value) for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _fill(own: dict[str, Any], saved: Mapping[str, Any], device: torch.device) -> None:
    """Make an optimizer's state of a parameter the saved one, in place where there are tensors to hold it."""
    for name in own.keys() - saved.keys():
        del own[name]
    for name, value in saved.items():
        present = own.get(name)
        if isinstance(value, Tensor) and isinstance(present, Tensor) and value.shape == present.shape:
            present.copy_(value)
        else:
            # A snapshot from a checkpoint may be elsewhere. Counts of steps are where their optimizer put them.
            own[name] = value.to(device, copy=True) if isinstance(value, Tensor) and value.dim() else _copied(value)


def _placed(saved: Any, like: Any) -> Any:
    """Return a saved state with its tensors where those of the present one are."""
    if isinstance(saved, Tensor):
        return saved.to(like.device) if isinstance(like, Tensor) else saved
    if isinstance(saved, dict):
        return {key: _placed(value, like.get(key) if isinstance(like, dict) else None) for key, value in saved.items()}
    return saved
