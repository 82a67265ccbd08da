"""Fisher traces by their definition: every token position has leaf copies of its own of all that an expert learns."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moegeo_router as mg
from moegeo_router.observe import RoutingStatistics

D, HIDDEN, E, K = 8, 12, 4, 2

Expert = Callable[[dict[str, Tensor], Tensor], Tensor]
"""(the parameters of one expert, one token (D,)) -> (D,)"""


def gating(logits: Tensor, k: int = K) -> tuple[Tensor, Tensor]:
    """The k largest probabilities of a softmax over all experts, not renormalised, and whose they are."""
    return F.softmax(logits, dim=-1).topk(k, dim=-1)


class Router(nn.Module):
    def __init__(self, k: int = K) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D))
        self.k = k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = x @ self.weight.T
        return logits, *gating(logits, self.k)


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(D, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D, D),
    "no bias": lambda: nn.Linear(D, D, bias=False),
    "mlp": lambda: nn.Sequential(nn.Linear(D, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, D, bias=False)),
    "swiglu": SwiGLU,
}


class Block(nn.Module):
    """A MoE block whose experts see the rows of their own tokens only: a list of modules, or a stacked module."""

    def __init__(self, experts: nn.Module, k: int = K) -> None:
        super().__init__()
        self.router = Router(k)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        _, gates, ids = self.router(rows)
        if not isinstance(self.experts, nn.ModuleList):
            return self.experts(rows, gates, ids).view_as(x)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            tokens, slots = (ids == e).nonzero(as_tuple=True)
            y = y.index_add(0, tokens, gates[tokens, slots, None] * expert(rows[tokens]))
        return y.view_as(x)


class Model(nn.Module):
    """Residual MoE blocks on (B, L, D), each followed by a mixing of the positions (if ``mix``)."""

    def __init__(self, *blocks: nn.Module, mix: bool = True, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks, self.mix, self.reentrant = nn.ModuleList(blocks), mix, reentrant

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer, block in enumerate(self.blocks):
            y = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
            x = self.join(layer, x, y)
        return x

    def join(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
        """The input of the next block, from the input x and the output y of this one."""
        return x + y + (x + y).cumsum(dim=1).tanh() if self.mix else x + y

    def after(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
        """The model's output, from the input x and the output y of block ``layer``."""
        x = self.join(layer, x, y)
        for later in range(layer + 1, len(self.blocks)):
            x = self.join(later, x, self.blocks[later](x))
        return x

    def before(self, layer: int, x: Tensor) -> Tensor:
        """The input of block ``layer``."""
        for earlier in range(layer):
            x = self.join(earlier, x, self.blocks[earlier](x))
        return x.detach()


def build(kind: str = "swiglu", layers: int = 2, k: int = K, **options: object) -> Model:
    """A model whose experts are modules of one of the ``KINDS``."""
    torch.manual_seed(0)
    blocks = [Block(nn.ModuleList(KINDS[kind]() for _ in range(E)), k) for _ in range(layers)]
    return Model(*blocks, **options).double()


def inputs(rows: int = 3, seed: int = 1, length: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, D, generator=generator, dtype=torch.float64).requires_grad_()


def loss_of(output: Tensor) -> Tensor:
    """A sum over tokens, as the definition has it."""
    return ((output - 1).square().sum(-1) + output.sin().sum(-1)).sum()


def traces_by_copies(
    expert: Expert, parameters: dict[str, Tensor], x: Tensor, weight_ED: Tensor, loss: Callable[[Tensor], Tensor]
) -> Tensor:
    """``Σ_t ‖∂L/∂θ_e⁽ᵗ⁾‖²`` of a block's parameters (E, …), by autograd on a copy (T, E, …) of each.

    Args:
        expert: computes one expert.
        parameters: of all experts.
        x: (B, L, D) input of the block.
        weight_ED: of the router.
        loss: of the block's output (B, L, D).
    """
    x_TD = x.detach().reshape(-1, D)
    gates_TK, ids_TK = gating(x_TD @ weight_ED.detach().T)
    copies = {name: _copies(p, len(x_TD)) for name, p in parameters.items()}
    y_TD = torch.stack(
        [
            sum(g * expert({n: c[t, e] for n, c in copies.items()}, x_TD[t]) for g, e in zip(gates, ids, strict=True))
            for t, (gates, ids) in enumerate(zip(gates_TK, ids_TK.tolist(), strict=True))
        ]
    )
    return _squares(torch.autograd.grad(loss(y_TD.view(x.shape)), list(copies.values())))


def traces_by_module(module: nn.Module, calls: list[tuple[Tensor, ...]], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The same for a stacked module, whose own forward is called for one token at a time, on that token's copies."""
    copies = {name: _copies(p, len(calls)) for name, p in module.named_parameters()}
    y_TD = torch.cat(
        [
            torch.func.functional_call(module, {name: c[t] for name, c in copies.items()}, call)
            for t, call in enumerate(calls)
        ]
    )
    return _squares(torch.autograd.grad(loss(y_TD), list(copies.values())))


def _copies(parameter: Tensor, tokens: int) -> Tensor:
    return parameter.detach().expand(tokens, *parameter.shape).clone().requires_grad_()


def _squares(gradients: tuple[Tensor, ...]) -> Tensor:
    return sum(g.flatten(2).square().sum(-1).sum(0) for g in gradients)


def attach(model: nn.Module, fisher: str, **options: object) -> mg.Geometry:
    return mg.attach(model, config=mg.GeometryConfig(fisher=fisher, **{"on_error": "raise", "loss": "sum"} | options))


def traces_of(geometry: mg.Geometry) -> list[Tensor]:
    """End the step; return its traces, layer by layer."""
    geometry.metrics()
    state = geometry.state_dict()
    sums = RoutingStatistics.zeros(state["experts"].items()).unflat(state["sums"])
    return [layer.traces for layer in sums.layers.values()]


def close(found: list[Tensor], wanted: list[Tensor], rtol: float = 1e-10) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (theirs > 0).sum() > 1  # an oracle of zeros would prove nothing
        torch.testing.assert_close(ours, theirs.detach().double(), rtol=rtol, atol=0)
