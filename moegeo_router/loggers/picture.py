"""A matrix as a picture, for the logs that show pictures: a row of cells a layer, a cell an expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ANCHORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""The colours of 0, of the maximum, and of equal steps between: matplotlib's viridis, ever lighter."""

PADDING = (160, 160, 160)
"""The grey of what is no cell: a shorter row's end."""

CELL, PICTURE = 8, 64
"""The least pixels of a cell and of the whole picture, each way."""


def heatmap_picture(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Paint a matrix, coloured from 0 to its maximum.

    Args:
        rows: finite numbers >= 0, one at least; they may differ in length, the first is on top.

    Returns:
        RGB of type uint8, shape (height, width, 3): every cell the same whole number of pixels.
    """
    import numpy as np  # not a dependency of the package by itself

    width = max(len(row) for row in rows)
    values = np.array([[*map(float, row), *[np.nan] * (width - len(row))] for row in rows])
    shares = values / (np.nanmax(values) or 1.0)
    anchors = np.array(ANCHORS, dtype=float)
    positions = np.linspace(0, 1, len(anchors))
    colours = np.stack([np.interp(shares, positions, channel) for channel in anchors.T], axis=-1)
    colours[np.isnan(values)] = PADDING
    height_of_cell, width_of_cell = (max(CELL, -(-PICTURE // cells)) for cells in values.shape)
    return colours.round().astype(np.uint8).repeat(height_of_cell, axis=0).repeat(width_of_cell, axis=1)


def heatmap_caption(rows: Sequence[Sequence[float]], labels: Sequence[str]) -> str:
    """Say what the picture of a matrix cannot: what its rows are and what its colours mean.

    Args:
        rows: as in ``heatmap_picture``.
        labels: what each row is.
    """
    values = [float(value) for row in rows for value in row]
    scale = f"values {min(values):.4g} to {max(values):.4g}, dark is 0, light is {max(values):.4g}"
    return f"from top: {', '.join(labels)}; {scale}"
