"""Planted data and a router that knows the truth: the metrics take the values one derives by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from trainers.data.planted import PlantedImages, PlantedText

SURE = 400.0  # logits so far apart that fp32 probabilities are 0 and 1


class Assigned(nn.Module):
    """An MoE block whose router sees each token's source, one-hot, and sends it where ``table`` (D, E) says."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        domains, experts = table.shape
        self.router = mg.GeometricRouter(domains, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(domains, domains) for _ in range(experts))
        with torch.no_grad():
            self.router.weight.copy_(SURE * table.T)

    def forward(self, domains: Tensor) -> Tensor:
        x = nn.functional.one_hot(domains, self.router.in_features).float()
        gating = mg.topk_gating(self.router(x), 1, renormalize=False)
        return sum(
            torch.where(gating.ids == e, gating.weights, 0).sum(-1, keepdim=True) * expert(x)
            for e, expert in enumerate(self.experts)
        )


def measured(table: Tensor, domains: Tensor, mask: Tensor) -> dict[str, float]:
    config = mg.GeometryConfig(top_k=1, renormalize=False, num_domains=len(table), on_error="raise")
    block = Assigned(table)
    geometry = mg.attach(nn.ModuleDict({"block": block}), config=config)
    with geometry.tokens(mask, domains=domains):
        block(domains).square().mean().backward()
    return geometry.metrics()


def tokens_of(data: PlantedText | PlantedImages) -> tuple[Tensor, Tensor]:
    batch = data.train_batch(0)
    return batch.domains, batch.mask


@pytest.mark.parametrize(
    "data",
    [PlantedText(sources=4, alphabet=8, documents=200, batch_size=16), PlantedImages(clusters=4, images=800)],
    ids=["text", "images"],
)
def test_the_true_assignment_and_one_expert_for_all(data):
    domains, mask = tokens_of(data)
    w = (torch.bincount(domains[mask], minlength=4) / mask.sum()).double()
    assert bool((w > 0).all())
    largest = 2 * math.acos(1 / math.sqrt(4))

    found = measured(torch.eye(4), domains, mask)
    # Every token is one-hot on its source's expert, so p̄ = w.
    assert found["geometry/fsi_token"] == pytest.approx(1, abs=1e-6)
    assert found["geometry/fsi"] == pytest.approx(2 * math.acos(float((w / 4).sqrt().sum())) / largest, abs=1e-5)
    assert found["geometry/dispersion_1"] == pytest.approx((2 * math.acos(float((w * w.sqrt()).sum())) / largest) ** 2)
    information = -float((w * w.log()).sum()) / math.log(4)
    assert found["geometry/routing_information"] == pytest.approx(information, abs=1e-6)
    assert found["geometry/fsi_domain"] == pytest.approx(float((w * 2 * torch.arccos(w.sqrt())).sum()), abs=1e-5)
    assert found["geometry/max_violation"] == pytest.approx(float(4 * w.max()) - 1, abs=1e-6)

    found = measured(torch.eye(4)[:1].expand(4, 4), domains, mask)
    assert found["geometry/fsi"] == pytest.approx(1, abs=1e-5)
    for name in ("dispersion_1", "routing_information", "fsi_domain"):
        assert found[f"geometry/{name}"] == pytest.approx(0, abs=1e-5)
    assert found["geometry/max_violation"] == pytest.approx(3)
    assert found["geometry/fhs"] == pytest.approx(math.sqrt(3))
    assert found["geometry/dead_fraction"] == 0.75


def test_two_sources_an_expert_and_equal_shares():
    """By hand in full: 4 equal sources, two of them on each of 2 experts."""
    domains = torch.arange(4).repeat(8)
    found = measured(torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]), domains, torch.ones(32, dtype=torch.bool))
    expected = {
        "fsi": 0.0,
        "dispersion_1": 1.0,
        "routing_information": 1.0,
        "fsi_domain": 2 * math.acos(math.sqrt(0.5)),
        "max_violation": 0.0,
    }
    for name, value in expected.items():
        assert found[f"geometry/{name}"] == pytest.approx(value, abs=1e-5), name
