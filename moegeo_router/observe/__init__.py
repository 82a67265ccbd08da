"""Observation: sums over tokens that add up over micro-batches and ranks, and the taps that fill them."""

from .forward import LayerForward
from .statistics import LayerStatistics, RoutingStatistics
from .taps import LayerTap
from .tokens import TokenTap

__all__ = ["LayerForward", "LayerStatistics", "LayerTap", "RoutingStatistics", "TokenTap"]
