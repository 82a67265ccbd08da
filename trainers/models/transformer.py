"""The trunk both models share: pre-norm attention blocks whose feed-forward layers are mixtures of experts.

Shape suffixes: B batch, L length, D width, H heads, C width of a head (C = D / H).
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from moegeo_router.routers.gating import ScoreFunction
from trainers.models.experts import SwiGLUExperts
from trainers.models.moe import MoELayer, PriorFactory, RouterFactory, Routing

NORM_EPS = 1e-6  # RMSNorm's default is the dtype's epsilon, 0.8% in bfloat16
ROTARY_BASE = 10_000.0


def initial_std(dim: int) -> float:
    """Standard deviation of a fresh weight, ``0.02·√(768 / dim)``: GPT-2's 0.02 at its width of 768.

    Scaled so that fresh pre-activations are as large at every width; a flat 0.02 starts narrow models too weak.

    Args:
        dim: width of the residual stream.

    Returns:
        The standard deviation.
    """
    return 0.02 * math.sqrt(768 / dim)


class Rotary(nn.Module):
    """Rotary positions: the pair (x_i, x_{i+C/2}) at position p turns by the angle ``p · 10000^(-2i/C)``.

    A product of two vectors turned so depends on their positions only through the difference.

    Args:
        length: the longest sequence.
        dim: D.
        heads: H; C = D / H is even.

    Raises:
        ValueError: dim is no even multiple of heads.
    """

    cos_LC: Tensor
    sin_LC: Tensor

    def __init__(self, length: int, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % (2 * heads):
            raise ValueError(f"dim must be an even multiple of heads = {heads} for rotary positions, got {dim}")
        frequencies = ROTARY_BASE ** -(torch.arange(0, dim // heads, 2, dtype=torch.float32) * heads / dim)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies).repeat(1, 2)
        self.register_buffer("cos_LC", angles.cos(), persistent=False)
        self.register_buffer("sin_LC", angles.sin(), persistent=False)

    def forward(self, x_LC: Tensor) -> Tensor:
        """Turn the vectors (..., L, C), each by the angles of its position l; shape and dtype are kept."""
        length = x_LC.shape[-2]
        first, second = x_LC.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return (x_LC * self.cos_LC[:length] + turned * self.sin_LC[:length]).to(x_LC.dtype)


class Attention(nn.Module):
    """Multi-head self-attention, causal with rotary positions or bidirectional without positions.

    Args:
        dim: D.
        heads: H, a divisor of D.
        rotary: given, attention is causal and queries and keys are turned; None, it is bidirectional.

    Raises:
        ValueError: heads does not divide dim.
    """

    def __init__(self, dim: int, heads: int, rotary: Rotary | None) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim = {dim}, got {heads}")
        self.heads = heads
        self.rotary = rotary
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def reset_parameters(self, std: float, out_std: float) -> None:
        """Draw the weights from N(0, std²), the output's from N(0, out_std²)."""
        nn.init.normal_(self.qkv.weight, std=std)
        nn.init.normal_(self.out.weight, std=out_std)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Mix positions; (B, L, D) -> (B, L, D)."""
        qkv = rearrange(self.qkv(x_BLD), "b l (three h c) -> three b h l c", three=3, h=self.heads)
        q, k = qkv[:2] if self.rotary is None else self.rotary(qkv[:2])
        v = qkv[2]
        y_BHLC = F.scaled_dot_product_attention(q, k, v, is_causal=self.rotary is not None)
        return self.out(rearrange(y_BHLC, "b h l c -> b l (h c)"))


class SwiGLU(nn.Module):
    """A dense SwiGLU feed-forward layer, ``(silu(x w_gate) ⊙ (x w_up)) w_down``.

    Args:
        dim: D.
        hidden: hidden width.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w_gate = nn.Linear(dim, hidden, bias=False)
        self.w_up = nn.Linear(dim, hidden, bias=False)
        self.w_down = nn.Linear(hidden, dim, bias=False)

    def reset_parameters(self, std: float, out_std: float) -> None:
        """Draw the weights from N(0, std²), w_down's from N(0, out_std²)."""
        nn.init.normal_(self.w_gate.weight, std=std)
        nn.init.normal_(self.w_up.weight, std=std)
        nn.init.normal_(self.w_down.weight, std=out_std)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; (..., D) -> (..., D)."""
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + ffn(norm(x))``.

    Args:
        dim: D.
        attention: the attention layer.
        ffn: an ``MoELayer`` or a dense layer.
    """

    def __init__(self, dim: int, attention: Attention, ffn: MoELayer | SwiGLU) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.attention = attention
        self.ffn_norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self.ffn = ffn

    def forward(self, x_BLD: Tensor, ids_BL: Tensor | None = None) -> tuple[Tensor, Routing | None]:
        """Apply the block; returns (B, L, D) and the routing, None for a dense feed-forward layer."""
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD))
        normed_BLD = self.ffn_norm(x_BLD)
        if not isinstance(self.ffn, MoELayer):
            return x_BLD + self.ffn(normed_BLD), None
        y_BLD, routing = self.ffn(normed_BLD, ids_BL)
        return x_BLD + y_BLD, routing


