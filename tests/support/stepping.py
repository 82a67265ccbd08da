"""A model on a manifold, its optimizer taken over, and what a step did."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.geometry import PolarRows
from tests.support.moe import LinearGateBlock, Model, batch, build, token_loss

OFF = mg.Regularizers.none()
LIMIT = 0.05  # of natural steps, radians


def converted(seed: int = 0, manifold: str = "polar") -> Model:
    model = build(LinearGateBlock, seed=seed)
    mg.geometrize(model, manifold, allow_change=True)
    return model


def take_over(model: nn.Module, optimizer: object, **options: object) -> mg.Geometry:
    config = {"top_k": 2, "regularizers": OFF, "on_error": "raise", "step": "riemannian"} | options
    return mg.attach(model, optimizer, mg.GeometryConfig(**config))


def natural(model: nn.Module, optimizer: object, **options: object) -> mg.Geometry:
    return take_over(model, optimizer, **{"step": "natural", "natural": mg.NaturalConfig(limit=LIMIT)} | options)


def backward(model: nn.Module, seed: int = 1, scale: float = 1.0) -> None:
    (scale * token_loss(model(batch(seed=seed)))).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range = range(3)) -> None:
    for seed in seeds:
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()


def routers(model: Model) -> list[Tensor]:
    return [block.gate.weight for block in model.blocks]


def turned(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """Polar distance that every row of every router went."""
    return torch.stack([PolarRows().dist(a, b.detach()) for a, b in zip(before, after, strict=True)])
