"""What the controller sees of an optimizer step: plain numbers, the same on every rank, and in the log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: The name under which what is of the whole run stands beside the layers.
RUN = "run"


@dataclass(frozen=True, kw_only=True)
class LayerReading:
    """One layer's numbers of one step.

    Attributes:
        scalars: as from ``metrics.summary`` and of signals of one's own; what is not known is not there.
        counts: (E,) how often each expert was chosen; empty where that is not known.
        k: experts chosen per token; 0 where that is not known.
    """

    scalars: Mapping[str, float]
    counts: tuple[float, ...] = ()
    k: int = 0


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The numbers of one step.

    Attributes:
        step: of the optimizer, from 1.
        loss: of the training, mean over micro-batches and ranks; NaN where it was not told.
        skipped: whether the step was not taken, because a gradient was not finite.
        layers: by name.
        lost: metrics that are no longer known from here on, because a signal of one's own failed.
    """

    step: int
    loss: float = math.nan
    skipped: bool = False
    layers: Mapping[str, LayerReading] = field(default_factory=dict)
    lost: tuple[str, ...] = ()

    def to_fields(self) -> dict[str, Any]:
        """Return it as JSON can hold it; ``of_fields`` gives back the same to the last bit."""
        layers = {
            name: {"scalars": dict(layer.scalars), "counts": [_whole(n) for n in layer.counts], "k": layer.k}
            for name, layer in self.layers.items()
        }
        fields = {"optimizer_step": self.step, "loss": self.loss, "skipped": self.skipped, "layers": layers}
        return fields | ({"lost": list(self.lost)} if self.lost else {})

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> Reading:
        """Return the reading that ``to_fields`` was called on."""
        layers = {
            name: LayerReading(
                scalars={key: float(value) for key, value in layer["scalars"].items()},
                counts=tuple(float(count) for count in layer["counts"]),
                k=int(layer["k"]),
            )
            for name, layer in fields["layers"].items()
        }
        return cls(
            step=int(fields["optimizer_step"]),
            loss=float(fields["loss"]),
            skipped=bool(fields["skipped"]),
            layers=layers,
            lost=tuple(fields.get("lost", ())),
        )


def _whole(count: float) -> float:
    return int(count) if count.is_integer() else count  # shorter in the log
