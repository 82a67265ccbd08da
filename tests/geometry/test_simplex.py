"""The Fisher-Rao functions against oracles that share no code with them.

The oracles: mpmath's arccos at 50 digits, arc lengths for E = 2, explicit rotation matrices on the sphere of square
roots, quadrature of the metric, finite differences, scipy's root finding.
"""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch import Tensor

from moegeo_router.geometry import simplex as s

F64 = torch.float64
quiet = settings(deadline=None, derandomize=True, database=None, max_examples=100)


def points(*shape: int, inside: float = 0.3) -> Tensor:
    """Distributions whose coordinates are all at least ``inside / E``."""
    p = torch.rand(*shape, dtype=F64).pow(3)
    return (1 - inside) * p / p.sum(-1, keepdim=True) + inside / shape[-1]


def tangents(p: Tensor, length: float) -> Tensor:
    """Random tangent vectors of the given Fisher-Rao length."""
    v = torch.randn_like(p)
    v = v - p * v.sum(-1, keepdim=True)
    return length * v / (v.square() / p).sum(-1, keepdim=True).sqrt()


def exact_distance(p: Tensor, q: Tensor) -> float:
    with mpmath.workdps(50):
        p_mp, q_mp = ([mpmath.mpf(float(x)) for x in row] for row in (p, q))
        fidelity = sum(mpmath.sqrt(x * y) for x, y in zip(p_mp, q_mp, strict=True))
        return float(2 * mpmath.acos(min(1, fidelity / mpmath.sqrt(sum(p_mp) * sum(q_mp)))))


def rotation(p: Tensor, v: Tensor, angle: float | None = None) -> Tensor:
    """The rotation of R^E that turns √p along v/(2√p), by ‖v/(2√p)‖ or by ``angle``: it also transports vectors."""
    a = p.sqrt()
    w = v / (2 * a)
    if angle is not None:
        w = w * angle / w.norm()
    return torch.matrix_exp(torch.outer(w, a) - torch.outer(a, w))


def angle_to_boundary(p: Tensor, v: Tensor) -> float:
    """The smallest angle at which a coordinate of the great circle of v vanishes: bracketed on a grid, then brentq."""
    a = p.sqrt()
    w = v / (2 * a)
    w = w / w.norm()

    def lowest(t: float) -> float:
        return float((math.cos(t) * a + math.sin(t) * w).min())

    grid = [i * 1e-3 for i in range(1, 1600)]
    first = next(t for t in grid if lowest(t) < 0)
    return brentq(lowest, first - 1e-3, first, xtol=1e-14)


# --- distance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 2e-15), (torch.float32, 1e-6)])
@pytest.mark.parametrize("num_experts", [2, 8, 64])
def test_distance_is_the_exact_one(num_experts: int, dtype: torch.dtype, tolerance: float) -> None:
    p, q = points(2, num_experts, inside=0.0)
    hot = torch.eye(num_experts, dtype=F64)
    near = torch.softmax(p.log() + 1e-3 * torch.randn(num_experts, dtype=F64), -1)
    for x, y in [(p, q), (p, near), (p, hot[0]), (hot[0], hot[1]), (0.999 * hot[0] + 0.001 * p, hot[0])]:
        x, y = x.to(dtype), y.to(dtype)
        assert float(s.fisher_rao_distance(x, y)) == pytest.approx(exact_distance(x, y), rel=tolerance, abs=tolerance)


def test_distance_keeps_its_digits_next_to_zero() -> None:
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64)
    v = torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=F64)
    for t in (1e-6, 1e-8):  # arccos would return noise of 1e-8 here
        expected = t * math.sqrt(1 / 0.4 + 1 / 0.3)
        assert float(s.fisher_rao_distance(p, p + t * v)) == pytest.approx(expected, rel=5e-6)


def test_distances_known_by_hand() -> None:
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64)
    assert float(s.fisher_rao_distance(p, s.uniform(4, dtype=F64))) == pytest.approx(0.476014519537, abs=1e-12)
    for num_experts, expected in [(4, 2.094395), (8, 2.418858), (16, 2.636232), (64, 2.890937)]:
        hot = torch.eye(num_experts, dtype=F64)
        assert float(s.fisher_rao_distance(hot[0], s.uniform(num_experts))) == pytest.approx(expected, abs=1e-6)
        assert float(s.fisher_rao_distance(hot[0], hot[1])) == pytest.approx(math.pi, abs=1e-12)
    assert float(s.fisher_rao_distance(p, p)) == 0


simplexes = st.lists(st.floats(0, 1), min_size=5, max_size=5).filter(lambda x: sum(x) > 1e-3)


@quiet
@given(simplexes, simplexes, simplexes)
def test_distance_is_a_metric_bounded_by_kl(x: list[float], y: list[float], z: list[float]) -> None:
    p, q, r = (torch.tensor(row, dtype=F64) / sum(row) for row in (x, y, z))
    d = s.fisher_rao_distance
    assert 0 <= d(p, q) <= math.pi + 1e-12
    assert d(p, q) == d(q, p)
    assert d(p, r) <= d(p, q) + d(q, r) + 1e-12
    kl = torch.where(p > 0, p * (p / q).log(), 0).sum()
    assert bool(kl.isnan()) or d(p, q).square() <= 4 * kl + 1e-12


