"""``GeometricRouter``: called like ``nn.Linear``, its weight a manifold parameter.

Shape legend: D width, E experts; any leading dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry.simplex import widen
from .prior import ExpertPrior
from .tag import changes_function, put_on_manifold, refuse_zero_rows, restore_tag

if TYPE_CHECKING:
    from ..geometry.rows import ManifoldName

#: Bounds of the cosine router's temperature: logits within ±1/τ.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 10.0


class GeometricRouter(nn.Linear):
    """A router (..., D) -> (..., E) in the dtype of its input, wherever ``nn.Linear(D, E)`` stood.

    The weight (E, D) *is* a ``geoopt.ManifoldParameter``; a Riemannian optimizer moves it along its manifold:

    ===============  ==================================  =======================================================
    ``manifold``     the rows of the weight              logits
    ===============  ==================================  =======================================================
    ``polar``        any, with a scale-free metric       ``x Wᵀ + b``
    ``sphere``       norm 1 (cosine router)              ``cos(x, w_e) / τ + b``, τ learnable in [0.01, 10]
    ``orthonormal``  mutually orthonormal (E ≤ D)        ``x Wᵀ + b``
    ``euclidean``    any                                 ``x Wᵀ + b``
    ===============  ==================================  =======================================================

    A ``prior`` with ``where="logits"`` is added to them, ``log(E π)``, in fp32.

    Under the same seed, polar and Euclidean routers start from the very weights of ``nn.Linear``. The cosine
    router's temperature starts where its logits are as large as theirs for inputs of norm √D.

    Args:
        in_features: D.
        num_experts: E.
        manifold: one of the table.
        bias: add a learnable bias (E,), as ``nn.Linear`` does by default.
        prior: a prior over the E experts that is part of the logits, kept as the submodule ``prior``.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: unknown manifold, a size below 1, orthonormal rows with E > D, unit rows with D = 1, or a prior of
            another size or with ``where="selection"`` (which belongs to the gating: ``topk_gating``).

    Example:
        >>> gate = GeometricRouter(256, 8)
        >>> weights, ids, probs = topk_gating(gate(x), k=2)
    """

    temperature_logit: nn.Parameter

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        manifold: ManifoldName = "polar",
        bias: bool = True,
        prior: ExpertPrior | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("in_features", in_features), ("num_experts", num_experts)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        # Before nn.Linear's own __init__, because that calls reset_parameters.
        object.__setattr__(self, "manifold", manifold)
        super().__init__(in_features, num_experts, bias=bias, device=device, dtype=dtype)
        if prior is not None:
            self.add_prior(prior)

    manifold: ManifoldName

    @property
    def prior(self) -> ExpertPrior | None:
        """The prior in the logits."""
        # Not registered as None: a linear layer that became a router in place has nothing of the kind.
        return self._modules.get("prior")  # type: ignore[return-value]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.out_features

    @property
    def temperature(self) -> Tensor:
        """τ of the cosine router, shape (1,), between its bounds whatever ``temperature_logit`` is.

        Raises:
            AttributeError: the manifold is not ``"sphere"``.
        """
        low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
        return torch.exp(low + (high - low) * torch.sigmoid(widen(self.temperature_logit)))

    def reset_parameters(self) -> None:
        """Initialise like ``nn.Linear``, then put the weight on its manifold."""
        super().reset_parameters()
        if self.manifold == "sphere":
            if "temperature_logit" not in self._parameters:
                # 1-D because sharded training refuses 0-D parameters.
                self.temperature_logit = nn.Parameter(self.weight.new_zeros(1))
            self.set_temperature(_matching_temperature(self.weight))
        put_on_manifold(self.weight, self.manifold, allow_change=True)
        self._project()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (..., E) of inputs (..., D), in the dtype ``nn.Linear`` would return.

        Raises:
            ValueError: the last dimension is not D, or integer inputs.
        """
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"the router expects inputs (..., {self.in_features}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"the router expects floating point inputs, got {x.dtype}")
        if self.manifold != "sphere":
            logits = super().forward(x)
            return logits if self.prior is None else self.prior(logits)
        dtype, full_precision = _outside_autocast(x)
        with full_precision:  # a cosine rounded to bf16 would be divided by a small temperature
            # The weight is normalised here too: a Euclidean optimizer or a rounding may have moved it off the sphere.
            logits = F.linear(_direction(widen(x)), _direction(widen(self.weight))) / self.temperature
            logits = logits if self.bias is None else logits + widen(self.bias)
            return (logits if self.prior is None else self.prior(logits)).to(dtype)

    def add_prior(self, prior: ExpertPrior) -> None:
        """Make ``prior`` part of the logits, instead of one that was.

        Raises:
            ValueError: a prior for another number of experts, or with ``where="selection"``.
        """
        if prior.where != "logits":
            raise ValueError(
                "a router's prior is part of its logits and needs where='logits', got where='selection': "
                "give that to the gating, topk_gating(logits, k, **prior.selection())"
            )
        if prior.num_experts != self.num_experts:
            raise ValueError(f"prior must be over {self.num_experts} experts, got {prior.num_experts}")
        self._modules["prior"] = prior

    def linear_input(self, x: Tensor) -> Tensor:
        """Return the x̃ (..., D) for which the logits are ``x̃ Wᵀ + b``: x itself, or ``x / (‖x‖ τ)`` (``sphere``)."""
        return x if self.manifold != "sphere" else _direction(widen(x)) / self.temperature

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        restore_tag(self.weight, self.manifold)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        restore_tag(self.weight, self.manifold)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, manifold: ManifoldName = "polar", allow_change: bool = False
    ) -> GeometricRouter:
        """Return a new router with a copy of ``linear``'s parameters. (``geometrize`` converts a model in place.)

        Raises:
            ValueError: the manifold cannot hold the weight without changing the function, or ``linear`` is a cosine
                router, and ``allow_change`` is not set; a zero row for the sphere.
            TypeError: not an ``nn.Linear``, or one with a forward of its own.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"from_linear takes an nn.Linear, got {type(linear).__name__}")
        if type(linear).forward not in (nn.Linear.forward, GeometricRouter.forward):
            raise TypeError(f"{type(linear).__name__} has a forward of its own: geometrize(model) keeps it")
        if changes_function(manifold) and not allow_change:
            raise ValueError(f"{manifold} rows change the function of a given weight: pass allow_change=True")
        if isinstance(linear, GeometricRouter):
            linear = linear.to_linear(allow_change=allow_change)
        if manifold == "sphere":
            refuse_zero_rows(linear.weight, "linear")
        with _random_state_kept(linear.weight.device):
            router = cls(
                linear.in_features,
                linear.out_features,
                manifold=manifold,
                bias=linear.bias is not None,
                device=linear.weight.device,
                dtype=linear.weight.dtype,
            )
        with torch.no_grad():
            router.weight.copy_(linear.weight)
            if linear.bias is not None:
                router.bias.copy_(linear.bias)
            if manifold == "sphere":
                router.set_temperature(_matching_temperature(linear.weight))
        router._project()
        _copy_flags(linear, router)
        return router

    def to_linear(self, *, allow_change: bool = False) -> nn.Linear:
        """Return a new ``nn.Linear`` with a copy of the parameters.

        A cosine router normalises its input, which a linear layer cannot: with ``allow_change`` its weight is scaled
        so that the function is the same for inputs of norm √D. A prior becomes part of the bias; where there is none,
        ``allow_change`` allows one.

        Raises:
            ValueError: a cosine router, or a prior that is not uniform and no bias, without ``allow_change``.
        """
        shift = self.prior_shift(allow_change)
        with _random_state_kept(self.weight.device):
            linear = nn.Linear(
                self.in_features,
                self.num_experts,
                bias=self.bias is not None or shift is not None,
                device=self.weight.device,
                dtype=self.weight.dtype,
            )
        with torch.no_grad():
            linear.weight.copy_(self.weight if self.manifold != "sphere" else self._folded(allow_change))
            if linear.bias is not None:
                linear.bias.copy_((0 if self.bias is None else self.bias) + (0 if shift is None else shift))
        _copy_flags(self, linear)
        return linear

    @torch.no_grad()
    def prior_shift(self, allow_change: bool = False) -> Tensor | None:
        """Return what the prior adds to the logits, (E,), None for nothing: what a linear layer must have in its bias.

        Raises:
            ValueError: there is no bias that could take it, and no ``allow_change``.
        """
        if self.prior is None or not bool(self.prior.log_prior().any()):
            return None
        if self.bias is None and not allow_change:
            raise ValueError(
                "the router has a prior in its logits and no bias to keep it: pass allow_change=True to get a bias"
            )
        return self.prior.log_prior()

    def extra_repr(self) -> str:
        """Show the sizes and the manifold."""
        return (
            f"in_features={self.in_features}, num_experts={self.num_experts}, manifold={self.manifold!r}, "
            f"bias={self.bias is not None}"
        )

    def _folded(self, allow_change: bool) -> Tensor:
        if not allow_change:
            raise ValueError("a cosine router normalises its input, nn.Linear does not: pass allow_change=True")
        return _direction(widen(self.weight)) / (self.temperature * math.sqrt(self.in_features))

    @torch.no_grad()
    def _project(self) -> None:
        """Move the weight's new values to its manifold: ``put_on_manifold`` leaves those of a tagged weight alone."""
        if changes_function(self.manifold):
            self.weight.copy_(self.weight.manifold.projx(self.weight))  # type: ignore[attr-defined]

    @torch.no_grad()
    def set_temperature(self, temperature: Tensor) -> None:
        """Set τ of the cosine router, as near as its bounds allow."""
        low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
        # Just inside the bounds, where the sigmoid still has a gradient.
        share = ((temperature.log() - low) / (high - low)).clamp(0.01, 0.99)
        self.temperature_logit.copy_(torch.logit(share))


