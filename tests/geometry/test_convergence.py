"""geoopt's optimizers reach known optima on every manifold, and stay on it.

A retraction can pass every local law and still be wrong where steps are long: these runs take long steps on purpose.
Each row of a batch is a run of its own, because the manifolds' second moments are per point.
"""

from __future__ import annotations

from collections.abc import Callable

import geoopt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moegeo_router.geometry import EuclideanRows, FisherRaoSimplex, OrthonormalRows, PolarRows, UnitRows

F64 = torch.float64
RUNS = 5
optimizers = pytest.mark.parametrize("optimizer", ["adam", "sgd", "momentum"])


def minimise(
    loss: Callable[[Tensor], Tensor], start: Tensor, manifold: geoopt.Manifold, optimizer: str, lr: float, steps: int
) -> Tensor:
    """Run an optimizer of geoopt, its rate falling to 0 along a cosine; return where it ends."""
    point = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
    made = {
        "adam": lambda: geoopt.optim.RiemannianAdam([point], lr=lr),
        "sgd": lambda: geoopt.optim.RiemannianSGD([point], lr=lr),
        "momentum": lambda: geoopt.optim.RiemannianSGD([point], lr=lr / 5, momentum=0.8),
    }[optimizer]()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(made, steps)
    for step in range(steps):
        made.zero_grad()
        loss(point.as_subclass(torch.Tensor)).backward()
        made.step()
        schedule.step()
        if step % 10 == 0:
            assert manifold.check_point_on_manifold(point.detach(), atol=1e-9, rtol=1e-9)
    return point.detach().as_subclass(torch.Tensor)


def random_points(manifold: geoopt.Manifold, *shape: int) -> Tensor:
    return manifold.random(*shape, dtype=F64).as_subclass(torch.Tensor)


def targets(name: str) -> Tensor:
    target = torch.rand(RUNS, 8, dtype=F64).square() + 0.02
    match name:
        case "near a corner":
            target = 1e-4 * target
            target[:, 0] = 1.0
        case "near an edge":
            target[:, :4] *= 1e-6
    return target / target.sum(-1, keepdim=True)


@optimizers
@pytest.mark.parametrize("exact", [False, True], ids=["projection", "exact"])
@pytest.mark.parametrize("name", ["inside", "near a corner", "near an edge"])
def test_distributions_reach_the_target_of_a_kl(name: str, exact: bool, optimizer: str) -> None:
    manifold, target = FisherRaoSimplex(exact), targets(name)
    # Off the boundary, because the first gradients are target / p, which momentum and Adam's second moment remember.
    start = (random_points(manifold, RUNS, 8) + 1) / 9
    lr, steps = {"adam": (0.05, 500), "sgd": (0.8, 100), "momentum": (0.05, 500)}[optimizer]
    found = minimise(lambda p: -(target * p.log()).sum(), start, manifold, optimizer, lr, steps)
    fidelity = (found * target).sqrt().sum(-1)
    assert float(2 * torch.arccos(fidelity.min().clamp_max(1))) < 1e-3


@optimizers
@pytest.mark.parametrize("exact", [False, True], ids=["projection", "exact"])
def test_distributions_reach_the_corner_of_a_linear_loss(exact: bool, optimizer: str) -> None:
    manifold, cost = FisherRaoSimplex(exact), torch.rand(RUNS, 8, dtype=F64)
    cost[:, 3] = -0.5
    start = random_points(manifold, RUNS, 8)
    # Few steps: a momentum that points out of the simplex must not stop the other coordinates.
    lr, steps = {"adam": (0.2, 120), "sgd": (1.0, 100), "momentum": (1.0, 100)}[optimizer]
    found = minimise(lambda p: (cost * p).sum(), start, manifold, optimizer, lr, steps)
    assert float(found[:, 3].min()) > 1 - 1e-6


@optimizers
@pytest.mark.parametrize("manifold", [PolarRows(), EuclideanRows()], ids=["polar", "euclidean"])
def test_rows_reach_the_target_of_least_squares(manifold: geoopt.Manifold, optimizer: str) -> None:
    target, start = (torch.randn(RUNS, 6, dtype=F64) for _ in range(2))
    if optimizer == "adam":
        start[0] = 0
    else:  # a row at more than 90° from its target would first shrink towards 0, and slow down
        start = 1.5 * target.norm(dim=-1, keepdim=True) * F.normalize(start + target, dim=-1)
    lr, steps = {"adam": (0.1, 400), "sgd": (0.05, 300), "momentum": (0.05, 300)}[optimizer]
    found = minimise(lambda w: (w - target).square().sum(), start, manifold, optimizer, lr, steps)
    torch.testing.assert_close(found, target, atol=1e-3, rtol=0)


@optimizers
def test_unit_rows_reach_the_leading_eigenvector(optimizer: str) -> None:
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=F64))[0]
    matrix = basis @ torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.0, -1.0, -2.0], dtype=F64)) @ basis.mT
    start = random_points(UnitRows(), RUNS, 6)
    lr, steps = {"adam": (0.1, 300), "sgd": (0.1, 150), "momentum": (0.1, 150)}[optimizer]
    found = minimise(lambda w: -((w @ matrix) * w).sum(), start, UnitRows(), optimizer, lr, steps)
    torch.testing.assert_close((found @ basis[:, 0]).abs(), torch.ones(RUNS, dtype=F64), atol=1e-6, rtol=0)


@optimizers
def test_orthonormal_rows_solve_procrustes(optimizer: str) -> None:
    u, _, v = torch.linalg.svd(torch.randn(RUNS, 3, 6, dtype=F64), full_matrices=False)
    target = u @ torch.diag(torch.tensor([2.0, 1.5, 1.0], dtype=F64)) @ v  # its nearest orthonormal matrix is u v
    start = random_points(OrthonormalRows(), RUNS, 3, 6)
    lr, steps = {"adam": (0.1, 300), "sgd": (0.2, 200), "momentum": (0.2, 200)}[optimizer]
    found = minimise(lambda w: (w - target).square().sum() / 2, start, OrthonormalRows(), optimizer, lr, steps)
    torch.testing.assert_close(found, u @ v, atol=1e-3, rtol=0)
