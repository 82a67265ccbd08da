"""Fine-tuning models of transformers: frozen routers, micro-batches, half precision, what is quantised or sharded."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.control.selection_bias import selection_bias
from moegeo_router.optim.natural import NaturalRule
from tests.support.ranks import on_two_ranks
from tests.support.tiny_transformers import VOCABULARY, backward, build

pytest.importorskip("transformers")

FAMILIES = ("Mixtral", "DeepseekV3", "GptOss")


def ids_of(seed: int, rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def attached(model: nn.Module, lr: float = 1e-2, **options: Any) -> tuple[mg.Geometry, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    return mg.attach(model, optimizer, mg.GeometryConfig(inject=True, **options)), optimizer


def weights(model: nn.Module) -> list[Tensor]:
    return [site.weight.detach().clone() for site in mg.find_routers(model)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def freeze(model: nn.Module, frozen: bool = True) -> None:
    for site in mg.find_routers(model):
        site.weight.requires_grad_(not frozen)


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_routers_are_watched_and_the_rest_trains_as_without(family):
    models = [build(family), build(family)]
    for watched, model in enumerate(models):
        freeze(model)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        if watched:
            mg.geometrize(model)
            geometry = mg.attach(model, optimizer, mg.GeometryConfig(inject=True))
        for _ in range(3):
            backward(model)
            optimizer.step()
    found = geometry.metrics()
    assert found["geometry/fsi"] > 0
    assert found["geometry/fhs"] > 0
    assert found["geometry/regularizer"] == 0
    for (name, one), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    geometry.detach()


def test_regularizers_that_were_asked_for_do_not_fit_frozen_routers():
    model = build("Mixtral")
    mg.geometrize(model)
    freeze(model)
    with pytest.raises(ValueError, match=r"regularizers were asked for, but the routers .* are frozen"):
        attached(model, regularizers=mg.Regularizers(fsi=0.1))


def test_routers_may_be_frozen_and_released_while_it_runs():
    model = build("Mixtral")
    mg.geometrize(model)
    geometry, optimizer = attached(model)
    moved = []
    for frozen in (False, True, False):
        freeze(model, frozen)
        before = weights(model)
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        moved.append(not equal(before, weights(model)))
    assert moved == [True, False, True]
    assert geometry.metrics()["geometry/movement"] > 0


@pytest.mark.parametrize("step", ["natural", "riemannian"])
@pytest.mark.parametrize("inject", [True, False])
def test_micro_batches_are_one_batch(inject, step):
    results = []
    for parts in (1, 2):
        model = build("Qwen3Moe").double()
        model.set_experts_implementation("eager")  # torch's grouped product knows no float64
        mg.geometrize(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"inject": True, "accumulation": parts} if inject else {}
        config = mg.GeometryConfig(step=step, regularizers=mg.Regularizers(fsi=5.0, z=0.1), **options)
        geometry = mg.attach(model, optimizer, config)
        for seed in range(3):
            for ids in ids_of(seed, rows=4).chunk(parts):
                loss = model(input_ids=ids, labels=ids).loss + (0 if inject else geometry.loss())
                (loss / parts).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        results.append((weights(model), geometry.metrics()))
        geometry.detach()
    for one, other in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    whole, split = (found for _, found in results)
    assert split == pytest.approx(whole, rel=1e-6, abs=1e-9)


def test_clipping_sees_the_routers_gradients():
    model = build("Mixtral")
    mg.geometrize(model)
    geometry, _ = attached(model, regularizers=mg.Regularizers(z=100.0))
    backward(model)
    before = [site.weight.grad.clone() for site in mg.find_routers(model)]
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    for site, gradient in zip(mg.find_routers(model), before, strict=True):
        torch.testing.assert_close(site.weight.grad, gradient * (1e-3 / norm), rtol=1e-3, atol=0)
    geometry.detach()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("step", ["natural", "riemannian"])
def test_steps_below_the_resolution_of_bf16_add_up(family, step):
    model = build(family).bfloat16()
    mg.geometrize(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-5)
    natural = mg.NaturalConfig(limit=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        geometry = mg.attach(model, optimizer, mg.GeometryConfig(inject=True, step=step, natural=natural))
    start, first = weights(model), None
    for _ in range(60):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        first = first or [float((w != s).float().mean()) for w, s in zip(weights(model), start, strict=True)]
    after = [float((w != s).float().mean()) for w, s in zip(weights(model), start, strict=True)]
    assert max(first) < 0.1
    assert min(after) > 3 * max(first)
    assert all(w.dtype == torch.bfloat16 for w in weights(model))
    geometry.detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_natural_steps_stay_natural_in_half_precision(family):
    model = build(family).bfloat16()
    mg.geometrize(model)
    geometry, optimizer = attached(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            backward(model)
            optimizer.step()
    assert geometry._steps.natural
    assert all(isinstance(stack.rule, NaturalRule) for stack in geometry._steps._stacks)
    geometry.detach()


def test_autocast_gives_the_metrics_of_the_logits_that_route():
    model = build("Mixtral")
    mg.geometrize(model)
    geometry, optimizer = attached(model, regularizers=mg.Regularizers.none())
    logits: list[Tensor] = []
    handle = mg.find_routers(model)[0].module.register_forward_hook(lambda *a: logits.append(a[2][0].detach()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids_of(0), labels=ids_of(0)).loss
    handle.remove()
    loss.backward()
    optimizer.step()
    assert logits[0].dtype == torch.bfloat16
    first = geometry._watch.window.newest(wait=True)[0].layers[geometry.layers[0]]
    torch.testing.assert_close(first.p.float(), logits[0].float().softmax(-1).sum(0), rtol=1e-4, atol=1e-5)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    geometry.detach()


def test_a_scaler_that_skips_a_step_leaves_routers_alone():
    model = build("Mixtral")
    mg.geometrize(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    geometry = mg.attach(model, optimizer, mg.GeometryConfig(inject=True, grad_scaler=scaler))
    moved = []
    for broken in (False, True, False):
        before = weights(model)
        scaler.scale(model(input_ids=ids_of(0), labels=ids_of(0)).loss).backward()
        if broken:
            next(model.parameters()).grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved.append(not equal(before, weights(model)))
    assert moved == [True, False, True]
    geometry.detach()


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_skips_a_step_leaves_selection_biases_alone(fused):
    model = build("DeepseekV3")
    mg.geometrize(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    geometry = mg.attach(model, optimizer, mg.GeometryConfig(inject=True, grad_scaler=scaler, bias_speed=0.01))
    _, bias = selection_bias(model, mg.find_routers(model)[0])
    moved = []
    for broken in (False, True, False):
        before = bias.clone()
        scaler.scale(model(input_ids=ids_of(0), labels=ids_of(0)).loss).backward()
        if broken:
            next(model.parameters()).grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved.append(not torch.equal(before, bias))
    assert moved == [True, False, True]
    geometry.detach()


def test_a_loop_with_accelerate_is_a_loop_like_any_other():
    accelerate = pytest.importorskip("accelerate")
    results = []
    for wrapped in (False, True):
        model = build("Qwen3Moe")
        mg.geometrize(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        prepared, stepped, backward_of = model, optimizer, torch.Tensor.backward
        if wrapped:
            accelerator = accelerate.Accelerator(cpu=True)
            prepared, stepped = accelerator.prepare(model, optimizer)
            backward_of = accelerator.backward
        geometry = mg.attach(prepared, stepped)
        for seed in range(3):
            backward_of(prepared(input_ids=ids_of(seed), labels=ids_of(seed)).loss + geometry.loss())
            stepped.step()
            stepped.zero_grad()
        results.append((weights(model), geometry.metrics()))
        geometry.detach()
        assert not optimizer._optimizer_step_pre_hooks
    assert equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def _quantised(dtype: torch.dtype) -> nn.Module:
    """A model whose experts are held as a library for quantised training holds them: integers, or 8-bit floats."""
    model = build("Qwen3Moe")
    for module in model.modules():
        if not type(module).__name__.endswith("Experts"):
            continue
        for name, parameter in list(module.named_parameters()):
            wide = parameter.detach().clone()
            kept = (wide * 100).round().to(dtype) if dtype == torch.int8 else wide.to(dtype)
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(kept, requires_grad=False))
            setattr(module, f"wide_{name}", wide)
        # Its forward reads the weights as floats again.
        module.forward = _Dequantised(module)
    return model


class _Dequantised:
    def __init__(self, module: Any) -> None:
        self._module = module

    def __call__(self, hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for e in range(self._module.num_experts):
            token, slot = torch.where(ids == e)
            gate, up = (hidden[token] @ self._module.wide_gate_up_proj[e].T).chunk(2, dim=-1)
            y = (nn.functional.silu(gate) * up) @ self._module.wide_down_proj[e].T
            out = out.index_add(0, token, y * gates[token, slot, None])
        return out


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_experts_are_left_alone(dtype):
    model = _quantised(dtype)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".experts." in n}
    mg.geometrize(model)
    geometry, optimizer = attached(model, controller="act")
    for _ in range(3):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    found = geometry.metrics()
    assert found["geometry/fhs"] > 0
    assert found["geometry/movement"] > 0
    after = dict(model.named_parameters())
    assert all(torch.equal(before[n].view(torch.int8), after[n].view(torch.int8)) for n in before)
    geometry.detach()
    with pytest.raises(ValueError, match=r"router model\.layers\.0\.mlp\.gate|quantised"):
        attached(model, fisher="parameters")


def test_a_quantised_router_is_named():
    model = build("Qwen3Moe")
    gate = model.model.layers[1].mlp.gate
    del gate.weight
    gate.register_parameter("weight", nn.Parameter(torch.ones(4, 32, dtype=torch.int8), requires_grad=False))
    with pytest.raises(ValueError, match=r"the weight of router model\.layers\.1\.mlp\.gate must be a floating point"):
        mg.geometrize(model)


def test_a_model_without_its_weights_is_named():
    model = build("Qwen3Moe").to("meta")
    for act in (mg.geometrize, mg.attach):
        with pytest.raises(ValueError, match=r"router model\.layers\.0\.mlp\.gate is on the meta device: materialise"):
            act(model)


def test_expert_parallel_models_are_refused():
    model = build("Qwen3Moe")
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module._is_expert_parallel = True
    for act in (mg.geometrize, mg.attach, mg.NaturalGradient):
        with pytest.raises(
            ValueError, match=r"model\.layers\.0\.mlp\.experts is expert-parallel: load the model without"
        ):
            act(model)


def _sharded(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    for part, what in (("mlp.gate", "weight of router"), ("mlp.experts", "weight of model.layers.0.mlp.experts")):
        model = build("Qwen3Moe")
        module = model.model.layers[0].get_submodule(part)
        name, parameter = next(module.named_parameters())
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
        for act in (mg.geometrize, mg.attach):
            with pytest.raises(ValueError, match=f"{what}.* is a DTensor"):
                act(model)


def test_sharded_models_are_refused(tmp_path):
    on_two_ranks(_sharded, tmp_path)


def test_weights_that_are_loaded_later_keep_the_geometry(tmp_path):
    model, other = build("DeepseekV3"), build("DeepseekV3")
    with torch.no_grad():
        for site in mg.find_routers(other):
            site.weight.mul_(3)
    mg.geometrize(model)
    geometry, optimizer = attached(model)
    model.load_state_dict(copy.deepcopy(other.state_dict()))
    assert equal(weights(model), weights(other))
    backward(model)
    optimizer.step()
    assert geometry.metrics()["geometry/movement"] > 0
    assert all(type(site.weight).__name__ == "ManifoldParameter" for site in mg.find_routers(model))
    geometry.detach()
