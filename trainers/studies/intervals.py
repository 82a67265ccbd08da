"""Means over seeds with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import covariance, fmean, stdev, variance


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and its confidence interval.

    Attributes:
        mean: the mean.
        half_width: of Student's interval; NaN for a single value, of which nothing can be said.
        n: how many values.
        lowest: the least a value can be, where the interval is cut.
        highest: the most.
    """

    mean: float
    half_width: float
    n: int
    lowest: float = -math.inf
    highest: float = math.inf

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return max(self.lowest, self.mean - self.half_width) if self.n > 1 else math.nan

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return min(self.highest, self.mean + self.half_width) if self.n > 1 else math.nan


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the mean of independent values with Student's confidence interval.

    Args:
        values: one or more, e.g. of different seeds.
        confidence: of the interval.

    Raises:
        ValueError: no values, or a confidence outside of 0 … 1.
    """
    if not values or not 0 < confidence < 1:
        raise ValueError(f"expected values and 0 < confidence < 1, got {len(values)} values and {confidence}")
    n = len(values)
    half_width = _quantile(n - 1, confidence) * stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return Interval(mean=fmean(values), half_width=half_width, n=n)


def _quantile(degrees: int, confidence: float) -> float:
    """Return Student's two-sided quantile."""
    from scipy.special import stdtrit  # type: ignore[import-untyped]  # geoopt brings scipy; only reports need it

    return float(stdtrit(degrees, 0.5 + confidence / 2))


def share_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the mean of shares, each in 0 … 1, with Student's interval cut there.

    Args:
        values: as in ``mean_interval``.
        confidence: as in ``mean_interval``.

    Raises:
        ValueError: as in ``mean_interval``, or a value outside of 0 … 1.
    """
    if any(not 0 <= value <= 1 for value in values):
        raise ValueError(f"expected shares in 0 … 1, got {min(values)} … {max(values)}")
    found = mean_interval(values, confidence)
    return Interval(mean=found.mean, half_width=found.half_width, n=found.n, lowest=0.0, highest=1.0)


def paired_difference(
    ours: Mapping[int, float], theirs: Mapping[int, float], confidence: float = 0.95
) -> Interval | None:
    """Return the mean of ours - theirs over the seeds both have: what the seeds share cancels out.

    Args:
        ours: values by seed.
        theirs: values by seed.
        confidence: as in ``mean_interval``.

    Returns:
        The difference; None if no seed is in both.
    """
    differences = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    return mean_interval(differences, confidence) if differences else None


@dataclass(frozen=True, kw_only=True)
class Equivalence:
    """A paired difference beside a margin within which two things count as equal.

    Attributes:
        difference: ours - theirs, with its 95% interval.
        margin: half the width of what counts as equal.
        p: of two one-sided t-tests (TOST) against a difference as large as the margin; NaN for a single pair.
        alpha: below which p shows equality: the interval of confidence 1 - 2 alpha lies within the margin.
    """

    difference: Interval
    margin: float
    p: float
    alpha: float = 0.05

    @property
    def equivalent(self) -> bool:
        """Whether the difference is shown to be smaller than the margin."""
        return self.p < self.alpha

    def verdict(self, rising: bool = False) -> str:
        """Return "equivalent", "better", "worse" or "inconclusive", the first of these that is shown.

        A difference that is shown and is smaller than the margin is "equivalent (better)" or "equivalent (worse)".

        Args:
            rising: whether more is better.
        """
        found = self.difference
        shown = found.low > 0 or found.high < 0  # not so where there is no interval
        direction = "better" if (found.mean > 0) == rising else "worse"
        if self.equivalent:
            return f"equivalent ({direction})" if shown else "equivalent"
        return direction if shown else "inconclusive"


def equivalence(
    ours: Mapping[int, float], theirs: Mapping[int, float], margin: float, alpha: float = 0.05
) -> Equivalence | None:
    """Compare two things over the seeds both have.

    Args:
        ours: values by seed.
        theirs: values by seed.
        margin: what counts as equal, as a share of the mean of theirs (over those seeds).
        alpha: of each of the two tests.

    Returns:
        The comparison; None if no seed is in both.

    Raises:
        ValueError: a margin that is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"expected a margin above 0, got {margin}")
    found = paired_difference(ours, theirs)
    if found is None:
        return None
    width = margin * abs(fmean(theirs[seed] for seed in ours if seed in theirs))
    differences = [value - theirs[seed] for seed, value in ours.items() if seed in theirs]
    return Equivalence(difference=found, margin=width, p=_tost(differences, width), alpha=alpha)


