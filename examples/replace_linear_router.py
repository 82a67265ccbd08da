"""Replace the linear router of your own MoE model by a geometric one, train it, and leave again.

python examples/replace_linear_router.py     (needs torch, geoopt, einops; seconds on a CPU)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moegeo_router as mg


class MoE(nn.Module):
    """An MoE layer as many people have one: a linear gate, a list of experts, top-2 routing."""

    def __init__(self, dim: int = 16, num_experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Return each token's two experts, weighed by the gate."""
        gating = mg.topk_gating(self.gate(x), k=2)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(gating.ids == e)
            out = out.index_add(0, token, expert(x[token]) * gating.weights[token, choice, None])
        return out


def clusters(tokens: int, dim: int = 16) -> tuple[Tensor, Tensor]:
    """Tokens around four centres, each cluster with a linear map of its own to learn."""
    law = torch.Generator().manual_seed(0)
    centres, maps = torch.randn(4, dim, generator=law) * 2, torch.randn(4, dim, dim, generator=law) / 4
    label = torch.randint(4, (tokens,))
    x = centres[label] + 0.5 * torch.randn(tokens, dim)
    return x, torch.einsum("td,tde->te", x, maps[label])


def main() -> None:
    """Convert, train, export."""
    torch.manual_seed(0)
    model = MoE()
    x, _ = clusters(256)
    before = model.gate(x)

    mg.geometrize(model)  # in place: the gate is still the same nn.Linear with the same weight tensor
    assert torch.equal(model.gate(x), before), "the function is the same, bit for bit"
    print("router weight:", type(model.gate.weight).__name__, "on", model.gate.weight.manifold.name)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    geometry = mg.attach(model, optimizer, mg.GeometryConfig(top_k=2))  # takes over the gate's step, and watches
    for step in range(301):
        x, target = clusters(256)
        loss = F.mse_loss(model(x), target)
        (loss + geometry.loss()).backward()  # by default 0.01 · fsi²: keep all experts in use
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            seen = geometry.metrics()
            scores = "  ".join(f"{name} {seen[f'geometry/{name}']:.3f}" for name in ("fsi", "dispersion_1", "fhs"))
            print(f"step {step:3d}  loss {loss:.4f}  {scores}")
    geometry.detach()  # the step is AdamW's again

    trained = model.gate(x)
    mg.export(model)  # as if we had never been there
    assert torch.equal(model.gate(x), trained)
    print("exported:", type(model.gate.weight).__name__, "in a plain", type(model.gate).__name__)


if __name__ == "__main__":
    main()
