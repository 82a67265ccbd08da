"""Chosen experts and gates among what a router returns, where shapes alone do not tell them from other tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.observe import choices

D, T = 8, 64


class Router(nn.Module):
    """Returns whatever ``outputs`` makes of its logits."""

    def __init__(self, experts: int, outputs: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.layer = nn.Linear(D, experts)
        self.outputs = outputs

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.outputs(self.layer(x))


class Block(nn.Module):
    """Mixes dense weights (T, E) that ``weights`` makes of what the router returns."""

    def __init__(self, experts: int, outputs: Callable[[Tensor], tuple[Tensor, ...]], weights) -> None:
        super().__init__()
        self.router = Router(experts, outputs)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(experts))
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights(*self.router(x))
        return x + sum(weights[:, e, None] * expert(x) for e, expert in enumerate(self.experts))


def dispatch(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, combine weights (T, E) and an integer mask (T, E), as layers that dispatch by einsum have them."""
    p, experts = logits.softmax(-1), logits.shape[-1]
    mask = F.one_hot(p.topk(max(1, experts // 4)).indices, experts).sum(-2)
    return logits, p * mask, mask


def all_chosen(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k = E: four tensors (T, E)."""
    p = logits.softmax(-1)
    gates, ids = p.topk(p.shape[-1])
    return logits, p, gates, ids


def ordered(logits: Tensor, p: Tensor, gates: Tensor, ids: Tensor) -> Tensor:
    return torch.zeros_like(gates).scatter(-1, ids, gates)


def watch(block: nn.Module, **options: object) -> mg.Geometry:
    return mg.attach(block, config=mg.GeometryConfig(**{"on_error": "raise", "controller": None} | options))


def trained(block: nn.Module, geometry: mg.Geometry, x: Tensor) -> dict[str, float]:
    block(x).square().mean().backward()
    return geometry.metrics()


@pytest.mark.parametrize("experts", [2, 4, 8])
def test_a_mask_of_whole_numbers_is_not_taken_for_choices(experts):
    torch.manual_seed(0)
    block, x = Block(experts, dispatch, lambda logits, combine, mask: combine), torch.randn(T, D)
    geometry = watch(block)
    with pytest.warns(UserWarning, match=r"layer router shows logits, not the experts chosen"):
        found = trained(block, geometry, x)
    assert "geometry/fsi_load" not in found
    geometry.detach()
    geometry = watch(block, top_k=max(1, experts // 4), renormalize=False)
    counts = dispatch(block.router.layer(x))[2].sum(0)
    expected = float(mg.fsi_load(counts, max(1, experts // 4), normalized=True))
    assert trained(block, geometry, x)["geometry/fsi_load"] == pytest.approx(expected, rel=1e-6)


def test_choices_beside_a_mask_are_found():
    torch.manual_seed(0)

    def outputs(logits: Tensor) -> tuple[Tensor, ...]:
        _, combine, mask = dispatch(logits)
        return mask, combine, *logits.softmax(-1).topk(2), logits

    block, x = Block(8, outputs, lambda mask, combine, *others: combine), torch.randn(T, D)
    counts = dispatch(block.router.layer(x))[2].sum(0)
    expected = float(mg.fsi_load(counts, 2, normalized=True))
    assert trained(block, watch(block), x)["geometry/fsi_load"] == pytest.approx(expected, rel=1e-6)


def heterogeneity(block: Block, x: Tensor) -> float:
    """FHS by definition, from the dense weights and the gradient of the output."""
    weights = block.weights(*block.router(x)).detach()
    y = block(x)
    (gradient,) = torch.autograd.grad(y.square().mean(), y)
    return float(mg.fhs((weights.square() * gradient.square().sum(-1, keepdim=True)).sum(0)))


@pytest.mark.parametrize("first", ["full", "no tokens", "no preference"])
def test_of_several_tensors_the_gates_are_those_that_the_logits_explain(first):
    torch.manual_seed(0)
    block, x = Block(4, all_chosen, ordered), torch.randn(T, D)
    if first == "no preference":
        nn.init.zeros_(block.router.layer.weight)
    nn.init.zeros_(block.router.layer.bias)
    geometry = watch(block)
    trained(block, geometry, x[:0] if first == "no tokens" else x)
    with torch.no_grad():
        block.router.layer.weight.normal_()
        block.router.layer.bias.copy_(torch.tensor([2.0, 1.0, 0.0, -1.0]))
    found = trained(block, geometry, x)
    geometry.detach()
    assert found["geometry/fhs"] == pytest.approx(heterogeneity(block, x), rel=1e-6)


@pytest.mark.parametrize("outputs", [dispatch, all_chosen])
def test_values_are_looked_at_once(outputs, monkeypatch):
    """Each look waits for an accelerator."""
    looked = []

    def counting(*arguments: object) -> int | None:
        looked.append(arguments)
        return choose(*arguments)

    choose = choices._choose
    monkeypatch.setattr(choices, "_choose", counting)
    block = Block(4, outputs, ordered if outputs is all_chosen else lambda logits, combine, mask: combine)
    geometry = watch(block, top_k=None if outputs is all_chosen else 1)
    for tokens in (0, T, T, T):
        trained(block, geometry, torch.randn(tokens, D))
    assert len(looked) == 2  # one without tokens, one with them


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_what_the_logits_explain_alike_is_told_by_the_order(order):
    """Gates before and after they are renormalised: the first are taken, and logits of the chosen never."""
    torch.manual_seed(0)

    def outputs(logits: Tensor) -> tuple[Tensor, ...]:
        gates, ids = logits.softmax(-1).topk(2)
        several = gates, gates / gates.sum(-1, keepdim=True), logits.gather(-1, ids)
        return logits, ids, *(several[i] for i in order)

    def weights(logits: Tensor, ids: Tensor, *several: Tensor) -> Tensor:
        return torch.zeros_like(logits).scatter(-1, ids, several[0] if order[0] != 2 else several[1])

    block, x = Block(4, outputs, weights), torch.randn(T, D)
    expected = heterogeneity(block, x)
    assert trained(block, watch(block), x)["geometry/fhs"] == pytest.approx(expected, rel=1e-6)


def test_injected_regularizers_reach_a_router_that_chooses_all():
    torch.manual_seed(0)
    block, x = Block(4, all_chosen, ordered), torch.randn(T, D)
    config = mg.GeometryConfig(inject=True, regularizers=mg.Regularizers(z=0.1), step=None, on_error="raise")
    optimizer = torch.optim.SGD(block.parameters(), lr=0.0)
    block(x).sum().backward()
    before = block.router.layer.weight.grad.clone()
    optimizer.zero_grad()
    mg.attach(block, optimizer, config)
    block(x).sum().backward()
    optimizer.step()  # raises where they reached no router
    z = block.router.layer(x).detach().requires_grad_()
    (0.1 * z.logsumexp(-1).square().mean()).backward()
    torch.testing.assert_close(block.router.layer.weight.grad - before, z.grad.T @ x, rtol=1e-4, atol=1e-5)


def test_a_forward_without_tokens_does_not_decide_which_output_is_the_logits():
    torch.manual_seed(0)

    def outputs(logits: Tensor) -> tuple[Tensor, ...]:
        scaled = 8 * logits
        return scaled, *scaled.softmax(-1).topk(2)

    block = Block(4, outputs, lambda z, gates, ids: torch.zeros_like(z).scatter(-1, ids, gates))
    geometry, x = watch(block), torch.randn(T, D)
    trained(block, geometry, x[:0])
    expected = float(mg.fsi_token((8 * block.router.layer(x)).detach().softmax(-1)))
    assert trained(block, geometry, x)["geometry/fsi_token"] == pytest.approx(expected, rel=1e-5)
