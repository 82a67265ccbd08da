"""Fine-tuning: micro-batches of unequal size, scalers, bf16 and its resumption, quantised weights, late thaws."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.control.expert_weights import ExpertWeights
from moegeo_router.control.revive import Revive
from moegeo_router.routers.experts import Experts, find_experts
from tests.support.finetuning import adamw, config, same, train, values
from tests.support.tiny_transformers import FAMILIES, VOCABULARY, backward, build

pytest.importorskip("transformers")

SOME = ("Mixtral", "DeepseekV3", "GptOss")
#: Families whose routers are not linear, as ``test_families`` has it.
NOT_LINEAR = [name for name, tiny in FAMILIES.items() if any("x Wᵀ" in w or "no tokens" in w for w in tiny.warns)]


def converted(family: str, dtype: torch.dtype = torch.float32) -> Any:
    model = build(family).to(dtype)
    mg.geometrize(model)
    return model


def weights(model: nn.Module) -> list[Tensor]:
    return [site.weight.detach().clone() for site in mg.find_routers(model)]


def ids_of(seed: int, rows: int = 4) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, 12), generator=torch.Generator().manual_seed(seed))


# --- micro-batches ---


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_micro_batches_of_unequal_size_are_one_batch(family):
    lengths = torch.tensor([12, 5, 9, 3])
    mask = (torch.arange(12) < lengths[:, None]).long()
    found = []
    for cuts in ([4], [1, 3]):
        model = build(family).double()
        model.set_experts_implementation("eager")  # torch's grouped product knows no float64
        mg.geometrize(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        geometry = mg.attach(model, optimizer, config(loss="sum", regularizers=mg.Regularizers(fsi=5.0, z=0.1)))
        for seed in range(3):
            for ids, kept in zip(ids_of(seed).split(cuts), mask.split(cuts), strict=True):
                logits = model(input_ids=ids, attention_mask=kept).logits
                losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
                loss = (losses * kept.flatten()).sum() / mask.sum()
                (loss + geometry.loss(tokens=int(mask.sum()))).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((weights(model), geometry.metrics()))
        geometry.detach()
    for one, other in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-6, abs=1e-9)


# --- mixed precision ---


@pytest.mark.parametrize("inject", [False, True])
def test_scaled_losses_are_measured_and_stepped_as_unscaled(inject):
    found = []
    for scale in (1.0, 2.0**10):
        model = converted("Mixtral")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        options = {"inject": inject, "grad_scaler": scaler, "regularizers": mg.Regularizers(z=0.1)}
        geometry = mg.attach(model, optimizer, config(**options))
        for seed in range(3):
            ids = ids_of(seed)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            scaler.scale(loss if inject else loss + geometry.loss()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append((weights(model), geometry.metrics()))
        geometry.detach()
    for one, other in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-3, abs=1e-6)
    assert 0 < found[1][1]["geometry/movement"] <= 0.015 * math.sqrt(2)


def test_an_overflow_in_fp16_leaves_routers_alone():
    model = converted("Mixtral")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    geometry = mg.attach(model, optimizer, config(inject=True, grad_scaler=scaler))
    ids, moved, skipped = ids_of(0), [], []
    for _ in range(40):
        before, scale = weights(model), scaler.get_scale()
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped.append(scaler.get_scale() < scale)
        moved.append(not all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)))
    assert True in skipped
    assert False in skipped
    assert moved == [not skip for skip in skipped]
    geometry.detach()


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NOT_LINEAR])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:layer .*:UserWarning", "ignore:the routers .* have gradients, but:UserWarning")
def test_rounding_makes_no_router_fall_back(family, dtype):
    if family == "Inkling2Text" and dtype == torch.bfloat16:
        pytest.skip("transformers multiplies fp32 by bf16 there once the model is cast")
    model = converted(family, dtype)
    optimizer = adamw(model)
    geometry = mg.attach(model, optimizer, config(controller=None, fisher=None))
    for _ in range(2):
        backward(model)
        optimizer.step()  # falling back is a warning
        optimizer.zero_grad()
    assert geometry._steps is not None
    assert all(geometry._steps.is_natural(name) for name in geometry._steps.names)
    geometry.detach()


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("step", ["natural", "riemannian"])
def test_bf16_resumes_bit_for_bit(family, step):
    def start() -> tuple[Any, Any, mg.Geometry]:
        model = converted(family, torch.bfloat16)
        optimizer = adamw(model)
        return model, optimizer, mg.attach(model, optimizer, config(step=step, regularizers=None))

    model, optimizer, geometry = start()
    train(model, optimizer, geometry)
    others = start()
    for ours, theirs in zip((model, optimizer, geometry), others, strict=True):
        theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    masters = [[stack._master.weight for stack in g._steps._stacks] for g in (geometry, others[2])]  # type: ignore[union-attr]
    for ours, theirs in zip(*masters, strict=True):
        assert ours.dtype == torch.float32
        assert not torch.equal(ours, ours.bfloat16().float())  # it knows more than the weights do
        assert torch.equal(ours, theirs)
    train(model, optimizer, geometry)
    train(*others)
    assert same(values(model), values(others[0]))
    assert others[2].metrics() == geometry.metrics()


# --- quantised weights ---


def stack_of(*shape: int, dtype: torch.dtype) -> nn.Module:
    module = nn.Module()
    module.register_parameter("w", nn.Parameter(torch.zeros(shape).to(dtype), requires_grad=False))
    return module


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantised_experts_cannot_be_revived_and_that_is_said(dtype):
    experts = Experts(name="block.experts", container=stack_of(4, 8, 8, dtype=dtype))
    with pytest.raises(ValueError, match=rf"block\.experts are quantised or sharded \(Tensor, {dtype}\)"):
        ExpertWeights(experts, 4)
    ExpertWeights(Experts(name="", container=stack_of(4, 8, 8, dtype=torch.bfloat16)), 4)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_models_with_quantised_experts_say_what_they_cannot(dtype):
    model = converted("Qwen3Moe")
    for site in mg.find_routers(model):
        experts = find_experts(model, site)
        assert experts is not None
        for name, weight in list(experts.container.named_parameters()):
            setattr(experts.container, name, nn.Parameter(weight.detach().to(dtype), requires_grad=False))
    geometry = mg.attach(model, adamw(model), config(controller="act"))
    assert geometry._control is not None
    reason = Revive().unavailable(geometry._control._plant, geometry.layers[0])
    assert reason == f"the weights of model.layers.0.mlp.experts are quantised or sharded (Tensor, {dtype})"
    geometry.detach()
    with pytest.raises(ValueError, match=r"stacked experts .* is a quantised or sharded weight .*: take fisher='out"):
        mg.attach(model, config=config(fisher="parameters"))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts are frozen: take 'outputs'"):
        mg.attach(model, adamw(model), config(fisher="minibatch"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_quantised_router_is_named_and_what_to_do(dtype):
    model = build("Mixtral")
    gate = model.model.layers[1].mlp.gate
    gate.weight = nn.Parameter(gate.weight.detach().to(dtype), requires_grad=False)
    message = rf"router model\.layers\.1\.mlp\.gate .* is quantised \(Parameter, {dtype}\): have whoever quantises"
    for act in (mg.geometrize, mg.attach):
        with pytest.raises(ValueError, match=message):
            act(model)


# --- frozen when attached ---


@pytest.mark.parametrize("family", SOME)
def test_a_frozen_router_that_the_optimizer_holds_changes_nothing_until_it_thaws(family):
    found = []
    for watched in (False, True):
        model = build(family)
        for site in mg.find_routers(model):
            site.weight.requires_grad_(False)
        optimizer = adamw(model, trained=False)
        geometry = None
        if watched:
            mg.geometrize(model)
            geometry = mg.attach(model, optimizer, config(regularizers=None))
        train(model, optimizer, geometry)
        found.append(values(model))
    assert same(*found)
    assert geometry is not None
    before = weights(model)
    for site in mg.find_routers(model):
        site.weight.requires_grad_(True)
    train(model, optimizer, geometry)
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert 0 < geometry.metrics()["geometry/movement"] <= 0.015 * math.sqrt(2)


def test_a_router_that_thaws_and_that_nobody_was_given_is_told_of_once():
    model = converted("Mixtral")
    first, second = mg.find_routers(model)
    first.weight.requires_grad_(False)
    optimizer = adamw(model)
    mg.attach(model, optimizer, config())
    train(model, optimizer, steps=1)
    first.weight.requires_grad_(True)
    optimizer.add_param_group({"params": [first.weight]})
    with pytest.warns(UserWarning, match=r"routers model\.layers\.0\.mlp\.gate were frozen .* attach again"):
        train(model, optimizer, steps=1)
    train(model, optimizer, steps=1)
    assert second.weight.requires_grad


def test_a_state_of_an_older_format_is_named():
    model = converted("Mixtral")
    geometry = mg.attach(model, adamw(model), config())
    with pytest.raises(ValueError, match=r"geometry's state has format 1, expected 2"):
        geometry.load_state_dict(geometry.state_dict() | {"format": 1})
    geometry.detach()
