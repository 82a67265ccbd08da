"""Optimization of router weights: natural gradients, and the take-over of their step from the user's optimizer."""

from .natural import Movement
from .optimizer import NaturalGradient
from .rules import NaturalRules
from .takeover import RouterSteps

__all__ = ["Movement", "NaturalGradient", "NaturalRules", "RouterSteps"]