def _matching_temperature(weight: Tensor) -> Tensor:
    """Return the τ, shape (1,), that keeps the size of the logits for inputs of norm √D: ``1 / (√D · mean ‖w_e‖)``."""
    norm = torch.linalg.vector_norm(widen(weight.detach()), dim=-1).mean().clamp_min(1e-12)
    return (1 / (math.sqrt(weight.shape[1]) * norm)).reshape(1)


def _direction(x: Tensor) -> Tensor:
    """Return x / ‖x‖; 0, with no gradient, for x = 0 (a padding token's gradient must not be ∝ 1/ε)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm == 0, torch.inf)


def _outside_autocast(x: Tensor) -> tuple[torch.dtype, AbstractContextManager[object]]:
    """Return the dtype a linear layer would give here, and a context in which autocast leaves the operations alone."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x.dtype, nullcontext()
    return torch.get_autocast_dtype(kind), torch.autocast(kind, enabled=False)


def _random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    """A conversion draws an initialisation it then overwrites: the caller's random numbers must not notice."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _copy_flags(source: nn.Linear, target: nn.Linear) -> None:
    target.train(source.training)
    target.weight.requires_grad_(source.weight.requires_grad)
    if source.bias is not None:
        target.bias.requires_grad_(source.bias.requires_grad)
