"""The figure of the stable-region study: loss and dead experts by multiplier, a line an arm."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from trainers.studies.files import write_whole
from trainers.studies.intervals import Interval, mean_interval, share_interval
from trainers.studies.region import ARMS, REFERENCE
from trainers.studies.region_grid import Cell, Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which the colour-blind can tell apart; the reference is black. Markers tell them apart, too.
COLOURS = ("#000000", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#CC79A7", "#009E73", "#999999")
MARKERS = "osDv^P*X"

#: Least distance between two labels, in heights of a panel.
GAP = 0.062


@dataclass(frozen=True)
class _Curve:
    arm: str
    multipliers: Sequence[float]
    intervals: Sequence[Interval]

    @property
    def style(self) -> dict[str, Any]:
        place = (ARMS.index(self.arm) if self.arm in ARMS else len(ARMS)) % len(COLOURS)
        return {"color": COLOURS[place], "marker": MARKERS[place]}


def write_figure(grid: Grid, path: Path) -> None:
    """Write the picture: validation loss above, share of dead experts below, a column a balance weight.

    Args:
        grid: the rows.
        path: of the PNG.
    """
    from matplotlib.figure import Figure  # without pyplot there is no state and no display

    columns = len(grid.balances)
    figure = Figure(figsize=(3.9 * columns + 2.2, 7.2), dpi=110, layout="constrained")
    axes = figure.subplots(2, columns, sharex=True, sharey="row", squeeze=False)
    losses = [list(_curves(grid, balance, "loss")) for balance in grid.balances]
    deaths = [list(_curves(grid, balance, "dead")) for balance in grid.balances]
    for column, balance in enumerate(grid.balances):
        _draw(axes[0, column], losses[column])
        _draw(axes[1, column], deaths[column])
        axes[0, column].set_title(f"balance weight {balance:g}", fontsize=10)
        axes[1, column].set_xlabel("multiplier of the routers' learning rate")
        axes[1, column].set_xticks(grid.multipliers, [f"{multiplier:g}" for multiplier in grid.multipliers])
        axes[1, column].minorticks_off()
    axes[0, 0].set_ylabel("validation loss (nats a token)")
    axes[0, 0].set_ylim(*_loss_limits([curve for curves in losses for curve in curves]))
    axes[1, 0].set_ylabel("dead experts (share, last 20 steps)")
    top = 1.06 * max([0.1, *(i.mean for curves in deaths for curve in curves for i in curve.intervals)])
    axes[1, 0].set_ylim(-0.03 * top, top)
    _label(axes[0, -1], losses[-1])
    _label(axes[1, -1], deaths[-1])
    figure.suptitle(f"mean over {grid.seeds} seed{'s' * (grid.seeds > 1)}, band: 95% interval", fontsize=9)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write the picture with 128 colours: a third of the bytes, and the eye sees no difference.

    Args:
        figure: the picture.
        path: of the PNG.
    """
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    write_whole(path, small.getvalue())


def _curves(grid: Grid, balance: float, what: str) -> Iterator[_Curve]:
    for arm in grid.arms:
        cells = {multiplier: grid.cell(balance, arm, multiplier) for multiplier in grid.multipliers}
        found = {multiplier: interval for multiplier, cell in cells.items() if (interval := _interval(cell, what))}
        if found:
            yield _Curve(arm, [*found], [*found.values()])


def _interval(cell: Cell, what: str) -> Interval | None:
    values = [*getattr(cell, what).values()]
    if not values:
        return None
    return share_interval(values) if what == "dead" else mean_interval(values)


def _draw(axes: Axes, curves: Sequence[_Curve]) -> None:
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.25, linewidth=0.5)
    for curve in curves:
        means = [interval.mean for interval in curve.intervals]
        emphasis = 2.2 if curve.arm == REFERENCE else 1.4
        axes.plot(curve.multipliers, means, markersize=4.5, linewidth=emphasis, **curve.style)
        lows, highs = ([getattr(i, end) for i in curve.intervals] for end in ("low", "high"))
        axes.fill_between(curve.multipliers, lows, highs, color=curve.style["color"], alpha=0.13, linewidth=0)


def _loss_limits(curves: Sequence[_Curve]) -> tuple[float, float]:
    """Return the limits of the loss: a few arms that fail must not press all others into one line."""
    means = [interval.mean for curve in curves for interval in curve.intervals]
    if not means:
        return 0.0, 1.0
    low, high = min(means), max(means)
    high = min(high, low + 4 * max(median(means) - low, 0.02))
    margin = 0.06 * (high - low) or 0.05
    return low - 2 * margin, high + margin


def _label(axes: Axes, curves: Sequence[_Curve]) -> None:
    """Write each arm's name right of the panel, at the height of its line's end or as near as there is room."""
    low, high = axes.get_ylim()
    curves = sorted(curves, key=lambda curve: curve.intervals[-1].mean)
    ends = [min(max((curve.intervals[-1].mean - low) / (high - low), 0.0), 1.0) for curve in curves]
    for curve, end, place in zip(curves, ends, spread_out(ends, GAP), strict=True):
        colour = curve.style["color"]
        axes.annotate(
            curve.arm,
            xy=(1.0, end),
            xytext=(1.08, place),
            xycoords="axes fraction",
            fontsize=9,
            va="center",
            color=colour,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 0, "relpos": (0, 0.5)},
        )


def spread_out(places: Sequence[float], gap: float) -> list[float]:
    """Return ascending places moved as little as it takes for each to be ``gap`` above the one before, in 0 … 1.

    Args:
        places: ascending.
        gap: at least this is between two; less if they do not fit.
    """
    gap = min(gap, 1 / max(1, len(places) - 1))
    moved = list(places)
    for index in range(1, len(moved)):
        moved[index] = max(moved[index], moved[index - 1] + gap)
    for index in reversed(range(len(moved))):
        ceiling = 1.0 if index == len(moved) - 1 else moved[index + 1] - gap
        moved[index] = min(moved[index], ceiling)
    return moved