def _tost(differences: Sequence[float], margin: float) -> float:
    """Return the larger p of the tests that the mean is above -margin, and below it."""
    from scipy.special import stdtr

    n, mean = len(differences), fmean(differences)
    if n < 2:
        return math.nan
    error, distance = stdev(differences) / math.sqrt(n), margin - abs(mean)
    if error == 0:
        return 0.0 if distance > 0 else 1.0
    return float(stdtr(n - 1, -distance / error))


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A ratio of two means and its confidence interval, which is not symmetric.

    Attributes:
        value: the ratio.
        low: the interval's lower end.
        high: its upper end.
        n: how many pairs.
    """

    value: float
    low: float
    high: float
    n: int


def ratio_of_means(
    numerators: Sequence[float], denominators: Sequence[float], confidence: float = 0.95
) -> Ratio | None:
    """Return the ratio of the means of pairs with Fieller's interval.

    The interval holds every ratio r for which 0 is in Student's interval of the mean of numerator - r · denominator.

    Args:
        numerators: of independent pairs, e.g. of different seeds.
        denominators: of the same pairs.
        confidence: as in ``mean_interval``.

    Returns:
        The ratio; None where the denominators' own interval holds 0, or there is one pair: any ratio is possible then.

    Raises:
        ValueError: as in ``mean_interval``, or not as many denominators as numerators.
    """
    if len(numerators) != len(denominators):
        raise ValueError(f"expected pairs, got {len(numerators)} numerators and {len(denominators)} denominators")
    above, below = (mean_interval(values, confidence) for values in (numerators, denominators))
    n = below.n
    if not abs(below.mean) > below.half_width:
        return None
    # a r² - 2 b r + c <= 0
    k = _quantile(n - 1, confidence) ** 2 / n
    a = below.mean**2 - k * variance(denominators)
    b = above.mean * below.mean - k * covariance(numerators, denominators)
    c = above.mean**2 - k * variance(numerators)
    root = math.sqrt(max(b * b - a * c, 0.0))
    return Ratio(value=above.mean / below.mean, low=(b - root) / a, high=(b + root) / a, n=n)


def mean_ratio(numerators: Sequence[float], denominators: Sequence[float], confidence: float = 0.95) -> Ratio:
    """Return the geometric mean of the ratios of pairs, with Student's interval of their logarithms.

    Twice and half as much weigh alike.

    Args:
        numerators: of independent pairs, above 0.
        denominators: of the same pairs, above 0.
        confidence: as in ``mean_interval``.

    Returns:
        The ratio; without an interval (NaN) for a single pair.

    Raises:
        ValueError: as in ``mean_interval``.
    """
    found = mean_interval(
        [math.log(above / below) for above, below in zip(numerators, denominators, strict=True)], confidence
    )
    return Ratio(value=math.exp(found.mean), low=math.exp(found.low), high=math.exp(found.high), n=found.n)


def with_ends(ratio: Ratio | None, digits: int = 2) -> str:
    """Return "1.07 (1.02 to 1.13)"; the ratio alone for a single pair; "-" where there is none."""
    if ratio is None:
        return "-"
    value = f"{ratio.value:.{digits}f}"
    return value if math.isnan(ratio.low) else f"{value} ({ratio.low:.{digits}f} to {ratio.high:.{digits}f})"


def with_pairs(difference: Interval | None, digits: int = 3) -> str:
    """Return a paired difference with its sign and number of pairs, "+0.012 ± 0.005 (3)"; "-" where there is none."""
    return "-" if difference is None else f"{with_half_width(difference, '+', digits)} ({difference.n})"


def with_half_width(interval: Interval | None, sign: str = "", digits: int = 3) -> str:
    """Return "1.234 ± 0.005"; the mean alone where one value says nothing of its uncertainty; "-" without any.

    Args:
        interval: the mean.
        sign: ``"+"`` for one in any case.
        digits: after the point.
    """
    if interval is None:
        return "-"
    mean = f"{interval.mean:{sign}.{digits}f}"
    return mean if math.isnan(interval.half_width) else f"{mean} ± {interval.half_width:.{digits}f}"
