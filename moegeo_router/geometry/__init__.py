"""The mathematics: functions on the Fisher-Rao simplex, and manifolds for geoopt's optimizers.

The manifolds need geoopt, whose import takes seconds, so they load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .simplex import (
    entropy,
    exp_map,
    fisher_rao_distance,
    frechet_mean,
    geodesic,
    inner,
    log_map,
    project_tangent,
    random_distributions,
    retract,
    riemannian_gradient,
    transport,
    uniform,
)

if TYPE_CHECKING:
    from .fisher_rao import FisherRaoSimplex
    from .rows import EuclideanRows, OrthonormalRows, PolarRows, UnitRows

__all__ = [
    "EuclideanRows",
    "FisherRaoSimplex",
    "OrthonormalRows",
    "PolarRows",
    "UnitRows",
    "entropy",
    "exp_map",
    "fisher_rao_distance",
    "frechet_mean",
    "geodesic",
    "inner",
    "log_map",
    "project_tangent",
    "random_distributions",
    "retract",
    "riemannian_gradient",
    "transport",
    "uniform",
]


def __getattr__(name: str) -> Any:
    if name == "FisherRaoSimplex":
        return import_module(f"{__name__}.fisher_rao").FisherRaoSimplex
    if name in ("EuclideanRows", "OrthonormalRows", "PolarRows", "UnitRows"):
        return getattr(import_module(f"{__name__}.rows"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