def test_squared_distance_is_twice_kl_to_second_order() -> None:
    p = points(6)
    v = tangents(p, 1.0)
    errors = []
    for t in (0.1, 0.01, 0.001):
        q = p + t * 0.1 * v
        kl = (p * (p / q).log()).sum()
        errors.append(abs(float(s.fisher_rao_distance(p, q).square() / (2 * kl)) - 1))
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[2] < 1e-4


# --- the metric, exp, log, transport ---------------------------------------------------------------------------------


def test_inner_is_the_round_metric_of_radius_two() -> None:
    p = points(6)
    u, v = tangents(p, 1.0), tangents(p, 2.0)
    step = 1e-6
    du, dv = (((p + step * x).sqrt() - (p - step * x).sqrt()) / step for x in (u, v))  # derivatives of 2√p
    assert float(s.inner(p, u, v)) == pytest.approx(float((du * dv).sum()), abs=1e-8)
    assert float(s.inner(p, v, v)) == pytest.approx(4.0)


@pytest.mark.parametrize("curve", ["geodesic", "exp"])
def test_curves_are_as_long_as_they_should_be(curve: str) -> None:
    p, q = points(2, 5)
    v = tangents(p, 0.6)
    t = torch.linspace(0, 1, 4001, dtype=F64)
    path = s.geodesic(p, q, t) if curve == "geodesic" else s.exp_map(p, t[:, None] * v)
    middle, step = (path[1:] + path[:-1]) / 2, path[1:] - path[:-1]
    speed = (step.square() / middle).sum(-1).sqrt()
    length = exact_distance(p, q) if curve == "geodesic" else 0.6
    assert float(speed.sum()) == pytest.approx(length, rel=1e-6)
    assert float(speed.max() / speed.min()) == pytest.approx(1, abs=1e-5)  # constant speed


def test_two_experts_are_an_arc() -> None:
    x, y, c = (torch.tensor(value, dtype=F64) for value in (0.3, 1.1, 0.25))

    def at(angle: Tensor) -> Tensor:
        return torch.stack([angle.cos().square(), angle.sin().square()])

    def velocity(angle: Tensor) -> Tensor:
        return torch.stack([-(2 * angle).sin(), (2 * angle).sin()])

    close = torch.testing.assert_close
    close(s.fisher_rao_distance(at(x), at(y)), 2 * (y - x))
    close(s.inner(at(x), velocity(x), velocity(x)), torch.tensor(4.0, dtype=F64))
    close(s.exp_map(at(x), c * velocity(x)), at(x + c))
    close(s.retract(at(x), c * velocity(x)), at(x + torch.arctan(c)))
    close(s.log_map(at(x), at(y)), (y - x) * velocity(x))
    close(s.geodesic(at(x), at(y), 0.25), at(x + 0.25 * (y - x)))
    close(s.transport(at(x), at(y), c * velocity(x)), c * velocity(y))
    close(s.frechet_mean(torch.stack([at(x), at(y)]), torch.tensor([3.0, 1.0], dtype=F64)), at(x + 0.25 * (y - x)))


@pytest.mark.parametrize("num_experts", [2, 3, 8, 64])
def test_exp_and_transport_rotate_the_sphere(num_experts: int) -> None:
    p = points(num_experts)
    v, u = tangents(p, 0.15), tangents(p, 1.3)
    turn = rotation(p, v)
    b = turn @ p.sqrt()
    torch.testing.assert_close(s.exp_map(p, v), b.square())
    torch.testing.assert_close(s.transport(p, b.square(), u), 2 * b * (turn @ (u / (2 * p.sqrt()))))


@pytest.mark.parametrize("num_experts", [2, 8, 64])
def test_log_is_the_inverse_of_exp(num_experts: int) -> None:
    hot = torch.eye(num_experts, dtype=F64)
    p = points(num_experts)
    for q in (points(num_experts), hot[1], 0.5 * (hot[0] + hot[1]), (1 - 1e-9) * hot[0] + 1e-9 * p, p + 1e-9 * hot[0]):
        q = q / q.sum()
        v = s.log_map(p, q)
        a, b = p.sqrt(), q.sqrt()
        theta = exact_distance(p, q) / 2
        if theta > 1e-3:
            torch.testing.assert_close(v, 2 * a * theta / math.sin(theta) * (b - math.cos(theta) * a))
        assert float((v.square() / p).sum().sqrt()) == pytest.approx(2 * theta, rel=1e-6)
        assert float(v.sum()) == pytest.approx(0, abs=1e-14)
        torch.testing.assert_close(s.exp_map(p, v), q, rtol=1e-7, atol=1e-14)


def test_log_is_the_gradient_of_half_the_squared_distance() -> None:
    p, q = points(2, 6)
    p.requires_grad_()
    fidelity = (p * q).sqrt().sum() / p.sum().sqrt()  # homogeneous in p, so its gradient is a tangent one
    (gradient,) = torch.autograd.grad((2 * torch.arccos(fidelity)).square() / 2, p)
    torch.testing.assert_close(s.log_map(p, q).detach(), -(p * (gradient - (p * gradient).sum())).detach())


