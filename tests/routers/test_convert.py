"""``geometrize`` and ``export`` on toy models of several code bases' shapes."""

from __future__ import annotations

import copy
import math

import geoopt
import pytest
import torch
from geoopt.optim import RiemannianAdam
from torch import nn

from moegeo_router import GeometricRouter, export, find_routers, geometrize
from moegeo_router.routers import manifold_of

from .toy_models import D, E, ListMoE, Model, SwitchRouter, ToyTopKRouter

NAMES = ["layers.0.gate", "layers.2.gate", "layers.3.mlp", "layers.4.routing"]
WEIGHTS = ["layers.0.gate.weight", "layers.2.gate.weight", "layers.3.mlp.weight", "layers.4.routing.classifier.weight"]


def snapshot(model):
    """Everything that must not change: identities, values, classes, flags, keys."""
    return {
        "modules": [(name, id(m), type(m)) for name, m in model.named_modules()],
        "parameters": [(n, id(p), p.data_ptr(), p.dtype, p.requires_grad) for n, p in model.named_parameters()],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
    }


def assert_unchanged(before, model):
    after = snapshot(model)
    assert after["modules"] == before["modules"]
    assert after["parameters"] == before["parameters"]
    assert list(after["values"]) == list(before["values"])
    assert all(torch.equal(after["values"][name], value) for name, value in before["values"].items())


def tagged(model):
    return [name for name, p in model.named_parameters() if manifold_of(p) is not None]


@pytest.mark.parametrize("manifold", ["polar", "euclidean"])
def test_geometrize_and_export_change_nothing_but_the_tag(manifold):
    model, x = Model(), torch.randn(5, D)
    before, expected = snapshot(model), model(x)
    sites = geometrize(model, manifold)
    assert [site.name for site in sites] == NAMES
    assert [(site.num_experts, site.in_features) for site in sites] == [(E, D)] * 4
    assert tagged(model) == WEIGHTS
    assert all(isinstance(site.weight, geoopt.ManifoldParameter) for site in sites)
    assert torch.equal(model(x), expected)
    assert_unchanged(before, model)
    assert export(model) is model
    assert tagged(model) == []
    assert all(type(p) is nn.Parameter and not hasattr(p, "manifold") for p in model.parameters())
    assert torch.equal(model(x), expected)
    assert_unchanged(before, model)


def test_it_is_in_place_for_an_optimizer_made_before():
    model, x = Model(), torch.randn(5, D)
    optimizer = RiemannianAdam(model.parameters(), lr=0.1)
    sites = geometrize(model)
    before = sites[0].weight.detach().clone()
    model(x).square().sum().backward()
    g = sites[0].weight.grad.clone()
    optimizer.step()
    # First Adam step of PolarRows: direction r²g / √(r⁴g²/r²) per row, by hand, then the exponential map.
    r = before.norm(dim=-1, keepdim=True)
    rgrad = r.square() * g
    u = -0.1 * rgrad / (rgrad.norm(dim=-1, keepdim=True) / r + 1e-8)
    mu = before / r
    a = (mu * u).sum(-1, keepdim=True) / r
    t = u / r - a * mu
    h = t.norm(dim=-1, keepdim=True)
    expected = r * a.exp() * (h.cos() * mu + h.sin() / h * t)
    torch.testing.assert_close(sites[0].weight.detach(), expected, rtol=1e-4, atol=1e-5)


def test_an_adamw_made_before_still_steps_the_weight():
    model = ListMoE()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    geometrize(model)
    before = model.gate.weight.detach().clone()
    model(torch.randn(5, D)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.gate.weight, before)


def test_bf16_frozen_and_eval_stay():
    model = ListMoE(bias=True, dtype=torch.bfloat16).eval()
    model.gate.weight.requires_grad_(False)
    before = snapshot(model)
    geometrize(model)
    assert_unchanged(before, model)
    assert not model.gate.training
    assert tagged(model) == ["gate.weight"]
    export(model)
    assert_unchanged(before, model)


