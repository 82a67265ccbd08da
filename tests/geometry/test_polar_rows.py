"""PolarRows against its isometry to R × S^{D-1}, computed here by hand; its symmetries; its rule for zero rows."""

from __future__ import annotations

import math

import geoopt
import pytest
import torch
from torch import Tensor

from moegeo_router.geometry import PolarRows

F64 = torch.float64
close = torch.testing.assert_close


def to_product(w: Tensor) -> tuple[Tensor, Tensor]:
    """The isometry: w ↦ (log ‖w‖, w / ‖w‖)."""
    r = w.square().sum(-1, keepdim=True).sqrt()
    return r.log(), w / r


def push(w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Its differential, by forward-mode autograd."""
    _, (log_norm, direction) = torch.func.jvp(to_product, (w,), (u,))
    return log_norm, direction


def turn(mu: Tensor, nu: Tensor) -> Tensor:
    """The rotation of R^D in the plane of two unit vectors that takes mu to nu: parallel transport on the sphere."""
    cosine = float(mu @ nu)
    across = nu - cosine * mu
    sine = across.norm()
    across = across / sine
    plane = torch.outer(across, mu) - torch.outer(mu, across)
    return torch.matrix_exp(torch.atan2(sine, mu @ nu) * plane)


@pytest.fixture
def manifold() -> PolarRows:
    return PolarRows()


def rows(*shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two matrices with row norms over three orders of magnitude, and two tangent vectors at the first."""
    x, y, u, v = (torch.randn(*shape, dtype=F64) for _ in range(4))
    stretch = 10 ** (3 * torch.rand(*shape[:-1], 1, dtype=F64) - 1.5)
    return stretch * x, y / stretch, stretch * u, stretch * v


@pytest.mark.parametrize("width", [2, 3, 16])
def test_everything_agrees_with_the_product_manifold(manifold: PolarRows, width: int) -> None:
    for x, y, u, v in zip(*rows(5, width), strict=True):
        (log_r, mu), (log_s, nu) = to_product(x), to_product(y)
        (a, t), (b, q) = push(x, u), push(x, v)
        angle = torch.arccos((mu * nu).sum())
        close(manifold.inner(x, u, v), (a * b).sum() + (t * q).sum())
        close(manifold.dist(x, y), torch.hypot(log_r - log_s, angle).squeeze())
        arrived_log, arrived = to_product(manifold.expmap(x, u))
        h = t.norm()
        close(arrived_log, log_r + a)
        close(arrived, mu * h.cos() + t / h * h.sin())
        assert torch.equal(manifold.retr(x, u), manifold.expmap(x, u))
        log_a, log_t = push(x, manifold.logmap(x, y))
        close(log_a, log_s - log_r)
        close(log_t, (nu - angle.cos() * mu) * angle / angle.sin())
        moved_a, moved_t = push(y, manifold.transp(x, y, v))
        close(moved_a, b)
        close(moved_t, turn(mu, nu) @ q)


def test_geoopt_s_sphere_times_line_agrees(manifold: PolarRows) -> None:
    sphere = geoopt.SphereExact()
    x, y, u, _ = rows(6, 4)
    (log_r, mu), (log_s, nu), (a, t) = to_product(x), to_product(y), push(x, u)
    close(to_product(manifold.expmap(x, u))[1], sphere.expmap(mu, t))
    close(manifold.dist(x, y).square(), (log_r - log_s).squeeze(-1).square() + sphere.dist(mu, nu).square())
    close(manifold.norm(x, u).square(), a.squeeze(-1).square() + sphere.inner(mu, t))


def test_gradient_is_the_pulled_back_one(manifold: PolarRows) -> None:
    x, _, v, _ = rows(4, 5)
    g = torch.randn_like(x)
    gradient = manifold.egrad2rgrad(x, g)
    close(gradient, x.square().sum(-1, keepdim=True) * g)
    (a, t), (b, q) = push(x, gradient), push(x, v)
    close((a * b + (t * q).sum(-1, keepdim=True)).squeeze(-1), (g * v).sum(-1))


def test_scaling_rows_commutes_with_everything(manifold: PolarRows) -> None:
    x, y, u, v = rows(4, 5)
    c, d = (10 ** torch.randn(4, 1, dtype=F64) for _ in range(2))
    close(manifold.expmap(c * x, c * u), c * manifold.expmap(x, u))
    close(manifold.dist(c * x, c * y), manifold.dist(x, y))
    close(manifold.inner(c * x, c * u, c * v), manifold.inner(x, u, v))
    close(manifold.logmap(c * x, c * y), c * manifold.logmap(x, y))
    close(manifold.transp(c * x, d * y, c * v), d * manifold.transp(x, y, v))
    close(manifold.egrad2rgrad(c * x, u / c), c * manifold.egrad2rgrad(x, u))


def test_values_by_hand(manifold: PolarRows) -> None:
    x = torch.tensor([2.0, 0.0], dtype=F64)
    ahead, aside = torch.tensor([2 * math.log(3), 0.0], dtype=F64), torch.tensor([0.0, math.pi], dtype=F64)
    close(manifold.expmap(x, ahead), torch.tensor([6.0, 0.0], dtype=F64))
    close(manifold.expmap(x, aside), torch.tensor([0.0, 2.0], dtype=F64))  # a quarter turn: π / r = π / 2
    close(manifold.expmap(x, ahead + aside), torch.tensor([0.0, 6.0], dtype=F64))
    expected = math.hypot(math.log(3), math.pi / 2)
    close(manifold.dist(x, torch.tensor([0.0, 6.0], dtype=F64)), torch.tensor(expected, dtype=F64))
    close(manifold.norm(x, ahead + aside), torch.tensor(expected, dtype=F64))
    close(manifold.dist(x, -x), torch.tensor(math.pi, dtype=F64))


# --- zero rows --------------------------------------------------------------------------------------------------------


def with_zero_row(dtype: torch.dtype = F64) -> Tensor:
    x = torch.arange(1.0, 13.0, dtype=dtype).reshape(3, 4)
    x[1] = 0
    return x


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_a_zero_row_stands_for_a_short_row_in_a_seeded_direction(dtype: torch.dtype) -> None:
    x = with_zero_row(dtype)
    one, again, other = (PolarRows(seed).projx(x) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one[1], other[1])
    assert torch.equal(one[[0, 2]], x[[0, 2]])
    assert float(one[1].float().norm()) == pytest.approx(0.1 / math.sqrt(3), rel=1e-2)
    before = torch.get_rng_state()
    PolarRows(1).projx(x)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone
    both = PolarRows(1).projx(torch.zeros(2, 4, dtype=dtype))
    assert not torch.equal(both[0], both[1])  # no ties


def test_functions_read_a_zero_row_as_what_it_stands_for(manifold: PolarRows) -> None:
    x, y = with_zero_row(), torch.randn(3, 4, dtype=F64)
    u, stand_in = torch.randn(3, 4, dtype=F64), manifold.projx(x)
    for value, expected in [
        (manifold.dist(x, y), manifold.dist(stand_in, y)),
        (manifold.expmap(x, u), manifold.expmap(stand_in, u)),
        (manifold.logmap(x, y), manifold.logmap(stand_in, y)),
        (manifold.logmap(y, x), manifold.logmap(y, stand_in)),
        (manifold.transp(x, y, u), manifold.transp(stand_in, y, u)),
        (manifold.inner(x, u), manifold.inner(stand_in, u)),
        (manifold.egrad2rgrad(x, u), manifold.egrad2rgrad(stand_in, u)),
    ]:
        assert bool(value.isfinite().all())
        close(value, expected)
    assert not manifold.check_point_on_manifold(x)
    assert manifold.check_point_on_manifold(stand_in)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(manifold.expmap(x, u).sum() + manifold.dist(x, y).sum(), x)
    assert bool(gradient.isfinite().all())


def test_a_row_too_small_for_its_norm_is_a_zero_row(manifold: PolarRows) -> None:
    x = torch.full((1, 4), 1e-30)  # its square underflows in fp32
    assert manifold.check_point_on_manifold(manifold.projx(x))
    assert not manifold.check_point_on_manifold(x)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "momentum"])
