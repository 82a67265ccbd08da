"""Experts beside a router, however a code base keeps them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.routers.experts import block_of, find_experts

D, E = 6, 4


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(E, D, D))
        self.bias = nn.Parameter(torch.randn(E, D))


class Listed(nn.Module):
    """A module that holds the list, as JetMoE's and NLLB's do."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))


class Block(nn.Module):
    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.shared_experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Own(Block):
    def __init__(self) -> None:
        super().__init__()
        self.w2 = nn.Parameter(torch.randn(E, D, D))


def listed() -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(D, D) for _ in range(E))


def named() -> nn.ModuleDict:
    return nn.ModuleDict({f"expert_{i}": nn.Linear(D, D) for i in range(E)})


@pytest.mark.parametrize(
    ("block", "name", "stacked"),
    [
        (Block(experts=listed()), "mlp.experts", False),
        (Block(local_experts=named()), "mlp.local_experts", False),
        (Block(experts=nn.ModuleDict({**named(), "token_dropout": nn.Dropout()})), "mlp.experts", False),  # NLLB
        (Block(experts=Stacked()), "mlp.experts", True),
        (Block(experts=Listed()), "mlp.experts.experts", False),
        (Own(), "mlp", True),
    ],
    ids=["list", "dict", "dict with more", "stacked", "list inside", "own parameters"],
)
def test_found(block, name, stacked):
    model = nn.ModuleDict({"mlp": block})
    (site,) = mg.find_routers(model)
    experts = find_experts(model, site)
    assert (experts.name, experts.stacked, len(experts.modules)) == (name, stacked, 0 if stacked else E)
    assert block_of(model, site) == ("mlp", block)


def test_shared_experts_and_lists_of_another_length_are_none():
    for block in (Block(), Block(experts=nn.ModuleList([nn.Linear(D, D)]))):
        model = nn.ModuleDict({"mlp": block})
        assert find_experts(model, mg.find_routers(model)[0]) is None


def test_the_block_is_the_nearest_module_that_is_called():
    block = Block(gates=nn.ModuleDict({"router": nn.Linear(D, E)}))
    model = nn.Sequential(block)
    site = mg.find_routers(model, select="0.gates.router")[0]
    assert block_of(model, site) == ("0", block)
    alone = nn.ModuleDict({"router": nn.Linear(D, E)})
    assert block_of(alone, mg.find_routers(alone)[0]) is None
