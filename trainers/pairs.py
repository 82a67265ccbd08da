"""Two ways of doing the same work, timed in turn; and a part of some work, timed while the work is done."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest import mock

SAMPLE_SECONDS = 0.1  # one side of a pair is the mean over as many calls, taking turns with the other's


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two ways of doing the same work.

    Args:
        name: what the row is called.
        ours: does the work once, our way.
        theirs: does the work once, the other way.
        goal: the least ratio (their time) / (our time) wanted; None, there is no goal.
    """

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    goal: float | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some work, and the functions of it whose share of its time is wanted: a row of "ours" in "theirs".

    Args:
        name: what the row is called.
        build: makes the work, once, and returns what does it once more.
        functions: (class, name) of its methods; none calls another of them.
        calls: of the work, in one sample.
        goal: the least ratio (time of the work) / (time in the functions) wanted; None, there is no goal.
    """

    name: str
    build: Callable[[], Callable[[], object]]
    functions: Sequence[tuple[type, str]]
    calls: int = 1
    goal: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What the pairs of one comparison gave.

    Args:
        comparison: what was compared.
        ours: seconds of one call, one for each pair.
        theirs: likewise.
    """

    comparison: Comparison | Part
    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """(their time) / (our time) of every pair."""
        return [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of ``ratios``."""
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool | None:
        """Whether the goal was reached; None without a goal."""
        goal = self.comparison.goal
        return None if goal is None else self.ratio >= goal


def measure(comparison: Comparison | Part, repeats: int, synchronize: Callable[[], None]) -> Measurement:
    """Time both sides in turn, A B B A A B …, so that neither has the better moments or the warmer cache.

    Args:
        comparison: what to compare; a part is timed inside of its work.
        repeats: pairs, at least 1.
        synchronize: waits until the device has finished; does nothing on a CPU.

    Returns:
        The seconds of one call of each side in each pair.

    Raises:
        ValueError: repeats below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if isinstance(comparison, Part):
        return _measure_part(comparison, repeats, synchronize)
    for side in (comparison.ours, comparison.theirs):  # warm up, twice: the first backward also allocates
        side()
        side()
    calls = max(1, round(SAMPLE_SECONDS / _seconds(comparison.theirs, synchronize)))
    ours: list[float] = []
    theirs: list[float] = []
    turns = [(comparison.ours, ours), (comparison.theirs, theirs)]
    for _ in range(repeats):
        for _, times in turns:
            times.append(0.0)
        for _ in range(calls):
            for side, times in turns:
                times[-1] += _seconds(side, synchronize) / calls
            turns.reverse()
    return Measurement(comparison=comparison, ours=tuple(ours), theirs=tuple(theirs))


def _measure_part(part: Part, repeats: int, synchronize: Callable[[], None]) -> Measurement:
    ours, theirs = [], []
    with _stopwatch(part.functions) as watch:
        work = part.build()
        work()
        for _ in range(repeats):
            before = watch.seconds
            theirs.append(sum(_seconds(work, synchronize) for _ in range(part.calls)) / part.calls)
            ours.append((watch.seconds - before) / part.calls)
    return Measurement(comparison=part, ours=tuple(ours), theirs=tuple(theirs))


@dataclass
class _Watch:
    seconds: float = 0.0


@contextmanager
def _stopwatch(functions: Sequence[tuple[type, str]]) -> Iterator[_Watch]:
    """Add up the seconds that are spent in methods, of whatever is made inside."""
    watch = _Watch()

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                watch.seconds += time.perf_counter() - start

        return call

    with ExitStack() as patches:
        for owner, name in functions:
            patches.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
        yield watch


def _seconds(call: Callable[[], object], synchronize: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start
