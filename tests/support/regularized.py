"""Geometry that is attached with every regularizer on, and rates of zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import moegeo_router as mg

ALL = mg.Regularizers(fsi=1.0, fhs=0.5, dispersion=1.0, information=1.0, balance=0.1, z=0.1)


def attached(model: nn.Module, **options: object) -> tuple[torch.optim.Optimizer, mg.Geometry]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = {"step": None, "on_error": "raise", "regularizers": ALL} | options
    return optimizer, mg.attach(model, optimizer, mg.GeometryConfig(**config))


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters()]
