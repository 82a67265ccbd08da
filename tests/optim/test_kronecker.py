"""The Kronecker-factored Fisher information against dense matrices."""

from __future__ import annotations

import curvlinops
import pytest
import torch
from torch import Tensor

import moegeo_router as mg
from moegeo_router.optim.kronecker import KroneckerFisher
from moegeo_router.optim.rows import Rows
from moegeo_router.routers import routing_probabilities

E, D = 4, 5
SCORES = ("softmax", "sigmoid")


def made_of(*batches: Rows, **options: object) -> KroneckerFisher:
    block, scores = options.pop("block", 1024), options.pop("scores", "softmax")
    config = configured(**options)
    fisher = KroneckerFisher(batches[0].x.new_empty(len(batches[0].x), E, batches[0].x.shape[-1]), block, scores)
    for rows in batches:
        fisher.add(rows, config.decay)
        fisher.refresh(1, config)
    return fisher


def configured(**options: float) -> mg.NaturalConfig:
    return mg.NaturalConfig(**{"decay": 0.0, "damping": 0.0, "floor": 0.0} | options)


def batch(tokens: int, weight: Tensor, routers: int = 1, seed: int = 0, width: int = D) -> tuple[Rows, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(routers, tokens, width, generator=g, dtype=torch.float64)
    z = x @ weight.mT
    ones = torch.ones(routers, tokens, dtype=torch.float64)
    return Rows(x, z.mT, ones), x


def weights(routers: int = 1, width: int = D, seed: int = 9) -> Tensor:
    return torch.randn(routers, E, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_fisher(weight_ED: Tensor, x_TD: Tensor, scores: str) -> Tensor:
    """The Hessian in vec(W) of the mean KL from the routing at W, by autograd."""
    p = routing_probabilities(x_TD @ weight_ED.T, scores)

    def mean_kl(flat: Tensor) -> Tensor:
        q = routing_probabilities(x_TD @ flat.view_as(weight_ED).T, scores)
        return (p * (p.log() - q.log())).sum(-1).mean()

    return torch.autograd.functional.hessian(mean_kl, weight_ED.flatten())


@pytest.mark.parametrize("scores", SCORES)
def test_equals_the_dense_fisher_for_one_token(scores):
    weight = weights()
    rows, x = batch(1, weight)
    sums = made_of(rows, scores=scores, damping=0.1).tensors()
    kronecker = torch.kron(sums["G"][0], sums["A"][0, 0])
    torch.testing.assert_close(kronecker, dense_fisher(weight[0], x[0], scores), rtol=0, atol=1e-10)


@pytest.mark.parametrize("scores", SCORES)
def test_equals_the_dense_fisher_where_logits_and_inputs_are_independent(scores):
    # Every input with its logits once as they are and once with the expert order of another token: uncorrelated.
    weight = weights()
    rows, x = batch(3, weight, seed=1)
    x_all = x[0].repeat_interleave(3, 0)
    z_all = rows.z[0].T.repeat(3, 1)
    ones = torch.ones(1, 9, dtype=torch.float64)
    every = Rows(x_all[None], z_all.T[None], ones)
    sums = made_of(every, scores=scores, damping=0.1).tensors()
    G_t = [torch.autograd.functional.hessian(lambda d, z=z: _kl(z, d, scores), torch.zeros_like(z)) for z in z_all]
    dense = sum(torch.kron(G, torch.outer(v, v)) for G, v in zip(G_t, x_all, strict=True)) / 9
    torch.testing.assert_close(torch.kron(sums["G"][0], sums["A"][0, 0]) / 81, dense, rtol=0, atol=1e-10)


def _kl(z: Tensor, dz: Tensor, scores: str) -> Tensor:
    p, q = routing_probabilities(z, scores), routing_probabilities(z + dz, scores)
    return (p * (p.log() - q.log())).sum()


@pytest.mark.parametrize("scores", SCORES)
def test_solves_the_damped_kronecker_system(scores):
    weight = weights(routers=2)
    rows, _ = batch(40, weight, routers=2)
    fisher = made_of(rows, scores=scores, damping=0.3, floor=0.01)
    gradient = torch.randn(2, E, D, dtype=torch.float64)
    if scores == "softmax":
        gradient -= gradient.mean(1, keepdim=True)
    solved, sums = fisher.solve(gradient), fisher.tensors()
    uniform = (1 - 1 / E) / E * E / (E - 1)  # mean non-zero eigenvalue of diag u - u uᵀ
    for index in range(2):
        G, A = sums["G"][index] / 40, sums["A"][index, 0] / 40
        G = G + (0.3 * G.trace() / (E - 1) + 0.01 * uniform * (E - 1) / E) * torch.eye(E, dtype=G.dtype)
        A = A + 0.3 * A.trace() / D * torch.eye(D, dtype=A.dtype)
        dense = torch.linalg.solve(torch.kron(G, A), gradient[index].flatten())
        torch.testing.assert_close(solved[index].flatten(), dense, rtol=1e-9, atol=1e-12)


def test_without_damping_it_is_the_pseudo_inverse():
    weight = weights()
    rows, _ = batch(40, weight)
    fisher = made_of(rows)
    gradient = torch.randn(1, E, D, dtype=torch.float64)
    gradient -= gradient.mean(1, keepdim=True)
    sums = fisher.tensors()
    dense = torch.linalg.pinv(torch.kron(sums["G"][0] / 40, sums["A"][0, 0] / 40), hermitian=True, rtol=1e-10)
    torch.testing.assert_close(fisher.solve(gradient).flatten(), dense @ gradient.flatten(), rtol=1e-8, atol=1e-10)


def test_the_mean_over_experts_has_the_mean_curvature():
    """It moves no softmax: a step there is one in a direction of G's mean non-zero eigenvalue."""
    weight = weights()
    rows, _ = batch(40, weight)
    fisher = made_of(rows, damping=0.5)
    gradient = torch.randn(1, 1, D, dtype=torch.float64).expand(1, E, D)
    sums = fisher.tensors()
    mean_G = sums["G"][0].trace() / 40 / (E - 1)
    A = sums["A"][0, 0] / 40
    A = A + 0.5 * A.trace() / D * torch.eye(D, dtype=A.dtype)
    expected = gradient[0] @ torch.linalg.inv(A) / (1.5 * mean_G)
    torch.testing.assert_close(fisher.solve(gradient)[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("block", "blocks"), [(1024, [5]), (3, [3, 2]), (2, [2, 2, 1]), (1, [1] * 5)])
def test_blocks_are_the_diagonal_blocks_of_the_full_factor(block, blocks):
    weight = weights()
    rows, x = batch(40, weight)
    fisher = made_of(rows, block=block, damping=0.2)
    A = x[0].T @ x[0] / 40
    damping = 0.2 * A.trace() / D
    masked = torch.block_diag(*(A[i : i + s, i : i + s] for i, s in _spans(blocks)))
    G = fisher.tensors()["G"][0] / 40
    G = G + 0.2 * G.trace() / (E - 1) * torch.eye(E, dtype=G.dtype)
    gradient = torch.randn(1, E, D, dtype=torch.float64)
    gradient -= gradient.mean(1, keepdim=True)
    expected = torch.linalg.inv(G) @ gradient[0] @ torch.linalg.inv(masked + damping * torch.eye(D, dtype=A.dtype))
    torch.testing.assert_close(fisher.solve(gradient)[0], expected, rtol=1e-9, atol=1e-12)


def _spans(sizes: list[int]) -> list[tuple[int, int]]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return list(zip(starts, sizes, strict=True))


def test_averages_fade_by_tokens():
    weight = weights()
    (first, x1), (second, x2) = batch(10, weight, seed=1), batch(30, weight, seed=2)
    sums = made_of(first, second, decay=0.5).tensors()
    expected = (0.5 * x1[0].T @ x1[0] + x2[0].T @ x2[0]) / (0.5 * 10 + 30)
    torch.testing.assert_close(sums["A"][0, 0] / sums["tokens"][0], expected, rtol=1e-12, atol=0)


def test_a_window_of_steps_equals_a_refresh_a_step():
    weight = weights()
    batches = [batch(10, weight, seed=seed)[0] for seed in range(4)]
    often = made_of(*batches, decay=0.8)
    once = made_of(batches[0], decay=0.8)
    for rows in batches[1:]:
        once.add(rows, 0.8)
    once.refresh(3, configured(decay=0.8))
    gradient = torch.randn(1, E, D, dtype=torch.float64)
    torch.testing.assert_close(often.solve(gradient), once.solve(gradient), rtol=1e-9, atol=1e-12)


def test_between_refreshes_the_inverses_stay():
    weight = weights()
    fisher = made_of(batch(40, weight)[0])
    gradient = torch.randn(1, E, D, dtype=torch.float64)
    before = fisher.solve(gradient)
    fisher.add(batch(40, 3 * weight, seed=5)[0], 0.0)
    assert torch.equal(fisher.solve(gradient), before)
    fisher.refresh(1, configured())
    assert not torch.allclose(fisher.solve(gradient), before, rtol=0.1)


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("scores", SCORES)
def test_few_or_no_tokens_give_finite_steps(tokens, scores):
    weight = weights()
    rows, _ = batch(tokens, weight)
    solved = made_of(rows, scores=scores, damping=0.01, floor=1e-3).solve(torch.randn(1, E, D, dtype=torch.float64))
    assert solved.isfinite().all()


def test_saturated_routing_has_the_floor():
    weight = 1e4 * weights()
    rows, _ = batch(40, weight)
    solved = made_of(rows, damping=0.01, floor=1e-3).solve(torch.ones(1, E, D, dtype=torch.float64).cumsum(1))
    assert solved.isfinite().all()


def test_curvlinops_agrees():
    """An independent implementation of K-FAC: the type-2 Fisher of a linear layer under the cross-entropy."""
    weight = weights()
    rows, x = batch(12, weight)
    layer = torch.nn.Linear(D, E, bias=False, dtype=torch.float64)
    layer.weight.data = weight[0].clone()
    targets = torch.zeros(12, dtype=torch.long)  # the type-2 Fisher does not depend on them
    operator = curvlinops.KFACLinearOperator(
        layer,
        torch.nn.CrossEntropyLoss(),
        [layer.weight],
        [(x[0], targets)],
        fisher_type="type-2",
        check_deterministic=False,
    )
    theirs = operator @ torch.eye(E * D, dtype=torch.float64)
    sums = made_of(rows).tensors()
    ours = torch.kron(sums["G"][0] / 12, sums["A"][0, 0] / 12)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