def test_the_first_step_leaves_zero(manifold: PolarRows, optimizer: str) -> None:
    start = with_zero_row(torch.float32)
    gradient = torch.randn(3, 4)
    weight = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
    # The same matrix without its zero row moves as if the zero row had not been there.
    others = geoopt.ManifoldParameter(start[[0, 2]].clone(), manifold=manifold)
    for parameter, g in ((weight, gradient), (others, gradient[[0, 2]])):
        parameter.grad = g.clone()
        match optimizer:
            case "adam":
                geoopt.optim.RiemannianAdam([parameter], lr=0.01).step()
            case "sgd":
                geoopt.optim.RiemannianSGD([parameter], lr=0.01).step()
            case "momentum":
                geoopt.optim.RiemannianSGD([parameter], lr=0.001, momentum=0.9).step()
    weight, others = weight.detach(), others.detach()
    assert bool(weight.isfinite().all())
    assert manifold.check_point_on_manifold(weight)
    close(weight[[0, 2]], others)
    if optimizer == "adam":
        # Adam's first step has length lr in the metric, whatever the norm of the row.
        close(manifold.dist(manifold.projx(start), weight), torch.full((3,), 0.01), rtol=1e-3, atol=0)
        assert float((weight[1] * gradient[1]).sum()) < float((manifold.projx(start)[1] * gradient[1]).sum())
