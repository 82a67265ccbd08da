"""Fine-tuning with PEFT: routers that are frozen, copied, or trained by adapters, in either order of the wrapping."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.routers.experts import block_of, find_experts
from moegeo_router.routers.tag import manifold_of
from tests.support.finetuning import (
    ALPHA,
    FAMILIES,
    RANK,
    adamw,
    base_of,
    config,
    converted_first,
    converted_last,
    layers_of,
    lora,
    same,
    train,
    values,
)
from tests.support.tiny_transformers import batch, build, loss_of, run
from tests.support.witness import fsi_of, hooks_of, p_of

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    # PEFT 0.21.2 asks transformers 5.23 by a name that is deprecated there.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def fsi(model: Any, place: str, weight: Tensor, bias: Tensor | None = None, scores: str = "softmax") -> float:
    """Return the FSI of a layer from the inputs of the module at a place and the weight that is in force there."""
    seen: list[Tensor] = []
    hook = model.get_submodule(place).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    run(model)
    hook.remove()
    x_TD = seen[0].detach().reshape(-1, weight.shape[1]).double()
    z_TE = x_TD @ weight.detach().double().T + (0 if bias is None else bias.detach().double())
    kept = batch(base_of(model))["attention_mask"].reshape(-1) > 0
    return fsi_of(p_of(z_TE[kept], scores).mean(dim=0))


def effective(layer: Any, base: Tensor) -> Tensor:
    """Return ``W + α/r B A`` from the matrices themselves."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return base.double() + ALPHA / RANK * b.double() @ a.double()


ORDERS = [converted_first, converted_last]


# --- LoRA on the attention: the routers rest ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("wrap", "of_base"), [(converted_first, False), (converted_last, True)])
def test_routers_that_peft_freezes_are_watched_and_nothing_changes(family, wrap, of_base):
    plain = lora(build(family))
    train(plain, adamw(plain))
    for trained in (True, False):  # whether the optimizer holds the frozen weights or not
        model = wrap(build(family))
        optimizer = adamw(model, trained)
        options = config(regularizers=None)
        geometry = mg.attach(base_of(model) if of_base else model, optimizer, options)
        assert list(geometry.layers) == layers_of(family)
        train(model, optimizer, geometry)
        assert same(values(model), values(plain))
        metrics = geometry.metrics()
        assert metrics["geometry/fhs"] > 0
        assert "geometry/movement" not in metrics
        geometry.detach()


# --- modules_to_save: PEFT trains a copy of the router ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wrap", ORDERS)
def test_the_copy_in_use_is_the_router(family, wrap):
    model = wrap(build(family), modules_to_save=[FAMILIES[family]])
    sites = mg.find_routers(model)
    assert [site.name for site in sites] == layers_of(family)
    for site in sites:
        wrapper = base_of(model).get_submodule(site.name)
        assert site.module is wrapper.modules_to_save["default"]
        assert manifold_of(site.weight) is not None
        assert site.weight.requires_grad
        block, experts = block_of(model, site), find_experts(model, site)
        assert block is not None
        assert block[1] is base_of(model).get_submodule(site.name.rpartition(".")[0])
        assert experts is not None
        assert type(experts.container).__name__.endswith("Experts")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("wrap", "of_base"), [(converted_first, False), (converted_last, True)])
def test_copies_are_trained_as_the_routers_of_a_model_without_peft(family, wrap, of_base):
    """LoRA frozen at 0 leaves the same model: weights and metrics agree bit for bit."""
    stock = build(family)
    mg.geometrize(stock)
    leaf = FAMILIES[family]
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_(f".{leaf}." in name)
    model = wrap(build(family), modules_to_save=[leaf], init_lora_weights=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f".{leaf}.modules_to_save." in name)
    before = values(model)
    found = []
    for each in (stock, model):
        optimizer = adamw(each)
        geometry = mg.attach(base_of(each) if each is model and of_base else each, optimizer, config(regularizers=None))
        train(each, optimizer, geometry)
        found.append(geometry.metrics())
        geometry.detach()
    assert found[0] == found[1]
    assert 0 < found[1]["geometry/movement"] <= 0.015 * math.sqrt(2)
    for site in mg.find_routers(model):
        assert torch.equal(site.weight, stock.get_parameter(f"{site.name}.weight"))
    moved = {name for name, value in values(model).items() if not torch.equal(value, before[name])}
    assert moved
    assert all(f".{leaf}.modules_to_save.default." in name for name in moved)


def test_a_copied_block_has_its_router_and_its_experts_in_it():
    model = converted_last(build("GptOss"), modules_to_save=["mlp"])
    sites = mg.find_routers(model)
    assert [site.name for site in sites] == layers_of("GptOss")
    copied = base_of(model).get_submodule("model.layers.0.mlp").modules_to_save["default"]
    assert sites[0].module is copied.router
    assert find_experts(model, sites[0]).container is copied.experts  # type: ignore[union-attr]
    optimizer = adamw(model)
    geometry = mg.attach(model, optimizer, config())
    train(model, optimizer)
    assert geometry.metrics()["geometry/fhs"] > 0


