"""A log as TensorBoard event files, with the keys of the JSON-lines log."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .base import Level, bin_values, check_alert, check_event, check_heatmap, check_histogram, check_metrics
from .picture import heatmap_caption, heatmap_picture

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger:
    """Write rows to a TensorBoard event file (numbers in TensorBoard's own single precision).

    An event is a text "event/<kind>" with its fields as JSON, an alert the same below what it tells. Every row is
    handed to the operating system at once: a killed process loses none, and TensorBoard shows it while the run goes on.

    Args:
        directory: the folder of this run, made if missing. TensorBoard shows the event files of a folder as one run:
            those that an earlier run left there stay, unshown.
        resume_step: go on in the folder of an interrupted run from the checkpoint of this step: the rows of later
            steps stay in its file, and TensorBoard drops them (its default reader at the next row of the same key).

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, directory: str | Path, *, resume_step: int | None = None) -> None:
        self.directory = Path(directory)
        # The first step that is dropped. A new run says it too: TensorBoard takes a folder's first such mark for its
        # start, and only a later one for a resume.
        purge_step = 0 if resume_step is None else resume_step + 1
        self._writer = _summary_writer()(str(self.directory), purge_step=purge_step)
        self._writer.flush()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one row of numbers (see ``Logger.log``)."""
        check_metrics(metrics, step)
        for key, value in metrics.items():
            self._writer.add_scalar(key, float(value), step)
        self._writer.flush()

    def event(self, kind: str, fields: Mapping[str, object], step: int) -> None:
        """Write one event (see ``Logger.event``)."""
        check_event(kind, fields, step)
        self._writer.add_text(f"event/{kind}", _as_block(fields), step)
        self._writer.flush()

    def record(self, kind: str, fields: Mapping[str, object], step: int) -> None:
        """Check the row and keep nothing of it (see ``Logger.record``)."""
        check_event(kind, fields, step)

    def alert(self, kind: str, title: str, text: str, level: Level, fields: Mapping[str, object], step: int) -> None:
        """Write one alert (see ``Logger.alert``)."""
        check_alert(kind, title, text, level, fields, step)
        told = f"**{level}: {title}**\n\n{text}\n\n{_as_block(fields)}"
        self._writer.add_text(f"event/{kind}", told, step)
        self._writer.flush()

    def histogram(self, key: str, values: Sequence[float], step: int) -> None:
        """Write one distribution (see ``Logger.histogram``)."""
        check_histogram(key, values, step)
        numbers = [float(value) for value in values]
        counts, edges = bin_values(numbers)
        # Not add_histogram, which counts anew. TensorBoard knows a bin by its right edge: the first one, up to the
        # leftmost edge, is empty.
        self._writer.add_histogram_raw(
            key,
            min=min(numbers),
            max=max(numbers),
            num=len(numbers),
            sum=sum(numbers),
            sum_squares=sum(number * number for number in numbers),
            bucket_limits=edges,
            bucket_counts=[0, *counts],
            global_step=step,
        )
        self._writer.flush()

    def heatmap(self, key: str, rows: Sequence[Sequence[float]], labels: Sequence[str], step: int) -> None:
        """Write one matrix as a picture, and a text with its labels and scale (see ``Logger.heatmap``)."""
        check_heatmap(key, rows, labels, step)
        self._writer.add_image(key, heatmap_picture(rows), step, dataformats="HWC")
        self._writer.add_text(key, heatmap_caption(rows, labels), step)
        self._writer.flush()

    def close(self, exit_code: int = 0) -> None:
        """Write what is left and close the file; the exit code is not recorded."""
        self._writer.close()

    @property
    def how_to_open(self) -> str:
        """One line that tells a person how to see the logs."""
        return f"tensorboard: `tensorboard --logdir {self.directory}` shows it here"


def _as_block(fields: Mapping[str, object]) -> str:
    # A block of code: TensorBoard reads texts as Markdown.
    return f"```\n{json.dumps(dict(fields), indent=2, ensure_ascii=False)}\n```"


def _summary_writer() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("TensorBoardLogger needs tensorboard: pip install moegeo-router[tensorboard]") from None
    return SummaryWriter
