"""A GPT-style language model with mixture-of-experts blocks. B batch, L length, V vocabulary, D width."""

import torch.nn.functional as F
from torch import Tensor, nn

from moegeo_router.routers.gating import ScoreFunction
from trainers.models.moe import ModelOutput, PriorFactory, RouterFactory
from trainers.models.transformer import Rotary, Transformer, initial_std


class LanguageModel(nn.Module):
    """Next-token prediction: embedding, causal blocks with rotary attention, RMSNorm, head.

    Args:
        vocab_size: V ≥ 1.
        router: makes a router from (dim, num_experts), e.g. ``moegeo_router.GeometricRouter``.
        prior: makes the prior over the experts of a layer, e.g. ``moegeo_router.ExpertPrior``; None: none.
        dim: D, width of the residual stream.
        layers: number of blocks.
        heads: attention heads; dim / heads is even.
        num_experts: E in every MoE layer.
        top_k: experts a token visits.
        expert_hidden: hidden width of one expert.
        length: the longest sequence in tokens.
        moe_every: every n-th block is a mixture of experts, the others are dense.
        tied: the head's weight is the embedding.
        renormalize: the gates of a token's chosen experts sum to 1.
        scores: "softmax" or "sigmoid".
        experts: how the experts are computed (see ``trainers.models.experts``).

    Raises:
        ValueError: a size that does not fit; the message names it.
    """

    def __init__(
        self,
        vocab_size: int,
        router: RouterFactory,
        prior: PriorFactory | None = None,
        *,
        dim: int = 128,
        layers: int = 4,
        heads: int = 4,
        num_experts: int = 8,
        top_k: int = 2,
        expert_hidden: int = 256,
        length: int = 256,
        moe_every: int = 1,
        tied: bool = True,
        renormalize: bool = True,
        scores: ScoreFunction = "softmax",
        experts: str = "auto",
    ) -> None:
        super().__init__()
        for name, size in {"vocab_size": vocab_size, "dim": dim, "length": length}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.length = length
        self.embedding = nn.Embedding(vocab_size, dim)
        self.trunk = Transformer(
            router,
            Rotary(length, dim, heads),
            dim=dim,
            layers=layers,
            heads=heads,
            num_experts=num_experts,
            top_k=top_k,
            expert_hidden=expert_hidden,
            moe_every=moe_every,
            renormalize=renormalize,
            scores=scores,
            experts=experts,
            prior=prior,
        )
        self.head = None if tied else nn.Linear(dim, vocab_size, bias=False)
        for layer in (self.embedding, self.head):
            if layer is not None:
                nn.init.normal_(layer.weight, std=initial_std(dim))

    def forward(self, tokens_BL: Tensor) -> ModelOutput:
        """Predict the next token at every position.

        Args:
            tokens_BL: int64 ids in [0, V), at most ``length`` of them a row.

        Returns:
            logits (B, L, V) and the routing of each MoE layer over T = B·L tokens.

        Raises:
            ValueError: tokens that are not (B, L), or longer than ``length``.
        """
        if tokens_BL.ndim != 2 or tokens_BL.shape[1] > self.length:
            raise ValueError(f"tokens must be (B, L) with L at most {self.length}, got {tuple(tokens_BL.shape)}")
        x_BLD, routing = self.trunk(self.embedding(tokens_BL), tokens_BL)
        head_VD = self.embedding.weight if self.head is None else self.head.weight
        return ModelOutput(logits=F.linear(x_BLD, head_VD), routing=routing)
