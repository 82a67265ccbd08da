"""Routers: the drop-in module, conversion of a model in place, gating, priors, and finding routers in a model."""

from .convert import export, geometrize
from .family import RouterFamily
from .find import RouterSite, find_routers
from .gating import Gating, routing_probabilities, topk_gating
from .prior import ExpertPrior, SignBias
from .router import GeometricRouter
from .tag import manifold_of

__all__ = [
    "ExpertPrior",
    "Gating",
    "GeometricRouter",
    "RouterFamily",
    "RouterSite",
    "SignBias",
    "export",
    "find_routers",
    "geometrize",
    "manifold_of",
    "routing_probabilities",
    "topk_gating",
]
