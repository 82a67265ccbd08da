"""What counts as a router, and what the errors of selection say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moegeo_router import GeometricRouter, RouterFamily, find_routers, geometrize

D, E = 6, 4


def block(**children):
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def experts(count=E):
    return nn.ModuleList(nn.Linear(D, D) for _ in range(count))


def stacked(*shape):
    module = nn.Module()
    module.w = nn.Parameter(torch.randn(*shape))
    return module


def of_class(name, **children):
    """A module whose class has the given name."""
    module = type(name, (nn.Module,), {})()
    for child_name, child in children.items():
        setattr(module, child_name, child)
    return module


def linear(outputs=E):
    return nn.Linear(D, outputs)


ROUTERS = {
    "gate beside a list": (block(gate=linear(), experts=experts()), ["gate"]),
    "gate beside a dict": (block(gate=linear(), experts=nn.ModuleDict({str(e): linear() for e in range(E)})), ["gate"]),
    "gate beside a stack": (block(gate=linear(), experts=stacked(E, D, D)), ["gate"]),
    "gate beside own stack": (block(gate=linear(), w_experts=nn.Parameter(torch.randn(E, D, D))), ["gate"]),
    "gate beside a list in a module": (block(gate=linear(), local_experts=block(items=experts())), ["gate"]),
    "gate of one expert": (block(gate=linear(1), experts=experts(1)), ["gate"]),
    "router": (block(router=linear()), ["router"]),
    "wg": (block(gate=block(wg=linear())), ["gate.wg"]),
    "TopKGate with wg": (block(gate=of_class("TopKGate", wg=linear())), ["gate"]),
    "JetMoe": (block(router=of_class("JetMoeTopKGating", layer=linear(), top_k=2)), ["router"]),
    "Dbrx": (block(router=of_class("DbrxRouter", layer=linear())), ["router"]),
    "Gemma": (block(anything=of_class("GemmaTextRouter", norm=nn.LayerNorm(D), proj=linear())), ["anything"]),
    "DeepSeek": (block(mlp=of_class("MoEGate", weight=nn.Parameter(torch.randn(E, D)))), ["mlp"]),
    "ours": (block(some_name=GeometricRouter(D, E)), ["some_name"]),
}
NOT_ROUTERS = {
    "gated MLP": block(gate=linear(), up=linear(), down=linear()),
    "gate beside other experts": block(gate=linear(D), experts=experts(E)),
    "shared expert gate": block(shared_expert_gate=linear(1), shared_expert=block(gate=linear(), up=linear())),
    "router of one output": block(router=linear(1)),
    "1-D weight": block(scale=of_class("RouterScale", weight=nn.Parameter(torch.randn(E)))),
    "gate_proj": block(gate_proj=linear(), experts=experts()),
    "the model itself": linear(),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_found(name):
    model, expected = ROUTERS[name]
    assert [site.name for site in find_routers(model)] == expected
    assert find_routers(model)[0].weight.ndim == 2


@pytest.mark.parametrize("name", NOT_ROUTERS)
def test_not_found(name):
    with pytest.raises(ValueError, match="no router found"):
        find_routers(NOT_ROUTERS[name])


def test_finding_none_says_what_was_looked_for_and_what_is_there():
    model = block(**{f"layer{i}": nn.Linear(3, i + 2) for i in range(10)})
    with pytest.raises(ValueError, match="no router found") as error:
        geometrize(model)
    text = str(error.value)
    assert "classes called *Router*" in text
    assert "nn.Linear called router or wg, or called gate beside as many experts" in text
    assert "layer0 (3 -> 2)" in text
    assert "layer7 (3 -> 9) and 2 more" in text
    assert "layer8" not in text
    assert "\n" not in text
    with pytest.raises(ValueError, match=r"looked for select='\*\.gate'\. Its linear layers: none"):
        geometrize(nn.Sequential(nn.ReLU()), select="*.gate")
    with pytest.raises(ValueError, match=r"looked for select=\[\]"):
        geometrize(model, select=[])


def test_finding_none_says_what_a_router_with_several_linear_layers_needs():
    """As makeMoE's, whose noise has a layer of its own, as wide as the experts."""
    noisy = of_class("NoisyTopkRouter", topkroute_linear=linear(), noise_linear=linear())
    model = nn.Sequential(block(router=noisy, experts=experts()))
    with pytest.raises(ValueError, match=r"0\.router \(NoisyTopkRouter\) has several linear layers") as error:
        find_routers(model)
    assert "(topkroute_linear, noise_linear)" in str(error.value)
    assert "select=mg.RouterFamily(router='NoisyTopkRouter', projection='topkroute_linear')" in str(error.value)
    family = RouterFamily(router="NoisyTopkRouter", projection="topkroute_linear")
    assert find_routers(model, family)[0].projection is noisy.topkroute_linear


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (block(w_gate=nn.Parameter(torch.randn(D, E)), experts=experts()), r"w_gate \(6, 4\)"),
        (block(moe=of_class("MyRouter", kernel=nn.Parameter(torch.randn(D, E)))), r"moe\.kernel \(6, 4\)"),
    ],
)
def test_finding_none_says_what_a_bare_parameter_needs(model, name):
    with pytest.raises(ValueError, match=rf"{name} is a bare parameter: .* put mg\.GeometricRouter\("):
        find_routers(model)