def test_transport_is_an_isometry_and_comes_back() -> None:
    p, q = points(2, 7, 9)
    u, v = tangents(p, 1.0), tangents(p, 3.0)
    moved_u, moved_v = s.transport(p, q, u), s.transport(p, q, v)
    close = torch.testing.assert_close
    close((moved_u * moved_v / q).sum(-1), (u * v / p).sum(-1))
    close(moved_u.sum(-1), torch.zeros(7, dtype=F64), atol=1e-13, rtol=0)
    close(s.transport(q, p, moved_u), u)
    close(s.transport(p, q, s.log_map(p, q)), -s.log_map(q, p))  # a geodesic carries its own velocity


def test_projection_and_gradient_are_orthogonal_in_the_metric() -> None:
    p = points(4, 6)
    g, direction = torch.randn_like(p), tangents(p, 1.0)
    projected, gradient = s.project_tangent(p, g), s.riemannian_gradient(p, g)
    close = torch.testing.assert_close
    close(projected.sum(-1), torch.zeros(4, dtype=F64), atol=1e-13, rtol=0)
    close(((g - projected) * direction / p).sum(-1), torch.zeros(4, dtype=F64), atol=1e-12, rtol=0)
    close(s.project_tangent(p, direction), direction)
    close(gradient.sum(-1), torch.zeros(4, dtype=F64), atol=1e-13, rtol=0)
    close((gradient * direction / p).sum(-1), (g * direction).sum(-1))


# --- the retraction and the boundary ---------------------------------------------------------------------------------


def test_retraction_is_the_projected_step() -> None:
    p = points(8)
    v = tangents(p, 0.2)
    moved = p.sqrt() + v / (2 * p.sqrt())
    torch.testing.assert_close(s.retract(p, v), (moved / moved.norm()).square())


def test_retraction_agrees_with_exp_to_second_order() -> None:
    p = points(8)
    v = tangents(p, 1.0)
    t = torch.logspace(-0.7, -2.5, 10, dtype=F64)
    error = (s.retract(p, t[:, None] * v) - s.exp_map(p, t[:, None] * v)).norm(dim=-1)
    slopes = error.log().diff() / t.log().diff()
    assert bool(((slopes > 2.9) & (slopes < 3.1)).all()), slopes


@pytest.mark.parametrize("length", [3.0, 30.0])
def test_a_step_that_is_too_long_stops_before_the_boundary(length: float) -> None:
    for _ in range(5):
        p = points(6)
        v = tangents(p, length)
        phi = angle_to_boundary(p, v)
        expected = (rotation(p, v, angle=0.99 * phi) @ p.sqrt()).square()
        for step, angle in ((s.exp_map, length / 2), (s.retract, math.atan(length / 2))):
            reached = step(p, v)
            stays = (rotation(p, v, angle=angle) @ p.sqrt()).square()
            torch.testing.assert_close(reached, expected if angle > phi else stays, rtol=1e-9, atol=1e-13)
            assert float(s.fisher_rao_distance(p, reached)) == pytest.approx(2 * min(0.99 * phi, angle), rel=1e-9)


def test_the_rule_begins_at_the_boundary() -> None:
    p = points(6)
    v = tangents(p, 2.0)  # the angle 1
    phi = angle_to_boundary(p, v)
    for share, reached in ((0.999, 0.999), (1.001, 0.99)):
        moved = s.exp_map(p, share * phi * v)
        assert float(s.fisher_rao_distance(p, moved)) == pytest.approx(2 * reached * phi, rel=1e-9)
        moved = s.retract(p, math.tan(share * phi) * v)
        assert float(s.fisher_rao_distance(p, moved)) == pytest.approx(2 * reached * phi, rel=1e-9)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("num_experts", [2, 8, 256])
def test_a_geodesic_to_the_boundary_is_not_shortened(num_experts: int, dtype: torch.dtype) -> None:
    p = points(20, num_experts).to(dtype)
    q = p.clone()
    q[..., : num_experts // 2] = 0
    q = q / q.sum(-1, keepdim=True)
    tolerance = 1e-7 if dtype == F64 else 1e-3  # distances near 0 are roots of the error
    assert float(s.fisher_rao_distance(s.exp_map(p, s.log_map(p, q)), q).max()) < tolerance


def test_geodesics_leave_the_boundary() -> None:
    for dtype in (F64, torch.float32):
        hot = torch.eye(3, dtype=dtype)
        torch.testing.assert_close(s.geodesic(hot[0], hot[1], 0.5), torch.tensor([0.5, 0.5, 0.0], dtype=dtype))
        expected = torch.tensor([math.cos(math.pi / 6) ** 2, 0.0, math.sin(math.pi / 6) ** 2], dtype=dtype)
        torch.testing.assert_close(s.geodesic(hot[0], hot[2], 1 / 3), expected)
        torch.testing.assert_close(s.geodesic(hot[0], hot[1], 1.0), hot[1])