def test_tied_weights_stay_tied():
    model = nn.ModuleList([ListMoE(), ListMoE()])
    model[1].gate.weight = model[0].gate.weight
    assert len(geometrize(model)) == 2
    assert model[0].gate.weight is model[1].gate.weight
    assert manifold_of(model[1].gate.weight) is not None
    export(model)
    assert model[0].gate.weight is model[1].gate.weight
    assert type(model[0].gate.weight) is nn.Parameter


def test_hooks_and_copies_survive():
    model, x, seen = ListMoE(), torch.randn(5, D), []
    model.gate.register_forward_hook(lambda *_: seen.append(1))
    geometrize(model)
    twin = copy.deepcopy(model)
    assert tagged(twin) == ["gate.weight"]
    assert twin.gate.weight is not model.gate.weight
    assert torch.equal(twin(x), model(x))
    assert len(seen) == 2


@pytest.mark.parametrize("manifold", ["polar", "euclidean", "orthonormal"])
def test_twice_is_once(manifold):
    model = Model()
    geometrize(model, manifold, allow_change=True)
    before, manifolds = snapshot(model), [site.weight.manifold for site in find_routers(model)]
    geometrize(model, manifold)
    assert_unchanged(before, model)
    assert [site.weight.manifold for site in find_routers(model)] == manifolds


def test_twice_is_once_for_a_cosine_router():
    model = ListMoE()
    geometrize(model, "sphere", allow_change=True)
    before = snapshot(model)
    geometrize(model, "sphere")
    assert_unchanged(before, model)


def test_a_second_manifold_is_refused():
    model = Model()
    geometrize(model, "polar")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"router layers\.0\.gate is on Polar rows already: export\(model\) first"):
        geometrize(model, "euclidean")
    assert_unchanged(before, model)
    export(model)
    geometrize(model, "euclidean")


@pytest.mark.parametrize(
    ("manifold", "allow_change", "message"),
    [
        ("orthonormal", True, r"router 1\.gate: orthonormal rows need num_experts <= in_features, got 4 > 3$"),
        ("orthonormal", False, r"orthonormal rows change the function of router 0\.gate: pass allow_change=True"),
        ("sphere", False, r"sphere rows change the function of router 0\.gate: pass allow_change=True"),
        ("sphere", True, r"router 2 is a ToyTopKRouter: only nn\.Linear routers can become cosine routers"),
        ("cube", True, "manifold must be 'polar', 'sphere', 'orthonormal' or 'euclidean', got 'cube'"),
    ],
)
def test_all_or_nothing(manifold, allow_change, message):
    narrow = ListMoE()
    narrow.gate = nn.Linear(3, E, bias=False)
    model = nn.ModuleList([ListMoE(), narrow, ToyTopKRouter()])
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        geometrize(model, manifold, allow_change=allow_change)
    assert tagged(model) == []
    assert_unchanged(before, model)


def test_orthonormal_rows_are_the_nearest():
    model = ListMoE()
    weight = model.gate.weight
    u, _, vt = torch.linalg.svd(weight.detach(), full_matrices=False)
    geometrize(model, "orthonormal", allow_change=True)
    assert model.gate.weight is weight
    torch.testing.assert_close(weight.detach(), u @ vt, rtol=1e-4, atol=1e-5)
    assert type(model.gate) is nn.Linear
    after, x = weight.detach().clone(), torch.randn(5, D)
    expected = model(x)
    export(model)
    assert torch.equal(weight, after)
    assert torch.equal(model(x), expected)


