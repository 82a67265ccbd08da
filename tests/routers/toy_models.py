"""Toy MoE models in the shapes of several code bases."""

from __future__ import annotations

import torch
from torch import nn

D, E = 6, 4


class Expert(nn.Module):
    """A gated MLP: its ``gate`` is no router."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, D, bias=False)
        self.up = nn.Linear(D, D, bias=False)

    def forward(self, x):
        return self.gate(x).sigmoid() * self.up(x)


class ListMoE(nn.Module):
    """A gate beside a ModuleList, a shared expert with its own 1-output gate."""

    def __init__(self, bias=False, dtype=None):
        super().__init__()
        self.gate = nn.Linear(D, E, bias=bias)
        self.experts = nn.ModuleList(Expert() for _ in range(E))
        self.shared_expert = Expert()
        self.shared_expert_gate = nn.Linear(D, 1, bias=False)
        self.to(dtype)

    def forward(self, x):
        p = self.gate(x).softmax(-1)
        routed = sum(p[..., e : e + 1] * expert(x) for e, expert in enumerate(self.experts))
        return routed + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(E, D, D))


class StackedMoE(nn.Module):
    """A gate beside stacked expert weights."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E)
        self.experts = Stack()

    def forward(self, x):
        return torch.einsum("te,td,edf->tf", self.gate(x).softmax(-1), x, self.experts.w)


class ToyTopKRouter(nn.Module):
    """Transformers' shape: the router holds the weight itself and returns a tuple."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D))

    def forward(self, x):
        logits = x @ self.weight.T
        return logits, *logits.softmax(-1).topk(2)


class TupleMoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = ToyTopKRouter()

    def forward(self, x):
        return self.mlp(x)[1].sum(-1, keepdim=True) * x


class SwitchRouter(nn.Module):
    """A router with an inner ``classifier``."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(D, E, bias=False)

    def forward(self, x):
        return self.classifier(x)


class SwitchMoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.routing = SwitchRouter()

    def forward(self, x):
        return self.routing(x).softmax(-1).amax(-1, keepdim=True) * x


class Model(nn.Module):
    """All of them behind each other, and a dense gated MLP."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(D, D)
        self.layers = nn.ModuleList([ListMoE(), Expert(), StackedMoE(), TupleMoE(), SwitchMoE()])

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return x
