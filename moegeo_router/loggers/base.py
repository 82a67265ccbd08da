"""The logger protocol, the logger that does nothing, and the one that feeds several others."""

from __future__ import annotations

import json
import math
import sys
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from numbers import Real
from typing import Literal, Protocol, get_args, runtime_checkable

RESERVED_KEYS = frozenset({"step", "time", "event", "non_finite", "histogram", "heatmap"})
"""Keys that a logger writes itself beside the caller's."""

BINS = 20
"""The bins of every histogram."""

Level = Literal["info", "warning", "error"]
"""How bad something is that a person is told."""

ALERT_KEYS = frozenset({"title", "text", "level"})
"""Keys under which an alert's row holds what a person reads, beside the caller's fields."""


@runtime_checkable
class Logger(Protocol):
    """What a training loop needs of a log: numbers, distributions, things that happened, and an end."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one row of numbers.

        Args:
            metrics: flat, namespaced keys ("train/loss", "geometry/layer0/fsi") to plain numbers (NaN and inf allowed).
            step: the optimizer step the numbers belong to, >= 0.

        Raises:
            ValueError: a key is reserved or not a string, a value is not a plain number, or the step is invalid.
        """

    def event(self, kind: str, fields: Mapping[str, object], step: int) -> None:
        """Write one row about something that happened.

        Args:
            kind: what happened ("checkpoint", "non_finite").
            fields: its details; whatever ``json`` can write (NaN and inf allowed).
            step: the optimizer step at which it happened, >= 0.

        Raises:
            ValueError: a field is reserved or cannot be written as JSON, or the step is invalid.
        """

    def record(self, kind: str, fields: Mapping[str, object], step: int) -> None:
        """Write a row for programs, not people: only logs that are read back keep it.

        Args:
            kind: as in ``event``.
            fields: as in ``event``.
            step: as in ``event``.

        Raises:
            ValueError: as in ``event``.
        """

    def alert(self, kind: str, title: str, text: str, level: Level, fields: Mapping[str, object], step: int) -> None:
        """Write what a person should hear of.

        Args:
            kind: as in ``event``.
            title: a line that says what happened.
            text: the rest of it; may be empty.
            level: how bad it is.
            fields: its details, as in ``event``, and other than ``title``, ``text`` and ``level``.
            step: as in ``event``.

        Raises:
            ValueError: as in ``event``; a title that is empty or of several lines, a text that is none, or an unknown
                level.
        """

    def histogram(self, key: str, values: Sequence[float], step: int) -> None:
        """Write how numbers are distributed, in the bins of ``bin_values`` (the experts' shares of the load).

        Args:
            key: as in ``log``, and of one kind: wandb and TensorBoard show no second under the same key
                ("geometry/layer0/load").
            values: one plain, finite number or more.
            step: the optimizer step the numbers belong to, >= 0.

        Raises:
            ValueError: the key is reserved or not a string, there are no values, one is not a finite plain number, or
                the step is invalid.
        """

    def heatmap(self, key: str, rows: Sequence[Sequence[float]], labels: Sequence[str], step: int) -> None:
        """Write a matrix: one row a layer, one column an expert (the load of every expert of every layer).

        Args:
            key: as in ``histogram`` ("geometry/loads").
            rows: plain, finite numbers >= 0 (a picture of them is scaled from 0 to their maximum); a layer with fewer
                experts has a shorter row.
            labels: what each row is ("layer0").
            step: the optimizer step the numbers belong to, >= 0.

        Raises:
            ValueError: the key is reserved or not a string, there are no numbers, one is not a finite plain number
                >= 0, there is not one text a row in the labels, or the step is invalid.
        """

    def close(self, exit_code: int = 0) -> None:
        """Finish the log; closing twice is harmless.

        Args:
            exit_code: 0 for a run that ended as planned.
        """


def check_metrics(metrics: Mapping[str, float], step: int) -> None:
    """Check one row of numbers.

    Args:
        metrics: as in ``Logger.log``.
        step: as in ``Logger.log``.

    Raises:
        ValueError: as in ``Logger.log``.
    """
    _check_step(step)
    for key, value in metrics.items():
        _check_key("metrics", key)
        if not isinstance(value, Real):
            raise ValueError(f"metrics[{key!r}]: expected a plain number, got {type(value).__name__}")