def test_selectors_go_by_the_names_without_peft():
    model = converted_last(build("Mixtral"), modules_to_save=["gate"])
    names = ["model.layers.1.mlp.gate"]
    wrapper = base_of(model).model.layers[1].mlp.gate
    for select in (names[0], wrapper, wrapper.modules_to_save["default"], lambda name, _: name in names):
        assert [site.name for site in mg.find_routers(model, select)] == names


# --- adapters on the routers: the weight in force is W + BA ---


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Mixtral", {"target_parameters": ["mlp.gate.weight"]}),
        ("GptOss", {"target_parameters": ["router.weight"]}),
        ("DeepseekV3", {"target_parameters": ["mlp.gate.weight"]}),
        ("Phimoe", {"target_parameters": ["router.weight"]}),
        ("Llama4Text", {"target_parameters": ["router.weight"]}),
        ("HunYuanMoEV1", {"target_modules": ["wg"]}),
        ("Dbrx", {"target_modules": ["router.layer"]}),
    ],
)
@pytest.mark.parametrize("wrap", ORDERS)
def test_adapted_routers_are_watched_as_they_are(family, options, wrap):
    model = wrap(build(family), **options)
    sites = mg.find_routers(model)
    assert sites
    assert all(site.adapted and not site.frozen for site in sites)
    geometry = mg.attach(model, config=config(controller=None))
    run(model).float().square().mean().backward()
    metrics = geometry.metrics()
    geometry.detach()
    off = []
    for number, site in enumerate(sites):
        place = next(n for n, m in model.named_modules() if m is site.projection)
        scores = "sigmoid" if family in ("DeepseekV3", "Llama4Text") else "softmax"
        bias = getattr(site.projection, "bias", None)
        layer = f"layer{number}" if len(sites) > 1 else "layer1"
        found = metrics[f"geometry/{layer}/fsi"]
        weight = effective(site.adapter, site.weight)
        assert found == pytest.approx(fsi(model, place, weight, bias, scores), rel=1e-4)
        off.append(abs(found / fsi(model, place, site.weight, bias, scores) - 1))
    assert max(off) > 0.01  # the adapter is no small thing: the weight alone says something else


@pytest.mark.parametrize(("family", "leaf"), [("Mixtral", "mlp.gate"), ("GptOss", "router")])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "all"])
def test_adapters_of_routers_are_stepped_by_the_optimizer_alone(family, leaf, trained, recwarn):
    options = {"target_parameters": [f"{leaf}.weight"]}
    plain = lora(build(family), **options)
    train(plain, adamw(plain))
    model = converted_last(build(family), **options)
    optimizer = adamw(model, trained)
    recwarn.clear()
    geometry = mg.attach(model, optimizer, config())
    assert geometry._stepped == []
    train(model, optimizer)
    said = [str(w.message) for w in recwarn if "adapters (LoRA)" in str(w.message)]
    assert len(said) == len(recwarn) == 1
    assert all(name in said[0] for name in layers_of(family))
    assert same(values(model), values(plain))
    geometry.detach()


@pytest.mark.filterwarnings("ignore:the routers .* are trained by adapters")
def test_routers_beside_adapted_ones_are_stepped():
    model = converted_last(build("Mixtral"), target_parameters=["layers.1.mlp.gate.weight"])
    first, second = mg.find_routers(model)
    first.weight.requires_grad_(True)
    before = [first.weight.detach().clone(), second.weight.detach().clone()]
    optimizer = adamw(model)
    geometry = mg.attach(model, optimizer, config())
    train(model, optimizer)
    assert 0 < geometry.metrics()["geometry/layer0/movement"] <= 0.015 * math.sqrt(2)
    assert not torch.equal(first.weight, before[0])
    assert torch.equal(second.weight, before[1])


