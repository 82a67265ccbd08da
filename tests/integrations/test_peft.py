"""PEFT's wrappers around routers, in both orders of wrapping and converting."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moegeo_router as mg
from tests.support.tiny_transformers import backward, build

peft = pytest.importorskip("peft")

pytestmark = [
    # PEFT 0.21 asks models of transformers 5.23 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated"),
]

ORDERS = ("geometrize first", "get_peft_model first")
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
SAVED = {**ATTENTION, "modules_to_save": ["gate"]}
ADAPTED = {**ATTENTION, "target_parameters": ["mlp.gate.weight"]}


def wrapped(options: dict[str, Any], order: str = ORDERS[0], family: str = "Qwen3Moe") -> Any:
    model = build(family)
    config = peft.LoraConfig(init_lora_weights=False, **options)
    if order == ORDERS[0]:
        mg.geometrize(model)
        return peft.get_peft_model(model, config)
    model = peft.get_peft_model(model, config)
    mg.geometrize(model)
    return model


def attached(model: nn.Module, **options: Any) -> tuple[mg.Geometry, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return mg.attach(model, optimizer, mg.GeometryConfig(inject=True, **options)), optimizer


def routers(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".gate." in name}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("order", ORDERS)
def test_lora_beside_the_routers_leaves_them_frozen_and_watched(order):
    model = wrapped(ATTENTION, order)
    before = routers(model)
    geometry, optimizer = attached(model)
    backward(model)
    optimizer.step()
    found = geometry.metrics()
    assert set(geometry.layers) == {f"model.layers.{i}.mlp.gate" for i in range(2)}
    assert found["geometry/fsi"] > 0
    assert found["geometry/regularizer"] == 0
    assert not changed(before, routers(model))


def test_watching_a_model_with_adapters_changes_nothing_of_its_training():
    models = [wrapped(ATTENTION), wrapped(ATTENTION)]
    for watch, model in enumerate(models):
        geometry = mg.attach(model) if watch else None
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            backward(model)
            optimizer.step()
        if geometry is not None:
            assert geometry.metrics()["geometry/fhs"] > 0
            geometry.detach()
    for (name, one), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("order", ORDERS)
def test_the_copy_that_is_trained_is_the_router(order):
    model = wrapped(SAVED, order)
    before = routers(model)
    geometry, optimizer = attached(model, per_layer=True)
    assert set(geometry.layers) == {f"model.layers.{i}.mlp.gate" for i in range(2)}
    used = {f"base_model.model.model.layers.{i}.mlp.gate.modules_to_save.default" for i in range(2)}
    for _ in range(2):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    found = geometry.metrics()
    assert {"geometry/layer0/fsi", "geometry/layer1/fsi"} <= set(found)
    assert found["geometry/movement"] > 0
    assert found["geometry/fhs"] > 0
    assert changed(before, routers(model)) == {f"{name}.weight" for name in used}


def test_the_copy_of_another_adapter_rests():
    model = wrapped(SAVED)
    model.add_adapter("second", peft.LoraConfig(**SAVED))
    for adapter in ("second", "default"):
        model.set_adapter(adapter)
        for site in mg.find_routers(model):
            assert site.module is model.get_base_model().get_submodule(site.name).modules_to_save[adapter]
    model.add_adapter("without", peft.LoraConfig(**ATTENTION))
    model.set_adapter("without")
    for site in mg.find_routers(model):
        assert site.module is model.get_base_model().get_submodule(site.name).original_module


@pytest.mark.parametrize("order", ORDERS)
def test_an_adapted_router_is_watched_as_it_routes_and_its_adapter_is_the_optimizers(order):
    model = wrapped(ADAPTED, order)
    before = routers(model)
    seen: dict[str, Tensor] = {}
    for site in mg.find_routers(model):
        layer = model.get_base_model().get_submodule(site.name)
        delta = layer.get_delta_weight("default").detach()
        assert delta.abs().max() > 0
        weight = site.weight.detach() + delta
        # The routing is computed from the input and the sum of both weights, beside the model.
        site.module.register_forward_hook(
            lambda module, args, output, w=weight, n=site.name: seen.update({n: F.linear(args[0].detach(), w)})
        )
    with pytest.warns(UserWarning, match=r"trained by adapters \(LoRA\), which your optimizer steps"):
        geometry, optimizer = attached(model)
    backward(model, masked=False)
    optimizer.step()
    optimizer.zero_grad()
    p = torch.stack([logits.reshape(-1, 4).softmax(-1).mean(0) for logits in seen.values()])
    expected = float(mg.fsi(p[0], normalized=True) + mg.fsi(p[1], normalized=True)) / 2
    assert geometry.metrics()["geometry/fsi"] == pytest.approx(expected, rel=1e-3)
    moved = changed(before, routers(model))
    assert moved
    assert all("lora_" in name for name in moved)


def test_regularizers_reach_the_adapter_of_a_router():
    gradients = []
    for weights in (mg.Regularizers.none(), mg.Regularizers(z=1.0)):
        model = wrapped(ADAPTED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            geometry, _ = attached(model, regularizers=weights)
        backward(model)
        gradients.append(next(p.grad for n, p in model.named_parameters() if ".gate." in n and "lora_B" in n))
        geometry.detach()
    assert not torch.allclose(*gradients)


def test_linear_gates_with_lora_are_found_and_seen():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 4, bias=False)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            gates, ids = self.gate(x).softmax(-1).topk(2)
            out = torch.stack([e(x) for e in self.experts], dim=1)
            return x + (gates[..., None] * out.gather(1, ids[..., None].expand(-1, -1, 8))).sum(1)

    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(Block()), peft.LoraConfig(target_modules=["gate"], init_lora_weights=False)
    )
    (site,) = mg.find_routers(model)
    assert site.adapted
    x = torch.randn(64, 8)
    p = model.base_model.model[0].gate(x).softmax(-1).mean(0)
    assert not torch.allclose(p, F.linear(x, site.weight).softmax(-1).mean(0), atol=1e-3)
    geometry = mg.attach(model, config=mg.GeometryConfig(top_k=2, renormalize=False))
    model.train()(x).square().mean().backward()
    expected = float(mg.fsi(p.detach(), normalized=True))
    assert geometry.metrics()["geometry/fsi"] == pytest.approx(expected, rel=1e-3)
    geometry.detach()


def test_adapters_on_experts_leave_the_traces_of_the_outputs():
    model = wrapped({**ATTENTION, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]})
    geometry, _ = attached(model)
    backward(model)
    geometry._after_step()
    assert geometry.metrics()["geometry/fhs"] > 0
    geometry.detach()


@pytest.mark.parametrize("options", [ATTENTION, SAVED, ADAPTED], ids=["attention", "saved", "adapted"])
def test_what_is_saved_is_an_adapter_like_any_other(options, tmp_path):
    model = wrapped(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        geometry, optimizer = attached(model)
    for _ in range(2):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)  # in the middle, nothing exported
    geometry.detach()
    ids = torch.randint(3, 99, (1, 8))
    stock = peft.PeftModel.from_pretrained(build("Qwen3Moe"), tmp_path).eval()
    model.eval()
    with torch.no_grad():
        assert torch.equal(stock(input_ids=ids).logits, model(input_ids=ids).logits)
        with model.disable_adapter():
            plain = model(input_ids=ids).logits
        assert torch.equal(plain, build("Qwen3Moe").eval()(input_ids=ids).logits)
        merged = mg.export(model.merge_and_unload())
        torch.testing.assert_close(merged(input_ids=ids).logits, stock(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert all(type(p) is nn.Parameter for p in merged.parameters())


def test_detach_and_export_leave_the_wrapped_model_as_it_was():
    model, alone = (
        wrapped(SAVED),
        peft.get_peft_model(build("Qwen3Moe"), peft.LoraConfig(init_lora_weights=False, **SAVED)),
    )
    geometry, _ = attached(model)
    backward(model)
    geometry.detach()
    mg.export(model)
    for (name, module), other in zip(model.named_modules(), alone.modules(), strict=True):
        assert type(module) is type(other), name
        assert len(module._forward_hooks) == len(other._forward_hooks), name
        assert len(module._forward_pre_hooks) == len(other._forward_pre_hooks), name
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
