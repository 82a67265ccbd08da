"""Teach the controller a failure of your own: a signal that sees it, and an intervention that repairs it.

python examples/own_signal_and_intervention.py     (needs torch, geoopt, einops; seconds on a CPU)

The failure: twins. Two rows of a router point the same way, so that two experts are always chosen together, and have
the work of one. It happens to models whose experts began as copies. No metric of the table looks at it.
"""

import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.loggers import JSONLLogger


def closest_rows(weight: Tensor) -> tuple[float, int, int]:
    """Return the largest cosine between two rows of a router, and which they are."""
    rows = F.normalize(weight.detach().float(), dim=1)
    cosines = (rows @ rows.T).fill_diagonal_(-1.0)
    first, second = divmod(int(cosines.argmax()), len(rows))
    return float(cosines.max()), first, second


class Twins(mg.Signal):
    """The largest cosine between two rows of a router: 1 where two experts are one to the tokens."""

    name = "twins"
    thresholds = (
        mg.Threshold(
            metric="twins",
            failure="silent capacity loss",  # whose ladder answers to it
            warning=0.9,
            critical=0.99,
            warmup=20,
            smoothing=5,
            source="chosen for this example",
        ),
    )

    def values(self, seen: mg.LayerStep) -> Mapping[str, float]:
        """Look at the weights: they are the same on every rank. ``seen`` has the step's sums over the tokens, too."""
        return {"twins": closest_rows(seen.plant.sites[seen.layer].weight)[0]}


class TurnApart(mg.Intervention):
    """Turns the second of two twins away from the first, to an angle of this cosine; its norm stays."""

    name, cost = "turn_apart", "the tokens of one expert are shared out anew"

    def __init__(self, cosine: float) -> None:
        self._cosine = cosine

    def unavailable(self, plant: mg.Plant, layer: str) -> str | None:
        """Return why it can never be done in this layer; None: it can."""
        return plant.frozen(layer)

    @torch.no_grad()
    def apply(self, plant: mg.Plant, order: mg.Order) -> mg.Applied:
        """Do it. ``detail`` goes into the log, ``memory`` is what undoing needs, and is in the checkpoints."""
        weight = plant.sites[order.layer].weight
        cosine, first, second = closest_rows(weight)
        if cosine < self._cosine:
            return mg.Applied(done=False, detail={"reason": f"the closest rows have cosine {cosine:.2f}"})
        before, axis = weight[second].clone(), F.normalize(weight[first], dim=0)
        # On every rank and after every resume the same direction: no random numbers of the run's.
        aside = torch.randn(len(axis), generator=torch.Generator().manual_seed(order.step)).to(axis)
        aside = F.normalize(aside - (aside @ axis) * axis, dim=0)
        turned = self._cosine * axis + (1 - self._cosine**2) ** 0.5 * aside
        weight[second] = before.norm() * turned
        detail = {"experts": [first, second], "cosine": [round(cosine, 3), self._cosine]}
        return mg.Applied(done=True, detail=detail, memory={"row": second, "change": weight[second] - before})

    @torch.no_grad()
    def undo(self, plant: mg.Plant, layer: str, memory: Mapping[str, Any]) -> None:
        """Take it back, and leave what the row has learnt since."""
        weight = plant.sites[layer].weight
        weight[memory["row"]] -= memory["change"].to(weight)


class MoE(nn.Module):
    """A layer of six experts behind a linear gate, top-2."""

    def __init__(self, dim: int = 16, num_experts: int = 6) -> None:
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
    """Tokens around six centres, each cluster with a linear map of its own to learn."""
    law = torch.Generator().manual_seed(0)
    centres, maps = torch.randn(6, dim, generator=law) * 2, torch.randn(6, dim, dim, generator=law) / 4
    label = torch.randint(6, (tokens,))
    x = centres[label] + 0.5 * torch.randn(tokens, dim)
    return x, torch.einsum("td,tde->te", x, maps[label])


def main(steps: int = 150) -> None:
    """Train a model with twins, and let the controller part them."""
    torch.manual_seed(0)
    model = MoE()
    with torch.no_grad():  # the failure: expert 5 began as a copy of expert 0
        model.experts[5].load_state_dict(model.experts[0].state_dict())
        model.gate.weight[5] = model.gate.weight[0]
    mg.geometrize(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    control = mg.ControlConfig(
        # Against this failure mode first what the library knows, then ours.
        ladders={"silent capacity loss": ("regularizers", "turn_apart")},
        patience=10,  # steps
        settle=15,
    )
    config = mg.GeometryConfig(
        top_k=2, controller="act", control=control, signals=(Twins(),), interventions=(TurnApart(cosine=0.5),)
    )
    geometry = mg.attach(model, optimizer, config)
    log = time.strftime("runs/own_signal-%Y%m%d-%H%M%S/metrics.jsonl")
    logger = JSONLLogger(log)
    for step in range(1, steps + 1):
        x, target = clusters(256)
        loss = geometry.record_loss(F.mse_loss(model(x), target))
        (loss + geometry.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen = geometry.metrics()
        logger.log({"train/loss": loss.item(), **seen}, step)
        for event in geometry.log_control(logger, step):
            print(f"step {step:3d}  {event.kind:7s}  {event.line}")
            if "done" in event.detail:
                print(f"{'':18s} done: {event.detail['done']}")
        if step % 50 == 0:
            print(f"step {step:3d}  loss {loss:.4f}  twins {seen['geometry/twins']:.3f}")
    logger.close()
    print(f"the same decisions from the log, without these classes:\n  python -m moegeo_router.replay {log}")


if __name__ == "__main__":
    main()
