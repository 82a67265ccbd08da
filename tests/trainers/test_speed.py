"""The speed table: pairs, ratios and verdicts; the speeds themselves are for `make bench`, not for a test."""

import time

import pytest
import torch

from trainers.speed import Comparison, Measurement, comparisons, main, measure, table

torch.set_num_threads(1)


def _measurement(ours: tuple[float, ...], theirs: tuple[float, ...], goal: float | None = None) -> Measurement:
    comparison = Comparison(name="row", ours=lambda: None, theirs=lambda: None, goal=goal)
    return Measurement(comparison=comparison, ours=ours, theirs=theirs)


def test_ratio_is_the_median_of_pairs_and_more_is_faster():
    measurement = _measurement((1.0, 1.0, 2.0), (3.0, 2.0, 2.0))
    assert measurement.ratios == [3.0, 2.0, 1.0]
    assert measurement.ratio == 2.0


@pytest.mark.parametrize(("goal", "met"), [(None, None), (2.0, True), (2.1, False)])
def test_goal(goal, met):
    assert _measurement((1.0,), (2.0,), goal).met is met


def test_sides_take_turns_and_swap_the_first_place():
    calls = []
    now = [0.0]

    def side(name: str, seconds: float):
        def call() -> None:
            calls.append(name)
            now[0] += seconds

        return call

    comparison = Comparison(name="row", ours=side("A", 1.0), theirs=side("B", 3.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: now[0])
        measurement = measure(comparison, 3, lambda: None)
    assert "".join(calls) == "AABB" + "B" + "AB" + "BA" + "AB"  # warm-up, calibration, three pairs
    assert measurement.ours == (1.0, 1.0, 1.0)
    assert measurement.theirs == (3.0, 3.0, 3.0)


def test_short_calls_are_repeated_within_a_sample():
    calls = []
    now = [0.0]

    def call() -> None:
        calls.append(1)
        now[0] += 0.005

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: now[0])
        measurement = measure(Comparison(name="row", ours=call, theirs=call), 1, lambda: None)
    assert len(calls) == 4 + 1 + 2 * 4  # 4 calls of 5 ms make a sample of 20 ms
    assert measurement.ours == pytest.approx((0.005,))


def test_device_is_waited_for_on_both_ends_of_a_sample():
    waits = []
    measure(Comparison(name="row", ours=lambda: None, theirs=lambda: time.sleep(0.02)), 1, lambda: waits.append(1))
    assert len(waits) == 2 * (2 + 1 + 2)


def test_no_repeats_is_an_error():
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measure(Comparison(name="row", ours=int, theirs=int), 0, lambda: None)


def test_table_shows_times_ratio_range_and_verdict():
    header, first, second = table(
        [_measurement((0.001, 0.001, 0.002), (0.003, 0.002, 0.002), 2.5), _measurement((0.002,), (0.004,))]
    ).splitlines()
    assert header.split() == ["ours", "ms", "theirs", "ms", "ratio", "min..max", "goal"]
    assert first.split() == ["row", "1.000", "2.000", "2.00", "1.00..3.00", "2.50", "MISSED"]
    assert second.split() == ["row", "2.000", "4.000", "2.00", "2.00..2.00", "-"]


def test_both_sides_of_every_comparison_compute_the_same():
    torch.manual_seed(0)
    for comparison in comparisons(torch.device("cpu")):
        ours, theirs = comparison.ours(), comparison.theirs()
        shapes = [t.shape for t in (ours if isinstance(ours, tuple) else (ours,))]
        assert shapes == [t.shape for t in (theirs if isinstance(theirs, tuple) else (theirs,))]
        if comparison.name.startswith("router"):
            assert torch.equal(ours, theirs)


def test_command_prints_every_row(capsys):
    main(["--repeats", "1"])
    output = capsys.readouterr().out
    assert "router forward, 8 experts" in output
    assert "expert layer forward + backward, 32 experts" in output
