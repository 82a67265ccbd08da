"""A geometry-aware router for Mixture-of-Experts models in PyTorch.

import moegeo_router as mg

mg.geometrize(model)                         # every router's weight becomes a manifold parameter, in place
gate = mg.GeometricRouter(d_model, experts)  # or build with one, wherever nn.Linear(d_model, experts) stood
geometry = mg.attach(model)                  # watch the routing while it trains: geometry.metrics()
mg.fsi(p), mg.dispersion(p)                  # how concentrated, how specialized a routing is
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from . import geometry
from .attach import Geometry, attach
from .config import GeometryConfig, NaturalConfig
from .control.config import ControlConfig, SetPoint
from .control.own_signals import LayerStep, Signal
from .control.plant import Applied, Intervention, Order, Plant
from .control.thresholds import Threshold
from .geometry import fisher_rao_distance
from .losses import Regularizers
from .metrics import (
    dispersion,
    fhs,
    flip_rate,
    fsi,
    fsi_domain,
    fsi_load,
    fsi_max,
    fsi_token,
    fsi_velocity,
    routing_information,
)
from .optim import NaturalGradient
from .routers import (
    ExpertPrior,
    Gating,
    GeometricRouter,
    RouterFamily,
    RouterSite,
    SignBias,
    export,
    find_routers,
    geometrize,
    routing_probabilities,
    topk_gating,
)
from .version import __version__

if TYPE_CHECKING:
    from .geometry.fisher_rao import FisherRaoSimplex
    from .geometry.rows import PolarRows
    from .integrations.trainer import MoEGeometryCallback

__all__ = [
    "Applied",
    "ControlConfig",
    "ExpertPrior",
    "FisherRaoSimplex",
    "Gating",
    "GeometricRouter",
    "Geometry",
    "GeometryConfig",
    "Intervention",
    "LayerStep",
    "NaturalConfig",
    "NaturalGradient",
    "Order",
    "Plant",
    "PolarRows",
    "Regularizers",
    "RouterFamily",
    "RouterSite",
    "SetPoint",
    "SignBias",
    "Signal",
    "Threshold",
    "__version__",
    "attach",
    "dispersion",
    "export",
    "fhs",
    "find_routers",
    "fisher_rao_distance",
    "flip_rate",
    "fsi",
    "fsi_domain",
    "fsi_load",
    "fsi_max",
    "fsi_token",
    "fsi_velocity",
    "geometrize",
    "routing_information",
    "routing_probabilities",
    "topk_gating",
]

# A star import asks for every name here: this one only where it can be had.
if find_spec("transformers") is not None and find_spec("accelerate") is not None:
    __all__ += ["MoEGeometryCallback"]


def __getattr__(name: str) -> Any:
    # The manifolds need geoopt and the callback transformers, whose import takes seconds: only those who ask pay.
    if name in ("FisherRaoSimplex", "PolarRows"):
        return getattr(geometry, name)
    if name == "MoEGeometryCallback":
        from .integrations.trainer import MoEGeometryCallback

        return MoEGeometryCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
