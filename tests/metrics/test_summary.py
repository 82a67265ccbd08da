"""Names of scalars and of layers, and how layers become one number."""

from __future__ import annotations

import pytest
import torch

import moegeo_router as mg
from moegeo_router.metrics.summary import expert_scalars, flatten, layer_scalars, short_names
from moegeo_router.observe import LayerStatistics


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["model.layers.0.mlp.gate", "model.layers.11.mlp.gate"], ["layer0", "layer11"]),
        (["trunk.blocks.3.ffn.router"], ["layer3"]),
        (["router"], ["router"]),
        (["a", "b"], ["a", "b"]),
        (["encoder.block.0.router", "decoder.block.0.router"], ["encoder", "decoder"]),
        (["layers.0.gate", "layers.0.attention.gate"], ["layers.0.gate", "attention"]),
        ([], []),
    ],
)
def test_short_names(names, short):
    assert short_names(names) == dict(zip(names, short, strict=True))


def routed(seed: int) -> LayerStatistics:
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sums = LayerStatistics.of(logits, logits.topk(2).indices)
    return sums.with_traces(torch.tensor([1.0, 3.0, 0.0, 4.0], dtype=torch.float64))


def test_velocity_is_the_distance_from_the_step_before():
    now, before = routed(0), routed(1)
    assert "fsi_velocity" not in layer_scalars(now)
    assert "fsi_velocity" not in layer_scalars(now, LayerStatistics.zeros(4))
    found = layer_scalars(now, before)["fsi_velocity"]
    assert found == pytest.approx(float(mg.fisher_rao_distance(now.p / 30, before.p / 30)))


def test_alarms_are_those_of_the_worst_layer_and_the_rest_is_averaged():
    layers = {"l.0": {"fsi": 0.25, "fhs": 0.5, "dead_fraction": 0.0}, "l.1": {"fsi": 0.75, "fhs": 1.5}}
    assert flatten(layers) == {"geometry/fsi": 0.5, "geometry/fhs": 1.5, "geometry/dead_fraction": 0.0}
    assert flatten(layers, per_layer=True)["geometry/layer1/fhs"] == 1.5


def test_shares_of_experts():
    found = expert_scalars(routed(0))
    assert [found[f"trace/{e}"] for e in range(4)] == [0.125, 0.375, 0.0, 0.5]
    for name in ("load", "p"):
        assert sum(found[f"{name}/{e}"] for e in range(4)) == pytest.approx(1)
    assert not any(key.startswith("trace") for key in expert_scalars(LayerStatistics.of(torch.zeros(3, 4))))


def test_heterogeneity_is_there_where_the_traces_are():
    scalars = layer_scalars(routed(0))
    assert scalars["fhs"] == pytest.approx(float(mg.fhs(torch.tensor([1.0, 3.0, 0.0, 4.0]))))
    assert "fhs_per_token" in scalars
    assert scalars["starved_fraction"] == 0.25  # all four are chosen, one has no traces
    silent = layer_scalars(routed(0).with_traces(torch.zeros(4, dtype=torch.float64)))
    assert not {"fhs", "fhs_per_token", "starved_fraction"} & silent.keys()
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    unknown = layer_scalars(LayerStatistics.of(logits).with_traces(routed(0).traces))
    assert "fhs" in unknown
    assert not {"fhs_per_token", "starved_fraction"} & unknown.keys()
