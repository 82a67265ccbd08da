"""The continuous control: bounded, quiet when not needed, stable under noise."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moegeo_router.config import GeometryConfig
from moegeo_router.control.config import ControlConfig, SetPoint
from moegeo_router.control.setpoints import SetPointControl

POINT = SetPoint(metric="fsi_load", at_most=0.4, gain=0.002, proportional=0.05, most=0.05, rate=0.002)


def run(values, point=POINT):
    control = SetPointControl([point])
    return [control.update("layer", {point.metric: value}).get(point.moves, 0.0) for value in values]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=200))
def test_weights_stay_within_bounds_and_move_no_faster_than_the_rate(values):
    weights = run(values)
    assert all(0 <= weight <= POINT.most + 1e-12 for weight in weights)
    assert all(abs(b - a) <= POINT.rate + 1e-12 for a, b in zip([0.0, *weights], weights, strict=False))


def test_nothing_is_done_on_the_right_side_and_weights_go_back_to_exactly_0():
    assert set(run([0.39] * 50)) == {0.0}
    weights = run([0.9] * 200 + [0.1] * 300)
    assert max(weights) == pytest.approx(POINT.most)
    assert weights[-1] == 0.0


def test_the_integral_does_not_wind_up():
    # However long it was at its bound, it takes as long to come back.
    short, long = run([0.9] * 200 + [0.2] * 400), run([0.9] * 5000 + [0.2] * 400)
    assert short[200:] == pytest.approx(long[5000:])


def test_at_least_is_the_mirror_of_at_most():
    low = SetPoint(metric="dispersion_kept", at_least=0.6, moves="dispersion")
    assert run([0.7] * 10, low)[-1] == 0
    assert run([0.5] * 10, low)[-1] > 0


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
def test_the_loop_settles_and_does_not_cycle(noise):
    # A load that answers to the weight with a lag, and noise that is as bad as it can be: it opposes the last move.
    control, random_numbers = SetPointControl([POINT]), random.Random(1)
    load, smooth, weight, weights, loads = 0.7, 0.7, 0.0, [], []
    for _ in range(4000):
        load += 0.02 * (0.7 - 12 * weight - load)
        measured = load + noise * random_numbers.choice([-1, 1])
        smooth += (measured - smooth) / 20
        weight = control.update("layer", {"fsi_load": smooth})["balance"]
        weights.append(weight)
        loads.append(load)
    tail = weights[-1000:]
    assert max(tail) - min(tail) < 0.002 + 0.1 * noise, "a limit cycle"
    assert abs(sum(loads[-1000:]) / 1000 - 0.4) < 0.03


def test_contradictions_are_told():
    with pytest.raises(ValueError, match="both move 'balance'"):
        ControlConfig(setpoints=(POINT, SetPoint(metric="fhs", at_most=1.0)))
    with pytest.raises(ValueError, match=r"at least 0\.8 and at most 0\.4"):
        ControlConfig(setpoints=(POINT, SetPoint(metric="fsi_load", at_least=0.8, moves="fsi")))
    with pytest.raises(ValueError, match="at_most or at_least"):
        SetPoint(metric="fhs")
    with pytest.raises(ValueError, match="moves must be one of"):
        SetPoint(metric="fhs", at_most=1.0, moves="magic")
    with pytest.raises(ValueError, match="no metric 'nothing'"):
        GeometryConfig(control=ControlConfig(setpoints=(SetPoint(metric="nothing", at_most=1.0),)))