class Transformer(nn.Module):
    """Blocks and a final RMSNorm; every ``moe_every``-th block's feed-forward layer is a mixture of experts.

    The other blocks get a dense SwiGLU layer of the same active width, top_k · expert_hidden. Weights are drawn
    from N(0, std²) with ``std = initial_std(dim)``, those that write to the residual stream from N(0, std²/(2·layers));
    a router keeps the initialisation that its factory gave it.

    Args:
        router: makes a router from (dim, num_experts).
        rotary: positions for causal attention; None for bidirectional attention.
        dim: D.
        layers: number of blocks.
        heads: attention heads, a divisor of dim.
        num_experts: E.
        top_k: K.
        expert_hidden: hidden width of one expert.
        moe_every: blocks moe_every - 1, 2·moe_every - 1, … are mixtures.
        renormalize: see ``MoELayer``.
        scores: see ``MoELayer``.
        experts: see ``MoELayer``.
        prior: see ``MoELayer``.

    Raises:
        ValueError: a size that does not fit; the message names it.
    """

    def __init__(
        self,
        router: RouterFactory,
        rotary: Rotary | None,
        *,
        dim: int,
        layers: int,
        heads: int,
        num_experts: int,
        top_k: int,
        expert_hidden: int,
        moe_every: int,
        renormalize: bool,
        scores: ScoreFunction,
        experts: str,
        prior: PriorFactory | None,
    ) -> None:
        super().__init__()
        if not 1 <= moe_every <= layers:
            raise ValueError(f"moe_every must lie in [1, layers = {layers}], got {moe_every}")

        def ffn(layer: int) -> MoELayer | SwiGLU:
            if (layer + 1) % moe_every:
                return SwiGLU(dim, top_k * expert_hidden)
            return MoELayer(dim, expert_hidden, num_experts, top_k, router, renormalize, scores, experts, prior)

        self.blocks = nn.ModuleList(Block(dim, Attention(dim, heads, rotary), ffn(layer)) for layer in range(layers))
        self.norm = nn.RMSNorm(dim, eps=NORM_EPS)
        self._initialize(initial_std(dim))

    def forward(self, x_BLD: Tensor, ids_BL: Tensor | None = None) -> tuple[Tensor, dict[str, Routing]]:
        """Apply all blocks; returns (B, L, D) and the routing of the MoE layers by name.

        Args:
            x_BLD: (B, L, D).
            ids_BL: (B, L) int64, what routers that need ids are given.
        """
        routing: dict[str, Routing] = {}
        for layer, block in enumerate(self.blocks):
            x_BLD, routed = block(x_BLD, ids_BL)
            if routed is not None:
                routing[f"layer{layer}"] = routed
        return self.norm(x_BLD), routing

    def _initialize(self, std: float) -> None:
        """GPT-2's rule: the 2·layers writers to the residual stream are scaled down to keep its variance."""
        out_std = std / math.sqrt(2 * len(self.blocks))
        for module in self.modules():
            if isinstance(module, Attention | SwiGLU | SwiGLUExperts):
                module.reset_parameters(std, out_std)
