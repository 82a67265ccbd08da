"""Observation: sums over tokens that add up over micro-batches and ranks, and the taps that fill them."""

from .statistics import LayerStatistics, RoutingStatistics
from .taps import RouterTap

__all__ = ["LayerStatistics", "RouterTap", "RoutingStatistics"]
