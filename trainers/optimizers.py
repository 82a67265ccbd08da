"""The optimizers of a run: AdamW for the model, a Riemannian step for the routers; and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import nn
from torch.optim import AdamW, Optimizer

from moegeo_router.routers import manifold_of


def adamw(
    model: nn.Module,
    *,
    lr: float = 2e-3,
    betas: Sequence[float] = (0.9, 0.95),
    weight_decay: float = 0.1,
) -> list[Optimizer]:
    """Step every parameter by AdamW, routers included: what people do without geometry.

    Args:
        model: the model.
        lr: peak learning rate.
        betas: of Adam.
        weight_decay: decoupled, on matrices only (no norms, biases, temperatures).

    Returns:
        One fused AdamW.

    Raises:
        ValueError: a negative learning rate or decay, or orthonormal routers, which would not stay orthonormal. (Polar
            rows may be anywhere, and a cosine router normalises its rows itself.)
    """
    from moegeo_router.geometry import OrthonormalRows  # geoopt loads here, not at import

    manifolds = [manifold_of(p) for p in model.parameters()]
    if any(isinstance(m, OrthonormalRows) for m in manifolds):
        raise ValueError("optimizer=adamw would take orthonormal rows off their manifold: take optimizer=riemannian")
    return [_adamw(model.parameters(), lr, betas, weight_decay)]


def riemannian(
    model: nn.Module,
    *,
    lr: float = 2e-3,
    betas: Sequence[float] = (0.9, 0.95),
    weight_decay: float = 0.1,
    router_lr: float = 2e-2,
    router_betas: Sequence[float] = (0.9, 0.95),
) -> list[Optimizer]:
    """Step the routers' weights along their manifold by geoopt's RiemannianAdam, all the rest by AdamW.

    Args:
        model: the model; at least one of its parameters is on a router manifold.
        lr: peak learning rate of AdamW.
        betas: of AdamW.
        weight_decay: of AdamW, on matrices only. Routers are not decayed: on a scale-free manifold it has no meaning.
        router_lr: peak learning rate of the routers. On polar and unit rows it is the angle (radians) a row turns per
            step while its gradients agree, hence larger than AdamW's, which is a change per coordinate.
        router_betas: of RiemannianAdam.

    Returns:
        A fused AdamW and a RiemannianAdam.

    Raises:
        ValueError: no parameter is on a router manifold, or a negative learning rate or decay.
    """
    routers = [p for p in model.parameters() if manifold_of(p) is not None]
    if not routers:
        raise ValueError(
            "optimizer=riemannian needs routers on a manifold and this model has none: "
            "take router=polar, or optimizer=adamw for plain routers"
        )
    _require_non_negative(router_lr=router_lr)
    from geoopt.optim import RiemannianAdam

    rest = [p for p in model.parameters() if manifold_of(p) is None]
    # geoopt's weight decay is coupled to the gradient; it stays 0.
    return [_adamw(rest, lr, betas, weight_decay), RiemannianAdam(routers, lr=router_lr, betas=tuple(router_betas))]


def _adamw(parameters: Iterable[nn.Parameter], lr: float, betas: Sequence[float], weight_decay: float) -> Optimizer:
    _require_non_negative(lr=lr, weight_decay=weight_decay)
    all_parameters = list(parameters)
    groups = [
        {"params": [p for p in all_parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in all_parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr=lr, betas=tuple(betas), fused=True)  # type: ignore[arg-type]


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


def set_learning_rates(optimizers: Iterable[Optimizer], scale: float) -> None:
    """Set every group's learning rate to ``scale`` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            # The peak is kept in the group, so it travels with the optimizer's state.
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * scale