def test_cosine_router_in_place_and_back():
    model = ListMoE(bias=True)
    gate, weight, bias = model.gate, model.gate.weight, model.gate.bias
    rows, size = weight.detach().clone(), weight.detach().norm(dim=-1).mean().item()
    geometrize(model, "sphere", allow_change=True)
    assert model.gate is gate
    assert type(gate) is GeometricRouter
    assert gate.weight is weight
    assert gate.bias is bias
    assert list(gate.state_dict()) == ["weight", "bias", "temperature_logit"]
    x = torch.randn(9, D)
    cosine = torch.nn.functional.cosine_similarity(x[:, None], rows[None], dim=-1)
    expected = cosine * math.sqrt(D) * size + bias
    torch.testing.assert_close(gate(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"routers gate normalise their input, nn\.Linear does not: pass allow_change"):
        export(model)
    assert type(gate) is GeometricRouter
    x = x / x.norm(dim=-1, keepdim=True) * math.sqrt(D)
    expected = gate(x)
    export(model, allow_change=True)
    assert type(gate) is nn.Linear
    assert gate.weight is weight
    assert list(gate.state_dict()) == ["weight", "bias"]
    assert vars(gate).keys() == vars(nn.Linear(D, E)).keys()
    torch.testing.assert_close(gate(x), expected, rtol=1e-4, atol=1e-5)


def test_export_makes_geometric_routers_linear():
    model = ListMoE()
    model.gate = GeometricRouter(D, E)
    x, weight = torch.randn(5, D), model.gate.weight
    expected = model(x)
    export(model)
    assert type(model.gate) is nn.Linear
    assert model.gate.weight is weight
    assert type(weight) is nn.Parameter
    assert torch.equal(model(x), expected)
    assert repr(model.gate) == repr(nn.Linear(D, E))


def test_export_leaves_foreign_manifold_parameters_alone():
    model = ListMoE()
    model.table = geoopt.ManifoldParameter(torch.eye(3), manifold=geoopt.Sphere())
    geometrize(model)
    export(model)
    assert tagged(model) == []
    assert type(model.table) is geoopt.ManifoldParameter
    assert isinstance(model.table.manifold, geoopt.Sphere)
    plain = nn.Linear(2, 2)
    assert export(plain) is plain


def stepped_with_zero_rows():
    torch.manual_seed(1)
    model, x = nn.ModuleList([ListMoE(), ListMoE()]), torch.randn(5, D)
    for layer in model:
        layer.gate.weight.data[1:3] = 0
    expected = model[0](x)
    with pytest.warns(UserWarning, match=r"router [01]\.gate: 2 of 4 rows are zero") as record:
        geometrize(model)
    assert len(record) == 2
    assert record[0].filename == __file__
    assert torch.equal(model[0](x), expected)
    assert (model[0].gate.weight[1:3] == 0).all()
    optimizer = RiemannianAdam(model.parameters(), lr=1e-3)
    sum(layer(x).square().sum() for layer in model).backward()
    optimizer.step()
    return [layer.gate.weight.detach().clone() for layer in model]


def test_zero_rows_keep_the_function_and_move_at_the_first_step():
    first, second = stepped_with_zero_rows()
    again, _ = stepped_with_zero_rows()
    assert torch.equal(first, again)
    norms = first[1:3].norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, 0.1 / math.sqrt(3)), rtol=0.01, atol=0)
    # Two rows, and two routers, start in different directions: no ties.
    directions = torch.cat([first[1:3], second[1:3]])
    cosines = torch.nn.functional.cosine_similarity(directions[:, None], directions[None], dim=-1)
    assert cosines.fill_diagonal_(0).abs().max() < 0.99


