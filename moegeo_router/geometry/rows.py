"""The manifolds a router's weight (E, D) can live on: polar rows, unit rows, orthonormal rows, plain rows.

Naming follows geoopt: x, y points; u, v tangent vectors. Only ``PolarRows`` and ``EuclideanRows`` hold every weight
matrix and so preserve a trained router; the others change its function on conversion.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from geoopt import Euclidean, EuclideanStiefel, Manifold, Sphere
from geoopt.tensor import ManifoldTensor
from torch import Tensor

from .fisher_rao import shape_of
from .simplex import sinc, sphere_angle, sphere_exp, sphere_log, sphere_transport, widen

ManifoldName = Literal["polar", "sphere", "orthonormal", "euclidean"]


class RouterManifold:
    """Marks the manifolds of this library, so that ``export`` leaves a user's own manifold parameters alone."""


class PolarRows(RouterManifold, Manifold):
    """Rows w of R^D without 0, with the scale-free metric ``<u, v>_w = u·v / ‖w‖²`` [ours].

    Isometric to ``(log ρ, μ) ∈ R × S^{D-1}`` with ``w = ρμ``: a step turns a row by an angle and stretches it
    by a factor, whatever its norm. With ``r = ‖w‖, μ = w/r, a = μ·u/r, t = u/r - aμ, h = ‖t‖``::

        exp_w(u) = r eᵃ (cos h · μ + sinc h · t)
        dist²    = log²(r₁/r₂) + ∠(μ₁, μ₂)²

    A zero row has no direction. It stands for a row of norm ``ZERO_ROW_NORM`` in a random direction, drawn from a
    generator with this manifold's ``seed``: the same on every rank, and what the first step starts from. Opposite rows
    have no unique geodesic: their ``logmap`` and ``transp`` are not defined. (``torch.compile`` cannot look for zero
    rows: call ``projx`` before a compiled step if there may be some.)

    Rows are the last dimension; any leading dimensions; half-precision rows are computed in fp32 and rounded once.

    Args:
        seed: seeds the directions given to zero rows.
    """

    name = "Polar rows"
    ndim = 1
    reversible = False

    #: A tenth of the row norm of ``nn.Linear``'s own initialisation (1/√3 for any D): nearly uniform routing, no ties.
    ZERO_ROW_NORM = 0.1 / math.sqrt(3)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self._directions: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return ``√(log²(r₁/r₂) + ∠(μ₁, μ₂)²)`` a row, (...) or (..., 1)."""
        r, mu = self._polar(x)
        s, nu = self._polar(y)
        legs = torch.cat(torch.broadcast_tensors(torch.log(r / s), sphere_angle(mu, nu, keepdim=True)), dim=-1)
        return torch.linalg.vector_norm(legs, dim=-1, keepdim=keepdim)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Move each row along the geodesic of u for unit time."""
        r, mu = self._polar(x)
        a, t = self._split(r, mu, u)
        h = torch.linalg.vector_norm(t, dim=-1, keepdim=True)
        return (r * torch.exp(a) * (torch.cos(h) * mu + sinc(h) * t)).to(x.dtype)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Move each row: the exponential map, which is in closed form."""
        return self.expmap(x, u)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the tangent vectors at x whose geodesics reach y at unit time."""
        r, mu = self._polar(x)
        s, nu = self._polar(y)
        return (r * (torch.log(s / r) * mu + sphere_log(mu, nu))).to(x.dtype)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Carry v from x to y: the radial part stays, the angular part turns with μ (an isometry)."""
        r, mu = self._polar(x)
        s, nu = self._polar(y)
        a, t = self._split(r, mu, v)
        return (s * (a * nu + sphere_transport(mu, nu, t))).to(v.dtype)

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """Return ``u·v / ‖x‖²`` a row, (...) or (..., 1)."""
        r, _ = self._polar(x)
        u = widen(u)
        product = (u * (u if v is None else v)).sum(dim=-1, keepdim=True) / r.square()
        return product if keepdim else product.squeeze(-1)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Return u: every vector is tangent."""
        return u.expand(torch.broadcast_shapes(x.shape, u.shape))

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the Riemannian gradient ``‖x‖² u`` of the Euclidean gradient u."""
        r, _ = self._polar(x)
        return (r.square() * u).to(u.dtype)

    def projx(self, x: Tensor) -> Tensor:
        """Return x with zero rows replaced by what they stand for."""
        r, mu = self._polar(x)
        zero = torch.linalg.vector_norm(widen(x), dim=-1, keepdim=True) == 0
        return torch.where(zero, (r * mu).to(x.dtype), x)

    def random(
        self, *size: int, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: object
    ) -> Tensor:
        """Sample rows with independent normal coordinates."""
        shape = shape_of(size)
        return ManifoldTensor(torch.randn(shape, dtype=dtype, device=device), manifold=self)

    def extra_repr(self) -> str:
        """Show the seed of the zero rows' directions."""
        return f"seed={self.seed}"

    def _polar(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return norms (..., 1) and directions (..., D), with the documented stand-in for zero rows."""
        x = widen(x)
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        zero = r == 0
        # Whether there are any is only looked up where that costs nothing: an accelerator would have to wait.
        if not torch.compiler.is_compiling() and (x.device.type != "cpu" or bool(zero.any())):
            x = torch.where(zero, self._zero_row_directions(x), x)
            r = torch.where(zero, self.ZERO_ROW_NORM, r)
        return r, x / r

    def _zero_row_directions(self, x: Tensor) -> Tensor:
        key = (x.shape, x.dtype, x.device)
        if key not in self._directions:
            # Drawn on the CPU whatever the device, so that every rank and every device gets the same rows.
            generator = torch.Generator().manual_seed(self.seed)
            rows = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            rows = self.ZERO_ROW_NORM * rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
            self._directions = {key: rows.to(x)}
        return self._directions[key]

    def __getstate__(self) -> dict[str, Any]:
        # What can be drawn again need not be saved.
        return self.__dict__ | {"_directions": {}}

    @staticmethod
    def _split(r: Tensor, mu: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Split a tangent vector into its radial part a (..., 1) and its angular part t (..., D), both over r."""
        u = widen(u) / r
        a = (mu * u).sum(dim=-1, keepdim=True)
        return a, u - a * mu

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> tuple[bool, str | None]:
        norm = torch.linalg.vector_norm(widen(x), dim=-1)
        if not bool(((norm > 0) & norm.isfinite()).all()):
            return False, "every row must be finite and different from 0"
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if not bool(u.isfinite().all()):
            return False, "a tangent vector must be finite"
        return True, None


class UnitRows(RouterManifold, Sphere):
    """Rows of norm 1: geoopt's ``Sphere``, for the cosine router, with the two repairs its float32 needs.

    geoopt 0.5.1 gives dist(x, x) = 0.014 in float32 with no gradient, and NaN gradients of ``expmap`` at u = 0.
    """

    name = "Unit rows"

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the angle between rows, (...) or (..., 1)."""
        return sphere_angle(widen(x), widen(y), keepdim=keepdim)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Move each row along the great circle of u: ``cos h · x + sinc h · u``."""
        return self.projx(sphere_exp(widen(x), widen(u))).to(x.dtype)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Move each row by u and normalise."""
        return self.projx(widen(x) + widen(u)).to(x.dtype)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the tangent vectors at x whose great circles reach y at unit time."""
        return sphere_log(widen(x), widen(y)).to(x.dtype)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Carry v from x to y along their great circle (an isometry)."""
        return sphere_transport(widen(x), widen(y), widen(v)).to(v.dtype)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Project u on the tangent space of x."""
        return super().proju(widen(x), widen(u)).to(u.dtype)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the Riemannian gradient of the Euclidean gradient u: its projection."""
        return self.proju(x, u)

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """Return ``u·v`` a row, (...) or (..., 1)."""
        return super().inner(widen(x), widen(u), None if v is None else widen(v), keepdim=keepdim)


class OrthonormalRows(RouterManifold, EuclideanStiefel):
    """Mutually orthonormal rows (E ≤ D): geoopt's Stiefel manifold on the transposed view."""

    name = "Orthonormal rows"

    def _check_shape(self, shape: tuple[int, ...], name: str) -> tuple[bool, str | None]:
        if len(shape) >= 2 and shape[-2] > shape[-1]:
            return False, f"orthonormal rows need num_experts <= in_features, got {shape[-2]} > {shape[-1]}"
        return super()._check_shape((*shape[:-2], *shape[:-3:-1]), name)

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> tuple[bool, str | None]:
        return super()._check_point_on_manifold(widen(x).mT, atol=atol, rtol=rtol)

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        return super()._check_vector_on_tangent(widen(x).mT, widen(u).mT, atol=atol, rtol=rtol)

    def projx(self, x: Tensor) -> Tensor:
        """Return the nearest matrix with orthonormal rows (polar factor)."""
        return super().projx(widen(x).mT).mT.to(x.dtype)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Project u on the tangent space of x."""
        return super().proju(widen(x).mT, widen(u).mT).mT.to(u.dtype)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the Riemannian gradient of the Euclidean gradient u: its projection."""
        return self.proju(x, u)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Move x by u and orthonormalise (QR)."""
        # Not geoopt's: that one flips signs in place, which autograd refuses.
        q, r = torch.linalg.qr((widen(x) + widen(u)).mT)
        signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q)
        return (q * signs.unsqueeze(-2)).mT.to(x.dtype)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Move x along the geodesic of u for unit time."""
        return super().expmap(widen(x).mT, widen(u).mT).mT.to(x.dtype)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Carry v to y by projection on its tangent space."""
        return self.proju(y, v)

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """Return ``Σ u_ij v_ij`` over the matrix, (...) or (..., 1, 1)."""
        return super().inner(x, widen(u), None if v is None else widen(v), keepdim=keepdim)

    def random(
        self, *size: int, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: object
    ) -> Tensor:
        """Sample matrices with orthonormal rows."""
        shape = shape_of(size)
        self._assert_check_shape(shape, "x")
        return ManifoldTensor(self.projx(torch.randn(shape, dtype=dtype, device=device)), manifold=self)

    def origin(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        seed: int | None = 42,
    ) -> Tensor:
        """Return the first E unit vectors; ``seed`` is part of geoopt's signature and has no effect."""
        shape = shape_of(size)
        self._assert_check_shape(shape, "x")
        eye = torch.eye(shape[-2], shape[-1], dtype=dtype, device=device)
        return ManifoldTensor(eye.expand(shape).clone(), manifold=self)


class EuclideanRows(RouterManifold, Euclidean):
    """R^{E×D} as it is: every coordinate for itself, so geoopt's RiemannianAdam is Adam."""

    name = "Euclidean rows"


def router_manifold(name: str, seed: int = 0) -> PolarRows | UnitRows | OrthonormalRows | EuclideanRows:
    """Return the manifold called ``name``; ``seed`` is for the zero rows of ``PolarRows``.

    Raises:
        ValueError: unknown name.
    """
    match name:
        case "polar":
            return PolarRows(seed)
        case "sphere":
            return UnitRows()
        case "orthonormal":
            return OrthonormalRows()
        case "euclidean":
            return EuclideanRows()
    raise ValueError(f"manifold must be 'polar', 'sphere', 'orthonormal' or 'euclidean', got {name!r}")
