"""The open probability simplex with the Fisher-Rao metric, as a geoopt manifold.

Naming follows geoopt: x, y points; u, v tangent vectors. The mathematics is in ``simplex``.
"""

from __future__ import annotations

import torch
from geoopt import Manifold
from geoopt.tensor import ManifoldTensor
from torch import Tensor

from . import simplex


class FisherRaoSimplex(Manifold):
    """Distributions over E experts in the last dimension, at Fisher-Rao distance ``2 arccos Σ √(x_i y_i)`` in [0, π].

    The retraction is the projection step on the sphere of square roots, ``((a + w)/‖a + w‖)²``, or the exponential map
    with ``exact=True``; a step that would leave the simplex stops at .99 of the way to its boundary. Points that come
    out of ``retr``, ``expmap``, ``projx`` and ``random`` are meant to be stored: they are floored at 1e-12 a
    coordinate. Any leading dimensions; half-precision points are computed in fp32.

    Args:
        exact: retract by the exponential map.

    Example:
        >>> prior = geoopt.ManifoldParameter(torch.full((8,), 1 / 8), manifold=FisherRaoSimplex())
        >>> optimizer = geoopt.optim.RiemannianAdam([prior], lr=0.1)
    """

    name = "Fisher-Rao simplex"
    ndim = 1
    reversible = False

    def __init__(self, exact: bool = False) -> None:
        super().__init__()
        self.exact = exact

    def extra_repr(self) -> str:
        """Name the variant."""
        return "exact" if self.exact else ""

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the Fisher-Rao distance in radians, (...) or (..., 1)."""
        distance = simplex.fisher_rao_distance(x, y)
        return distance.unsqueeze(-1) if keepdim else distance

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Move from x along u: by the sphere-projection step, or exactly with ``exact=True``.

        What u would take from a coordinate that lies on the floor already is left out: a momentum that still points
        outwards there would otherwise stop all other coordinates too, for as long as it lasts.
        """
        on_floor = (x <= 2 * self._floor(x.dtype)) & (u < 0)
        u = torch.where(on_floor.any(dim=-1, keepdim=True), self.proju(x, torch.where(on_floor, 0, u)), u)
        return self._stored(simplex.exp_map(x, u) if self.exact else simplex.retract(x, u), x.dtype)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Move from x along the geodesic of u for unit time."""
        return self._stored(simplex.exp_map(x, u), x.dtype)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the tangent vector at x whose geodesic reaches y at unit time."""
        return simplex.log_map(x, y).to(x.dtype)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Carry v from x to y along their geodesic (an isometry)."""
        return simplex.transport(x, y, v).to(v.dtype)

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """Return ``Σ u_i v_i / x_i``, (...) or (..., 1)."""
        product = simplex.inner(x, u, u if v is None else v)
        return product.unsqueeze(-1) if keepdim else product

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Project u on the tangent space of x: ``u - x Σ u_i``."""
        return simplex.project_tangent(x, u).to(u.dtype)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the Riemannian gradient ``x ⊙ (u - Σ x_i u_i)`` of the Euclidean gradient u."""
        return simplex.riemannian_gradient(x, u).to(u.dtype)

    def projx(self, x: Tensor) -> Tensor:
        """Put x on the simplex: clip at the floor, divide by the sum."""
        return self._stored(simplex.widen(x), x.dtype)

    def random(
        self, *size: int, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: object
    ) -> Tensor:
        """Sample uniformly with respect to the Fisher-Rao volume, Dirichlet(½, …, ½)."""
        points = simplex.random_distributions(*shape_of(size), dtype=dtype, device=device)
        return ManifoldTensor(self._stored(points, points.dtype), manifold=self)

    def origin(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        seed: int | None = 42,
    ) -> Tensor:
        """Return uniform distributions; ``seed`` is part of geoopt's signature and has no effect."""
        shape = shape_of(size)
        return ManifoldTensor(
            simplex.uniform(shape[-1], dtype=dtype, device=device).expand(shape).clone(), manifold=self
        )

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> tuple[bool, str | None]:
        if not bool((x > 0).all()):
            return False, "every coordinate must be positive"
        total = simplex.widen(x).sum(dim=-1)
        if not torch.allclose(total, torch.ones_like(total), atol=atol, rtol=rtol):
            return False, f"coordinates must sum to 1 with atol={atol}, rtol={rtol}"
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        total = simplex.widen(u).sum(dim=-1)
        if not torch.allclose(total, torch.zeros_like(total), atol=atol, rtol=rtol):
            return False, f"a tangent vector must sum to 0 with atol={atol}, rtol={rtol}"
        return True, None

    @staticmethod
    def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
        floored = x.clamp_min(FisherRaoSimplex._floor(dtype))
        return (floored / floored.sum(dim=-1, keepdim=True)).to(dtype)

    @staticmethod
    def _floor(dtype: torch.dtype) -> float:
        # fp16 cannot hold 1e-12: its smallest normal number takes that place.
        return max(simplex.FLOOR, torch.finfo(dtype).tiny)


def shape_of(size: tuple[int, ...] | tuple[tuple[int, ...]]) -> tuple[int, ...]:
    """Accept both ``random(2, 3)`` and ``random((2, 3))``, as geoopt's manifolds do."""
    return tuple(size[0]) if len(size) == 1 and isinstance(size[0], tuple) else size
