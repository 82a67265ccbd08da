"""Finding the logits among what a router returns.

Shape legend: T tokens (any leading dimensions), E experts, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry.simplex import widen
from ..routers.find import RouterSite
from ..routers.router import GeometricRouter
from .choices import EXPLAINED, misfit


class LogitsFinder:
    """Says which output of a router is its logits; where none is, computes them.

    Args:
        site: the router.

    Attributes:
        projected: input and output of the linear layer inside of the router, where there is one.
    """

    def __init__(self, site: RouterSite) -> None:
        self._site = site
        self._which: int | None = None  # of the candidates; -1: computed
        linear = type(site.module).forward in (nn.Linear.forward, GeometricRouter.forward)
        self._is_linear = linear or site.module is site.adapter
        self.projected: tuple[Tensor, Tensor] | None = None

    def input(self, inputs: Sequence[Any]) -> Tensor | None:
        """Return what the logits of a call are linear in, (..., D): the input of the linear layer; None if not seen.

        Args:
            inputs: what the router was called with.
        """
        if self.projected is not None:
            return self.projected[0]
        width = self._site.in_features
        fitting = (x for x in inputs if isinstance(x, Tensor) and x.is_floating_point() and x.ndim)
        return next((x for x in fitting if x.shape[-1] == width), None)

    def find(self, outputs: Sequence[Tensor], inputs: Sequence[Any]) -> Tensor:
        """Return the logits (..., E) of a call.

        Args:
            outputs: the tensors that the router returned.
            inputs: what it was called with.

        Where the router returns choices and gates only, they are computed, if they explain the gates.

        Raises:
            ValueError: no output could be logits, and they cannot be computed.
        """
        projected = None if self.projected is None else self.projected[1]
        experts = self._site.num_experts
        found = [t for t in outputs if t.is_floating_point() and t.ndim and t.shape[-1] == experts]
        if self._is_linear and found:
            return found[0]
        if not found and projected is None and self._which is None:
            with torch.no_grad():
                computed = self._computed(inputs, None)
                if computed is None or not _explained(outputs, computed):
                    shapes = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in outputs) or "no tensor"
                    raise ValueError(f"router {self._site.name} returned no logits (..., {experts}): {shapes}")
        which = self._which
        if which is None:
            with torch.no_grad():
                which = self._choose(found, self._computed(inputs, projected))
        logits = found[which] if which >= 0 else self._computed(inputs, projected)
        if logits is None:
            raise ValueError(f"router {self._site.name} returned scores, and its input (..., D) was not seen")
        if logits.numel():  # a forward without tokens tells nothing of the next
            self._which = which
        return logits

    def _choose(self, found: Sequence[Tensor], computed: Tensor | None) -> int:
        """Return which candidate is the logits, -1 if none is."""
        if computed is None:
            plausible = [i for i, t in enumerate(found) if not _looks_like_scores(t)]
            return (plausible or [0])[0]
        z_TE = computed.float().reshape(-1, computed.shape[-1])
        distances = [float((t.float().reshape(z_TE.shape) - z_TE).abs().mean()) for t in found]
        order = sorted(range(len(found)), key=distances.__getitem__)
        if order and distances[order[0]] <= 0.1 * float(z_TE.abs().mean()) + 1e-6:
            return order[0]
        # Scaled, biased or otherwise changed logits are logits; scores of them are not.
        return next((i for i in order if not _looks_like_scores(found[i])), -1)

    def _computed(self, inputs: Sequence[Any], projected: Tensor | None) -> Tensor | None:
        if projected is not None:
            return projected
        x = self.input(inputs)
        if x is None:
            return None
        bias = getattr(self._site.projection, "bias", None)
        return F.linear(widen(x), widen(self._site.weight), None if bias is None else widen(bias))


def _explained(outputs: Sequence[Tensor], computed: Tensor) -> bool:
    """Whether a router that returns choices and gates makes these of the computed logits, up to a factor a token."""
    z_TE = computed.reshape(-1, computed.shape[-1])
    ids = [t for t in outputs if t.dtype in (torch.int64, torch.int32) and t.ndim == 2 and len(t) == len(z_TE)]
    gates = [t for t in outputs if t.is_floating_point() and ids and t.shape == ids[0].shape]
    if not gates or gates[0].shape[-1] < 2:
        return False
    return not len(z_TE) or misfit(z_TE, ids[0], gates[0]) < EXPLAINED


def _looks_like_scores(t: Tensor) -> bool:
    """Whether all values are in [0, 1], as probabilities and sigmoid scores are."""
    return bool(((t >= 0) & (t <= 1)).all())
