"""KL of a change of the logits, and its second-order form, against plain definitions and autograd Hessians."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moegeo_router.optim.divergence import Divergence, routing_fisher
from moegeo_router.routers import routing_probabilities

SCORES = ("softmax", "sigmoid")


def kl(z_TE: Tensor, dz_TE: Tensor, scores: str) -> Tensor:
    """The definition, a token a row."""
    p, q = routing_probabilities(z_TE, scores), routing_probabilities(z_TE + dz_TE, scores)
    return (p * (p.log() - q.log())).sum(-1)


def rows(n: int = 6, experts: int = 5, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z, dz = (s * torch.randn(n, experts, generator=g, dtype=torch.float64) for s in (scale, 0.5))
    return z, dz, torch.rand(n, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("scores", SCORES)
def test_sums_are_weighted_kl_divergences(scores):
    z, dz, weight = rows()
    ours = Divergence(z.T, weight, scores).sums(dz.T)
    torch.testing.assert_close(ours, (weight * kl(z, dz, scores)).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scores", SCORES)
def test_fisher_is_the_hessian_of_the_kl(scores):
    z, _, weight = rows(n=3, experts=4)
    hessians = torch.stack([torch.autograd.functional.hessian(lambda d, t=t: kl(t, d, scores), t * 0) for t in z])
    expected = (weight[:, None, None] * hessians).sum(0)
    torch.testing.assert_close(routing_fisher(z.T, weight, scores), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scores", SCORES)
def test_quadratic_sums_are_the_fisher_form(scores):
    z, dz, weight = rows()
    each = [routing_fisher(t[:, None], torch.ones(1, dtype=t.dtype), scores) for t in z]
    expected = sum(w * d @ G @ d / 2 for w, d, G in zip(weight, dz, each, strict=True))
    torch.testing.assert_close(Divergence(z.T, weight, scores).quadratic_sums(dz.T), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2])
def test_small_steps_keep_their_digits_in_single_precision(scores, size):
    z, dz, weight = rows(n=64)
    exact = Divergence(z.T, weight, scores).sums(size * dz.T)
    single = Divergence(z.T.float(), weight.float(), scores).sums((size * dz.T).float())
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scores", SCORES)
@given(
    seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 3.0, 30.0]), size=st.sampled_from([1e-3, 1.0, 100.0, 1e4])
)
@settings(max_examples=60, deadline=None)
def test_never_negative_nor_nan(scores, seed, scale, size):
    z, dz, weight = rows(scale=scale, seed=seed)
    for dtype in (torch.float64, torch.float32):
        found = Divergence(z.T.to(dtype), weight.to(dtype), scores).sums((size * dz.T).to(dtype))
        assert found.isfinite()
        assert found >= 0


def test_large_steps_of_decided_tokens():
    # All of p on expert 0, all of q on expert 1: KL = 2 · 60 - log(…) ≈ 120.
    z = torch.tensor([[60.0, 0.0, 0.0]], dtype=torch.float64)
    dz = torch.tensor([[-120.0, 0.0, 0.0]], dtype=torch.float64)
    for scores in SCORES:
        expected = float(kl(z, dz, scores))
        for dtype in (torch.float64, torch.float32):
            found = Divergence(z.T.to(dtype), torch.ones(1, dtype=dtype), scores).sums(dz.T.to(dtype))
            assert float(found) == pytest.approx(expected, rel=1e-5)


def test_a_common_shift_moves_no_softmax():
    z, _, weight = rows()
    assert float(Divergence(z.T, weight).sums(torch.full_like(z.T, 3.0))) == 0
    assert float(Divergence(z.T, weight, "sigmoid").sums(torch.full_like(z.T, 3.0))) > 1e-3


def test_rows_without_weight_count_for_nothing():
    z, dz, weight = rows()
    weight[2:] = 0
    alone = Divergence(z[:2].T, weight[:2]).sums(dz[:2].T)
    torch.testing.assert_close(Divergence(z.T, weight).sums(dz.T), alone, rtol=1e-14, atol=0)
    torch.testing.assert_close(routing_fisher(z.T, weight), routing_fisher(z[:2].T, weight[:2]), rtol=1e-13, atol=1e-15)
