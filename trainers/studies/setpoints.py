"""How far the set-points of a run's controller went, which no event tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moegeo_router.control.config import ControlConfig
from moegeo_router.control.controller import Controller
from moegeo_router.control.reading import Reading

#: Before the name of what a set-point moves, in the results of a run.
PREFIX = "control/largest/"


def largest_weights(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the largest weights that set-points gave in any layer, by decisions taken again from the readings.

    Args:
        records: of a log, those with ``event`` ``controller`` and ``reading``; others are passed over.

    Returns:
        ``control/largest/balance`` …; empty without a controller that acts, and where it judged nothing yet.
    """
    controller: Controller | None = None
    largest: dict[str, float] = {}
    for record in records:
        if record["event"] == "controller":
            config = ControlConfig.of_fields(dict(record["config"]))
            controller = Controller(config, record["mode"], record["available"])
        elif record["event"] == "reading" and controller is not None:
            for weights in controller.update(Reading.of_fields(record)).weights.values():
                for name, weight in weights.items():
                    largest[name] = max(weight, largest.get(name, 0.0))
    return {f"{PREFIX}{name}": weight for name, weight in largest.items()}


def largest_of_all(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the largest weight of each name (``balance`` …) in any of the rows; empty if none has a set-point."""
    largest: dict[str, float] = {}
    for row in rows:
        for name, weight in row["results"].items():
            if name.startswith(PREFIX):
                short = name.removeprefix(PREFIX)
                largest[short] = max(weight, largest.get(short, 0.0))
    return largest
