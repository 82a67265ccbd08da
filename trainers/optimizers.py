"""The optimizer of a run, one AdamW (``attach`` takes the routers' step over from it); the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import nn
from torch.optim import AdamW, Optimizer

from moegeo_router.routers import find_routers, manifold_of

Routers = Literal["riemannian", "natural"]


def adamw(
    model: nn.Module,
    *,
    lr: float = 2e-3,
    betas: Sequence[float] = (0.9, 0.95),
    weight_decay: float = 0.1,
    routers: Routers | None = None,
    router_lr: float | None = None,
) -> Optimizer:
    """Return a fused AdamW over every parameter, the routers' weights in a group of their own.

    Args:
        model: the model.
        lr: peak learning rate.
        betas: of Adam.
        weight_decay: decoupled, on matrices only (no norms, biases, temperatures).
        routers: how ``attach`` is going to step the routers, whose group is then not decayed; None: like every matrix,
            what people do without geometry.
        router_lr: peak learning rate of the routers, of all their matrices where a router has several; None: ``lr``.
            On polar and unit rows a Riemannian step turns a row by ``√D`` times this (radians) while its gradients
            agree. Natural steps only follow the schedule.

    Raises:
        ValueError: a negative learning rate or decay; routers to be stepped along manifolds they are not on;
            orthonormal routers left to AdamW, which would not stay orthonormal. (Polar rows may be anywhere, and a
            cosine router normalises its rows itself.)
    """
    _require_non_negative(lr=lr, weight_decay=weight_decay, router_lr=lr if router_lr is None else router_lr)
    weights = _router_weights(model, routers)
    rest = [p for p in model.parameters() if all(p is not w for w in weights)]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        {
            "params": weights,
            "weight_decay": weight_decay if routers is None else 0.0,
            "lr": lr if router_lr is None else router_lr,
        },
    ]
    return AdamW([g for g in groups if g["params"]], lr=lr, betas=tuple(betas), fused=True)  # type: ignore[arg-type]


def _router_weights(model: nn.Module, routers: Routers | None) -> list[nn.Parameter]:
    from moegeo_router.geometry import OrthonormalRows  # geoopt loads here, not at import

    sites = find_routers(model)
    manifolds = [manifold_of(site.weight) for site in sites]
    if routers is not None and None in manifolds:
        raise ValueError(
            f"optimizer={routers} needs routers on a manifold and this model has none: "
            "take router=polar, or optimizer=adamw for plain routers"
        )
    if routers is None and any(isinstance(m, OrthonormalRows) for m in manifolds):
        raise ValueError("optimizer=adamw would take orthonormal rows off their manifold: take optimizer=riemannian")
    matrices = [p for site in sites for p in site.module.parameters() if p.ndim >= 2]
    return list({id(p): p for p in matrices}.values())


def _require_non_negative(**options: float) -> None:
    for name, value in options.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def learning_rate_scale(step: int, *, steps: int, warmup: int, final: float) -> float:
    """Return the factor on every peak learning rate: linear warm-up, then a cosine from 1 to ``final``.

    A pure function of the step, so a resumed run needs no scheduler state.

    Args:
        step: the step about to be taken, from 0.
        steps: steps of the whole run.
        warmup: steps of the warm-up.
        final: the factor at the end.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rates(optimizer: Optimizer, scale: float) -> None:
    """Set every group's learning rate to ``scale`` times its peak."""
    for group in optimizer.param_groups:
        # The peak is kept in the group, so it travels with the optimizer's state.
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * scale
