"""Loss-free balancing for routers that come with a bias for choosing: those of DeepSeek-V3, GLM-4, MiniMax-M2 …

Their models add the bias to the scores to choose experts, never to the gates, and leave its updates to whoever trains
them; transformers makes none.

Shape legend: E experts.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..observe.statistics import RoutingStatistics
from ..routers.experts import block_of
from ..routers.find import RouterSite
from ..routers.prior import sign_step

# Habits of the field, of the router, of a part of it, or of the block that calls it.
_NAMES = ("e_score_correction_bias", "expert_bias")


def selection_bias(model: nn.Module, site: RouterSite) -> tuple[str, Tensor] | None:
    """Return the name and the tensor (E,) or (1, E) of the bias with which a router chooses; None if it has none.

    Args:
        model: the model the site was found in.
        site: the router.
    """
    block = block_of(model, site)
    places = [(f"{site.name}.{name}" if name else site.name, module) for name, module in site.module.named_modules()]
    places += [] if block is None else [block]
    for place, module in places:
        for name in _NAMES:
            found = getattr(module, name, None)
            if isinstance(found, Tensor) and found.numel() == site.num_experts:
                return f"{place}.{name}" if place else name, found
    return None


class SelectionBiases:
    """Moves the selection biases of a model towards balance, once an optimizer step: ``b ← b + u · sign(mean n - n)``.

    n are the step's choices of all micro-batches and ranks.

    Args:
        model: the model.
        sites: its routers; those without such a bias are left alone.
        speed: u, 0.001 in the paper, in units of the scores.

    Raises:
        ValueError: no router has such a bias, or one is kept in a precision in which steps of u are lost.

    Source: Wang et al., "Auxiliary-Loss-Free Load Balancing", arXiv 2408.15664; DeepSeek-V3.
    """

    def __init__(self, model: nn.Module, sites: Iterable[RouterSite], speed: float) -> None:
        self._speed = speed
        found = {site.name: selection_bias(model, site) for site in sites}
        self._biases = {layer: bias[1] for layer, bias in found.items() if bias is not None}
        if not self._biases:
            raise ValueError(
                "bias_speed is for routers with a bias that only selects (e_score_correction_bias, expert_bias), and "
                f"none of {', '.join(found) or 'these'} has one; mg.GeometricRouter(prior=...) brings its own"
            )
        for name, bias in filter(None, found.values()):
            if bias.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"bias_speed: {name} is {bias.dtype}, in which steps of {speed} are lost: keep it in fp32 "
                    f"(tensor.data = tensor.data.float())"
                )

    @torch.no_grad()
    def update(self, reduced: RoutingStatistics) -> None:
        """Take one step.

        Args:
            reduced: the sums of the optimizer step, over all ranks. A layer whose choices are not known rests.
        """
        for layer, bias in self._biases.items():
            sums = reduced.layers.get(layer)
            if sums is not None:
                bias.add_(sign_step(sums.counts, bias.reshape(-1), self._speed).view_as(bias))
