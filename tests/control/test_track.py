"""A metric over time: averages, levels with hysteresis, drifts seen ahead."""

import math
import random

import pytest

from moegeo_router.control.thresholds import THRESHOLDS, Threshold, thresholds_with
from moegeo_router.control.track import CALM, CRITICAL, DRIFT, WARNING, Average, Averages, Track

ROW = Threshold(metric="m", failure="expert collapse", warning=1.0, critical=2.0, warmup=10, smoothing=5)


def levels(values, row=ROW):
    track, found = Track.new(), []
    for step, value in enumerate(values, start=1):
        track.update(value, step, row)
        found.append(track.level)
    return track, found


def test_the_average_is_that_of_its_definition():
    values = [0.3, 0.1, 0.7, 0.2]
    track, _ = levels(values)
    weights = [(1 - 1 / 5) ** (len(values) - 1 - i) for i in range(len(values))]
    assert track.fast.value == pytest.approx(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))


def test_averages_of_several_are_those_of_each_to_the_bit():
    noise, single, together = random.Random(0), [Average() for _ in range(3)], Averages([[0.0, 0.0]] * 3)
    assert all(map(math.isnan, together.values))
    for _ in range(50):
        values = [noise.random() for _ in single]
        together = Averages(together.pairs)  # as after a resume
        together.add(values, 20)
        for average, value in zip(single, values, strict=True):
            average.add(value, 20)
        assert together.values == tuple(average.value for average in single)
    assert Averages([]).values == ()


def test_levels_follow_thresholds_after_the_warm_up_and_end_below_where_they_began():
    _, found = levels([5.0] * 10 + [0.0] * 60)
    assert found[:10] == [CALM] * 10
    assert found[10] == CRITICAL
    assert found[-1] == CALM
    track, found = levels([1.05] * 40)
    assert found[-1] == WARNING
    assert track.since == 11
    for step in range(41, 60):
        track.update(0.9, step, ROW)  # below the warning, above its release at 0.8
        assert track.level == WARNING
    for step in range(60, 90):
        track.update(0.7, step, ROW)
    assert track.level == CALM
    assert track.since == -1


def test_low_can_be_the_bad_side():
    row = Threshold(metric="m", failure="expert collapse", bad="low", warning=0.5, critical=0.2, warmup=0, smoothing=1)
    assert levels([0.6], row)[1] == [CALM]
    assert levels([0.5], row)[1] == [WARNING]
    assert levels([0.1], row)[1] == [CRITICAL]
    assert levels([0.5, 0.59, 0.61], row)[1] == [WARNING, WARNING, CALM]


def test_a_drift_is_told_before_the_threshold_and_noise_is_not():
    noise = random.Random(0)
    still = [0.3 + noise.gauss(0, 0.05) for _ in range(400)]
    assert set(levels(still)[1]) == {CALM}
    rising = [0.3 + max(0, t - 100) * 0.003 + noise.gauss(0, 0.05) for t in range(400)]
    _, found = levels(rising)
    assert DRIFT in found
    assert found.index(WARNING) - found.index(DRIFT) > 50
    falling = [0.9 - 0.002 * t + noise.gauss(0, 0.02) for t in range(400)]
    assert set(levels(falling)[1]) == {CALM}, "a drift to the good side is none"


def test_values_that_are_not_finite_change_nothing():
    track, _ = levels([0.5] * 20)
    before = track.state()
    track.update(math.nan, 21, ROW)
    assert track.state() == before
    assert Track.of_state(before).state() == before


def test_the_table_is_consistent_and_mistakes_are_told():
    assert len({row.metric for row in THRESHOLDS}) == len(THRESHOLDS)
    assert all(row.source for row in THRESHOLDS)
    changed = {row.metric: row for row in thresholds_with({"fhs": {"warning": 1.5}})}
    assert changed["fhs"].warning == 1.5
    with pytest.raises(ValueError, match="no metric 'fsh'"):
        thresholds_with({"fsh": {"warning": 1.5}})
    with pytest.raises(ValueError, match="no field warn"):
        thresholds_with({"fhs": {"warn": 1.5}})
    with pytest.raises(ValueError, match="critical must be at least warning"):
        thresholds_with({"fhs": {"warning": 9.0}})
    with pytest.raises(ValueError, match="row for 'fhs' already"):
        thresholds_with({}, [ROW, Threshold(metric="fhs", failure="divergence", warning=1, critical=2)])
