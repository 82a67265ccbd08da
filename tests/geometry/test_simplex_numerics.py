"""The Fisher-Rao functions where they are hard: means, samples, gradients, the boundary, precision, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from moegeo_router.geometry import simplex as s

from .test_simplex import F64, exact_distance, points, tangents

#: name, function, takes a second point, takes a vector.
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], bool, bool]] = {
    "fisher_rao_distance": (s.fisher_rao_distance, True, False),
    "exp_map": (s.exp_map, False, True),
    "retract": (s.retract, False, True),
    "log_map": (s.log_map, True, False),
    "geodesic": (lambda p, q: s.geodesic(p, q, 0.3), True, False),
    "transport": (s.transport, True, True),
    "project_tangent": (s.project_tangent, False, True),
    "riemannian_gradient": (s.riemannian_gradient, False, True),
    "inner": (lambda p, v: s.inner(p, v, v.flip(-1)), False, True),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def arguments(name: str, p: Tensor, q: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    _, point, vector = FUNCTIONS[name]
    return (p, *([q] if point else []), *([v] if vector else []))


def call(name: str, p: Tensor, q: Tensor, v: Tensor) -> Tensor:
    return FUNCTIONS[name][0](*arguments(name, p, q, v))


# --- the Fréchet mean ------------------------------------------------------------------------------------------------


def objective(mean: Tensor, sample: Tensor, weights: Tensor) -> float:
    angles = torch.arccos((mean.sqrt() * sample.sqrt()).sum(-1).clamp_max(1))
    return float((weights * (2 * angles).square()).sum())


def test_mean_is_where_scipy_finds_the_minimum() -> None:
    sample, weights = points(12, 4, inside=0.05), torch.rand(12, dtype=F64)
    found = minimize(
        lambda z: objective(torch.softmax(torch.tensor(z), -1), sample, weights),
        x0=[0.0] * 4,
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 4000, "maxfev": 4000},
    )
    mean = s.frechet_mean(sample, weights)
    torch.testing.assert_close(mean, torch.softmax(torch.tensor(found.x), -1), atol=1e-6, rtol=0)
    assert objective(mean, sample, weights) <= found.fun + 1e-12
    extrinsic = (weights[:, None] * sample.sqrt()).sum(0).square()
    assert objective(extrinsic / extrinsic.sum(), sample, weights) > found.fun + 1e-5  # the start alone is not it


@pytest.mark.parametrize(("num_experts", "dtype"), [(4, F64), (64, F64), (1024, F64), (256, torch.float32)])
def test_mean_of_decisive_tokens_is_stationary(num_experts: int, dtype: torch.dtype) -> None:
    weights = torch.rand(num_experts, dtype=F64).pow(3) + 1e-3
    hot = torch.eye(num_experts, dtype=dtype)
    mean = s.frechet_mean(hot, weights.to(dtype)).double()
    # Stationary: Σ w_t (θ_t / sin θ_t) √p_t is a multiple of √m; with one-hot tokens, coordinate by coordinate.
    theta = torch.arccos(mean.sqrt())
    ratio = weights * theta / theta.sin() / mean.sqrt()
    assert float(ratio.max() / ratio.min()) == pytest.approx(1, abs=1e-9 if dtype == F64 else 1e-3)


def test_mean_by_symmetry_and_of_equal_points() -> None:
    torch.testing.assert_close(s.frechet_mean(torch.eye(8, dtype=F64)), s.uniform(8, dtype=F64))
    hot = torch.eye(3, dtype=F64)
    torch.testing.assert_close(s.frechet_mean(hot[[0, 0]]), hot[0])
    torch.testing.assert_close(s.frechet_mean(hot[:2]), torch.tensor([0.5, 0.5, 0.0], dtype=F64))
    p = points(6)
    torch.testing.assert_close(s.frechet_mean(p.expand(5, 6)), p)
    assert float(s.frechet_mean(torch.ones(3, 1))) == 1


def test_mean_of_batches() -> None:
    sample, weights = points(2, 3, 5, 4), torch.rand(2, 3, 5, dtype=F64)
    means = s.frechet_mean(sample, weights)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(means[i, j], s.frechet_mean(sample[i, j], weights[i, j]))
    assert not s.frechet_mean(sample.requires_grad_()).requires_grad  # as its docstring says


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_experts", [2, 5])
def test_samples_have_the_moments_of_dirichlet_one_half(num_experts: int) -> None:
    n, total = 200_000, num_experts / 2  # Dirichlet(½, …, ½)
    x = s.random_distributions(n, num_experts, dtype=F64, generator=torch.Generator().manual_seed(3))
    mean = 1 / num_experts
    variance = mean * (1 - mean) / (total + 1)
    assert x.mean(0).tolist() == pytest.approx([mean] * num_experts, abs=5 * math.sqrt(variance / n))
    assert x.var(0).tolist() == pytest.approx([variance] * num_experts, rel=0.02)
    covariance = ((x[:, 0] - mean) * (x[:, 1] - mean)).mean()
    assert float(covariance) == pytest.approx(-mean * mean / (total + 1), rel=0.05)


def test_samples_follow_generator_shape_and_dtype() -> None:
    first, again, other = (
        s.random_distributions(2, 3, 4, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert first.shape == (2, 3, 4)
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert bool((s.random_distributions(1000, 1, dtype=torch.float16) == 1).all())
    torch.testing.assert_close(s.uniform(5, dtype=F64), torch.full((5,), 0.2, dtype=F64))


# --- gradients and the boundary --------------------------------------------------------------------------------------


@every_function
def test_gradients_equal_finite_differences(name: str) -> None:
    p, q = points(2, 3, 5)
    v = tangents(p, 0.2)
    inputs = [x.clone().requires_grad_() for x in arguments(name, p, q, v)]
    assert torch.autograd.gradcheck(FUNCTIONS[name][0], inputs, atol=1e-6)


def hard_cases(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    p, q = points(2, 4).to(dtype)
    v = tangents(p.double(), 0.2).to(dtype)
    hot = torch.eye(4, dtype=dtype)
    zero_inside = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=dtype)
    underflown = torch.softmax(torch.tensor([0.0, -50.0, -90.0, -200.0], dtype=dtype), -1)
    still, tiny = torch.zeros(4, dtype=dtype), 1e-30 * v
    return {
        "p = q": (p, p, v),
        "v = 0": (p, q, still),
        "tiny v": (p, q, tiny),
        "p = q, v = 0": (p, p, still),
        "p_i = 0": (zero_inside, q, v),
        "q_i = 0": (p, zero_inside, v),
        "p_i = q_i = 0": (zero_inside, hot[0], still),
        "p one-hot": (hot[0], q, v),
        "q one-hot": (p, hot[1], v),
        "p, q disjoint": (hot[0], hot[1], v),
        "p = q one-hot": (hot[2], hot[2], still),
        "underflown": (underflown, hot[0], tiny),
        "too long": (p, q, 1e6 * v),
    }


@every_function
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("case", hard_cases(F64))
def test_values_and_gradients_are_finite(name: str, dtype: torch.dtype, case: str) -> None:
    inputs = [x.clone().requires_grad_() for x in arguments(name, *hard_cases(dtype)[case])]
    value = FUNCTIONS[name][0](*inputs)
    assert bool(value.isfinite().all()), value
    for gradient in torch.autograd.grad((value * torch.arange(1.0, 5.0, dtype=dtype)).sum(), inputs):
        assert bool(gradient.isfinite().all()), gradient
    if name in ("exp_map", "retract", "geodesic"):
        assert float(value.detach().sum()) == pytest.approx(1, abs=1e-6)
        assert bool((value >= 0).all())


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_distance_has_gradient_zero_at_equal_points(dtype: torch.dtype) -> None:
    p = points(5).to(dtype)
    for power in (1, 2):
        q = p.clone().requires_grad_()
        s.fisher_rao_distance(p, q).pow(power).backward()
        assert torch.equal(q.grad, torch.zeros_like(q))


def test_zero_steps_stay() -> None:
    p = points(3, 5)
    for step in (s.exp_map, s.retract):
        torch.testing.assert_close(step(p, torch.zeros_like(p)), p, rtol=1e-15, atol=0)
    torch.testing.assert_close(s.log_map(p, p), torch.zeros_like(p), rtol=0, atol=1e-16)
    v = tangents(p, 1.0)
    torch.testing.assert_close(s.transport(p, p, v), v)


# --- precision, shapes, bad input ------------------------------------------------------------------------------------


#: Largest error of float32 against float64 on the same numbers, coordinates of size 1.
FLOAT32 = dict.fromkeys(FUNCTIONS, 1e-06) | {"log_map": 2e-6, "transport": 4e-6, "inner": 4e-6}


@every_function
@pytest.mark.parametrize("num_experts", [2, 8, 64])
def test_float32_is_close_to_float64(name: str, num_experts: int) -> None:
    p, q = points(2, 50, num_experts).float()
    v = tangents(p.double(), 1.0).float()
    narrow, wide = call(name, p, q, v), call(name, p.double(), q.double(), v.double())
    assert narrow.dtype == torch.float32
    assert float((narrow - wide).abs().max()) <= FLOAT32[name]


@every_function
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    p, q = points(2, 6, 8).to(dtype)
    v = tangents(p.double(), 0.2).to(dtype)
    result = call(name, p, q, v)
    assert result.dtype == torch.float32
    assert torch.equal(result, call(name, p.float(), q.float(), v.float()))
    assert s.frechet_mean(p).dtype == torch.float32
    hot = torch.tensor([1.0, 0.0], dtype=dtype)
    assert float(s.inner(hot, 0 * hot, 0 * hot)) == 0


@every_function
def test_leading_dimensions_are_loops(name: str) -> None:
    p, q = points(2, 1, 4), points(3, 4)
    v = tangents(points(2, 3, 4), 0.1)
    together = call(name, p, q, v)
    for i in range(2):
        for j in range(3):
            row = together.expand(2, 3, *together.shape[2:])[i, j]
            torch.testing.assert_close(row, call(name, p[i, 0], q[j], v[i, j]))


def test_geodesic_takes_numbers_per_row() -> None:
    p, q = points(2, 3, 4)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    path = s.geodesic(p, q, t)
    torch.testing.assert_close(path[0], p[0])
    torch.testing.assert_close(path[2], q[2])
    assert exact_distance(p[1], path[1]) == pytest.approx(exact_distance(p[1], q[1]) / 2)
    torch.testing.assert_close(s.geodesic(p, q, torch.tensor(0.5)), s.geodesic(p, q, 0.5))


@every_function
def test_one_expert_has_nowhere_to_go(name: str) -> None:
    one, zero = torch.ones(3, 1), torch.zeros(3, 1)
    result = call(name, one, one, zero)
    assert torch.equal(result, (one if name in ("exp_map", "retract", "geodesic") else zero).reshape(result.shape))


@every_function
def test_bad_input_is_one_clear_line(name: str) -> None:
    p = s.uniform(4)
    for bad, message in [
        (torch.ones(0), r"p must be \(\.\.\., E\) with E >= 1 experts, got shape \(0,\)"),
        (torch.tensor(1.0), r"p must be \(\.\.\., E\) with E >= 1 experts, got shape \(\)"),
        (torch.ones(4, dtype=torch.long), r"p must be floating point, got torch.int64"),
        (torch.ones(3), r"the last dimensions \(experts\) must be equal, got p \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            call(name, bad, p, p)
        assert "\n" not in str(caught.value)


def test_bad_input_of_means_and_samples() -> None:
    for function, message in [
        (lambda: s.frechet_mean(torch.ones(4)), r"points must be \(\.\.\., T, E\) with T >= 1, got shape \(4,\)"),
        (lambda: s.frechet_mean(torch.ones(0, 4)), r"points must be .* got shape \(0, 4\)"),
        (lambda: s.frechet_mean(torch.ones(2, 0)), r"points must be .* got shape \(2, 0\)"),
        (lambda: s.frechet_mean(torch.ones(2, 4), torch.ones(3)), r"weights must be \(2,\), got \(3,\)"),
        (lambda: s.random_distributions(), r"size must be \(\.\.\., E\) with E >= 1, got \(\)"),
        (lambda: s.random_distributions(3, 0), r"size must be \(\.\.\., E\) with E >= 1, got \(3, 0\)"),
        (lambda: s.uniform(0), "num_experts must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            function()
