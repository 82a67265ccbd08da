"""One router by itself: inputs of every kind, and what a step did to its routing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.routers import routing_probabilities

INPUTS = ("random", "clustered", "saturated", "large mean", "anisotropic")


def inputs(kind: str, tokens: int = 400, width: int = 16, seed: int = 0) -> Tensor:
    """(T, D) float64 inputs; "saturated" ones are large, so that most tokens are decided."""
    g = torch.Generator().manual_seed(seed)
    law = torch.Generator().manual_seed(99)  # the same for every seed: fresh rows follow the same law
    x = torch.randn(tokens, width, generator=g, dtype=torch.float64)
    if kind == "clustered":
        centres = 3 * torch.randn(5, width, generator=law, dtype=torch.float64)
        return centres[torch.randint(5, (tokens,), generator=g)] + 0.1 * x
    if kind == "saturated":
        return 12 * x
    if kind == "large mean":
        return x + 10 * torch.randn(width, generator=law, dtype=torch.float64)
    if kind == "anisotropic":
        return x * torch.logspace(-2, 1, width, dtype=torch.float64)
    return x


class Router(nn.Module):
    """A model that is a router and a loss on its probabilities."""

    def __init__(
        self, experts: int = 6, width: int = 16, manifold: str | None = None, bias: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        if manifold is None:
            self.router: nn.Linear = nn.Linear(width, experts, bias=bias)
        else:
            self.router = mg.GeometricRouter(width, experts, manifold=manifold, bias=bias)
        self.double()
        teacher = torch.Generator().manual_seed(seed + 1)
        self.teacher = torch.randn(width, experts, generator=teacher, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.router(x)

    def loss(self, x: Tensor) -> Tensor:
        """Cross-entropy with the teacher's choices."""
        labels = (x @ self.teacher.to(x)).argmax(-1)
        return nn.functional.cross_entropy(self(x), labels)


def probabilities(model: Router, x: Tensor, scores: str = "softmax") -> Tensor:
    with torch.no_grad():
        model.eval()
        p = routing_probabilities(model(x), scores)
        model.train()
    return p


def mean_kl(p: Tensor, q: Tensor) -> float:
    tiny = 1e-300
    return float((p * (p.clamp_min(tiny).log() - q.clamp_min(tiny).log())).sum(-1).mean())


class TwoSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a_router, self.b_router = nn.Linear(8, 4, bias=False), nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a_router(x).softmax(-1)[..., 0] + self.b_router(x).softmax(-1)[..., 1]


def one_step(model: Router, optimizer: mg.NaturalGradient, seed: int = 0) -> float:
    optimizer.zero_grad()
    model.loss(inputs("random", seed=seed)).backward()
    optimizer.step()
    return float(optimizer.movement.moved)
