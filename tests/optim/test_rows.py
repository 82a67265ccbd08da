"""The bounded sample of a step's tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moegeo_router.optim.rows import RowSample, stack_rows

D, E = 3, 2


def feed(sample: RowSample, tokens: int, start: int = 0, mask: Tensor | None = None) -> None:
    """Tokens whose x and z are their number."""
    positions = sample.positions(tokens, torch.device("cpu"))
    number = (positions + start).double()
    kept = None if mask is None else mask[positions]
    sample.add(number[:, None].expand(-1, D), number[:, None].expand(-1, E), kept)


@given(sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=12), limit=st.integers(1, 64))
@settings(max_examples=100, deadline=None)
def test_bounded_and_fair(sizes, limit):
    sample = RowSample(limit)
    for start, tokens in zip([sum(sizes[:i]) for i in range(len(sizes))], sizes, strict=True):
        feed(sample, tokens, start)
        assert sum(len(part[2]) for part in sample._parts) <= 2 * limit + 2
    found = sample.take()
    if found is None:
        assert sum(sizes) < 2 * limit
        return
    x, z, weight = found
    assert len(x) <= limit
    assert len(x) == len(z) == len(weight)
    assert len(x[:, 0].unique()) == len(x)  # no token twice
    if len(weight):
        assert (weight == weight[0]).all()  # every row stands for as many
        # What is cut off at the end of a forward is less than a row.
        stride = int(weight[0])
        assert (
            sum(sizes) - stride * len(sizes) - stride * limit < float(weight.sum()) <= sum(sizes) + stride * len(sizes)
        )


def test_all_tokens_where_they_fit():
    sample = RowSample(512)
    feed(sample, 300)
    x, _, weight = sample.take()
    assert torch.equal(x[:, 0], torch.arange(300.0).double())
    assert torch.equal(weight, torch.ones(300).double())


def test_no_position_of_the_sequences_is_preferred():
    # 512 sequences of 256 tokens and 512 rows: one of each 256 tokens, at places that differ.
    sample = RowSample(512)
    feed(sample, 512 * 256)
    x, _, _ = sample.take()
    places = (x[:, 0] % 256).long()
    assert len(x) == 512
    assert len(places.unique()) > 128
    feed(sample, 512 * 256)
    again, _, _ = sample.take()
    assert not torch.equal(again, x)  # other tokens in the next step


def test_masked_and_broken_tokens_count_for_nothing():
    sample = RowSample(8)
    mask = torch.tensor([1, 1, 0, 1], dtype=torch.bool)
    x = torch.ones(4, D)
    z = torch.ones(4, E)
    x[1, 0], z[3, 1], x[2, 0] = torch.nan, torch.inf, torch.nan
    sample.add(x[sample.positions(4, x.device)], z, mask)
    x, z, weight = sample.take()
    assert torch.equal(weight, torch.tensor([1.0, 0, 0, 0]))
    assert x.isfinite().all()
    assert z.isfinite().all()


def test_unequal_forward_passes_are_sampled_alike():
    sample = RowSample(512)
    for start, tokens in ((0, 8192), (8192, 15), (8207, 15), (8222, 15), (8237, 200)):
        feed(sample, tokens, start)
    x, _, weight = sample.take()
    assert float(weight[x[:, 0] >= 8192].sum()) == pytest.approx(245, abs=40)
    assert len(set(weight.tolist())) == 1


def test_a_small_first_pass_does_not_make_the_next_ones_expensive():
    sample = RowSample(64)
    feed(sample, 3)
    positions = sample.positions(100_000, torch.device("cpu"))
    assert len(positions) <= 128


def test_a_step_has_the_rows_of_its_own_forwards():
    sample = RowSample(8)
    assert not sample.known
    assert sample.take() is None
    feed(sample, 4)
    assert len(sample.take()[0]) == 4
    assert sample.known
    assert sample.take() is None
    feed(sample, 2)
    assert len(sample.take()[0]) == 2
    feed(sample, 0)  # an empty batch
    assert sample.take() is None


def test_nothing_grows_without_steps():
    sample = RowSample(8)
    for _ in range(300):
        feed(sample, 5)
    assert len(sample._parts) <= 16
    assert sum(len(part[2]) for part in sample._parts) <= 16


def test_astronomic_values_are_left_out():
    sample = RowSample(8)
    x = torch.ones(3, D)
    x[1] = 1e19
    sample.add(x[sample.positions(3, x.device)], torch.ones(3, E), None)
    assert sample.take()[2].tolist() == [1.0, 0.0, 1.0]


def test_half_precision_rows_are_widened():
    sample = RowSample(8)
    sample.positions(2, torch.device("cpu"))
    sample.add(torch.ones(2, D, dtype=torch.bfloat16), torch.ones(2, E, dtype=torch.float16), None)
    assert {t.dtype for t in sample.take()[0]} == {torch.float32}


@pytest.mark.parametrize("bias", [False, True])
def test_stacked_rows_are_filled_up_without_weight(bias):
    samples = [RowSample(8), RowSample(8), RowSample(8)]
    feed(samples[0], 3)
    feed(samples[2], 5, start=10)
    rows = stack_rows(samples, torch.zeros(3, E, D, dtype=torch.float64), bias)
    assert rows.x.shape == (3, 5, D + bias)
    assert rows.z.shape == (3, E, 5)
    assert torch.equal(rows.weight.sum(-1), torch.tensor([3.0, 0, 5]).double())
    assert torch.equal(rows.z[2], torch.arange(10.0, 15).double().expand(E, 5))
    assert torch.equal(rows.x[0, :3, 0], torch.arange(3.0).double())
    if bias:
        assert (rows.x[..., -1] == 1).all()


def test_rows_of_an_earlier_step_are_gone():
    samples = [RowSample(8), RowSample(8)]
    like = torch.zeros(2, E, D, dtype=torch.float64)
    for sample in samples:
        feed(sample, 3)
    stack_rows(samples, like, bias=False)
    feed(samples[1], 2)
    rows = stack_rows(samples, like, bias=False)
    assert rows.weight.sum(-1).tolist() == [0.0, 2.0]
