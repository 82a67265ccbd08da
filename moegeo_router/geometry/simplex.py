"""The Fisher-Rao geometry of the open probability simplex, as plain functions.

``<v, w>_p = Σ v_i w_i / p_i`` on tangent vectors ``Σ v_i = 0``. Under ``p -> √p`` this is four times the round metric
of the unit sphere's positive orthant; every function below works there: ``a = √p``, ``b = √q``, ``w = v / (2a)``.

Points and vectors are (..., E): the last dimension holds the experts, all others broadcast. Half-precision input is
computed in fp32. Values are not checked or renormalised (reading them back would synchronise an accelerator);
``FisherRaoSimplex.check_point_on_manifold`` does that where it is wanted.

Formulas: Fisher information geometry of the categorical distribution (standard); the numerical forms are [ours].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

#: The smallest probability of a *stored* point, and of a divisor. Distances never see it.
FLOOR = 1e-12


def fisher_rao_distance(p: Tensor, q: Tensor) -> Tensor:
    """Return the geodesic distance ``d(p, q) = 2 arccos Σ √(p_i q_i) = 4 arcsin(‖√p - √q‖ / 2)``, in radians.

    The arcsin form keeps all digits at p = q, where arccos loses half of them and has NaN gradients. The gradient at
    p = q is 0 (the subgradient of least norm), at p_i = 0 it is finite.

    Args:
        p: (..., E) distributions.
        q: (..., E) distributions, broadcast against ``p``.

    Returns:
        (...) distances in [0, π].

    Raises:
        ValueError: the last dimensions differ or are empty.
    """
    _check_same_experts(p=p, q=q)
    return 4 * torch.arcsin(torch.linalg.vector_norm(root(p) - root(q), dim=-1) / 2)


def exp_map(p: Tensor, v: Tensor) -> Tensor:
    """Follow the geodesic from p with initial velocity v for unit time: ``(cos h · a + sinc h · w)²``, ``h = ‖w‖``.

    The simplex ends where a coordinate reaches 0, at the angle ``φ = min_{w_i < 0} atan2(h a_i, -w_i)``; beyond it the
    square would fold back inside. A vector with h > φ is shortened to 0.99 φ (a constant for autograd).

    Args:
        p: (..., E) distributions.
        v: (..., E) tangent vectors.

    Returns:
        (..., E) distributions.

    Raises:
        ValueError: the last dimensions differ or are empty.
    """
    a, w, _ = _on_sphere(p, v)
    return _follow(a, w)


def retract(p: Tensor, v: Tensor) -> Tensor:
    """Move along the geodesic of v by the sphere-projection step ``((a + w) / ‖a + w‖)²``: the angle arctan h, not h.

    Agrees with ``exp_map`` to second order, needs no trigonometry where the step stays inside, and has the same rule at
    the boundary.

    Args:
        p: (..., E) distributions.
        v: (..., E) tangent vectors.

    Returns:
        (..., E) distributions.

    Raises:
        ValueError: the last dimensions differ or are empty.
    """
    a, w, h = _on_sphere(p, v)
    angle = torch.arctan(h)
    scale = _shortening(a, w, h, angle=angle)
    # tan of the shortened angle; where nothing is shortened this is h itself, exactly.
    step = torch.where(scale < 1, torch.tan(scale * angle) / h.clamp_min(FLOOR), torch.ones_like(h))
    return ((a + step * w) / torch.hypot(torch.ones_like(h), step * h)).square()


def log_map(p: Tensor, q: Tensor) -> Tensor:
    """Return the tangent vector at p whose geodesic reaches q at unit time; ``‖log_p q‖_p = d(p, q)``.

    ``2a ⊙ (b - a + ½‖a - b‖² a) / sinc θ`` with ``θ = 2 atan2(‖a - b‖, ‖a + b‖)``, stable at p = q.

    Args:
        p: (..., E) distributions.
        q: (..., E) distributions.

    Returns:
        (..., E) tangent vectors at p.

    Raises:
        ValueError: the last dimensions differ or are empty.
    """
    _check_same_experts(p=p, q=q)
    a, b = torch.broadcast_tensors(root(p), root(q))
    return 2 * a * sphere_log(a, b)


def project_tangent(p: Tensor, v: Tensor) -> Tensor:
    """Project any vector on the tangent space, orthogonally in the Fisher-Rao metric: ``v - p Σ v_i``."""
    _check_same_experts(p=p, v=v)
    p, v = widen(p), widen(v)
    return v - p * v.sum(dim=-1, keepdim=True)


def riemannian_gradient(p: Tensor, g: Tensor) -> Tensor:
    """Turn a Euclidean gradient g into the natural gradient of a categorical: ``p ⊙ (g - Σ p_i g_i)``."""
    _check_same_experts(p=p, g=g)
    p, g = widen(p), widen(g)
    return p * (g - (p * g).sum(dim=-1, keepdim=True))


def inner(p: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return the Fisher-Rao inner product ``Σ u_i v_i / p_i``, shape (...)."""
    _check_same_experts(p=p, u=u, v=v)
    return (widen(u) * widen(v) / widen(p).clamp_min(FLOOR)).sum(dim=-1)


