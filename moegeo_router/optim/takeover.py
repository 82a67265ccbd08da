"""The routers' step, taken over from the user's optimizers.

Geometry lives in the step. Around every ``optimizer.step()`` a pre-hook withholds the gradients of the routers'
weights, so that the user's optimizer passes them by, and a post-hook moves the weights along their manifolds with the
learning rate of the group they sit in. Schedulers, groups, clipping and gradient scaling keep working: they act on the
optimizer and on the gradients, which are the user's own.

Shape legend: E experts, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..geometry.simplex import widen
from ..routers.find import RouterSite
from ..routers.tag import manifold_of


@dataclass
class _Router:
    """One weight that is stepped by us.

    Attributes:
        sites: the routers that share it.
        weight: the model's parameter.
        point: what geoopt steps: the same memory, or an fp32 master of a half-precision weight.
        optimizer: the user's optimizer that has the weight.
        stepper: geoopt's optimizer of this weight.
        gradient: the gradient withheld from the user's optimizer while it steps.
    """

    sites: list[RouterSite]
    weight: nn.Parameter
    point: Any
    optimizer: Optimizer
    stepper: Any
    gradient: Tensor | None = None

    @property
    def name(self) -> str:
        return self.sites[0].name


class RouterSteps:
    """Steps the routers by Riemannian Adam (geoopt's) whenever the user's optimizers step.

    A step of length 1 in the manifold's own norm is ``lr · scale · √D`` for polar and unit rows, so that, as in Adam,
    each coordinate of a row moves by about ``lr`` of the row's norm; ``lr · scale · √(E·D)`` for orthonormal rows,
    whose norm is the whole matrix's; on Euclidean rows it *is* Adam. No weight decay: on a scale-free manifold it has
    no meaning. The betas are those of the weight's group, where it has some. Half-precision weights keep an fp32
    master.

    Args:
        sites: routers whose weights are on a manifold of this library and require a gradient.
        optimizers: those that hold the weights.
        scale: factor on the learning rate.
        before: called before a step of the last of the optimizers, with all gradients in place.
        after: called after it.

    Raises:
        ValueError: a weight that is on no manifold or in no optimizer, or an optimizer that is taken over already.
    """

    def __init__(
        self,
        sites: Sequence[RouterSite],
        optimizers: Sequence[Optimizer],
        *,
        scale: float = 1.0,
        before: Callable[[], None],
        after: Callable[[], None],
    ) -> None:
        self._before, self._after, self._scale = before, after, scale
        self._optimizers = list(optimizers)
        for optimizer in self._optimizers:
            _refuse_second(optimizer)
        self._routers = self._collect(sites)
        self._handles = [
            handle
            for optimizer in self._optimizers
            for handle in (
                optimizer.register_step_pre_hook(self._withhold),
                optimizer.register_step_post_hook(self._step),
            )
        ]

    def remove(self) -> None:
        """Give the step back to the user's optimizers."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the steppers' state and the masters, by router."""
        return {
            router.name: {
                "stepper": router.stepper.state_dict()["state"],
                "master": None if router.point.dtype == router.weight.dtype else router.point.detach().clone(),
            }
            for router in self._routers
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``, bit for bit.

        Raises:
            ValueError: the state is of other routers.
        """
        names = [router.name for router in self._routers]
        if sorted(names) != sorted(state):
            raise ValueError(f"the state is of routers {', '.join(state)}, these are {', '.join(names)}")
        for router in self._routers:
            saved = state[router.name]
            router.stepper.state.clear()
            for values in saved["stepper"].values():
                # Not load_state_dict: it would turn geoopt's integer step into fp32, and with it the bias correction.
                router.stepper.state[router.point] = {
                    key: value.to(router.weight.device, copy=True) if isinstance(value, Tensor) else value
                    for key, value in values.items()
                }
            if saved["master"] is not None:
                router.point.data = saved["master"].to(router.weight.device, copy=True)

    def _collect(self, sites: Sequence[RouterSite]) -> list[_Router]:
        routers: dict[int, _Router] = {}
        for site in sites:
            if id(site.weight) in routers:
                routers[id(site.weight)].sites.append(site)
                continue
            optimizer = next((o for o in self._optimizers if _group_of(o, site.weight) is not None), None)
            if optimizer is None:
                raise ValueError(f"the weight of router {site.name} is in no optimizer given to attach")
            routers[id(site.weight)] = _router(site, optimizer)
        return list(routers.values())

    def _withhold(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Take the routers' gradients away before ``optimizer`` steps; with a closure, whenever that has made them."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._take(optimizer)
            return None

        def withholding() -> Any:
            self._give_back(optimizer)  # the closure's own zero_grad must find them
            loss = closure()
            self._take(optimizer)
            return loss

        if "closure" in kwargs:
            return args, kwargs | {"closure": withholding}
        return (args[0], withholding, *args[2:]), kwargs

    def _take(self, optimizer: Optimizer) -> None:
        if optimizer is self._optimizers[-1]:
            self._before()
        for router in self._routers:
            if router.optimizer is optimizer:
                _check_same_weight(router)
                router.gradient, router.weight.grad = router.weight.grad, None

    def _give_back(self, optimizer: Optimizer) -> None:
        for router in self._routers:
            if router.optimizer is optimizer and router.gradient is not None:
                router.weight.grad, router.gradient = router.gradient, None

    def _step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        skipped = getattr(optimizer, "found_inf", None)  # set by a gradient scaler around fused optimizers
        if skipped is None or not bool(skipped):
            for router in self._routers:
                if router.optimizer is optimizer and router.gradient is not None:
                    _step_router(router, self._scale, getattr(optimizer, "grad_scale", None))
        self._give_back(optimizer)
        if optimizer is self._optimizers[-1]:
            self._after()


def _router(site: RouterSite, optimizer: Optimizer) -> _Router:
    from geoopt import ManifoldParameter
    from geoopt.optim import RiemannianAdam

    manifold = manifold_of(site.weight)
    if manifold is None:
        raise ValueError(
            f"router {site.name} is on no manifold: call geometrize(model) before attach(model, optimizer), or leave "
            "its step to the optimizer with GeometryConfig(step=None)"
        )
    point = ManifoldParameter(widen(site.weight.detach()), manifold=manifold)
    return _Router([site], site.weight, point, optimizer, RiemannianAdam([point], lr=0.0))


@torch.no_grad()
def _step_router(router: _Router, scale: float, grad_scale: Tensor | None) -> None:
    weight, point, gradient = router.weight, router.point, router.gradient
    assert gradient is not None
    group = _group_of(router.optimizer, weight) or {}
    master = point.dtype != weight.dtype
    if not master:
        point.data = weight.data  # the same memory; it may have moved to another device
    else:
        # Where somebody else has written to the weight (a checkpoint, say), that is where the master goes on from.
        unchanged = point.to(weight.dtype) == weight
        point.data = torch.where(unchanged, point, weight.to(point.dtype)).data
    sign = -1 if group.get("maximize", False) else 1
    # A copy: geoopt writes to the gradient it is given, and this one is the user's.
    point.grad = sign * gradient.to(point.dtype) / (1 if grad_scale is None else grad_scale)
    (stepping,) = router.stepper.param_groups
    stepping["lr"] = float(group.get("lr", 0.0)) * scale * _unit(point)
    stepping["betas"] = group.get("betas", (0.9, 0.999))
    before = point.detach().clone() if stepping["lr"] == 0 else None
    router.stepper.step()
    if before is not None:
        point.data.copy_(before)  # a step of length 0 must not round: a warm-up from 0 changes no bit
    point.grad = None
    if master:
        weight.copy_(point)


def _unit(point: Any) -> float:
    """Return √(coordinates under one norm): √D a row, √(E·D) the matrix, 1 for Euclidean rows."""
    from ..geometry.rows import EuclideanRows, OrthonormalRows

    if isinstance(point.manifold, EuclideanRows):
        return 1.0
    return math.sqrt(point.numel() if isinstance(point.manifold, OrthonormalRows) else point.shape[-1])


def _group_of(optimizer: Optimizer, weight: Tensor) -> dict[str, Any] | None:
    for group in optimizer.param_groups:
        if any(parameter is weight for parameter in group["params"]):
            return group
    return None


def _check_same_weight(router: _Router) -> None:
    for site in router.sites:
        if site.weight is not router.weight:
            raise RuntimeError(
                f"the weight of router {site.name} was replaced since attach (to_empty, load_state_dict(assign=True)): "
                "detach, geometrize and attach again"
            )


def _refuse_second(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    hooks = optimizer._optimizer_step_pre_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), RouterSteps) for hook in hooks):
        raise ValueError("the optimizer's router step is taken over already: detach() the other attach first")
