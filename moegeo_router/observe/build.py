"""Putting the taps on a model: which blocks, which experts, which estimator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from ..config import GeometryConfig
from ..integrations.transformers import observe_experts
from ..routers.experts import block_of, find_experts
from ..routers.find import RouterSite
from .fisher import AddTraces, MinibatchTraces, NoTraces, OutputTraces, ParameterTraces, TraceEstimator
from .forward import LayerForward
from .hooks import Failed
from .taps import LayerTap, Sink
from .tokens import TokenTap


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside data-parallel and compiled wrappers: names and hooks are those of the model itself."""
    inner: object = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            assert isinstance(inner, nn.Module)
            return inner


def check_sites(sites: Sequence[RouterSite], config: GeometryConfig) -> None:
    """Raise a ValueError if ``top_k`` does not fit a router, or a router's weight is sharded."""
    for site in sites:
        if config.top_k is not None and config.top_k > site.num_experts:
            raise ValueError(f"top_k={config.top_k}: router {site.name} has {site.num_experts} experts")
        if type(site.weight.data).__name__ == "DTensor":
            raise ValueError(
                f"the weight of router {site.name} is a DTensor: sharded, expert- and tensor-parallel models are not "
                "supported"
            )


def taps_of(
    model: nn.Module,
    sites: Sequence[RouterSite],
    tokens: TokenTap,
    sink: Sink,
    failed: Callable[[str, Exception], None],
    active: Callable[[], bool],
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
                active=active,
                join=join,
            )
        )
    return taps


def estimator_of(tap: LayerTap | None, config: GeometryConfig, add: AddTraces, failed: Failed) -> TraceEstimator:
    """Return the estimator of Fisher traces for one layer; without a tap (a recorded layer) ``outputs`` or none.

    Raises:
        ValueError: the experts are not found, or the estimator cannot see inside them.
    """
    if config.fisher == "outputs":
        return OutputTraces(add, config.loss, config.gates, failed)
    if config.fisher is None or tap is None:
        return NoTraces()
    site, experts = tap.site, tap.experts
    if experts is None:
        raise ValueError(f"fisher={config.fisher!r}: no experts found beside router {site.name}: take fisher='outputs'")
    if config.fisher == "minibatch":
        return MinibatchTraces(experts, site.num_experts, add, failed)
    return ParameterTraces(experts, site.num_experts, tap, add, config.loss, failed, observe_experts)


def say_what_is_missing(seen: LayerForward, config: GeometryConfig) -> None:
    """Warn of what a layer does not show, and what that disables."""
    if seen.ids is None:
        missing, so = "shows logits, not the experts chosen", "no load metrics, no FHS by outputs"
    elif seen.gates is None and config.fisher == "outputs":
        missing, so = "shows the experts chosen, not their gates", "no FHS by outputs (fisher='parameters' needs none)"
    elif seen.output is None and config.fisher == "outputs":
        missing, so = "has no block whose output was seen", "no FHS by outputs"
    else:
        return
    hint = " (GeometryConfig(top_k=...) takes the k largest)" if seen.ids is None else ""
    warnings.warn(f"layer {seen.layer} {missing}: {so}{hint}", stacklevel=4)


def warn_of_constant_gates(seen: LayerForward) -> None:
    """Warn if the only gate of every token is exactly 1, so that no gradient of the loss reaches the router."""
    gates = seen.gates
    if gates is None or gates.device.type != "cpu" or gates.shape[-1] != 1 or seen.num_experts == 1:
        return
    if gates.numel() and bool(torch.all(gates == 1)):
        warnings.warn(
            f"layer {seen.layer}: top-1 gates that are renormalised are exactly 1, so the loss gives the router no "
            "gradient: weigh the chosen expert by its probability",
            stacklevel=4,
        )