class Scorer(nn.Module):
    """A router that shows scores only, with its linear layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).softmax(dim=-1)


def test_logits_that_a_router_hides_are_those_of_the_adapter_too():
    torch.manual_seed(0)
    model = lora(nn.Sequential(Scorer()), target_modules=["proj"])
    (site,) = mg.find_routers(model, "0")
    geometry = mg.attach(model, config=config(select="0", top_k=2, fisher=None))
    x = torch.randn(64, 8)
    model(x).square().mean().backward()
    logits = x.double() @ effective(site.adapter, site.weight).T + site.projection.bias.double()
    expected = fsi_of(logits.softmax(-1).mean(dim=0).detach())
    assert geometry.metrics()["geometry/fsi"] == pytest.approx(expected, rel=1e-5)
    geometry.detach()
    with pytest.raises(ValueError, match=r"router 0 has an adapter \(LoRA\): it cannot become a cosine router"):
        mg.geometrize(model, "sphere", select="0", allow_change=True)


def test_tokens_that_peft_puts_in_front_count_as_the_model_sees_them():
    virtual = 5
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual)
    model = peft.get_peft_model(build("Mixtral"), prompts).train()
    geometry = mg.attach(model, config=config())
    run(model).square().mean().backward()
    sums = geometry._watch.window.close(failed=False)
    kept = batch(base_of(model))["attention_mask"]
    assert float(sums.layers[geometry.layers[0]].tokens) == int(kept.sum()) + virtual * len(kept)
    geometry.detach()


# --- adapters on the experts ---


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("fisher", ["outputs", "parameters"])
def test_traces_of_experts_with_adapters_are_those_of_the_merged_experts(family, fisher):
    model = converted_last(build(family), target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    merged = copy.deepcopy(model).merge_and_unload().train()
    merged.requires_grad_(True)
    found = []
    for each in (model, merged):
        geometry = mg.attach(each, config=config(fisher=fisher, per_expert=True))
        loss_of(run(each)).backward()
        found.append(geometry.metrics())
        geometry.detach()
    assert found[0]["geometry/layer0/fhs"] > 0
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-6)


def test_gradients_of_frozen_experts_are_not_asked_for():
    model = converted_last(build("Mixtral"), target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    before = hooks_of(model)
    with pytest.raises(ValueError, match=r"experts, and model\.layers\.0\.mlp\.experts are frozen: take 'outputs'"):
        mg.attach(model, adamw(model), config(fisher="minibatch"))
    assert hooks_of(model) == before


# --- and away again ---


def traits(model: nn.Module) -> list[Any]:
    parameters = [(name, type(p), p.requires_grad) for name, p in model.named_parameters()]
    return [
        hooks_of(model),
        parameters,
        [(name, type(m)) for name, m in model.named_modules()],
        list(model.state_dict()),
    ]


@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ["gate"]}, {"target_parameters": ["mlp.gate.weight", "experts.down_proj"]}],
    ids=["attention", "copies", "adapters"],
)
@pytest.mark.filterwarnings("ignore:the routers .* are trained by adapters")
def test_detach_and_export_leave_the_model_as_it_was(options):
    model = lora(build("Mixtral"), **options)
    before, logits = traits(model), run(model)
    mg.geometrize(model)
    optimizer = adamw(model)
    geometry = mg.attach(model, optimizer, config(fisher="parameters"))
    assert hooks_of(model) != before[0]
    geometry.detach()
    mg.export(model)
    assert traits(model) == before
    assert torch.equal(run(model), logits)


@pytest.mark.parametrize("wrap", ORDERS)
def test_disabled_adapters_are_the_model_of_before_and_not_counted(wrap):
    expected = run(build("Mixtral"))
    found = []
    for looks_back in (False, True):
        model = wrap(build("Mixtral"), modules_to_save=["gate"])
        optimizer = adamw(model)
        geometry = mg.attach(model, optimizer, config())
        train(model, optimizer)
        loss_of(run(model)).backward()
        if looks_back:
            with model.disable_adapter():  # a reference model, as preference training asks it
                assert torch.equal(run(model), expected)
        optimizer.step()
        found.append((geometry.metrics(), [site.weight.detach() for site in mg.find_routers(model)]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("wrap", ORDERS)
@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["gate"]}, {"target_parameters": ["mlp.gate.weight"]}], ids=["copies", "adapters"]
)
@pytest.mark.filterwarnings("ignore:the routers .* are trained by adapters")
def test_merged_models_are_stock_models(wrap, options):
    model = wrap(build("Mixtral"), **options)
    optimizer = adamw(model)
    geometry = mg.attach(model, optimizer, config())
    train(model, optimizer)
    geometry.detach()
    logits = run(model)
    merged = model.merge_and_unload()
    assert [site.name for site in mg.find_routers(merged)] == layers_of("Mixtral")
    stock = build("Mixtral")
    stock.load_state_dict(merged.state_dict())
    torch.testing.assert_close(run(stock), logits, rtol=1e-4, atol=1e-5)
    assert all(manifold_of(site.weight) is not None for site in mg.find_routers(merged))
    mg.export(merged)
    assert {type(p) for p in merged.parameters()} == {nn.Parameter}
    assert hooks_of(merged) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_saved_and_go_on_bit_for_bit(family, tmp_path):
    model = converted_first(build(family), modules_to_save=[FAMILIES[family]])
    optimizer = adamw(model)
    geometry = mg.attach(model, optimizer, config(regularizers=None))
    train(model, optimizer, geometry)
    model.save_pretrained(tmp_path)
    states = [copy.deepcopy(each.state_dict()) for each in (optimizer, geometry)]
    # Whoever does not have this library loads the same model.
    stock = peft.PeftModel.from_pretrained(build(family), tmp_path, is_trainable=True).train()
    with torch.no_grad():  # a forward pass that is not counted
        assert torch.equal(run(stock), run(model))
    mg.geometrize(stock)
    others = adamw(stock)
    again = mg.attach(stock, others, config(regularizers=None))
    for each, state in zip((others, again), states, strict=True):
        each.load_state_dict(state)
    train(model, optimizer, geometry)
    train(stock, others, again)
    assert same(values(model), values(stock))
    assert again.metrics() == geometry.metrics()
