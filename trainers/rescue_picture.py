"""The picture of two runs side by side: what the controller saw, what it did, and how it went without it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moegeo_router.control.thresholds import THRESHOLDS

if TYPE_CHECKING:
    from trainers.rescue import Course

#: Title of a panel, and the metric whose thresholds it shows.
PANELS = (
    ("loss", None),
    ("FSI, worst layer", "fsi"),
    ("dead experts", "dead_fraction"),
    ("logit scale", "logit_scale"),
)

WITHOUT, WITH, ACTION = "#b04030", "#2060a0", "#888888"

#: Time constant of the drawn averages, in steps.
SMOOTHING = 10


def draw(courses: Sequence[Course], path: Path) -> None:
    """Write the picture.

    Args:
        courses: of the run without and the run with the controller.
        path: of the PNG.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(PANELS), 1, figsize=(9, 10), sharex=True, constrained_layout=True)
    rows = {row.metric: row for row in THRESHOLDS}
    for axis, (label, metric) in zip(axes, PANELS, strict=True):
        for course, colour, name in zip(courses, (WITHOUT, WITH), ("without", "with the controller"), strict=True):
            axis.plot(*_averaged(course.scalars[label]), color=colour, label=name)
        if metric is not None:
            row = rows[metric]
            axis.axhline(row.warning, color=ACTION, linestyle=":", linewidth=1)
            axis.axhline(row.critical, color=ACTION, linestyle="--", linewidth=1)
        axis.set_ylabel(label)
    axes[0].set_ylim(top=_top(courses))
    _mark(axes, actions(courses[-1]))
    axes[0].legend(loc="upper right")
    axes[-1].set_xlabel("step (dotted: warning, dashed: critical; numbers: interventions, below)")
    figure.suptitle("\n".join(_legend(actions(courses[-1]))), fontsize=8, x=0.01, ha="left", y=-0.01, va="top")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def check_path(path: Path) -> None:
    """Make the folder of the picture, and see whether it could be written.

    Raises:
        OSError: it could not be.
        ValueError: a name that is none of a picture.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.is_dir() or path.suffix[1:].lower() not in kinds:
        raise ValueError(f"--picture must be a file that ends in .png (or {', '.join(sorted(kinds))}), got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OSError(f"--picture {path} cannot be written")


def actions(course: Course) -> list[dict[str, Any]]:
    """Return the interventions that were carried out, in their order, with how they ended."""
    events = [] if course.outcome is None else course.outcome["events"]
    refused = {_identity(event) for event in events if "reason" in event}
    found = [e for e in events if e.get("kind") == "apply" and "reason" not in e and _identity(e) not in refused]
    for event in found:
        later = [e for e in events if e.get("kind") in ("keep", "undo") and _of(e) == _of(event)]
        event["ended"] = next((e["kind"] for e in later if e["step"] > event["step"]), "goes on")
    return found


def _identity(event: dict[str, Any]) -> tuple[Any, ...]:
    return event["step"], *_of(event)


def _of(event: dict[str, Any]) -> tuple[Any, ...]:
    return event.get("layer"), event.get("name"), event.get("failure")


def _averaged(values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and the running average with its beginning's bias taken out, which passes over NaN and inf."""
    beta, total, weight, averages = 1 - 1 / SMOOTHING, 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, weight = beta * total + (1 - beta) * value, beta * weight + (1 - beta)
        averages.append(total / weight if weight else math.nan)
    return np.arange(1, len(values) + 1), np.array(averages)


def _top(courses: Sequence[Course]) -> float:
    """Return an upper limit for the loss that leaves out the first fall, where more than that was trained."""
    averages = [_averaged(course.scalars["loss"])[1] for course in courses]
    later = [value for values in averages for value in (values[20:] if len(values) > 20 else values)]
    return max(filter(math.isfinite, later), default=1.0)


def _mark(axes: Sequence[Any], done: Sequence[dict[str, Any]]) -> None:
    for number, event in enumerate(done, start=1):
        for axis in axes:
            axis.axvline(event["step"], color=ACTION, linewidth=0.6)
        height = 1.02 + 0.06 * (number % 2)
        axes[0].text(event["step"], height, str(number), transform=axes[0].get_xaxis_transform(), ha="center", size=7)


def _legend(done: Sequence[dict[str, Any]]) -> list[str]:
    words = {"keep": "helped", "undo": "taken back"}
    return [
        f"{number}  step {event['step']}: {event['name']} against {event['failure']} in {event['layer']}, "
        f"{words.get(event['ended'], event['ended'])}"
        for number, event in enumerate(done, start=1)
    ]