def check_event(kind: str, fields: Mapping[str, object], step: int) -> None:
    """Check one event.

    Args:
        kind: as in ``Logger.event``.
        fields: as in ``Logger.event``.
        step: as in ``Logger.event``.

    Raises:
        ValueError: as in ``Logger.event``.
    """
    _check_step(step)
    if not isinstance(kind, str) or not kind:
        raise ValueError(f"kind: expected a non-empty string, got {kind!r}")
    for key, value in fields.items():
        _check_key("fields", key)
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"fields[{key!r}]: expected something JSON can hold, got {error}") from None


def check_alert(
    kind: str, title: str, text: str, level: Level, fields: Mapping[str, object], step: int
) -> dict[str, object]:
    """Check one alert.

    Args:
        kind: as in ``Logger.alert``.
        title: as in ``Logger.alert``.
        text: as in ``Logger.alert``.
        level: as in ``Logger.alert``.
        fields: as in ``Logger.alert``.
        step: as in ``Logger.alert``.

    Returns:
        The fields of the event that it is: the caller's, and ``title``, ``text`` and ``level``.

    Raises:
        ValueError: as in ``Logger.alert``.
    """
    check_event(kind, fields, step)
    if taken := sorted(ALERT_KEYS.intersection(fields)):
        raise ValueError(f"fields: expected keys other than {sorted(ALERT_KEYS)}, got {taken[0]!r}")
    if not isinstance(title, str) or len(title.splitlines()) != 1:
        raise ValueError(f"title: expected one line, got {title!r:.80}")
    if not isinstance(text, str):
        raise ValueError(f"text: expected a string, got {type(text).__name__}")
    if level not in get_args(Level):
        raise ValueError(f"level: expected one of {', '.join(get_args(Level))}, got {level!r}")
    return {**fields, "title": title, "text": text, "level": level}


def check_histogram(key: str, values: Sequence[float], step: int) -> None:
    """Check one distribution.

    Args:
        key: as in ``Logger.histogram``.
        values: as in ``Logger.histogram``.
        step: as in ``Logger.histogram``.

    Raises:
        ValueError: as in ``Logger.histogram``.
    """
    _check_step(step)
    _check_key("key", key)
    if len(values) == 0:
        raise ValueError("values: expected one number or more, got none")
    _check_finite("values", values)


def check_heatmap(key: str, rows: Sequence[Sequence[float]], labels: Sequence[str], step: int) -> None:
    """Check one matrix.

    Args:
        key: as in ``Logger.heatmap``.
        rows: as in ``Logger.heatmap``.
        labels: as in ``Logger.heatmap``.
        step: as in ``Logger.heatmap``.

    Raises:
        ValueError: as in ``Logger.heatmap``.
    """
    _check_step(step)
    _check_key("key", key)
    if sum(len(row) for row in rows) == 0:
        raise ValueError("rows: expected one number or more, got none")
    for index, row in enumerate(rows):
        _check_finite(f"rows[{index}]", row)
        if min(row, default=0) < 0:
            raise ValueError(f"rows[{index}]: expected numbers >= 0, got {min(row)!r}")
    if len(labels) != len(rows) or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"labels: expected a text for each of the {len(rows)} rows, got {labels!r}")


