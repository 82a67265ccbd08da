"""The priors over experts of a model, moved once an optimizer step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from moegeo_router.metrics import expert_counts
from moegeo_router.routers import ExpertPrior, SignBias
from trainers.models.moe import Prior, Routing
from trainers.observation import token_values


def expert_priors(model: nn.Module) -> list[Prior]:
    """Return the priors of the MoE layers, in the order of the layers; empty where the model has none."""
    return [module for module in model.modules() if isinstance(module, ExpertPrior | SignBias)]


def update_priors(
    model: nn.Module, routing: Mapping[str, Routing], mask: Tensor | None = None, *, lr_scale: float = 1.0
) -> None:
    """Move every prior of ``model``: by the load of the step, or along the gradient that the step has left.

    To be called after an optimizer step that was taken, not after one that was skipped.

    Args:
        model: a model of ``trainers.models``.
        routing: what its layers did with the tokens of the step.
        mask: (B, L) or (B,) bool, the positions or images that count; None: all.
        lr_scale: factor on the learning rate of priors that follow the gradient.
    """
    priors = expert_priors(model)
    if not priors:
        return
    for prior, record in zip(priors, routing.values(), strict=True):
        if isinstance(prior, ExpertPrior) and prior.rule == "natural":
            prior.step(lr_scale * prior.speed)
            continue
        ids_TK = record.ids if mask is None else record.ids[token_values(mask, len(record.ids))]
        prior.update(expert_counts(ids_TK, prior.num_experts))
