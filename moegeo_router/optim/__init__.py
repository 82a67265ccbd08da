"""Optimization of router weights: the take-over of their step from the user's optimizer."""

from .takeover import RouterSteps

__all__ = ["RouterSteps"]
