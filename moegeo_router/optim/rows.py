"""A bounded sample of the tokens of a step: what a natural step is computed from and held against.

Shape legend: T tokens, N kept rows, D width, E experts, L routers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..geometry.simplex import widen
from ..observe.forward import LayerForward, rows
from ..routers.find import RouterSite
from ..routers.prior import ExpertPrior
from ..routers.router import GeometricRouter


class Rows(NamedTuple):
    """Kept rows of L routers, fp32 or better.

    Attributes:
        x: (L, N, D) the inputs for which ``x Wᵀ + b`` are the logits, with a 1 appended where there is a bias.
        z: (L, E, N) the logits.
        weight: (L, N) how many tokens each row stands for; 0 for none.
    """

    x: Tensor
    z: Tensor
    weight: Tensor


class RowSample:
    """At most ``limit`` of the tokens that a router sees in a step, evenly spread over all of its forward passes.

    Of every ``stride`` tokens one is kept, each time another one of them; when there are too many, every other row is
    given up and the stride is doubled. Masked tokens and those with NaN, inf or astronomic values keep their place, but
    stand for nothing.

    Args:
        limit: the most rows.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._stride, self._tokens, self._kept = limit, 0, 0, 0
        #: Steps so far; they decide which tokens are kept.
        self.steps = 0
        #: Whether any forward pass was ever seen.
        self.known = False
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Return which of the next T tokens are to be added, (n,) int64."""
        self.known = True
        self._stride = self._stride or max(1, -(-tokens // self._limit))
        while self._kept + tokens // self._stride > 2 * self._limit:
            self._thin()
        begin = self._tokens
        self._tokens = end = begin + tokens
        # One token of every stratum of the step's tokens; the first and the last may lie in another forward pass.
        first, last = begin // self._stride, (end - 1) // self._stride
        first += int(self._token(first)) < begin
        last -= int(self._token(last)) >= end
        return self._token(torch.arange(first, max(first, last + 1), device=device)) - begin

    def add(self, x_ND: Tensor, z_NE: Tensor, mask_N: Tensor | None) -> None:
        """Add the rows at the ``positions``."""
        if not len(x_ND):
            return
        x_ND, z_NE = widen(x_ND.detach()), widen(z_NE.detach())
        # Their squares must add up without overflow; NaN compares False.
        most = torch.finfo(x_ND.dtype).max ** 0.5
        sound_N = (x_ND.square().sum(dim=-1) < most) & z_NE.isfinite().all(dim=-1)
        kept_N = sound_N if mask_N is None else sound_N & mask_N
        weight_N = kept_N.to(z_NE.dtype) * self._stride
        clean = (torch.where(kept_N.unsqueeze(-1), values, 0) for values in (x_ND, z_NE))
        self._parts.append((*clean, weight_N))
        self._kept += len(weight_N)

    def take(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return x (N, D), z (N, E) and weight (N,), None if the step had no tokens; begin the next step."""
        while self._kept > self._limit:
            self._thin()
        parts, self._parts = self._parts, []
        self._stride, self._tokens, self._kept = 0, 0, 0
        self.steps += 1
        if not parts:
            return None
        x, z, weight = (torch.cat(values) for values in zip(*parts, strict=True))
        return x, z, weight

    def _token(self, stratum: Any) -> Any:
        # Places in step with the sequences would always be the same words: the one within the stratum changes.
        return stratum * self._stride + (stratum * 7919 + self.steps * 104729) % self._stride

    def _thin(self) -> None:
        self._stride *= 2
        if self._parts:
            x, z, weight = (torch.cat(values)[::2] for values in zip(*self._parts, strict=True))
            self._parts, self._kept = [(x, z, 2 * weight)], len(weight)


class NotLinearError(ValueError):
    """The logits of a router are not ``x Wᵀ + b``."""


class RouterRows:
    """Takes the kept rows of one router out of its forward passes.

    Args:
        site: the router.
        sample: where the rows go.
    """

    def __init__(self, site: RouterSite, sample: RowSample) -> None:
        self._site, self._sample, self._checked = site, sample, False

    def observe(self, seen: LayerForward) -> None:
        """Take rows of a forward pass; not of one that shows no input, or that checkpointing runs again.

        Raises:
            NotLinearError: the logits are not ``x Wᵀ + b``.
            ValueError: an input of another width.
        """
        if seen.x is None or seen.recomputed:
            return
        if seen.x.shape[-1] != self._site.in_features:
            expected = f"(..., {self._site.in_features})"
            raise ValueError(f"x of router {self._site.name} must be {expected}, got {tuple(seen.x.shape)}")
        with torch.no_grad():
            positions = self._sample.positions(seen.size, seen.logits.device)
            x, z = (rows(values.detach()).index_select(0, positions) for values in (seen.x, seen.logits))
            mask = None if seen.mask is None else seen.mask.index_select(0, positions)
            router = self._site.projection
            x = router.linear_input(x) if isinstance(router, GeometricRouter) else x
            if not self._checked and len(x):
                self._check(widen(x), widen(z))
            self._sample.add(x, z, mask)

    def _check(self, x_ND: Tensor, z_NE: Tensor) -> None:
        bias = getattr(self._site.projection, "bias", None)
        expected = x_ND @ widen(self._site.weight).T + (0 if bias is None else widen(bias))
        prior = getattr(self._site.projection, "prior", None)
        if isinstance(prior, ExpertPrior):  # a constant of the step, as a bias is: ``x dWᵀ`` is the same
            expected = prior(expected)
        size = float(torch.linalg.vector_norm(z_NE))
        off = float(torch.linalg.vector_norm(z_NE - expected)) / max(size, 1e-12)
        # Rounding of half precision and jitter of the input are some percent; NaN is not for this check to judge.
        if off > 0.1:
            raise NotLinearError(
                f"the logits of router {self._site.name} are not x Wᵀ + b (off by {off:.0%}), so a natural step would "
                "not know what it does: take step='riemannian'"
            )
        self._checked = size > 0  # logits of 0 say nothing


def stack_rows(samples: Sequence[RowSample], like: Tensor, bias: bool) -> Rows:
    """Return the rows of all samples, filled up with rows of no weight to the same number; a step's end.

    Args:
        samples: those of L routers.
        like: (L, E, D) the weights: shape, dtype and device.
        bias: append a 1 to x.
    """
    taken = [sample.take() for sample in samples]
    most = max((len(kept[2]) for kept in taken if kept is not None), default=0)
    experts, width = like.shape[-2:]
    x, z, weight = (like.new_zeros(len(taken), most, *shape) for shape in ((width,), (experts,), ()))
    for index, kept in enumerate(taken):
        if kept is not None:
            for into, values in zip((x, z, weight), kept, strict=True):
                into[index, : len(values)] = values
    if bias:
        x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    return Rows(x, z.mT.contiguous(), weight)
