"""A small vision transformer with mixture-of-experts blocks.

Shape suffixes: B batch, C channels, H height, W width, N tokens of an image, D width of a token.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from moegeo_router.routers.gating import ScoreFunction
from trainers.models.moe import ModelOutput, PriorFactory, RouterFactory
from trainers.models.transformer import Transformer, initial_std


class VisionModel(nn.Module):
    """Classification: patch embedding, learned positions, bidirectional blocks, mean pooling, linear head.

    Args:
        num_classes: number of classes.
        image_shape: (C, H, W).
        router: makes a router from (dim, num_experts), e.g. ``moegeo_router.GeometricRouter``.
        prior: makes the prior over the experts of a layer, e.g. ``moegeo_router.ExpertPrior``; None: none.
        dim: D, width of the residual stream.
        layers: number of blocks.
        heads: attention heads, a divisor of dim.
        patch: side of a square patch in pixels, a divisor of H and W.
        num_experts: E in every MoE layer.
        top_k: experts a token visits.
        expert_hidden: hidden width of one expert.
        moe_every: every n-th block is a mixture of experts, the others are dense.
        renormalize: the gates of a token's chosen experts sum to 1.
        scores: "softmax" or "sigmoid".
        experts: how the experts are computed (see ``trainers.models.experts``).

    Raises:
        ValueError: a size that does not fit; the message names it.
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: tuple[int, int, int],
        router: RouterFactory,
        prior: PriorFactory | None = None,
        *,
        dim: int = 64,
        layers: int = 3,
        heads: int = 4,
        patch: int = 2,
        num_experts: int = 8,
        top_k: int = 2,
        expert_hidden: int = 128,
        moe_every: int = 1,
        renormalize: bool = True,
        scores: ScoreFunction = "softmax",
        experts: str = "auto",
    ) -> None:
        super().__init__()
        for name, size in {"num_classes": num_classes, "dim": dim, "patch": patch}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        channels, height, width = image_shape
        if height % patch or width % patch:
            raise ValueError(f"patch must divide height and width of image_shape {image_shape}, got {patch}")
        self.image_shape = (channels, height, width)
        self.patch = patch
        self.patch_embedding = nn.Linear(channels * patch * patch, dim)
        self.positions_ND = nn.Parameter(torch.empty(self.tokens_per_image, dim))
        self.trunk = Transformer(
            router,
            None,
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
        self.head = nn.Linear(dim, num_classes)
        nn.init.normal_(self.positions_ND, std=initial_std(dim))

    @property
    def tokens_per_image(self) -> int:
        """Patches of one image: (H / patch)·(W / patch)."""
        _, height, width = self.image_shape
        return (height // self.patch) * (width // self.patch)

    def forward(self, images_BCHW: Tensor) -> ModelOutput:
        """Classify images.

        Args:
            images_BCHW: floats of shape (B, *image_shape).

        Returns:
            logits (B, num_classes) and the routing of each MoE layer over T = B·tokens_per_image tokens.

        Raises:
            ValueError: images of another shape.
        """
        if images_BCHW.ndim != 4 or tuple(images_BCHW.shape[1:]) != self.image_shape:
            raise ValueError(f"images must be (B, *{self.image_shape}), got {tuple(images_BCHW.shape)}")
        patches = rearrange(images_BCHW, "b c (h p) (w q) -> b (h w) (c p q)", p=self.patch, q=self.patch)
        position_BN = torch.arange(patches.shape[1], device=patches.device).expand(patches.shape[:2])
        x_BND, routing = self.trunk(self.patch_embedding(patches) + self.positions_ND, position_BN)
        return ModelOutput(logits=self.head(x_BND.mean(dim=1)), routing=routing)
