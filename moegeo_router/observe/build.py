"""Putting the taps on a model: which blocks, which experts, which estimator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..config import GeometryConfig
from ..integrations import peft
from ..integrations.transformers import observe_experts
from ..routers.experts import block_of, find_experts, refuse_sharded
from ..routers.find import RouterSite
from .fisher import AddTraces, MinibatchTraces, NoTraces, OutputTraces, ParameterTraces, TraceEstimator
from .hooks import Failed, Hook
from .taps import LayerTap, Sink
from .tokens import TokenTap


def refuse_second_watch(sites: Sequence[RouterSite]) -> None:
    """Raise a ValueError if a router is watched already: two would count, inject and step twice."""
    for site in sites:
        if any(isinstance(hook, Hook) and hook.exclusive for hook in site.module._forward_hooks.values()):
            raise ValueError(f"router {site.name} is watched already: detach() the other attach first")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside data-parallel, compiled and PEFT's wrappers: names and hooks are its own."""
    inner: object = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            assert isinstance(inner, nn.Module)
            base = peft.base_model(inner)
            if base is inner:
                return inner
            inner = base


def unwrapped_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer inside accelerate's wrapper, which is an ``Optimizer`` that never steps itself."""
    inner: Any = optimizer
    while type(inner).__name__ == "AcceleratedOptimizer":
        inner = inner.optimizer
    return inner


def checked_optimizers(given: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    """Return one or several optimizers as a list, without accelerate's wrappers.

    Raises:
        ValueError: something else, or one twice.
    """
    listed = [] if given is None else [given] if isinstance(given, Optimizer) else given
    if not isinstance(listed, list | tuple) or not all(isinstance(one, Optimizer) for one in listed):
        got = ", ".join(type(one).__name__ for one in listed) if isinstance(listed, list | tuple) else listed
        raise ValueError(f"optimizer must be a torch.optim.Optimizer or a list of them, got {got!r:.80}")
    optimizers = [unwrapped_optimizer(one) for one in listed]
    if len({id(one) for one in optimizers}) < len(optimizers):
        raise ValueError("optimizer: one of them is given twice")
    return optimizers


def check_sites(model: nn.Module, sites: Sequence[RouterSite], config: GeometryConfig) -> None:
    """Raise a ValueError if ``top_k`` does not fit a router, or a router or its experts are sharded."""
    for site in sites:
        if config.top_k is not None and config.top_k > site.num_experts:
            raise ValueError(f"top_k={config.top_k}: router {site.name} has {site.num_experts} experts")
    refuse_sharded(model, sites)


def taps_of(
    model: nn.Module,
    sites: Sequence[RouterSite],
    tokens: TokenTap,
    sink: Sink,
    failed: Callable[[str, Exception], None],
    counts: Callable[[bool], bool],
    join: bool,
) -> list[LayerTap]:
    """Return a tap on each router's layer; see ``LayerTap``."""
    taps = []
    for site in sites:
        block = block_of(model, site)
        taps.append(
            LayerTap(
                site,
                None if block is None else block[1],
                find_experts(model, site),
                tokens,
                sink,
                failed=partial(failed, site.name),
                counts=counts,
                join=join,
            )
        )
    return taps


def estimator_of(
    tap: LayerTap | None, config: GeometryConfig, add: AddTraces, failed: Failed, lost: Callable[[], None]
) -> TraceEstimator:
    """Return the estimator of Fisher traces for one layer; without a tap (a recorded layer) ``outputs`` or none.

    Args:
        tap: the layer's tap, None if it is recorded.
        config: of the ``attach``.
        add: what receives the traces.
        failed: what is done with an error.
        lost: told when no gradient reaches the output that was recorded (a tap takes the block's very own).

    Raises:
        ValueError: the experts are not found, or the estimator cannot see inside them.
    """
    if config.fisher == "outputs":
        return OutputTraces(add, config.loss, config.routing.gates, failed, lost if tap is None else None)
    if config.fisher is None or tap is None:
        return NoTraces()
    site, experts = tap.site, tap.experts
    if experts is None:
        raise ValueError(f"fisher={config.fisher!r}: no experts found beside router {site.name}: take fisher='outputs'")
    if config.fisher == "minibatch":
        own = experts.own_parameters() if experts.stacked else experts.container.parameters()
        if not any(parameter.requires_grad for parameter in own):
            raise ValueError(
                f"fisher='minibatch' reads gradients of the experts, and {experts.name} are frozen: take 'outputs'"
            )
        if experts.stacked and not any(p.ndim > 1 and len(p) == site.num_experts for p in experts.own_parameters()):
            raise ValueError(
                f"fisher='minibatch': the weights of {experts.name} are not stacked by expert: take 'outputs'"
            )
        return MinibatchTraces(experts, site.num_experts, add, failed)
    return ParameterTraces(experts, site.num_experts, tap, add, config.loss, failed, observe_experts)
