"""Log the geometry of a routing to wandb while it trains: online when you are logged in, else offline.

python examples/log_geometry_to_wandb.py     (needs the extra "train"; seconds on a CPU)
"""

import time

import geoopt
import torch

import moegeo_router as mg
from moegeo_router.loggers import JSONLLogger, MultiLogger, WandbLogger


def geometry(p: torch.Tensor) -> dict[str, float]:
    """What to watch: the alarm (fsi, low is good) and the goals (dispersion, routing information, high is good)."""
    return {
        "geometry/fsi": mg.fsi(p, normalized=True).item(),
        "geometry/dispersion": mg.dispersion(p).item(),
        "geometry/routing_information": mg.routing_information(p, normalized=True).item(),
    }


def main(steps: int = 200) -> None:
    """Train one router on random tokens and log every step."""
    torch.manual_seed(0)
    directory = time.strftime("runs/log_geometry-%Y%m%d-%H%M%S")
    router = mg.GeometricRouter(32, 8)
    optimizer = geoopt.optim.RiemannianAdam(router.parameters(), lr=0.03)
    wandb_logger = WandbLogger(project="moegeo-router", directory=directory, config={"experts": 8, "lr": 0.03})
    logger = MultiLogger([wandb_logger, JSONLLogger(f"{directory}/metrics.jsonl")])
    for step in range(steps):
        p = mg.routing_probabilities(router(torch.randn(512, 32)))
        loss = mg.fsi(p).square() - mg.dispersion(p)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        logger.log({"train/loss": loss.item(), **geometry(p.detach())}, step)
    logger.close()
    print("last step:", {key: round(value, 3) for key, value in geometry(p.detach()).items()})
    print(wandb_logger.how_to_open)
    print(f"JSON lines: {directory}/metrics.jsonl")


if __name__ == "__main__":
    main()