def test_zero_rows_are_refused_on_the_sphere_and_silent_elsewhere():
    model = ListMoE()
    model.gate.weight.data[0] = 0
    before = snapshot(model)
    with pytest.raises(ValueError, match="router gate: 1 of 4 rows are zero and have no direction"):
        geometrize(model, "sphere", allow_change=True)
    assert_unchanged(before, model)
    geometrize(model, "euclidean")
    assert_unchanged(before, model)


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("layers.?.gate", ["layers.0.gate", "layers.1.gate", "layers.2.gate"]),
        ("layers.2*gate", ["layers.2.gate"]),
        ("layers.0.exp*gate", [f"layers.0.experts.{e}.gate" for e in range(E)]),  # a star matches dots
        ("layers.[02].gate", ["layers.0.gate", "layers.2.gate"]),
        (ToyTopKRouter, ["layers.3.mlp"]),
        ((SwitchRouter, "layers.2.gate"), ["layers.2.gate", "layers.4.routing"]),
        ([ToyTopKRouter, SwitchRouter], ["layers.3.mlp", "layers.4.routing"]),
        (lambda name, module: name.endswith("shared_expert_gate"), ["layers.0.shared_expert_gate"]),
    ],
)
def test_selectors(select, expected):
    model = Model()
    sites = geometrize(model, select=select)
    assert [site.name for site in sites] == expected
    assert len(tagged(model)) == len(expected)


def test_a_module_selects_itself():
    model = Model()
    sites = geometrize(model, select=model.layers[4].routing)
    assert [(site.name, site.module, site.projection) for site in sites] == [
        ("layers.4.routing", model.layers[4].routing, model.layers[4].routing.classifier)
    ]
    assert [site.name for site in find_routers(model.layers[4], [model.layers[4].routing])] == ["routing"]


def tied_pair():
    first, second = nn.Linear(8, 4), nn.Linear(8, 4)
    second.weight = first.weight
    return first, second, nn.ModuleDict({"a": nn.ModuleDict({"router": first}), "b": nn.ModuleDict({"router": second})})


def test_tied_routers_become_cosine_routers_with_one_temperature():
    first, second, model = tied_pair()
    geometrize(model, "sphere", allow_change=True)
    assert first.weight is second.weight
    assert first.temperature_logit is second.temperature_logit


def test_tied_cosine_routers_are_exported_once():
    first, second, model = tied_pair()
    geometrize(model, "sphere", allow_change=True)
    with torch.no_grad():
        first.temperature_logit.add_(1.0)
    x = nn.functional.normalize(torch.randn(5, 8), dim=-1) * math.sqrt(8)
    expected = first(x), second(x)
    export(model, allow_change=True)
    assert first.weight is second.weight
    torch.testing.assert_close((first(x), second(x)), expected)


def test_export_refuses_a_forward_it_would_lose():
    class Shifted(GeometricRouter):
        def forward(self, x):
            return super().forward(x) + 1

    model = nn.ModuleDict({"plain": GeometricRouter(8, 4), "shifted": Shifted(8, 4)})
    with pytest.raises(ValueError, match="router shifted: Shifted has a forward of its own"):
        export(model)
    assert type(model["plain"]) is GeometricRouter


def test_non_finite_weights_are_refused():
    model = nn.ModuleDict({"router": nn.Linear(8, 4)})
    with torch.no_grad():
        model["router"].weight[1, 2] = math.nan
    with pytest.raises(ValueError, match="router router: the weight holds NaN or inf"):
        geometrize(model)
    assert type(model["router"].weight) is nn.Parameter


@pytest.mark.parametrize("manifold", ["polar", "sphere", "orthonormal", "euclidean"])
def test_geometrize_again_repairs_a_lost_tag(manifold):
    model = nn.ModuleDict({"router": GeometricRouter(8, 4, manifold=manifold)})
    values = model["router"].weight.detach().clone()
    model["router"].weight = nn.Parameter(values.clone())  # as a sharding engine does
    geometrize(model, manifold)
    assert manifold_of(model["router"].weight) is not None
    assert torch.equal(model["router"].weight, values)
    model["router"].weight = nn.Parameter(values.clone())
    other = "polar" if manifold != "polar" else "euclidean"
    with pytest.raises(ValueError, match=f"router router is on {manifold} already"):
        geometrize(model, other)
