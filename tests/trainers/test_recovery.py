"""Whether the controller repaired a fault: shares of the harm with Fieller's interval, and runs that it saved."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.studies import region_row
from trainers.studies.faults import HEALTHY
from trainers.studies.faults_report import write_faults
from trainers.studies.intervals import mean_interval, ratio_of_means
from trainers.studies.recovery import repair, together

# --- ratios of means --------------------------------------------------------------------------------------------------


def test_ratio_of_two_pairs_worked_out_by_hand():
    # Means .055 and .105; variances and covariance 5e-5 each; t² / n = 12.7062² / 2 = 80.72, times these .004036.
    # a = .105² - .004036, b = .055 · .105 - .004036, c = .055² - .004036: roots -.2058 and .7033.
    found = ratio_of_means([0.05, 0.06], [0.10, 0.11])
    assert found is not None
    assert found.value == pytest.approx(0.055 / 0.105)
    assert (found.low, found.high) == (pytest.approx(-0.2058, abs=2e-4), pytest.approx(0.7033, abs=2e-4))
    assert found.n == 2


VALUES = st.lists(st.tuples(st.floats(-1, 1), st.floats(0.5, 1)), min_size=3, max_size=8)


@given(VALUES)
def test_at_its_ends_the_difference_is_just_not_told_from_0(pairs):
    above, below = [a for a, _ in pairs], [b for _, b in pairs]
    found = ratio_of_means(above, below)
    interval = mean_interval(below)
    assert (found is None) == (not interval.low > 0)
    if found is None:
        return
    assert found.low <= found.value + 1e-9
    assert found.value <= found.high + 1e-9
    if interval.low < 0.05:
        return  # the ends are far away, and rounding large
    for end in (found.low, found.high):
        left = mean_interval([a - end * b for a, b in pairs])
        assert abs(left.mean) == pytest.approx(left.half_width, rel=1e-4, abs=1e-6)


def test_where_the_denominator_may_be_0_any_ratio_is_possible():
    assert ratio_of_means([1.0, 1.1], [0.1, -0.1]) is None
    assert ratio_of_means([1.0], [2.0]) is None
    with pytest.raises(ValueError, match="expected pairs"):
        ratio_of_means([1.0, 2.0], [1.0])


# --- repairs ----------------------------------------------------------------------------------------------------------


def rows(fault: str, controller: str, losses: list[float | None], setting: str = "language", **more):
    """Runs of seeds 0, 1 …; None diverged."""
    labels = {"setting": setting, "arm": "linear_adamw", "fault": fault, "controller": controller, "onset": 0}
    return [
        region_row("", 1.0, 0.01, seed, loss, key=f"{setting}/{fault}/{controller}/seed{seed}", labels=labels, **more)
        for seed, loss in enumerate(losses)
    ]


HEALTHY_OFF = [1.70, 1.72, 1.71]


def cell(off: list[float | None], on: list[float | None]) -> str:
    return str(repair(rows("f", "off", off), rows("f", "on", on), rows(HEALTHY, "off", HEALTHY_OFF)))


def test_share_of_the_harm_that_was_taken_back():
    # Harms .20 in every seed, gains .10, .15, .05: mean .10, standard error .05 / √3, times 4.3027, over .20: ± 62.1%.
    off = [1.90, 1.92, 1.91]
    assert cell(off, [1.80, 1.77, 1.86]) == "50% [-12%, 112%] (3)"
    assert cell(off, HEALTHY_OFF) == "100% [100%, 100%] (3)"
    assert cell(off, off) == "0% [0%, 0%] (3)"
    assert cell(off, [2.00, 2.02, 2.01]) == "-50% [-50%, -50%] (3)"


def test_without_harm_there_is_no_share():
    assert cell([1.71, 1.71, 1.72], [1.9, 1.9, 1.9]) == "no harm"  # +.01, -.01, +.01
    assert cell([1.60, 1.62, 1.61], [1.9, 1.9, 1.9]) == "no harm"  # the fault did good
    assert cell([1.9], [1.8]) == "-"  # of one seed nothing can be said
    assert cell([1.9, 1.92, 1.91], []) == "-"  # not run with the controller


def test_diverged_runs_are_counted_and_not_put_in_nats():
    assert cell([None, None, None], [1.71, None, 1.72]) == "survived 2/3"
    assert cell([None, 1.92, 1.91], [1.71, 1.92, 1.91]) == "survived 1/1; 0% [0%, 0%] (2)"
    assert cell([None, 1.92, 1.91], [1.71, None, 1.91]) == "survived 1/1; lost 1"
    assert cell([1.90, 1.92, 1.91], [None, 1.82, 1.81]) == "50% [50%, 50%] (2); lost 1"
    failed = rows("f", "on", [None], status="failed")
    assert str(repair(rows("f", "off", [None]), failed, rows(HEALTHY, "off", [1.7]))) == "-"


def test_together_adds_harms_and_gains_of_every_seed():
    healthy = rows(HEALTHY, "off", HEALTHY_OFF)
    one = repair(rows("a", "off", [1.9, 1.92, 1.91]), rows("a", "on", [1.8, 1.82, 1.81]), healthy)  # .1 of .2
    two = repair(rows("b", "off", [2.1, 2.12, 2.11]), rows("b", "on", [2.1, 2.12, 2.11]), healthy)  # 0 of .4
    none = repair(rows("c", "off", HEALTHY_OFF), rows("c", "on", [1.73, 1.75, 1.74]), healthy)  # spoils .03 of nothing
    saved = repair(rows("d", "off", [None, None]), rows("d", "on", [1.7, None]), healthy)
    assert together([one, two, saved]) == (
        "17% [17%, 17%] (3) of the harm of 2 faults repaired; 1 of 2 diverged runs survived, 0 lost."
    )
    assert together([one, two, none]) == (  # .07 of .6
        "12% [12%, 12%] (3) of the harm of 3 faults repaired; 0 of 0 diverged runs survived, 0 lost."
    )
    assert together([none]) == "no harm in nats; 0 of 0 diverged runs survived, 0 lost."
    # Seeds that not every fault has are left out: what a sum misses must not look repaired.
    three = repair(rows("e", "off", [None, 1.92, 1.91]), rows("e", "on", [None, 1.72, 1.71]), healthy)  # .2 of .2
    assert together([one, three]) == (
        "75% [75%, 75%] (2) of the harm of 2 faults repaired; 0 of 1 diverged runs survived, 0 lost."
    )


def test_report_says_what_was_repaired_in_every_setting_and_in_all(tmp_path):
    found = []
    for setting, gain in (("language", 0.1), ("vision", 0.0)):
        found += rows(HEALTHY, "off", HEALTHY_OFF, setting) + rows(HEALTHY, "on", HEALTHY_OFF, setting)
        found += rows("row_drift", "off", [1.9, 1.92, 1.91], setting)
        found += rows("row_drift", "on", [1.9 - gain, 1.92 - gain, 1.91 - gain], setting)
        found += rows("domain_shift", "off", [2.7, 2.72, 2.71], setting)
        found += rows("domain_shift", "on", [2.7, 2.72, 2.71], setting)
    text = write_faults(found, tmp_path).read_text()
    assert "| -0.100 ± 0.000 (3) | 50% [50%, 50%] (3) |" in text
    assert "| +0.000 ± 0.000 (3) | 0% [0%, 0%] (3) |" in text
    # The domain shift, of which nothing was repaired, is in none of them.
    sums = [line for line in text.splitlines() if line.startswith("Together: ")]
    parts = [
        "50% [50%, 50%] (3) of the harm of 1 ",
        "0% [0%, 0%] (3) of the harm of 1 ",
        "25% [25%, 25%] (3) of the harm",
    ]
    assert [line.startswith(f"Together: {part}") for line, part in zip(sums, parts, strict=True)] == [True] * 3
