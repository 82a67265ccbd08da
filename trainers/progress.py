"""The progress of a run for a person: a live bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

#: Smoothing of the tokens per second shown, per step.
SMOOTHING = 0.1


class Progress(Protocol):
    """What the training loop tells: a context in which ``update`` is called once a step, ``mark`` now and then."""

    def __enter__(self) -> Progress:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End, whatever happened."""

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """Show that ``step`` steps are done and what the last one found."""

    def mark(self, step: int, line: str) -> None:
        """Show one line about something that happened."""


class Silent:
    """Shows nothing."""

    def __enter__(self) -> Silent:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """Do nothing."""

    def mark(self, step: int, line: str) -> None:
        """Do nothing."""


class Lines(Silent):
    """Prints a line every ``seconds`` seconds and at the last step: for output that is not a terminal.

    Args:
        steps: steps of the whole run.
        seconds: between lines.
    """

    def __init__(self, steps: int, seconds: float = 10.0) -> None:
        self._steps, self._seconds = steps, seconds
        self._next = 0.0
        self._speed = _Speed()

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """Print a line if it is time."""
        fields = _fields(scalars, self._speed)
        if time.monotonic() >= self._next or step == self._steps:
            self._next = time.monotonic() + self._seconds
            layers = "".join(f"  {line}" for line in layer_lines(scalars))
            print(f"step {step}/{self._steps}  {fields}{layers}", flush=True)

    def mark(self, step: int, line: str) -> None:
        """Print the line at once."""
        print(f"step {step}  {line}", flush=True)


class Bar(Silent):
    """A live bar with the loss, tokens a second and dead experts, and under it FSI and FHS of every layer.

    Args:
        steps: steps of the whole run.
        done: steps done before (of a resumed run).
    """

    def __init__(self, steps: int, done: int = 0) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = _with_layers(RichProgress)(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[s]}"),
        )
        self._task = self._bar.add_task("training", total=steps, completed=done, s="")
        self._speed = _Speed()

    def __enter__(self) -> Bar:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it is."""
        self._bar.stop()

    def update(self, step: int, scalars: Mapping[str, float]) -> None:
        """Move the bar, and show every layer."""
        self._bar.layers = layer_lines(scalars)
        self._bar.update(self._task, completed=step, s=_fields(scalars, self._speed))

    def mark(self, step: int, line: str) -> None:
        """Print the line above the bar."""
        # As it is: brackets are no markup, numbers and names have no colours of their own.
        self._bar.console.print(f"step {step}  {line}", markup=False, highlight=False, emoji=False)


def for_terminal(steps: int, done: int = 0) -> Progress:
    """Return a live bar if the output is a terminal, else lines."""
    from rich.console import Console

    return Bar(steps, done) if Console().is_terminal else Lines(steps)


class _Speed:
    """Tokens a second, smoothed over steps."""

    def __init__(self) -> None:
        self._seconds_per_token: float | None = None

    def __call__(self, tokens_per_second: float) -> float:
        latest, former = 1 / tokens_per_second, self._seconds_per_token
        self._seconds_per_token = latest if former is None else former + SMOOTHING * (latest - former)
        return 1 / self._seconds_per_token


def layer_lines(scalars: Mapping[str, float]) -> list[str]:
    """Return FSI and FHS: a line each with a number for each layer (of at most 12), or one line for the whole model."""
    lines = []
    for name, label in (("fsi", "FSI by layer"), ("fhs", "FHS by layer")):
        values = [value for key, value in scalars.items() if re.fullmatch(rf"geometry/[^/]+/{name}", key)]
        if values:
            shown = " ".join(f"{value:.3f}" for value in values[:12])
            lines.append(f"{label} {shown}{' …' if len(values) > 12 else ''}")
    names = (("fsi", "FSI"), ("fhs", "FHS"))
    whole = [f"{label} {scalars[f'geometry/{n}']:.3f}" for n, label in names if f"geometry/{n}" in scalars]
    return lines or (["  ".join(whole)] if whole else [])


def _with_layers(progress: type[Any]) -> type[Any]:
    """Return rich's bar with the layers' lines under it."""

    class WithLayers(progress):
        layers: Sequence[str] = ()

        def get_renderables(self) -> Iterator[Any]:
            yield from super().get_renderables()
            yield from self.layers

    return WithLayers


def _fields(scalars: Mapping[str, float], speed: _Speed) -> str:
    return (
        f"loss {scalars['train/loss']:.3f}  {speed(scalars['train/tokens_per_second']):,.0f} tokens/s  "
        f"dead {scalars.get('geometry/dead_fraction', math.nan):.0%}"
    )
