"""The largest step within a limit, for divergences of many shapes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moegeo_router.optim import speed
from moegeo_router.optim.speed import largest_step

SHAPES = {
    "quadratic": lambda x: x.square() / 2,
    "steeper": lambda x: x.square() / 2 + x**4,
    "flat at first": lambda x: x**6,
    "linear at the end": lambda x: x.square() / (1 + x),
    "saturating": lambda x: 1 - torch.exp(-x.square() / 2),
    "a wall": lambda x: x.square() / 2 + 10 * (x - 0.01).relu(),
}


@pytest.mark.parametrize("shape", SHAPES)
@given(size=st.floats(-6, 6), most=st.floats(-10, -1), guess=st.floats(-3, 3))
@settings(max_examples=40, deadline=None)
def test_reaches_the_limit_and_never_passes_it(shape, size, most, guess):
    scale, limit = 10.0**size, torch.tensor(10.0**most, dtype=torch.float64)
    calls = []

    def kl(eta):
        calls.append(eta.clone())
        return SHAPES[shape](scale * eta)

    whole = float(SHAPES[shape](torch.tensor(scale, dtype=torch.float64)))
    # The guess of the second-order form is off by up to a factor of a thousand here.
    right = torch.tensor(math.sqrt(2 * float(limit)) / scale * 10.0**guess, dtype=torch.float64)
    eta, reached = largest_step(kl, right.clamp(max=1).reshape(1), limit)
    assert float(reached) == pytest.approx(float(SHAPES[shape](scale * eta)), rel=1e-12)
    assert float(reached) <= float(limit)
    assert all(float(tried) <= 1 for tried in calls)
    if whole <= speed.CLOSE * float(limit):
        assert float(eta) == 1
    else:
        assert float(reached) >= speed.CLOSE * float(limit)


def test_a_good_guess_needs_one_look():
    calls = []

    def kl(eta):
        calls.append(eta)
        return eta.square() / 2

    most = torch.tensor(1e-4)
    eta, reached = largest_step(kl, (0.98 * 2 * most).sqrt().repeat(3), most)
    assert len(calls) == 1
    assert (reached > 0.96 * most).all()
    assert (eta < 1).all()


def test_every_router_has_its_own_scale():
    scale = torch.tensor([1e-3, 1.0, 30.0, 1e4])
    most = torch.tensor(0.5e-2)
    eta, reached = largest_step(lambda eta: (scale * eta).square() / 2, torch.ones(4), most)
    assert float(eta[0]) == 1
    torch.testing.assert_close(reached[1:], most.expand(3), rtol=0.04, atol=0)


def test_without_early_ends_the_result_is_the_same(monkeypatch):
    scale = torch.tensor([1.0, 30.0])

    def run():
        return largest_step(lambda eta: (scale * eta).square() / 2, torch.ones(2), torch.tensor(1e-3))

    early = run()
    monkeypatch.setattr(speed, "readable", lambda _: False)
    for ours, theirs in zip(run(), early, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nothing_is_allowed_where_the_divergence_is_not_known(value):
    eta, _ = largest_step(lambda eta: torch.full_like(eta, value), torch.ones(2), torch.tensor(1e-3))
    assert torch.equal(eta, torch.zeros(2))


def test_what_moves_nothing_is_not_shortened():
    eta, reached = largest_step(torch.zeros_like, torch.full((1,), 0.01), torch.tensor(1e-3))
    assert float(eta) == 1
    assert float(reached) == 0
