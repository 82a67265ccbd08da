"""Watch an MoE model in wandb while it trains, online when you are logged in, else offline: two lines in your loop.

python examples/log_geometry_to_wandb.py     (needs the extra "train"; seconds on a CPU)
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.loggers import JSONLLogger, MultiLogger, WandbLogger


class MoE(nn.Module):
    """A layer of eight experts behind a linear gate, top-2."""

    def __init__(self, dim: int = 32, num_experts: int = 8) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Add each token's two experts, weighed by the gate."""
        gating = mg.topk_gating(self.gate(x), k=2)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(gating.ids == e)
            x = x.index_add(0, token, expert(x[token]) * gating.weights[token, choice, None])
        return x


def main(steps: int = 200) -> None:
    """Train on random tokens; log every step, and pictures of the experts' load every 50."""
    torch.manual_seed(0)
    directory = time.strftime("runs/log_geometry-%Y%m%d-%H%M%S")
    model = nn.Sequential(MoE(), MoE())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    mg.geometrize(model)
    config = mg.GeometryConfig(top_k=2, per_layer=True, pictures_every=50)
    geometry = mg.attach(model, optimizer, config)
    wandb_logger = WandbLogger(project="moegeo-router", directory=directory, config={"experts": 8, "lr": 3e-3})
    logger = MultiLogger([wandb_logger, JSONLLogger(f"{directory}/metrics.jsonl")])
    for step in range(1, steps + 1):
        x = torch.randn(512, 32)
        loss = F.mse_loss(model(x), x.roll(1, dims=-1).tanh())
        (loss + geometry.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        metrics = geometry.metrics()
        logger.log({"train/loss": loss.item(), **metrics}, step)
        geometry.log_pictures(logger, step)
    logger.close()
    print(f"last step: FSI {metrics['geometry/fsi']:.3f}, FHS {metrics['geometry/fhs']:.2f}, loss {loss.item():.3f}")
    print(wandb_logger.how_to_open)
    print(f"JSON lines: {directory}/metrics.jsonl")


if __name__ == "__main__":
    main()
