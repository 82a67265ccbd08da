"""The logger protocol, the logger that does nothing, and the one that feeds several others."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from numbers import Real
from typing import Protocol

RESERVED_KEYS = frozenset({"step", "time", "event", "non_finite"})
"""Keys that a logger writes itself beside the caller's."""


class Logger(Protocol):
    """What a training loop needs of a log: numbers, things that happened, and an end."""

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


def _check_step(step: int) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step: expected an int >= 0, got {step!r}")


def _check_key(argument: str, key: object) -> None:
    if not isinstance(key, str) or key in RESERVED_KEYS:
        raise ValueError(f"{argument}: expected string keys other than {sorted(RESERVED_KEYS)}, got {key!r}")


class NullLogger:
    """A logger that writes nothing."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def event(self, kind: str, fields: Mapping[str, object], step: int) -> None:
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
        for logger in list(self.loggers):
            try:
                logger.log(metrics, step)
            except Exception as error:
                self._drop(logger, f"step {step}", error)

    def event(self, kind: str, fields: Mapping[str, object], step: int) -> None:
        """Write one event to every logger (see ``Logger.event``)."""
        check_event(kind, fields, step)
        for logger in list(self.loggers):
            try:
                logger.event(kind, fields, step)
            except Exception as error:
                self._drop(logger, f"step {step}", error)

    def close(self, exit_code: int = 0) -> None:
        """Close every logger; one that fails to close does not keep the others open."""
        for logger in list(self.loggers):
            try:
                logger.close(exit_code)
            except Exception as error:
                self._drop(logger, "close", error)

    def _drop(self, logger: Logger, when: str, error: Exception) -> None:
        self.loggers.remove(logger)
        with suppress(Exception):  # it failed already; this only frees its file or process
            logger.close(exit_code=1)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        message = f"{type(logger).__name__} failed at {when} and is dropped; the run goes on ({reason})"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
