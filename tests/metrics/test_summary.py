"""Names of scalars and of layers, and how layers become one number."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import moegeo_router as mg
from moegeo_router.metrics.summary import expert_scalars, flatten, layer_scalars, scalars_of_layers, short_names
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


# --- all layers at once


def tokens_of(seed: int, experts: int, k: int = 2) -> dict[str, torch.Tensor]:
    """One layer's logits, choices, domains and traces; the last expert is rarely chosen, the first one starved."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(60, experts, generator=generator, dtype=torch.float64)
    logits[:, -1] -= 4
    traces = torch.rand(experts, generator=generator, dtype=torch.float64)
    traces[0] = 1e-4
    domains = torch.randint(3, (60,), generator=generator)
    return {"logits": logits, "ids": logits.topk(k).indices, "traces": traces, "domains": domains}


def sums_of(logits, ids=None, traces=None, domains=None) -> LayerStatistics:
    sums = LayerStatistics.of(logits, ids, domains=domains, num_domains=0 if domains is None else 3)
    return sums if traces is None else sums.with_traces(traces)


def by_definition(logits, ids=None, traces=None, domains=None, previous=None) -> dict[str, float]:
    """Every scalar from the tokens themselves, in numpy."""

    def distance(p, q):
        return 2 * np.arccos(np.minimum(np.sqrt(p * q).sum(-1), 1))

    def entropy(p):
        return -np.sum(p * np.log(np.maximum(p, 1e-300)), -1)

    def spread(x):
        return np.std(x) / np.mean(x)

    z, experts = logits.numpy(), logits.shape[1]
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    mean, u, largest = p.mean(0), np.full(experts, 1 / experts), 2 * math.acos(experts**-0.5)
    ordered = np.sort(p, -1)
    found = {
        "fsi": distance(mean, u) / largest,
        "fsi_token": distance(p, u).mean() / largest,
        "dispersion_1": (2 * np.arccos(np.sum(np.sqrt(mean) * np.sqrt(p).mean(0))) / largest) ** 2,
        "routing_information": (entropy(mean) - entropy(p).mean()) / math.log(experts),
        "token_entropy": entropy(p).mean(),
        "margin": (ordered[:, -1] - ordered[:, -2]).mean(),
        "z_loss": (np.log(np.exp(z).sum(-1)) ** 2).mean(),
        "non_finite": 0.0,
    }
    if previous is not None:
        found["fsi_velocity"] = distance(mean, previous.softmax(-1).mean(0).numpy())
    if ids is not None:
        n = np.bincount(ids.flatten().numpy(), minlength=experts)
        f = n / n.sum()
        found |= {
            "fsi_load": distance(f, u) / (2 * math.acos(math.sqrt(ids.shape[1] / experts))),
            "max_violation": f.max() * experts - 1,
            "load_cv": spread(n),
            "load_gini": np.abs(f[:, None] - f).sum() / (2 * experts),
            "load_entropy": entropy(f) / math.log(experts),
            "dead_fraction": np.mean(f < 0.1 / experts),
        }
    if traces is not None:
        t = traces.numpy()
        found["fhs"] = spread(t)
    if ids is not None and traces is not None:
        found["fhs_per_token"] = spread((t / np.maximum(n, 1))[n > 0])
        found["starved_fraction"] = np.mean((f >= 0.5 / experts) & (t / t.sum() < 0.1 / experts))
    if domains is not None:
        of = [p[domains.numpy() == d] for d in range(3)]
        found["fsi_domain"] = sum(len(q) / len(p) * distance(q.mean(0), mean) for q in of)
    return found


def test_all_layers_at_once_are_each_by_its_definition():
    """Layers that differ in size, in k and in what is known of them, several of each kind."""
    layers, before, expected = {}, {}, {}
    kinds = [("logits",), ("logits", "ids"), ("logits", "traces"), ("logits", "ids", "traces")]
    kinds += [("logits", "domains"), ("logits", "ids", "traces", "domains")]
    for seed in range(48):
        experts, k, known = (4, 7)[seed % 2], (1, 2)[seed % 3 == 0], kinds[seed % len(kinds)]
        name, given = (
            f"layer{(seed * 7) % 48}",
            {key: v for key, v in tokens_of(seed, experts, k).items() if key in known},
        )
        layers[name], earlier = sums_of(**given), tokens_of(100 + seed, experts)["logits"]
        if seed % 4:
            before[name] = sums_of(earlier)
        expected[name] = by_definition(**given, previous=earlier if seed % 4 else None)
    found = scalars_of_layers(layers, before)
    assert list(found) == list(layers)
    for name, scalars in expected.items():
        assert found[name] == pytest.approx(scalars, rel=1e-9, abs=1e-7), name
        assert found[name] == pytest.approx(layer_scalars(layers[name], before.get(name)), rel=1e-12, abs=1e-15)
        assert all(type(value) is float for value in found[name].values())
    assert any(scalars.get("starved_fraction") for scalars in expected.values())
    assert any(scalars.get("dead_fraction") for scalars in expected.values())


def test_layers_without_tokens_are_empty_and_broken_ones_say_so():
    whole = tokens_of(0, 4)
    broken = LayerStatistics.of(torch.full((5, 4), math.nan), torch.zeros(5, 2, dtype=torch.long))
    partly = whole["logits"].clone()
    partly[:15, 1] = math.inf
    layers = {
        "broken": broken,
        "whole": sums_of(**whole),
        "silent": LayerStatistics.zeros(4),
        "partly": sums_of(partly),
        "one": LayerStatistics.of(torch.randn(5, 1)),
    }
    found = scalars_of_layers(layers, {name: LayerStatistics.zeros(4) for name in layers})
    assert found["broken"] == {"non_finite": 1.0}
    assert found["silent"] == {}
    assert found["whole"] == pytest.approx(by_definition(**whole), rel=1e-9, abs=1e-7)
    assert found["partly"] == pytest.approx(by_definition(partly[15:]) | {"non_finite": 0.25}, rel=1e-9, abs=1e-7)
    assert {found["one"][name] for name in ("fsi", "fsi_token", "dispersion_1", "routing_information")} == {0}
    assert scalars_of_layers({}, {}) == {}


def test_traces_that_are_broken_are_seen_in_their_layer_alone():
    layers = {name: sums_of(**tokens_of(seed, 4)) for seed, name in enumerate(("a", "b"))}
    layers["a"] = layers["a"].with_traces(torch.full((4,), math.nan, dtype=torch.float64))
    found = scalars_of_layers(layers, {})
    assert all(math.isnan(found["a"][name]) for name in ("fhs", "fhs_per_token", "starved_fraction"))
    assert found["b"] == layer_scalars(layers["b"])
