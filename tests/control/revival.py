"""A watched model whose experts can die: clusters of tokens, a block with experts of either kind, its probe."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import moegeo_router as mg
from moegeo_router.config import GeometryConfig
from moegeo_router.control.plant import Applied, Order, Plant
from moegeo_router.control.probe import LayerProbe
from moegeo_router.control.revive import Revive
from moegeo_router.losses import Regularizers
from moegeo_router.observe.forward import LayerForward
from moegeo_router.observe.hooks import Pausable
from moegeo_router.observe.taps import LayerTap
from moegeo_router.observe.tokens import TokenTap
from moegeo_router.regularization import regularization_of
from moegeo_router.routers.experts import block_of, find_experts
from trainers.models.moe import MoELayer

D, E, CLUSTERS = 8, 8, 6


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x).tanh())


class ListBlock(nn.Module):
    """A linear gate beside a list of experts; only those chosen run, so the others get no gradient at all."""

    def __init__(self, k: int = 2, bias: bool = False, renormalize: bool = True) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=bias)
        self.experts = nn.ModuleList(Expert() for _ in range(E))
        self.k, self.renormalize = k, renormalize

    def forward(self, x: Tensor) -> Tensor:
        gating = mg.topk_gating(self.gate(x), self.k, renormalize=self.renormalize)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, slots = (gating.ids == number).nonzero(as_tuple=True)
            if len(rows):
                out = out.index_add(0, rows, gating.weights[rows, slots].to(x)[:, None] * expert(x[rows]))
        return out


class StackBlock(nn.Module):
    """The trainers' layer, its stacked experts among them."""

    def __init__(
        self,
        k: int = 2,
        bias: bool = False,
        renormalize: bool = True,
        manifold: str | None = None,
        hidden: int = 16,
    ) -> None:
        super().__init__()

        def router(width: int, experts: int) -> nn.Module:
            if manifold is None:
                return nn.Linear(width, experts, bias=bias)
            return mg.GeometricRouter(width, experts, manifold=manifold, bias=bias)

        self.layer = MoELayer(D, hidden, E, k, router, renormalize=renormalize)
        self.layer.experts.reset_parameters(0.3, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Watched(Pausable):
    """A model, its tap and its probe, as ``attach`` puts them together."""

    def __init__(self, model: nn.Module, optimizers: list[Optimizer], steps: object = None, number: int = 0) -> None:
        self.model, self.optimizers, self.seen = model, optimizers, 0
        self.sites = mg.find_routers(model)
        self.site = self.sites[number]
        self.layer = self.site.name
        self.errors: list[Exception] = []
        block = block_of(model, self.site)
        experts = find_experts(model, self.site)
        self.probe = LayerProbe(self.site, None if block is None else block[1], self.errors.append)
        tokens = TokenTap(model, {self.layer}, lambda _: None, raising, active=self._is_active)
        self.taps = [
            tokens,
            LayerTap(
                self.site,
                block and block[1],
                experts,
                tokens,
                self._see,
                raising,
                lambda trained: trained and self._is_active(),
            ),
        ]
        self.plant = Plant(
            model=model,
            sites={site.name: site for site in self.sites},
            experts={site.name: find_experts(model, site) for site in self.sites},
            optimizers=optimizers,
            steps=steps,  # type: ignore[arg-type]
            regularization=regularization_of(
                model, self.sites, GeometryConfig(regularizers=Regularizers.none()), trained=False
            ),
            probes={self.layer: self.probe},
        )

    def _see(self, seen: LayerForward) -> None:
        self.seen += 1
        self.probe.see(seen)

    def order(self, dead: tuple[int, ...], load: tuple[float, ...], k: int = 2, step: int = 10) -> Order:
        return Order(step=step, layer=self.layer, failure="expert collapse", load=load, dead=dead, k=k)

    def share(self, x: Tensor, k: int) -> Tensor:
        """(E,) how many of the tokens choose each expert."""
        with torch.no_grad():
            logits = self.site.module(x)
        logits = logits[0] if isinstance(logits, tuple) else logits
        return torch.bincount(logits.topk(k).indices.flatten(), minlength=self.site.num_experts) / len(x)


def raising(error: Exception) -> None:
    raise error


def tokens(number: int = 240, seed: int = 0, centre: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return tokens in clusters around a common point, and targets: another linear map for each cluster."""
    law = torch.Generator().manual_seed(7)
    centres = centre * torch.randn(CLUSTERS, D, generator=law) + 1.5
    maps = torch.randn(CLUSTERS, D, D, generator=law) / D**0.5
    g = torch.Generator().manual_seed(seed)
    cluster = torch.randint(CLUSTERS, (number,), generator=g)
    x = centres[cluster] + 0.5 * torch.randn(number, D, generator=g)
    return x, torch.einsum("nd,ndf->nf", x, maps[cluster])


@torch.no_grad()
def collapse(watched: Watched, alive: tuple[int, ...] = (0, 1)) -> None:
    """Turn the rows of all other experts away from all tokens."""
    mean = tokens()[0].mean(dim=0)
    for expert in range(watched.site.num_experts):
        if expert not in alive:
            watched.site.weight[expert] = -mean / mean.norm() + 0.05 * torch.randn(D)


def load_of(watched: Watched, k: int) -> tuple[float, ...]:
    return tuple((watched.share(tokens()[0], k) / k).tolist())


def dead_of(load: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(expert for expert, share in enumerate(load) if share < 0.01)


def train(watched: Watched, steps: int = 1, seed: int = 0) -> float:
    """Train on fresh tokens and return the last loss; gradients are left in place."""
    loss = torch.zeros(())
    for step in range(steps):
        x, y = tokens(seed=seed + step)
        for optimizer in watched.optimizers:
            optimizer.zero_grad()
        loss = (watched.model(x) - y).square().mean()
        loss.backward()
        for optimizer in watched.optimizers:
            optimizer.step()
    return float(loss.detach())


def state_of(optimizers: list[Optimizer], model: nn.Module) -> dict[str, Tensor]:
    """All parameters and all tensors of the optimizers' state, by name."""
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"{name}/{key}"] = value.clone()
    return found


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """What is not the same, bit for bit."""
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


BLOCKS = {"list": ListBlock, "stack": StackBlock}
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.9),
}


class Forgetting(SimpleNamespace):
    """Stands for steps that were taken over."""

    def __init__(self) -> None:
        super().__init__(calls=[], names=["block.gate", "block.layer.router"])

    def forget(self, name: str, experts: list[int]) -> None:
        self.calls.append((name, list(experts)))


def collapsed(
    block: type[nn.Module] = StackBlock, optimizer: str = "AdamW", steps: int = 5, **options: object
) -> Watched:
    """A model of which two experts are alive, after a few steps of training, with its probe on."""
    torch.manual_seed(0)
    model = Model(block(**options)).train()
    watched = Watched(model, [], Forgetting())
    collapse(watched)
    watched.optimizers.append(OPTIMIZERS[optimizer](model.parameters()))
    watched.plant.optimizers = watched.optimizers
    if steps:
        train(watched, steps)
    watched.probe.on()
    train(watched)
    return watched


def revived(watched: Watched, revive: Revive, k: int = 2) -> Applied:
    load = load_of(watched, k)
    return revive.apply(watched.plant, watched.order(dead_of(load), load, k))
