"""One conformance suite over every manifold: geoopt's contract, and the laws its own suite does not check.

Each case says what it claims; the laws are checked by finite differences and Taylor slopes, never by its own code.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import geoopt
import pytest
import torch
from torch import Tensor

from moegeo_router.geometry import EuclideanRows, FisherRaoSimplex, OrthonormalRows, PolarRows, UnitRows

F64 = torch.float64


def plain(x: Tensor) -> Tensor:
    return x.as_subclass(torch.Tensor).clone()


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    manifold: geoopt.Manifold
    shapes: tuple[tuple[int, ...], ...]
    retraction_slope: float  # of ‖retr(tu) - exp(tu)‖ against t; 0: they are equal
    has_log: bool = True  # dist, logmap and an isometric transport
    smallest: float = 0.0  # probability, so that short steps stay inside

    def point(self, *shape: int) -> Tensor:
        x = plain(self.manifold.random(*shape, dtype=F64))
        return (1 - self.smallest) * x + self.smallest / shape[-1]

    def tangent(self, x: Tensor, length: float = 0.3) -> Tensor:
        u = self.manifold.proju(x, torch.randn_like(x))
        norm = self.manifold.norm(x, u, keepdim=True)
        return length * u / norm.clamp_min(1e-9)


ROWS = ((3, 5), (1, 2), (2, 3, 4), (6,))
CASES = [
    Case(name="simplex", manifold=FisherRaoSimplex(), shapes=(*ROWS, (8,)), retraction_slope=3, smallest=0.5),
    Case(name="simplex-exact", manifold=FisherRaoSimplex(exact=True), shapes=ROWS, retraction_slope=0, smallest=0.5),
    Case(name="polar", manifold=PolarRows(), shapes=(*ROWS, (3, 1)), retraction_slope=0),
    Case(name="unit", manifold=UnitRows(), shapes=ROWS, retraction_slope=3),
    Case(
        name="orthonormal",
        manifold=OrthonormalRows(),
        shapes=((3, 5), (2, 2, 4), (4, 4)),
        retraction_slope=2,
        has_log=False,
    ),
    Case(name="orthonormal-1", manifold=OrthonormalRows(), shapes=((1, 5),), retraction_slope=3, has_log=False),
    Case(name="euclidean", manifold=EuclideanRows(), shapes=(*ROWS, (1, 1)), retraction_slope=0),
]


def with_shapes(cases: list[Case]) -> pytest.MarkDecorator:
    pairs = [(case, shape) for case in cases for shape in case.shapes]
    ids = [f"{case.name}-{'x'.join(map(str, shape))}" for case, shape in pairs]
    return pytest.mark.parametrize(("case", "shape"), pairs, ids=ids)


every_case = with_shapes(CASES)
with_log = with_shapes([case for case in CASES if case.has_log])
one_shape = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def slope(errors: list[Tensor], times: list[float]) -> float:
    """The exponent of t in ``error ~ tⁿ``, by least squares on logarithms."""
    t = torch.tensor(times, dtype=F64).log()
    e = torch.stack([x.norm() for x in errors]).log()
    return float(((t - t.mean()) * (e - e.mean())).sum() / (t - t.mean()).square().sum())


TIMES = [0.1, 0.05, 0.02, 0.01]

# --- geoopt's contract -----------------------------------------------------------------------------------------------


@every_case
def test_points_and_projections_lie_on_the_manifold(case: Case, shape: tuple[int, ...]) -> None:
    m, x, anything = case.manifold, case.point(*shape), torch.randn(shape, dtype=F64)
    for y in (x, m.projx(anything), m.origin(*shape, dtype=F64), m.random(shape, dtype=F64)):
        assert y.shape == shape
        assert y.dtype == F64
        m.assert_check_point_on_manifold(y, atol=1e-12, rtol=1e-12)
    u = m.proju(x, anything)
    m.assert_check_vector_on_tangent(x, u, atol=1e-10, rtol=0)
    for y in (m.retr(x, u), m.expmap(x, u)):
        m.assert_check_point_on_manifold(y, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(m.projx(m.projx(anything)), m.projx(anything))
    torch.testing.assert_close(m.projx(x), x)
    torch.testing.assert_close(m.proju(x, u), u)
    assert torch.equal(plain(m.origin(shape)), plain(m.origin(shape)))
    assert geoopt.ManifoldParameter(x, manifold=m).manifold is m


@every_case
def test_inner_product(case: Case, shape: tuple[int, ...]) -> None:
    m, x = case.manifold, case.point(*shape)
    u, v, g = case.tangent(x), case.tangent(x), torch.randn(shape, dtype=F64)
    close = torch.testing.assert_close
    close(m.inner(x, u, v), m.inner(x, v, u))
    close(m.inner(x, u + 2 * v, v), m.inner(x, u, v) + 2 * m.inner(x, v, v))
    close(m.norm(x, u).square(), m.inner(x, u))
    assert bool((m.inner(x, u) >= 0).all())
    assert m.inner(x, u, keepdim=True).shape == (*shape[: len(shape) - m.ndim], *[1] * m.ndim)
    close(m.inner(x, u, v, keepdim=True).reshape(-1), m.inner(x, u, v).reshape(-1))
    # proju projects orthogonally: what it removes is normal to every tangent vector.
    removed = m.inner(x, g - m.proju(x, g), v)
    close(removed, torch.zeros_like(removed), atol=1e-12, rtol=0)


@every_case
def test_combined_calls_equal_separate_ones(case: Case, shape: tuple[int, ...]) -> None:
    m, x = case.manifold, case.point(*shape)
    u, v = case.tangent(x), case.tangent(x)
    for step, together, follow in [
        (m.retr, m.retr_transp, m.transp_follow_retr),
        (m.expmap, m.expmap_transp, m.transp_follow_expmap),
    ]:
        y, moved = together(x, u, v)
        torch.testing.assert_close(y, step(x, u))
        torch.testing.assert_close(moved, m.transp(x, y, v))
        torch.testing.assert_close(follow(x, u, v), moved)
        m.assert_check_vector_on_tangent(y, moved, atol=1e-10, rtol=0)


@one_shape
def test_leading_dimensions_are_loops(case: Case) -> None:
    m, shape = case.manifold, (2, 3, 4)
    x, y = case.point(*shape), case.point(*shape)
    u = case.tangent(x)
    calls: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
        lambda x, y, u: m.retr(x, u),
        lambda x, y, u: m.expmap(x, u),
        lambda x, y, u: m.transp(x, y, u),
        lambda x, y, u: m.egrad2rgrad(x, u),
        lambda x, y, u: m.proju(x, u),
        lambda x, y, u: m.inner(x, u),
        lambda x, y, u: m.projx(x + u),
        *([lambda x, y, u: m.dist(x, y), lambda x, y, u: m.logmap(x, y)] if case.has_log else []),
    ]
    for call in calls:
        rows = torch.stack([call(*row) for row in zip(x, y, u, strict=True)])
        torch.testing.assert_close(call(x, y, u), rows)


REJECTED = [
    (FisherRaoSimplex(), [0.5, 0.6], None, "coordinates must sum to 1"),
    (FisherRaoSimplex(), [1.0, 0.0], None, "every coordinate must be positive"),
    (FisherRaoSimplex(), [1.5, -0.5], None, "every coordinate must be positive"),
    (FisherRaoSimplex(), [float("nan"), 0.5], None, "every coordinate must be positive"),
    (FisherRaoSimplex(), [0.5, 0.5], [0.1, 0.0], "a tangent vector must sum to 0"),
    (PolarRows(), [[1.0, 0.0], [0.0, 0.0]], None, "every row must be finite and different from 0"),
    (PolarRows(), [[1.0, float("inf")]], None, "every row must be finite and different from 0"),
    (PolarRows(), [[1.0, 0.0]], [[float("nan"), 0.0]], "a tangent vector must be finite"),
    (UnitRows(), [[1.0, 0.1]], None, "norm"),
    (UnitRows(), [[1.0, 0.0]], [[0.1, 1.0]], "<x, u> != 0"),
    (OrthonormalRows(), [[1.0, 0.0], [0.6, 0.8]], None, "!= I"),
    (OrthonormalRows(), [[2.0, 0.0]], None, "!= I"),
    (OrthonormalRows(), [[1.0], [0.0]], None, "need num_experts <= in_features, got 2 > 1"),
    (OrthonormalRows(), [[1.0, 0.0]], [[1.0, 0.0]], "!=0"),
]


@pytest.mark.parametrize(("manifold", "point", "vector", "reason"), REJECTED)
def test_checks_reject_with_a_reason(manifold: geoopt.Manifold, point: list, vector: list | None, reason: str) -> None:
    x = torch.tensor(point, dtype=F64)
    if vector is None:
        ok, why = manifold.check_point_on_manifold(x, explain=True)
        with pytest.raises(ValueError, match=r"(?s)manifold"):
            manifold.assert_check_point_on_manifold(x)
    else:
        assert manifold.check_point_on_manifold(x)
        ok, why = manifold.check_vector_on_tangent(x, torch.tensor(vector, dtype=F64), explain=True)
    assert not ok
    assert reason in why


# --- the laws --------------------------------------------------------------------------------------------------------


@every_case
def test_gradient_is_the_one_of_the_metric(case: Case, shape: tuple[int, ...]) -> None:
    m, x = case.manifold, case.point(*shape)
    v, mixing = case.tangent(x), torch.randn(*shape, dtype=F64)

    def f(y: Tensor) -> Tensor:
        return (mixing * y).sin().sum() + (mixing.flip(-1) * y).sum().square()

    point = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(point), point)
    gradient = m.egrad2rgrad(x, g)
    m.assert_check_vector_on_tangent(x, gradient, atol=1e-9, rtol=0)
    predicted = float(m.inner(x, gradient, v).sum())
    assert predicted == pytest.approx(float((g * v).sum()), rel=1e-9, abs=1e-12)
    for step in (m.retr, m.expmap):
        difference = (f(step(x, 1e-5 * v)) - f(step(x, -1e-5 * v))) / 2e-5
        assert float(difference) == pytest.approx(predicted, rel=1e-6, abs=1e-8)


@every_case
def test_retraction_has_its_order(case: Case, shape: tuple[int, ...]) -> None:
    m, x = case.manifold, case.point(*shape)
    u = case.tangent(x, 1.0)
    for step in (m.retr, m.expmap):
        first_order = [step(x, t * u) - x - t * u for t in TIMES]
        if case.name != "euclidean" and u.norm() > 0:
            assert slope(first_order, TIMES) == pytest.approx(2, abs=0.15)
    difference = [m.retr(x, t * u) - m.expmap(x, t * u) for t in TIMES]
    if case.retraction_slope == 0:
        assert all(float(d.abs().max()) < 1e-14 for d in difference)
    else:
        assert slope(difference, TIMES) == pytest.approx(case.retraction_slope, abs=0.15)


@pytest.mark.parametrize("manifold", [UnitRows(), OrthonormalRows()])
def test_exp_has_no_tangential_acceleration(manifold: geoopt.Manifold) -> None:
    x = plain(manifold.random(3, 5, dtype=F64))
    u, h = manifold.proju(x, torch.randn(3, 5, dtype=F64)), 1e-4
    for t in (0.0, 0.4):
        before, y, after = (manifold.expmap(x, (t + s) * u) for s in (-h, 0, h))
        acceleration = manifold.proju(y, (after - 2 * y + before) / h**2)
        torch.testing.assert_close(acceleration, torch.zeros_like(y), atol=1e-5, rtol=0)
        torch.testing.assert_close(manifold.norm(y, (after - before) / (2 * h)), manifold.norm(x, u), atol=1e-6, rtol=0)


@with_log
def test_exp_log_dist_agree(case: Case, shape: tuple[int, ...]) -> None:
    m, x, y = case.manifold, case.point(*shape), case.point(*shape)
    if shape[-1] == 1:
        y = y.abs() * x.sign()  # a negative number is not within reach of a positive one
    u, v = m.logmap(x, y), case.tangent(x)
    close = torch.testing.assert_close
    m.assert_check_vector_on_tangent(x, u, atol=1e-10, rtol=0)
    close(m.expmap(x, u), y)
    close(m.logmap(x, m.expmap(x, v)), v)
    close(m.dist(x, y), m.norm(x, u))
    close(m.dist(x, y), m.dist(y, x))
    close(m.dist(x, m.expmap(x, v)), m.norm(x, v))
    close(m.dist(x, y, keepdim=True).reshape(-1), m.dist(x, y).reshape(-1))
    close(m.dist(x, x), torch.zeros_like(m.dist(x, x)), atol=1e-7, rtol=0)
    # (distances add up along the geodesic, so it is the shortest way)
    middle = m.expmap(x, 0.4 * u)
    close(m.dist(x, middle), 0.4 * m.dist(x, y))
    close(m.dist(middle, y), 0.6 * m.dist(x, y))


@with_log
def test_transport_is_parallel(case: Case, shape: tuple[int, ...]) -> None:
    m, x, y = case.manifold, case.point(*shape), case.point(*shape)
    if shape[-1] == 1:
        y = y.abs() * x.sign()
    u, v = case.tangent(x), case.tangent(x)
    moved_u, moved_v = m.transp(x, y, u), m.transp(x, y, v)
    close = torch.testing.assert_close
    m.assert_check_vector_on_tangent(y, moved_v, atol=1e-10, rtol=0)
    close(m.inner(y, moved_u, moved_v), m.inner(x, u, v))
    close(m.transp(y, x, moved_v), v)
    close(m.transp(x, y, u + 2 * v), moved_u + 2 * moved_v)
    close(m.transp(x, x, v), v)
    close(m.transp(x, y, m.logmap(x, y)), -m.logmap(y, x))


def test_transport_of_orthonormal_rows_is_a_projection() -> None:
    m = OrthonormalRows()
    x, y = (plain(m.random(3, 5, dtype=F64)) for _ in range(2))
    v = m.proju(x, torch.randn(3, 5, dtype=F64))
    moved, other = m.transp(x, y, v), m.proju(y, torch.randn(3, 5, dtype=F64))
    torch.testing.assert_close(((v - moved) * other).sum(), torch.zeros((), dtype=F64), atol=1e-12, rtol=0)
    torch.testing.assert_close(m.transp(x, x, v), v)
    assert float(moved.norm()) <= float(v.norm())


def test_projections_find_the_nearest_point() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, -2.0]], dtype=F64)
    torch.testing.assert_close(UnitRows().projx(x), torch.tensor([[0.6, 0.8], [0.0, -1.0]], dtype=F64))
    torch.testing.assert_close(FisherRaoSimplex().projx(x[0]), torch.tensor([3 / 7, 4 / 7], dtype=F64))
    clipped = FisherRaoSimplex().projx(torch.tensor([0.5, -1.0, 0.5], dtype=F64))
    torch.testing.assert_close(clipped, torch.tensor([0.5, 1e-12, 0.5], dtype=F64), rtol=1e-9, atol=0)
    assert torch.equal(PolarRows().projx(x), x)
    m, anything = OrthonormalRows(), torch.randn(3, 5, dtype=F64)
    nearest = m.projx(anything)
    for _ in range(20):
        other = m.retr(nearest, 0.1 * m.proju(nearest, torch.randn(3, 5, dtype=F64)))
        assert float((anything - other).norm()) > float((anything - nearest).norm())


# --- where numbers are difficult -------------------------------------------------------------------------------------


@one_shape
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_gradients_are_finite_at_zero_steps_and_equal_points(case: Case, dtype: torch.dtype) -> None:
    m, x = case.manifold, case.point(3, 4).to(dtype)
    zero = torch.zeros_like(x)
    calls: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (m.retr, (x, zero)),
        (m.expmap, (x, zero)),
        (m.norm, (x, case.tangent(x.double()).to(dtype))),
        (m.transp, (x, x, zero)),
        *([(m.dist, (x, x)), (m.dist2, (x, x)), (m.logmap, (x, x))] if case.has_log else []),
    ]
    for call, arguments in calls:
        inputs = [y.clone().requires_grad_() for y in arguments]
        value = call(*inputs)
        assert bool(value.isfinite().all())
        gradients = torch.autograd.grad((value * torch.rand_like(value)).sum(), inputs, allow_unused=True)
        assert all(bool(g.isfinite().all()) for g in gradients if g is not None), call


#: Largest error of a float32 result against float64 on the same float32 numbers.
FLOAT32 = {"polar": 5e-6, "unit": 2e-6, "orthonormal": 4e-6, "orthonormal-1": 4e-6}


@one_shape
def test_float32_is_close_to_float64(case: Case) -> None:
    m = case.manifold
    x, y = case.point(20, 1, 8).float(), case.point(20, 1, 8).float()
    u = case.tangent(x.double()).float()
    for call, arguments in [
        (m.retr, (x, u)),
        (m.expmap, (x, u)),
        (m.transp, (x, y, u)),
        (m.egrad2rgrad, (x, u)),
        *([(m.dist, (x, y)), (m.dist, (x, x)), (m.logmap, (x, y))] if case.has_log else []),
    ]:
        error = (call(*arguments) - call(*(a.double() for a in arguments))).abs().max()
        assert float(error) <= FLOAT32.get(case.name, 1e-6), call


@one_shape
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_points_stay_half_and_finite(case: Case, dtype: torch.dtype) -> None:
    m = case.manifold
    x, y = (plain(m.random(3, 8, dtype=dtype)) for _ in range(2))
    u = m.proju(x, (0.01 * torch.randn(3, 8)).to(dtype))
    results = [u, m.projx(x), m.egrad2rgrad(x, u), m.retr(x, u), m.expmap(x, u), m.transp(x, y, u)]
    results += [m.logmap(x, y)] if case.has_log else []
    for result in (x, *results):
        assert result.dtype == dtype
        assert bool(result.isfinite().all())
    hot = torch.tensor([[1.0, 0.0, 0.0]], dtype=dtype)
    assert m.check_point_on_manifold(m.projx(hot), atol=1e-2)


def test_stored_distributions_never_reach_zero() -> None:
    for m in (FisherRaoSimplex(), FisherRaoSimplex(exact=True)):
        for dtype in (F64, torch.float32, torch.bfloat16):
            x = m.projx(torch.tensor([1.0, 0.0, 0.0], dtype=dtype))
            u = m.proju(x, torch.tensor([5.0, -1.0, -1.0], dtype=dtype))
            for y in (x, m.retr(x, u), m.expmap(x, u)):
                assert float(y.min()) >= 0.99e-12
                assert float(y.sum()) == pytest.approx(1, abs=1e-6)


def test_a_coordinate_on_the_floor_does_not_stop_the_others() -> None:
    x = torch.tensor([0.6, 0.4, 1e-12], dtype=F64)
    outwards = torch.tensor([0.15, -0.1, -0.05], dtype=F64)
    # What is left of the vector, projected on the tangent space again: v - p Σv.
    inside = torch.tensor([0.15 - 0.6 * 0.05, -0.1 - 0.4 * 0.05, 0.0], dtype=F64)
    for m in (FisherRaoSimplex(), FisherRaoSimplex(exact=True)):
        torch.testing.assert_close(m.retr(x, outwards), m.retr(x, inside), rtol=0, atol=2e-12)
        assert float(m.dist(x, m.retr(x, outwards))) > 0.2
        inwards = m.retr(x, -outwards)  # and it can come back
        assert float(inwards[2]) > 0.01
        rows = torch.stack([x, torch.tensor([0.6, 0.3, 0.1], dtype=F64)])
        torch.testing.assert_close(m.retr(rows, outwards)[1], m.retr(rows[1], outwards))


def test_geoopt_is_imported_only_for_the_manifolds() -> None:
    code = "import sys, moegeo_router.geometry as g; assert 'geoopt' not in sys.modules; g.PolarRows; g.UnitRows"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        getattr(sys.modules["moegeo_router.geometry"], "Nothing")  # noqa: B009


@pytest.mark.parametrize("manifold", [PolarRows(), UnitRows(), OrthonormalRows()], ids=lambda m: m.name)
def test_half_precision_is_computed_in_single_and_rounded_once(manifold):
    x = manifold.projx(torch.randn(4, 16)).bfloat16()
    u = manifold.proju(x, 0.3 * torch.randn(4, 16).bfloat16())
    for step in (manifold.retr, manifold.expmap):
        assert torch.equal(step(x, u), step(x.float(), u.float()).bfloat16())
    assert manifold.inner(x, u).dtype == torch.float32
