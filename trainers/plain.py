"""The language model again in plain torch: the fastest hand-written twin, which ``trainers.speed`` races ours against.

Nothing of this library is used, nothing is recorded, only the default options exist: tied head, every block a
mixture, softmax scores, renormalised gates. Parameter names are those of ``trainers.models.LanguageModel`` without
their prefix "trunk.", so the twin can load its weights.

Shape suffixes: B batch, L length, D width, H heads, C width of a head, T tokens, E experts, K chosen.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainAttention(nn.Module):
    """Causal attention with rotary positions.

    Args:
        dim: D.
        heads: H.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x_BLD: Tensor, cos_LC: Tensor, sin_LC: Tensor) -> Tensor:
        """Mix positions; (B, L, D) -> (B, L, D)."""
        batch, length, dim = x_BLD.shape
        qkv = self.qkv(x_BLD).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        qk = qkv[:2]
        first, second = qk.chunk(2, dim=-1)
        q, k = qk * cos_LC + torch.cat((-second, first), dim=-1) * sin_LC
        y_BHLC = F.scaled_dot_product_attention(q, k, qkv[2], is_causal=True)
        return self.out(y_BHLC.transpose(1, 2).reshape(batch, length, dim))


class PlainExperts(nn.Module):
    """E stacked SwiGLU experts.

    Args:
        num_experts: E.
        dim: D.
        hidden: hidden width of one expert.
    """

    def __init__(self, num_experts: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.w_gate = nn.Parameter(0.02 * torch.randn(num_experts, dim, hidden))
        self.w_up = nn.Parameter(0.02 * torch.randn(num_experts, dim, hidden))
        self.w_down = nn.Parameter(0.02 * torch.randn(num_experts, hidden, dim))

    def forward(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """Gated sum of each token's experts; (T, D) -> (T, D)."""
        order = ids_TK.flatten().argsort(stable=True)
        rows = order // ids_TK.shape[1]
        counts = torch.bincount(ids_TK.flatten(), minlength=len(self.w_gate)).tolist()
        weights = (self.w_gate.unbind(), self.w_up.unbind(), self.w_down.unbind())
        groups = zip(x_TD[rows].split(counts), *weights, strict=True)
        y = torch.cat([(F.silu(x @ gate) * (x @ up)) @ down for x, gate, up, down in groups])
        return torch.zeros_like(x_TD).index_add_(0, rows, y * weights_TK.flatten()[order, None])


class PlainMixture(nn.Module):
    """A linear router and its experts.

    Args:
        dim: D.
        hidden: hidden width of one expert.
        num_experts: E.
        top_k: K.
    """

    def __init__(self, dim: int, hidden: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.experts = PlainExperts(num_experts, dim, hidden)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Route and compute; (B, L, D) -> (B, L, D)."""
        x_TD = x_BLD.flatten(0, 1)
        top_TK, ids_TK = self.router(x_TD).topk(self.top_k)
        # Renormalised softmax gates are the softmax over the chosen logits.
        return self.experts(x_TD, top_TK.softmax(dim=-1), ids_TK).view_as(x_BLD)


class PlainBlock(nn.Module):
    """One pre-norm block.

    Args:
        dim: D.
        heads: H.
        num_experts: E.
        top_k: K.
        hidden: hidden width of one expert.
    """

    def __init__(self, dim: int, heads: int, num_experts: int, top_k: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=1e-6)
        self.attention = PlainAttention(dim, heads)
        self.ffn_norm = nn.RMSNorm(dim, eps=1e-6)
        self.ffn = PlainMixture(dim, hidden, num_experts, top_k)

    def forward(self, x_BLD: Tensor, cos_LC: Tensor, sin_LC: Tensor) -> Tensor:
        """Apply the block; (B, L, D) -> (B, L, D)."""
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), cos_LC, sin_LC)
        return x_BLD + self.ffn(self.ffn_norm(x_BLD))


class PlainLanguageModel(nn.Module):
    """``trainers.models.LanguageModel`` with default options and ``nn.Linear`` routers; returns logits only.

    Its own initialisation is only good enough to be timed: load the other's weights to train it.

    Args:
        vocab_size: V.
        dim: D.
        layers: number of blocks.
        heads: H.
        num_experts: E.
        top_k: K.
        expert_hidden: hidden width of one expert.
        length: the longest sequence.
    """

    cos_LC: Tensor
    sin_LC: Tensor

    def __init__(
        self,
        vocab_size: int,
        *,
        dim: int = 128,
        layers: int = 4,
        heads: int = 4,
        num_experts: int = 8,
        top_k: int = 2,
        expert_hidden: int = 256,
        length: int = 256,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(PlainBlock(dim, heads, num_experts, top_k, expert_hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        half = dim // heads // 2
        angles = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos_LC", torch.cat((angles.cos(), angles.cos()), dim=-1), persistent=False)
        self.register_buffer("sin_LC", torch.cat((angles.sin(), angles.sin()), dim=-1), persistent=False)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Next-token logits; (B, L) -> (B, L, V)."""
        x_BLD = self.embedding(tokens_BL)
        length = tokens_BL.shape[1]
        for block in self.blocks:
            x_BLD = block(x_BLD, self.cos_LC[:length], self.sin_LC[:length])
        return self.norm(x_BLD) @ self.embedding.weight.T


def plain_step(model: nn.Module, *, lr: float = 1e-3, weight_decay: float = 0.1) -> Callable[[Tensor, Tensor], Tensor]:
    """The minimal training step: cross-entropy, backward, fused AdamW; no metrics, no clipping, no host read.

    Args:
        model: tokens (B, L) -> logits (B, L, V).
        lr: AdamW's learning rate.
        weight_decay: AdamW's decoupled weight decay.

    Returns:
        (inputs (B, L), targets (B, L)) -> the loss before the step, a detached scalar in nats per token.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)

    def step(inputs_BL: Tensor, targets_BL: Tensor) -> Tensor:
        loss = F.cross_entropy(model(inputs_BL).flatten(0, 1), targets_BL.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
