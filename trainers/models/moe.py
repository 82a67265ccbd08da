"""The mixture-of-experts layer: a router like ``nn.Linear``, top-k gating, SwiGLU experts.

Shape suffixes: T tokens, E experts, K chosen, D width, B batch, L length.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moegeo_router.routers import ExpertPrior, GeometricRouter, SignBias
from moegeo_router.routers.gating import ScoreFunction, topk_gating
from moegeo_router.routers.prior import Selection
from trainers.models.experts import SwiGLUExperts

RouterFactory = Callable[[int, int], nn.Module]
"""(in_features, num_experts) -> module called like nn.Linear; e.g. ``functools.partial(nn.Linear, bias=False)``

A module with a true attribute ``needs_ids`` is called with the tokens' ids as well.
"""

Prior = ExpertPrior | SignBias

PriorFactory = Callable[[int], Prior]
"""(num_experts) -> a prior over the experts; e.g. ``moegeo_router.ExpertPrior``"""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What one MoE layer did with its tokens, on the graph.

    Args:
        logits: (T, E) as the router emitted them.
        probs: (T, E) float32 routing probabilities, the router's scores over all experts normalised to sum 1.
        ids: (T, K) int64 chosen experts.
        weights: (T, K) float32 gates.
    """

    logits: Tensor
    probs: Tensor
    ids: Tensor
    weights: Tensor


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """What a model returns.

    Args:
        logits: (B, L, V) next-token logits of a language model; (B, classes) of a vision model.
        routing: one ``Routing`` for each MoE layer, in order, keyed "layer0", "layer1", … by block.
    """

    logits: Tensor
    routing: dict[str, Routing]


def drawn_like_linear(router: RouterFactory, dim: int, num_experts: int) -> nn.Module:
    """Make a router, and leave torch's random numbers as the ``nn.Linear`` that it replaces would.

    Models that differ in nothing but the router then begin with the same weights everywhere else, and runs of one seed
    can be compared in pairs.

    Args:
        router: the factory.
        dim: D.
        num_experts: E.
    """
    before = torch.get_rng_state()
    made = router(dim, num_experts)
    torch.set_rng_state(before)
    nn.Linear(dim, num_experts, bias=False)
    return made


class MoELayer(nn.Module):
    """Route every token to its top-k experts: ``y_t = Σ_k weights_tk · expert_{ids_tk}(x_t)``.

    Args:
        dim: D, width of a token.
        hidden: hidden width of one expert.
        num_experts: E ≥ 1.
        top_k: K, 1 ≤ K ≤ E.
        router: makes the router from (dim, num_experts).
        renormalize: the chosen gates of a token sum to 1.
        scores: "softmax" or "sigmoid".
        experts: "auto", "split", "grouped", "batched" or "loop" (see ``trainers.models.experts``).
        prior: makes a prior over the experts, which ``trainers.priors`` moves; None: none. One with
            ``where="logits"`` lives in the router, so that whoever watches the router sees the logits that count.

    Raises:
        ValueError: a size below 1, top_k outside [1, num_experts], an unknown option, or a prior for the logits of a
            router that is no ``GeometricRouter``.
    """

    prior: Prior | None

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        top_k: int,
        router: RouterFactory,
        renormalize: bool = True,
        scores: ScoreFunction = "softmax",
        experts: str = "auto",
        prior: PriorFactory | None = None,
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must lie in [1, num_experts = {num_experts}], got {top_k}")
        if scores not in ("softmax", "sigmoid"):
            raise ValueError(f"scores must be 'softmax' or 'sigmoid', got {scores!r}")
        self.dim, self.num_experts, self.top_k = dim, num_experts, top_k
        self.renormalize, self.scores = renormalize, scores
        self.experts = SwiGLUExperts(num_experts, dim, hidden, experts)
        self.router = drawn_like_linear(router, dim, num_experts)
        self.prior = None
        if prior is not None:
            self._add_prior(prior(num_experts))

    def forward(self, x_BLD: Tensor, ids_BL: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Apply the layer.

        Args:
            x_BLD: (..., D), any leading dimensions, of which the product is T; T = 0 and strided inputs work.
            ids_BL: (...) int64 id of each token, for routers that need it.

        Returns:
            The output in x's shape and dtype, and what the router did.

        Raises:
            ValueError: a last dimension other than D, no ids for a router that needs them, or a router that does not
                return (T, E).
        """
        if x_BLD.shape[-1] != self.dim:
            raise ValueError(f"x must have width {self.dim} in its last dimension, got {tuple(x_BLD.shape)}")
        x_TD = x_BLD.reshape(-1, self.dim)
        logits_TE = self._logits(x_TD, ids_BL)
        expected = (x_TD.shape[0], self.num_experts)
        if logits_TE.shape != expected:
            raise ValueError(f"router must return logits {expected}, got {tuple(logits_TE.shape)}")
        selection: Selection = {} if self.prior is None else self.prior.selection()
        gating = topk_gating(logits_TE, self.top_k, scores=self.scores, renormalize=self.renormalize, **selection)
        y_TD = self.experts(x_TD, gating.weights, gating.ids)
        routing = Routing(logits=logits_TE, probs=gating.probs, ids=gating.ids, weights=gating.weights)
        return y_TD.view(x_BLD.shape), routing

    def _logits(self, x_TD: Tensor, ids_BL: Tensor | None) -> Tensor:
        if not getattr(self.router, "needs_ids", False):
            return self.router(x_TD)
        if ids_BL is None or ids_BL.numel() != len(x_TD):
            raise ValueError(f"{type(self.router).__name__} needs the ids of the {len(x_TD)} tokens")
        return self.router(x_TD, ids_BL.reshape(-1))

    def _add_prior(self, prior: Prior) -> None:
        if prior.where == "selection":
            self.prior = prior
        elif isinstance(prior, ExpertPrior) and isinstance(self.router, GeometricRouter):
            self.router.add_prior(prior)
        else:
            raise ValueError(
                f"a prior with where='logits' lives in a GeometricRouter, the router is {type(self.router).__name__}: "
                "take another router, or where='selection'"
            )
