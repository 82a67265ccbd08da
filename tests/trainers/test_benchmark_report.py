"""The benchmark's statistics and its report: equivalence beside scipy's tests, verdicts, targets, what is missing."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests.support.studies import benchmark_rows
from trainers.studies.benchmark import ARMS, TIERS, main_runs, tuning_runs
from trainers.studies.benchmark_report import write_benchmark
from trainers.studies.benchmark_results import loss_at, results_of, tokens_to
from trainers.studies.benchmark_stages import Benchmark
from trainers.studies.intervals import equivalence, mean_interval
from trainers.studies.rows import RowsFile
from trainers.studies.runs import StudyError

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


# --- tokens to a target -----------------------------------------------------------------------------------------------


def test_between_its_points_a_curve_is_straight():
    curve = [(100.0, 4.0), (200.0, 3.0), (300.0, 3.5), (400.0, 2.5)]
    assert [loss_at(curve, tokens) for tokens in (50, 100, 150, 250, 400, 999)] == [4.0, 4.0, 3.5, 3.25, 2.5, 2.5]
    assert tokens_to(curve, 4.5) == 100
    assert tokens_to(curve, 3.25) == 175  # the first time
    assert tokens_to(curve, 2.75) == 375
    assert tokens_to(curve, 2.0) is None


# --- the report -------------------------------------------------------------------------------------------------------


def curve(speed: float, points: int = 8) -> dict[str, list[float]]:
    steps = range(1, points + 1)
    return {"tokens": [1000.0 * step for step in steps], "loss": [4.0 - speed * step / points for step in steps]}


def rows_of(task: str = "planted", ours: float = -0.0001, seeds: int = 10):
    """Rows in which ours differ from the baseline by ``ours``, hash is worse and dense diverged once."""
    noise = random.Random(0)
    found = []
    for number, arm in enumerate(("linear_switch", "linear_bias", "polar_natural", "hash", "dense")):
        # The loss-free baseline tunes best, the other one ends better.
        tuned = [2.0 + 0.1 * abs(index - 2) - 0.01 * (number == 1) for index in range(6)]
        found += benchmark_rows(CPU, tuning_runs(CPU, task, arm), tuned)
    shared = [1.9 + noise.random() / 10 for _ in range(max(seeds, 5))]
    tuned_to = {row["labels"]["arm"]: row["labels"]["setting"] for row in found}
    for arm, count, difference in (
        ("linear_bias", seeds, 0.0),
        ("polar_natural", seeds, ours),
        ("linear_switch", 5, -0.05),
        ("hash", 4, 0.2),
        ("dense", 5, 0.0),
    ):
        losses = [loss + difference + noise.random() / 1000 for loss in shared[:count]]
        runs = main_runs(CPU, task, {arm: tuned_to[arm]}, {arm: count})
        done = [None if arm == "dense" and seed == 1 else loss for seed, loss in enumerate(losses)]
        speed = 2000.0 if arm == "polar_natural" else 1600.0
        own = benchmark_rows(
            CPU,
            runs,
            done,
            train__tokens_per_second=[speed] * count,
            valid__recovery=[0.75] * count,
            valid__accuracy=[1 - loss / 10 for loss in losses],
            valid__geometry__dead_experts=[2.0] * count,
            valid__geometry__layer0__max_load=[1.2] * count,
            valid__geometry__layer1__max_load=[1.4] * count,
        )
        for row in own:
            row["curve"] = curve(2.0 if arm == "polar_natural" else 0.5 if arm == "hash" else 1.0)
        found += own
    return found


def written(tmp_path, rows, task: str = "planted") -> str:
    with RowsFile(tmp_path / task / "rows.jsonl") as file:
        for row in rows:
            file.append(row)
    paths = write_benchmark(Benchmark(tier=CPU, out=tmp_path, command=""))
    assert [path.name for path in paths] == ["benchmark.md", "differences.png", "curves.png"]
    assert all(path.stat().st_size > 1000 for path in paths[1:])
    return paths[0].read_text()


def cells(text: str, arm: str, table: int = 0) -> list[str]:
    lines = [line for line in text.splitlines() if line.startswith(f"| {ARMS[arm].title} |")]
    return [cell.strip() for cell in lines[table].strip("|").split("|")][1:]


def test_report_says_what_the_rows_say(tmp_path):
    rows = rows_of()
    text = written(tmp_path, rows)
    baseline = "The baseline is linear, loss-free bias. (In the runs below linear, Switch loss has the better mean.)"
    assert baseline in text
    runs, mean, difference, percent, p, verdict = cells(text, "polar_natural")
    ours, theirs = (
        [
            row["results"]["valid/loss"]
            for row in rows
            if row["labels"]["arm"] == arm and row["labels"]["phase"] == "main"
        ]
        for arm in ("polar_natural", "linear_bias")
    )
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    width = (expected.high - expected.low) / 2
    assert difference == f"{(expected.high + expected.low) / 2:+.4f} ± {width:.4f} (10)"
    assert (runs, p, verdict) == ("10", "<0.001", "equivalent")
    assert mean.startswith(f"{sum(ours) / 10:.4f} ± ")
    assert percent in ("+0.00", "-0.00", "-0.01")
    assert cells(text, "linear_bias")[-1] == "the baseline"
    assert cells(text, "linear_switch")[-1] == "better"
    assert cells(text, "hash")[0] == "4 of 5 (1 missing)"
    assert cells(text, "hash")[-1] == "worse"
    assert cells(text, "dense")[0] == "4 of 5 (1 without a result)"
    assert cells(text, "soft") == ["0 of 5 (5 missing)", "-", "-", "-", "-", "missing"]
    assert "- planted/dense/seed1: diverged, NaN or inf at step 3" in text
    assert "Tasks without rows: language, fashion_mnist, cifar10, multidomain." in text


def test_report_has_routing_speed_and_tuning(tmp_path):
    text = written(tmp_path, rows_of())
    assert cells(text, "polar_natural", 1) == ["0.7500 ± 0.0000 (+0.0000 ± 0.0000)", "-"]
    violation, dead, *_, speed, step, tokens = cells(text, "polar_natural", 2)
    assert (violation, dead, speed) == ("0.3000 ± 0.0000", "2.0000 ± 0.0000", "2,000")
    # 1,600 tokens a second are to 2,000 as 0.8 to 1; a curve twice as steep is there in half of the tokens.
    assert (step, tokens) == ("0.80 ± 0.00", "0.50 ± 0.00")
    assert cells(text, "hash", 2)[-1] == "-, 4 never"
    assert cells(text, "dense", 2)[0] == "-"
    chosen, loss, tried = cells(text, "hash", 3)
    assert (chosen, loss) == ("lr 0.0028", "2.000")
    assert tried.count(";") == 5
    assert cells(text, "soft", 3) == ["missing", "-", "-"]


def test_more_accuracy_is_better_and_few_pairs_are_said(tmp_path):
    rows = rows_of("cifar10", ours=0.3, seeds=4)
    text = written(tmp_path, rows, "cifar10")
    assert cells(text, "polar_natural")[-1] == "worse (too few pairs)"
    assert cells(text, "hash")[-1] == "worse"
    assert cells(text, "linear_switch")[-1] == "better"


def test_without_a_baseline_nothing_is_compared(tmp_path):
    rows = [row for row in rows_of() if not ARMS[row["labels"]["arm"]].linear]
    found = results_of(CPU, "planted", rows)
    assert found.reference is None
    assert found.compared("polar_natural", "valid/loss") is None
    with RowsFile(tmp_path / "planted" / "rows.jsonl") as file:
        for row in rows:
            file.append(row)
    (text, *_) = write_benchmark(Benchmark(tier=CPU, out=tmp_path, command=""))
    assert "there is nothing to compare with" in text.read_text()


def test_rows_of_another_tier_are_refused(tmp_path):
    with RowsFile(tmp_path / "planted" / "rows.jsonl") as file:
        file.append(rows_of()[0] | {"study": "benchmark-smoke"})
    with pytest.raises(StudyError, match="holds rows of benchmark-smoke, not of benchmark-cpu"):
        write_benchmark(Benchmark(tier=CPU, out=tmp_path, command=""))