def transport(p: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """Carry a tangent vector from p to q along their geodesic: ``2b ⊙ (w - <b,w>/(1+<a,b>) (a+b))``, an isometry.

    Args:
        p: (..., E) distributions.
        q: (..., E) distributions.
        v: (..., E) tangent vectors at p.

    Returns:
        (..., E) tangent vectors at q.

    Raises:
        ValueError: the last dimensions differ or are empty.
    """
    _check_same_experts(p=p, q=q, v=v)
    a, w, _ = _on_sphere(p, v)
    b = root(q)
    return 2 * b * sphere_transport(a, b, w)


def geodesic(p: Tensor, q: Tensor, t: float | Tensor) -> Tensor:
    """Return the point a fraction t ∈ [0, 1] of the way from p to q: ``exp_p(t log_p q)``.

    Computed on the sphere, so that p may lie on the boundary, where tangent vectors of the simplex lose the way inside.

    Args:
        p: (..., E) distributions.
        q: (..., E) distributions.
        t: a number, or (...) numbers.

    Returns:
        (..., E) distributions.

    Raises:
        ValueError: the last dimensions differ or are empty.
    """
    _check_same_experts(p=p, q=q)
    fraction = t.unsqueeze(-1) if isinstance(t, Tensor) and t.ndim else t
    a, b = torch.broadcast_tensors(root(p), root(q))
    return _follow(a, fraction * sphere_log(a, b))


@torch.no_grad()
def frechet_mean(
    points: Tensor, weights: Tensor | None = None, *, tolerance: float | None = None, max_steps: int = 100
) -> Tensor:
    """Return the Fréchet mean ``argmin_m Σ_t w_t d(m, p_t)²`` over the second-to-last dimension.

    Starts from the extrinsic mean ``normalize(Σ w_t √p_t)²`` and iterates ``m ← exp_m(s / κ)``, ``s = Σ w_t log_m p_t``
    and κ the curvature of the objective along s. Inside the positive orthant the mean exists and is unique. Unit steps
    (κ = 1) descend too, but crawl where tokens are decisive: 100 are not enough at E = 256, where this takes about ten.
    The result carries no gradient: that of a stopped iteration is not the mean's.

    Args:
        points: (..., T, E) distributions.
        weights: (..., T) non-negative, not all zero; equal where not given.
        tolerance: stop when every step is shorter (radians); default 100 × the dtype's ε.
        max_steps: iterations at most.

    Returns:
        (..., E) distributions.

    Raises:
        ValueError: no points, or the weights do not fit them.
    """
    _check_same_experts(points=points)
    if points.ndim < 2 or points.shape[-2] == 0:
        raise ValueError(f"points must be (..., T, E) with T >= 1, got shape {tuple(points.shape)}")
    if weights is None:
        weights = points.new_ones(points.shape[:-1])
    if weights.shape != points.shape[:-1]:
        raise ValueError(f"weights must be {tuple(points.shape[:-1])}, got {tuple(weights.shape)}")
    points = widen(points)
    share = (widen(weights) / weights.sum(dim=-1, keepdim=True)).unsqueeze(-1)
    roots = root(points)
    mean = F.normalize((share * roots).sum(dim=-2, keepdim=True), dim=-1)
    limit = 100 * torch.finfo(mean.dtype).eps if tolerance is None else tolerance
    for _ in range(max_steps):
        step = _mean_step(mean, roots, share)
        # On the sphere and without the boundary rule: an iterate may leave the orthant for a moment, the mean does not.
        mean = F.normalize(sphere_exp(mean, step), dim=-1)
        if bool((2 * torch.linalg.vector_norm(step, dim=-1) <= limit).all()):
            break
    return mean.squeeze(-2).square()


def random_distributions(
    *size: int,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample uniformly with respect to the Fisher-Rao volume: Dirichlet(½, …, ½), the square of a random direction.

    Args:
        size: the shape (..., E), E ≥ 1.
        dtype: floating dtype.
        device: device of the result.
        generator: source of randomness.

    Returns:
        ``size`` distributions.

    Raises:
        ValueError: no experts.
    """
    if not size or size[-1] < 1:
        raise ValueError(f"size must be (..., E) with E >= 1, got {size}")
    direction = torch.randn(*size, dtype=dtype, device=device, generator=generator)
    square = widen(direction).square()
    return (square / square.sum(dim=-1, keepdim=True)).to(direction.dtype)


def uniform(num_experts: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """Return the uniform distribution u = (1/E, …, 1/E)."""
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    return torch.full((num_experts,), 1 / num_experts, dtype=dtype, device=device)


def entropy(p: Tensor) -> Tensor:
    """Return the Shannon entropy ``-Σ p_i log p_i`` in nats, (...), with finite gradients at p_i = 0."""
    wide = widen(p)
    return -(wide * wide.clamp_min(torch.finfo(wide.dtype).tiny).log()).sum(dim=-1)


# --- the unit sphere beneath: shared with the router manifolds -------------------------------------------------------


def widen(x: Tensor) -> Tensor:
    """Return x in fp32, or in fp64 if it is fp64: bf16 probabilities would cost 2e-3 in a distance."""
    return x if x.dtype == torch.float64 else x.float()


def readable(x: Tensor) -> bool:
    """Whether values can be checked at no cost: reading them back would make an accelerator wait."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def root(p: Tensor) -> Tensor:
    """Return √p with a finite gradient at 0; the value there is √tiny (1e-19 in fp32), not an ε that distances see."""
    wide = widen(p)
    return wide.clamp_min(torch.finfo(wide.dtype).tiny).sqrt()


def sinc(x: Tensor) -> Tensor:
    """Return sin x / x, 1 at x = 0 (torch's sinc is the normalised one)."""
    return torch.sinc(x / math.pi)


def sphere_angle(a: Tensor, b: Tensor, keepdim: bool = False) -> Tensor:
    """Return the angle between unit vectors, ``2 atan2(‖a - b‖, ‖a + b‖)``: exact to rounding from 0 to π."""
    apart = torch.linalg.vector_norm(a - b, dim=-1, keepdim=keepdim)
    return 2 * torch.atan2(apart, torch.linalg.vector_norm(a + b, dim=-1, keepdim=keepdim))


def sphere_exp(a: Tensor, w: Tensor) -> Tensor:
    """Follow the great circle of the tangent vector w from a for unit time."""
    h = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    return torch.cos(h) * a + sinc(h) * w


def sphere_log(a: Tensor, b: Tensor) -> Tensor:
    """Return the tangent vector at a of the great circle to b, of length their angle (not defined for b = -a)."""
    apart = (a - b).square().sum(dim=-1, keepdim=True)
    return (b - a + apart / 2 * a) / sinc(sphere_angle(a, b, keepdim=True))


def sphere_transport(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """Carry the tangent vector w from a to b along their great circle (not defined for b = -a)."""
    along = (b * w).sum(dim=-1, keepdim=True) / (1 + (a * b).sum(dim=-1, keepdim=True))
    return w - along * (a + b)


def _on_sphere(p: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_same_experts(p=p, v=v)
    a = root(p)
    w = widen(v) / (2 * a.clamp_min(math.sqrt(FLOOR)))
    return a, w, torch.linalg.vector_norm(w, dim=-1, keepdim=True)


def _follow(a: Tensor, w: Tensor) -> Tensor:
    """Return the distribution at the end of the great circle of w from a, or at .99 of the way to the boundary."""
    h = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
    return sphere_exp(a, _shortening(a, w, h, angle=h) * w).square()


def _mean_step(mean: Tensor, roots: Tensor, share: Tensor) -> Tensor:
    """Return the step s / κ of a Fréchet mean on the sphere; all arguments are (..., T or 1, E or 1)."""
    logs = sphere_log(mean, roots)
    step = (share * logs).sum(dim=-2, keepdim=True)
    # Half a squared distance curves by 1 along its own great circle and by θ cot θ across it.
    theta = sphere_angle(mean, roots, keepdim=True)
    across = torch.cos(theta) / sinc(theta)
    lengths = theta.square() * step.square().sum(dim=-1, keepdim=True)
    along = (logs * step).sum(dim=-1, keepdim=True).square() / lengths.clamp_min(torch.finfo(mean.dtype).tiny)
    return step / (share * (across + (1 - across) * along)).sum(dim=-2, keepdim=True)


@torch.no_grad()
def _shortening(a: Tensor, w: Tensor, h: Tensor, angle: Tensor) -> Tensor:
    """Return the factor on ``angle`` (along w) that keeps it inside the orthant: 1, or .99 φ / angle beyond φ."""
    to_boundary = torch.where(w < 0, torch.atan2(h * a, -w), torch.inf).amin(dim=-1, keepdim=True)
    # Rounding must not shorten a step that ends on the boundary itself.
    beyond = angle > to_boundary * (1 + 32 * torch.finfo(a.dtype).eps)
    return torch.where(beyond, 0.99 * to_boundary / angle.clamp_min(FLOOR), torch.ones_like(h))


def _check_same_experts(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.ndim == 0 or tensor.shape[-1] == 0:
            raise ValueError(f"{name} must be (..., E) with E >= 1 experts, got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if len({tensor.shape[-1] for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"the last dimensions (experts) must be equal, got {shapes}")
