"""A small MoE model with everything that can go wrong around it: masks, checkpointing, several layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moegeo_router as mg

D, E, K, L = 8, 4, 2, 5


class TopKRouter(nn.Module):
    """A router that returns what transformers' routers return: logits, gates, ids."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(E, D))
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = x.reshape(-1, D) @ self.weight.T
        gating = mg.topk_gating(logits, K, renormalize=False)
        return logits, gating.weights, gating.ids


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, D, 2 * D) / 4)
        self.down = nn.Parameter(torch.randn(E, 2 * D, D) / 4)

    def forward(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        hidden = torch.einsum("td,edf->tef", x, self.up).tanh()
        out = torch.einsum("tef,efd->ted", hidden, self.down)
        dense = torch.zeros(len(x), E, dtype=gates.dtype).scatter(1, ids, gates)
        return torch.einsum("te,ted->td", dense.to(out), out)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = TopKRouter()
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        _, gates, ids = self.router(x)
        return x + self.experts(x.reshape(-1, D), ids, gates).view_as(x)


class LinearGateBlock(nn.Module):
    """A block whose router is an nn.Linear and whose gating is its own business."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        gating = mg.topk_gating(self.gate(x), K)
        out = x
        for e, expert in enumerate(self.experts):
            weight = torch.where(gating.ids == e, gating.weights, 0).sum(-1, keepdim=True)
            out = out + weight.to(x) * expert(x)
        return out


class Model(nn.Module):
    """Two MoE blocks on (B, L, D) inputs; the loss is a mean over the tokens that the mask keeps."""

    def __init__(self, block: type[nn.Module] = Block, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])
        self.head = nn.Linear(D, D)
        self.reentrant = reentrant

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def build(block: type[nn.Module] = Block, reentrant: bool | None = None, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model(block, reentrant).double()


def batch(rows: int = 8, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Shifted, so that the routing is neither balanced nor the same in every row.
    x = torch.randn(rows, L, D, generator=generator, dtype=torch.float64)
    return (x + torch.linspace(-1, 1, rows, dtype=torch.float64)[:, None, None]).requires_grad_()


def padding(side: str, rows: int = 8) -> Tensor:
    """Every second row ends (or begins) with two padded positions."""
    mask = torch.ones(rows, L, dtype=torch.long)
    mask[::2, -2:] = 0
    return mask if side == "right" else mask.flip(1)


def token_loss(output: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over unmasked tokens of ``‖y - 1‖²``."""
    per_token = (output - 1).square().sum(-1)
    return per_token.mean() if mask is None else (per_token * mask).sum() / mask.sum()
