"""Putting the loop on a training run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from ..config import GeometryConfig
from ..optim import RouterSteps
from ..regularization import Regularization
from ..routers.experts import block_of, find_experts
from ..routers.find import RouterSite
from .config import ControlConfig
from .damper import Damper
from .guard import Guard
from .interventions import CutRate, MoreRegularization, PriorStep, SlowDown, Temperature
from .loop import ControlLoop
from .own_signals import OwnSignals, with_rows
from .plant import Intervention, Plant
from .probe import LayerProbe, Paused
from .revive import Revive
from .rollback import Rollback, Snapshots


def control_loop(
    model: nn.Module,
    sites: Sequence[RouterSite],
    optimizers: Sequence[Optimizer],
    config: GeometryConfig,
    *,
    steps: RouterSteps | None,
    regularization: Regularization,
    paused: Paused,
) -> ControlLoop | None:
    """Return the loop of a run, None where it is to have no controller.

    Args:
        model: the model itself, out of its wrappers.
        sites: its routers.
        optimizers: the user's.
        config: of the ``attach``.
        steps: the routers' steps, where they were taken over.
        regularization: the regularizers.
        paused: makes a context in which nothing is counted.

    Raises:
        ValueError: an intervention in a ladder that nobody knows, or two of one name.
    """
    mode, control = config.controller, with_rows(config.control, config.signals)
    if mode is None:
        return None
    by_name = {site.name: site for site in sites}
    plant = Plant(
        model=model,
        sites=by_name,
        experts={site.name: find_experts(model, site) for site in sites},
        optimizers=list(optimizers),
        steps=steps,
        regularization=regularization,
        probes={site.name: _probe(model, site) for site in sites} if mode == "act" else {},
        damper=Damper(by_name, optimizers) if optimizers and mode == "act" else None,
        scores=config.routing.scores,
        group=config.group,
    )
    snapshots = Snapshots(plant, control.snapshot_scope, control.snapshots)
    gentle = [MoreRegularization(), PriorStep(), Temperature(), SlowDown(), CutRate()]
    revive = Revive(renormalize=config.routing.renormalize, paused=paused)
    known = [*gentle, revive, Rollback(snapshots), *config.interventions]
    _check_names(control, known)
    frozen = [site.name for site in sites if not site.weight.requires_grad]
    if mode == "act" and len(frozen) == len(sites):
        warnings.warn("every router is frozen: the controller can only observe", stacklevel=4)
    own = OwnSignals(config.signals, plant, strict=config.on_error == "raise")
    return ControlLoop(control, mode, plant, known, snapshots, own)


def _probe(model: nn.Module, site: RouterSite) -> LayerProbe:
    block = block_of(model, site)

    def failed(error: Exception) -> None:
        warnings.warn(f"looking at the tokens of {site.name} failed: {error}", stacklevel=2)

    return LayerProbe(site, None if block is None else block[1], failed)


def guard_of(optimizers: Sequence[Optimizer], config: GeometryConfig) -> Guard | None:
    """Return what keeps broken gradients from being stepped; None where nobody asked for it, or a scaler does it."""
    if config.controller != "act" or not config.control.guard or config.grad_scaler is not None or not optimizers:
        return None
    return Guard(optimizers, config.group)


def _check_names(config: ControlConfig, known: Sequence[Intervention]) -> None:
    names = [intervention.name for intervention in known]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"interventions: there are two called {sorted(twice)[0]!r}")
    for failure, ladder in config.ladders.items():
        if unknown := [name for name in ladder if name not in names]:
            raise ValueError(f"control.ladders[{failure!r}]: no intervention {unknown[0]!r}; there are {names}")
