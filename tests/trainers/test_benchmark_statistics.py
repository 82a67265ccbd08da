"""The benchmark's statistics: equivalence and ratios beside scipy's, verdicts, targets."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trainers.studies.benchmark_results import loss_at, smoothed, tokens_to
from trainers.studies.benchmark_tasks import TIERS
from trainers.studies.intervals import equivalence, mean_interval, mean_ratio, with_ends

CPU = TIERS["cpu"]

# --- equivalence ------------------------------------------------------------------------------------------------------

values = st.lists(st.floats(1.0, 2.0), min_size=2, max_size=12)


@settings(max_examples=60, deadline=None)
@given(values, st.floats(0.001, 0.3), st.integers(0, 10**6))
def test_equivalence_is_scipys_two_one_sided_tests(theirs, margin, seed):
    noise = random.Random(seed)
    ours = [value + noise.gauss(0, 0.1) for value in theirs]
    found = equivalence(dict(enumerate(ours)), dict(enumerate(theirs)), margin)
    width = margin * sum(theirs) / len(theirs)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    above = stats.ttest_1samp(differences, -width, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, width, alternative="less").pvalue
    assert found.margin == pytest.approx(width)
    assert found.p == pytest.approx(max(above, below), abs=1e-9)
    # p < 5% and the 90% interval within the margin are the same.
    interval = mean_interval(differences, 0.9)
    if abs(found.p - 0.05) > 1e-6:
        assert found.equivalent == (-width < interval.low and interval.high < width)
    p = stats.ttest_rel(ours, theirs).pvalue
    if abs(p - 0.05) > 1e-6 and not found.equivalent:
        assert (found.verdict() == "inconclusive") == (p > 0.05)


@pytest.mark.parametrize(
    ("differences", "rising", "verdict"),
    [
        ([0.001, -0.001, 0.0005, -0.0005], False, "equivalent"),
        ([0.001, 0.0012, 0.0011, 0.0009], False, "equivalent (worse)"),
        ([0.001, 0.0012, 0.0011, 0.0009], True, "equivalent (better)"),
        ([-0.03, -0.02, -0.025, -0.03], False, "better"),
        ([-0.03, -0.02, -0.025, -0.03], True, "worse"),
        ([0.03, 0.02, 0.025, 0.03], False, "worse"),
        ([0.03, -0.02, 0.025, -0.03], False, "inconclusive"),
        ([0.0], False, "inconclusive"),  # one pair says nothing
        ([0.0, 0.0], False, "equivalent"),  # the very same numbers
        ([0.1, 0.1], False, "worse"),
    ],
)
def test_verdicts(differences, rising, verdict):
    theirs = dict.fromkeys(range(len(differences)), 1.5)
    ours = {seed: 1.5 + difference for seed, difference in enumerate(differences)}
    found = equivalence(ours | {77: 9.0}, theirs | {78: 1.0}, 0.005)
    assert found.verdict(rising) == verdict
    assert found.margin == pytest.approx(0.0075)  # of the seeds both have
    assert math.isnan(found.p) == (len(differences) == 1)


def test_equivalence_needs_a_pair_and_a_margin():
    assert equivalence({0: 1.0}, {1: 1.0}, 0.005) is None
    with pytest.raises(ValueError, match="expected a margin above 0, got 0"):
        equivalence({0: 1.0}, {0: 1.0}, 0.0)


@settings(max_examples=30, deadline=None)
@given(values, st.integers(0, 10**6))
def test_a_mean_ratio_is_of_logarithms(below, seed):
    noise = random.Random(seed)
    above = [value * math.exp(noise.gauss(0, 0.3)) for value in below]
    found = mean_ratio(above, below)
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    assert found.value == pytest.approx(stats.gmean(ratios))
    interval = stats.ttest_1samp([math.log(ratio) for ratio in ratios], 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((math.exp(interval.low), math.exp(interval.high)))
    turned = mean_ratio(below, above)
    assert turned.value * found.value == pytest.approx(1)
    assert with_ends(found) == f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def test_one_pair_has_a_ratio_and_no_interval():
    assert with_ends(mean_ratio([3.0], [2.0])) == "1.50"
    assert with_ends(None) == "-"


# --- tokens to a target -----------------------------------------------------------------------------------------------


def test_between_its_points_a_curve_is_straight():
    curve = [(100.0, 4.0), (200.0, 3.0), (300.0, 3.5), (400.0, 2.5)]
    assert [loss_at(curve, tokens) for tokens in (50, 100, 150, 250, 400, 999)] == [4.0, 4.0, 3.5, 3.25, 2.5, 2.5]
    assert tokens_to(curve, 4.5) == 100
    assert tokens_to(curve, 3.25) == 175  # the first time
    assert tokens_to(curve, 2.75) == 375
    assert tokens_to(curve, 2.0) is None


def test_noise_is_averaged_away_before_a_target_is_looked_for():
    curve = [(float(index), 1.0 if index == 3 else 5.0) for index in range(12)]
    found = smoothed(curve)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in curve]
    assert [loss for _, loss in found[:9]] == pytest.approx([5, 5, 5, 4, 4.2, 4.2, 4.2, 4.2, 5])
