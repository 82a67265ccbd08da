"""The figures of the benchmark: differences to the baseline, at the end and on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from trainers.studies.benchmark import ARMS
from trainers.studies.benchmark_results import MARGIN, Results
from trainers.studies.intervals import Interval
from trainers.studies.region_figure import COLOURS, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Of an arm: ours, linear baselines, others.
_OURS, _LINEAR, _OTHER = COLOURS[1], COLOURS[0], COLOURS[7]

#: Solid, dashed and dotted lines, and their colours in turn.
_KINDS = (
    [arm for arm in ARMS if ARMS[arm].ours],
    [arm for arm in ARMS if ARMS[arm].linear],
    [arm for arm in ARMS if not (ARMS[arm].ours or ARMS[arm].linear)],
)
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")

#: Panels of curves beside each other.
_COLUMNS = 3

#: Differences beyond this many margins are cut; an arrow says so.
_CUT = 6.0


def write_differences(results: Mapping[str, Results], path: Path) -> bool:
    """Draw each arm's difference to the baseline in percent, a panel a task; right is better.

    Args:
        results: by task.
        path: of the PNG.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.figure import Figure  # without pyplot there is no state and no display

    shown = {task: found for task, found in results.items() if _points(found)}
    if not shown:
        return False
    arms = [arm for arm in ARMS if any(arm in _points(found) for found in shown.values())]
    figure = Figure(figsize=(2.6 * len(shown) + 2.4, 0.32 * len(arms) + 1.5), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, found in zip(axes, shown.values(), strict=True):
        _draw_differences(panel, found, arms)
    axes[0].set_yticks(range(len(arms)), [ARMS[arm].title for arm in arms], fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle("difference to the best-tuned linear baseline in %, 95% interval; right is better", fontsize=9)
    save(figure, path)
    return True


def _points(results: Results) -> dict[str, Interval]:
    return {arm: found for arm in ARMS if (found := results.gain(arm)) is not None}


def _draw_differences(axes: Axes, results: Results, arms: Sequence[str]) -> None:
    margin = 100 * MARGIN
    axes.axvspan(-margin, margin, color="#009E73", alpha=0.15, linewidth=0)
    axes.axvline(0, color="#000000", linewidth=0.7)
    for arm, found in _points(results).items():
        mean, width = found.mean, found.half_width
        colour = _OURS if ARMS[arm].ours else _LINEAR if ARMS[arm].linear else _OTHER
        place = arms.index(arm)
        if abs(mean) > _CUT * margin:
            edge = math.copysign(0.97 * _CUT * margin, mean)
            axes.plot([edge], [place], marker="<" if mean < 0 else ">", color=colour, markersize=6)
            axes.annotate(f"{mean:+.1f}", (0.85 * edge, place), fontsize=7, color=colour, va="center", ha="center")
        elif math.isnan(width):
            axes.plot([mean], [place], "o", markerfacecolor="none", color=colour, markersize=4)
        else:
            axes.errorbar([mean], [place], xerr=[width], fmt="o", color=colour, markersize=4, capsize=2, linewidth=1.2)
    axes.set_xlim(-_CUT * margin, _CUT * margin)
    axes.set_title(results.task.title.replace(", ", "\n", 1), fontsize=8)
    axes.grid(axis="x", alpha=0.25, linewidth=0.5)
    axes.tick_params(labelsize=8)


def write_curves(results: Mapping[str, Results], path: Path) -> bool:
    """Draw training loss over tokens less the baseline's, means over the seeds both have, a panel a task.

    Args:
        results: by task.
        path: of the PNG.

    Returns:
        Whether there was anything to draw.
    """
    from matplotlib.figure import Figure

    lines = {task: _lines(found) for task, found in results.items()}
    shown = {task: found for task, found in lines.items() if found}
    if not shown:
        return False
    columns = min(_COLUMNS, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(3.4 * columns + 2.0, 3.3 * rows + 0.3), dpi=110, layout="constrained")
    axes = [*figure.subplots(rows, columns, squeeze=False).flat]
    for panel, (task, found) in zip(axes, shown.items(), strict=False):
        _draw_curves(panel, found, results[task].task.data)
    for panel in axes[len(shown) :]:
        panel.remove()
    figure.supylabel("training loss less the baseline's, nats", fontsize=8)
    handles = {line.get_label(): line for panel in axes for line in panel.get_lines()[1:]}
    titles = [arm.title for arm in ARMS.values() if arm.title in handles]
    figure.legend([handles[title] for title in titles], titles, loc="outside right center", fontsize=7)
    save(figure, path)
    return True


def _lines(results: Results) -> dict[str, list[tuple[float, float]]]:
    """Return tokens and mean difference of each arm that has seeds in common with the baseline."""
    theirs = results.curves(results.reference)
    found = {}
    for arm in ARMS:
        ours = results.curves(arm)
        if arm == results.reference or not (seeds := ours.keys() & theirs.keys()):
            continue
        pairs = [list(zip(ours[seed], theirs[seed], strict=False)) for seed in sorted(seeds)]
        found[arm] = [
            (points[0][0][0], fmean(mine - other for (_, mine), (_, other) in points))
            for points in zip(*pairs, strict=False)
        ]
    return found


def _draw_curves(axes: Axes, lines: Mapping[str, Sequence[tuple[float, float]]], title: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.axhline(0, color="#000000", linewidth=0.7)
    for arm, points in lines.items():
        kind = next(own for own in _KINDS if arm in own)
        style = ("-", "--", ":")[_KINDS.index(kind)]
        colour = _LINES[kind.index(arm) % len(_LINES)]
        axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=1.1, label=ARMS[arm].title)
    # The first tenth is warm-up, where differences are large and say little.
    late = [loss for points in lines.values() for _, loss in points[len(points) // 10 :]]
    low, high = min(0.0, *late), max(0.0, *late)
    margin = 0.05 * (high - low) or 0.01
    axes.set_ylim(low - margin, high + margin)
    axes.set_title(title, fontsize=8)
    axes.set_xlabel("tokens", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25, linewidth=0.5)