def test_a_gated_mlp_is_no_bare_router():
    model = block(mlp=block(w_gate=nn.Parameter(torch.randn(D, 3 * D)), experts=experts()))
    with pytest.raises(ValueError, match=r'my_gate"$'):
        find_routers(model)


def test_every_selector_must_select():
    model = block(gate=linear(), experts=experts())
    with pytest.raises(ValueError, match=r"select='layers\.\*' selects no router of this model"):
        find_routers(model, ["gate", "layers.*"])


def test_selectors_of_another_type():
    with pytest.raises(
        TypeError, match="select takes name patterns, module types, modules, predicates or families, got 3"
    ):
        find_routers(linear(), 3)
    with pytest.raises(TypeError, match="got None"):
        find_routers(linear(), ["x", None])


def test_a_selected_module_must_have_a_weight():
    with pytest.raises(ValueError, match=r"act \(ReLU\) has no \(E, D\) weight, nor one linear layer"):
        find_routers(block(act=nn.ReLU()), "act")
    with pytest.raises(ValueError, match="weight of router gate is on the meta device: materialise the model first"):
        find_routers(block(gate=nn.Linear(D, E, device="meta"), experts=experts()))
    integers = of_class("HashRouter", weight=nn.Parameter(torch.zeros(E, D, dtype=torch.int64), requires_grad=False))
    with pytest.raises(ValueError, match="weight of router hash must be a floating point"):
        find_routers(block(hash=integers))


def test_what_is_inside_a_router_is_not_another_one():
    outer = of_class("TokenChoiceTopKRouter", gate=linear())
    assert [site.name for site in find_routers(block(router=outer))] == ["router"]
    assert [site.name for site in find_routers(outer)] == [""]
    # A name that merely starts alike is not inside.
    twins = block(router=linear(), router2=of_class("SecondRouter", layer=linear()))
    assert [site.name for site in find_routers(twins)] == ["router", "router2"]


def test_the_linear_layer_of_a_router_is_found_whatever_its_name():
    gate = of_class("MyRouter", linear=nn.Linear(D, E))
    assert find_routers(block(select=gate))[0].projection is gate.linear
    assert find_routers(block(anything=gate), "anything")[0].projection is gate.linear


def test_of_several_linear_layers_the_one_as_wide_as_the_experts_is_taken_or_none():
    gate = of_class("MLPRouter", proj=nn.Linear(D, 32), out=nn.Linear(32, E))
    (site,) = find_routers(block(gate=gate, experts=experts()))
    assert site.projection is gate.out
    with pytest.raises(ValueError, match="no router found"):
        find_routers(block(gate=gate))
    with pytest.raises(ValueError, match=r"found: proj, out\); select the layer itself"):
        find_routers(block(gate=gate), "gate")
