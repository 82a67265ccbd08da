"""A router that the library cannot know: tell it in one line what the module does not show.

python examples/own_router_family.py     (needs torch, geoopt, einops; seconds on a CPU)

The router below scores by sigmoids, hides its weight two modules deep, and shows nobody which experts it has chosen.
"""

import torch
from torch import Tensor, nn

import moegeo_router as mg


class Scorer(nn.Module):
    """Logits of normalised tokens; the second linear layer has nothing to do with routing."""

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, experts, bias=False)
        self.uncertainty = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (T, E) and how unsure the router is (T, 1)."""
        return self.out(self.norm(x)), self.uncertainty(x)


class Dispatcher(nn.Module):
    """The router: only weights (T, E) leave it, 0 where an expert is not chosen."""

    def __init__(self, dim: int, experts: int, k: int = 2) -> None:
        super().__init__()
        self.score, self.k = Scorer(dim, experts), k

    def forward(self, x: Tensor) -> Tensor:
        """Return each expert's weight for each token."""
        logits, _ = self.score(x)
        kept = torch.full_like(logits, -torch.inf).scatter(1, logits.topk(self.k).indices, 0.0)
        return (logits + kept).sigmoid()


class MoE(nn.Module):
    """A block of this code base."""

    def __init__(self, dim: int = 16, experts: int = 4) -> None:
        super().__init__()
        self.dispatch = Dispatcher(dim, experts)
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighed sum of the chosen experts."""
        return x + torch.stack([e(x) for e in self.experts], dim=-1).mul(self.dispatch(x)[:, None]).sum(-1)


def main() -> None:
    """Train a block of that kind for a moment."""
    torch.manual_seed(0)
    model, x = MoE(), torch.randn(256, 16)
    family = mg.RouterFamily(router=Dispatcher, projection="score.out", scores="sigmoid", top_k="k", renormalize=False)
    mg.geometrize(model, select=family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    geometry = mg.attach(model, optimizer, mg.GeometryConfig(select=family))
    for _ in range(50):
        loss = (model(x) - x.roll(1, dims=-1).tanh()).square().mean() + geometry.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    seen = geometry.metrics()
    print(f"{geometry.layers[0]}: {geometry.config.scores} scores, loss {loss.item():.2f}")
    for name in ("fsi", "fsi_load", "dead_fraction", "movement"):
        print(f"  {name:<14} {seen[f'geometry/{name}']:.3f}")


if __name__ == "__main__":
    main()
