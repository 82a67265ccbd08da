"""The logger of a run of transformers' ``Trainer``: one that is given, or one that is made when training begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..loggers import Logger, MultiLogger

#: Makes a logger, of the step that a run goes on from; None: of a new one.
LoggerOfStep = Callable[[int | None], Logger]


class RunLog:
    """Holds the logger of a run, and drops it if it fails.

    Args:
        logger: one that is open, and stays so; or a function that makes one for every run, which ends with it.

    Attributes:
        logger: None where there is none, or none yet.

    Raises:
        TypeError: neither of them.
    """

    def __init__(self, logger: Logger | LoggerOfStep | None) -> None:
        makes = callable(logger) and not isinstance(logger, Logger | type)
        self._make: Any = logger if makes else None
        self.logger = None if makes or logger is None else MultiLogger([_checked(logger)])

    def begin(self, step: int, *, resumed: bool) -> None:
        """Have the logger made, and anew where a run begins again inside of its ``train()``.

        Args:
            step: that it begins with.
            resumed: whether it goes on from a checkpoint.

        Raises:
            TypeError: what was made is no logger.
        """
        if self._make is None:
            return
        again = self.logger is not None
        self.end(exit_code=1)
        self.logger = MultiLogger([_checked(self._make(step if resumed or again else None))])

    def end(self, exit_code: int) -> None:
        """Close the logger that was made, if one was."""
        if self._make is not None and self.logger is not None:
            self.logger.close(exit_code)
            self.logger = None


def _checked(logger: object) -> Logger:
    if isinstance(logger, Logger) and not isinstance(logger, type):
        return logger
    raise TypeError(
        "logger must be one of moegeo_router.loggers (WandbLogger.of(wandb.init(...)), JSONLLogger(path) ...), or a "
        f"function that makes one of the step it goes on from, got {logger!r:.80}"
    )