def bin_values(values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Count numbers in equal bins between their minimum and their maximum, which the last bin includes.

    Numbers that are all equal, or too close for as many different edges, lie in the middle of bins of 0.05.

    Args:
        values: one finite number or more.

    Returns:
        The ``BINS`` counts and the ``BINS + 1`` edges.
    """
    low, high = float(min(values)), float(max(values))
    edges = _edges(low, high)
    if any(left >= right for left, right in pairwise(edges)):
        # Bins of 0.05 are themselves below the resolution of large numbers, and the largest float has none above it.
        reach, largest = max(0.5, 1e-9 * high, -1e-9 * low), sys.float_info.max
        edges = _edges(max(low - reach, -largest), min(high + reach, largest))
    counts = [0] * BINS
    for value in values:
        counts[min(bisect_right(edges, float(value)), BINS) - 1] += 1
    return counts, edges


def _edges(low: float, high: float) -> list[float]:
    # Not low + i * (high - low) / BINS: the difference of two finite floats may be infinite.
    return [low * (1 - i / BINS) + high * (i / BINS) for i in range(BINS + 1)]


def _check_step(step: int) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step: expected an int >= 0, got {step!r}")


def _check_key(argument: str, key: object) -> None:
    if not isinstance(key, str) or key in RESERVED_KEYS:
        raise ValueError(f"{argument}: expected string keys other than {sorted(RESERVED_KEYS)}, got {key!r}")


def _check_finite(argument: str, values: Iterable[float]) -> None:
    for value in values:
        try:
            finite = isinstance(value, Real) and math.isfinite(value)
        except OverflowError:  # an int that no float can hold
            finite = False
        if not finite:
            got = f"{value!r:.40}" if isinstance(value, Real) else type(value).__name__
            raise ValueError(f"{argument}: expected finite plain numbers, got {got}")


class NullLogger:
    """A logger that writes nothing."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def event(self, kind: str, fields: Mapping[str, object], step: int) -> None:
        """Do nothing."""

    def record(self, kind: str, fields: Mapping[str, object], step: int) -> None:
        """Do nothing."""

    def alert(self, kind: str, title: str, text: str, level: Level, fields: Mapping[str, object], step: int) -> None:
        """Do nothing."""

    def histogram(self, key: str, values: Sequence[float], step: int) -> None:
        """Do nothing."""

    def heatmap(self, key: str, rows: Sequence[Sequence[float]], labels: Sequence[str], step: int) -> None:
        """Do nothing."""

    def close(self, exit_code: int = 0) -> None:
        """Do nothing."""


class MultiLogger:
    """Feed several loggers; one that fails (disk full, service gone) is dropped with one warning, the rest go on.

    Rows are checked before any logger sees them, so a caller's mistake is still a ValueError and drops nobody.

    Args:
        loggers: the loggers, fed in this order.
    """

    def __init__(self, loggers: Iterable[Logger]) -> None:
        self.loggers = list(loggers)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one row of numbers to every logger (see ``Logger.log``)."""
        check_metrics(metrics, step)
        self._feed(f"step {step}", lambda logger: logger.log(metrics, step))

    def event(self, kind: str, fields: Mapping[str, object], step: int) -> None:
        """Write one event to every logger (see ``Logger.event``)."""
        check_event(kind, fields, step)
        self._feed(f"step {step}", lambda logger: logger.event(kind, fields, step))

    def record(self, kind: str, fields: Mapping[str, object], step: int) -> None:
        """Write one row for programs to every logger (see ``Logger.record``)."""
        check_event(kind, fields, step)
        self._feed(f"step {step}", lambda logger: logger.record(kind, fields, step))

    def alert(self, kind: str, title: str, text: str, level: Level, fields: Mapping[str, object], step: int) -> None:
        """Write one alert to every logger (see ``Logger.alert``)."""
        check_alert(kind, title, text, level, fields, step)
        self._feed(f"step {step}", lambda logger: logger.alert(kind, title, text, level, fields, step))

    def histogram(self, key: str, values: Sequence[float], step: int) -> None:
        """Write one distribution to every logger (see ``Logger.histogram``)."""
        check_histogram(key, values, step)
        self._feed(f"step {step}", lambda logger: logger.histogram(key, values, step))

    def heatmap(self, key: str, rows: Sequence[Sequence[float]], labels: Sequence[str], step: int) -> None:
        """Write one matrix to every logger (see ``Logger.heatmap``)."""
        check_heatmap(key, rows, labels, step)
        self._feed(f"step {step}", lambda logger: logger.heatmap(key, rows, labels, step))

    def close(self, exit_code: int = 0) -> None:
        """Close every logger; one that fails to close does not keep the others open."""
        self._feed("close", lambda logger: logger.close(exit_code))

    def _feed(self, when: str, call: Callable[[Logger], None]) -> None:
        for logger in list(self.loggers):
            try:
                call(logger)
            except Exception as error:
                self._drop(logger, when, error)

    def _drop(self, logger: Logger, when: str, error: Exception) -> None:
        self.loggers.remove(logger)
        with suppress(Exception):  # it failed already; this only frees its file or process
            logger.close(exit_code=1)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        message = f"{type(logger).__name__} failed at {when} and is dropped; the run goes on ({reason})"
        warnings.warn(message, RuntimeWarning, stacklevel=4)  # the caller's line
