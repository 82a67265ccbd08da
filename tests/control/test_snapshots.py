"""What goes back and what must not: beside ``test_rollback``, the corners of states that routers and layers share."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import moegeo_router as mg
from moegeo_router.control.plant import Order
from moegeo_router.control.rollback import Rollback, Snapshots
from tests.control.test_attached import batches, collapsing
from tests.control.test_rollback import copies, made, plant_of, same

STEPS = ["natural", "riemannian", None]
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=3e-3, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


def watched(step, make=OPTIMIZERS["adamw"], model=None, manifold="polar", controller="observe"):
    """A training whose controller only watches: nothing but the snapshots moves anything back."""
    model = collapsing() if model is None else model
    mg.geometrize(model, manifold=manifold, allow_change=manifold != "polar")
    optimizer = make(model.parameters())
    config = mg.GeometryConfig(
        top_k=2, renormalize=False, step=step, controller=controller, regularizers=mg.Regularizers.none()
    )
    return model, optimizer, mg.attach(model, optimizer, config)


def fit(model, optimizer, data):
    for x in data:
        x = x.to(next(model.parameters()).dtype)
        nn.functional.mse_loss(model(x), x.roll(1, -1).tanh()).backward()
        optimizer.step()
        optimizer.zero_grad()


def reloaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def snapshots_at(geometry, step, scope="routers"):
    snapshots = Snapshots(plant_of(geometry), scope, 2)
    snapshots.take(step)
    return snapshots


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("saved", [False, True])
def test_from_everything_the_same_batches_lead_to_the_same_bits(step, make, saved):
    model, optimizer, geometry = watched(step, make)
    data = batches(12)
    fit(model, optimizer, data[:5])
    snapshots = snapshots_at(geometry, 5, "everything")
    at = copies(model, optimizer, geometry)
    fit(model, optimizer, data[5:])
    end = copies(model, optimizer, geometry)
    if saved:
        snapshots.load(reloaded(snapshots.state()))
    snapshots.put_back(snapshots.newest(12), [])
    assert same(copies(model, optimizer, geometry), at)
    fit(model, optimizer, data[5:])
    assert same(copies(model, optimizer, geometry), end)


@pytest.mark.parametrize("step", STEPS)
def test_half_precision_goes_back_with_its_masters(step):
    model, optimizer, geometry = watched(step, model=collapsing().bfloat16())
    data = batches(12)
    fit(model, optimizer, data[:5])
    everything, routers = (snapshots_at(geometry, 5, scope) for scope in ("everything", "routers"))
    masters = geometry._steps.state_dict()
    fit(model, optimizer, data[5:])
    end = copies(model, optimizer, geometry)
    routers.put_back(routers.newest(12), ["1.gate"])
    if step is not None:
        now = geometry._steps.state_dict()
        assert same(now["1.gate"]["master"], masters["1.gate"]["master"])
        assert same(now["0.gate"]["master"], end[2]["0.gate"]["master"])
        assert torch.equal(now["1.gate"]["master"]["weight"].bfloat16(), model[1].gate.weight)
    everything.put_back(everything.newest(12), [])
    fit(model, optimizer, data[5:])
    assert same(copies(model, optimizer, geometry), end)


@settings(max_examples=10, deadline=None)
@given(
    step=st.sampled_from(STEPS),
    first=st.integers(0, 6),
    more=st.integers(0, 6),
    layer=st.sampled_from(["0.gate", "1.gate"]),
    seed=st.integers(0, 99),
)
@example(step=None, first=0, more=3, layer="0.gate", seed=0)
@example(step="riemannian", first=0, more=3, layer="0.gate", seed=0)
@example(step="riemannian", first=0, more=3, layer="1.gate", seed=0)
@example(step="riemannian", first=3, more=3, layer="0.gate", seed=0)
@example(step="natural", first=5, more=2, layer="0.gate", seed=0)
@example(step="natural", first=0, more=0, layer="0.gate", seed=0)
def test_of_one_router_nothing_else_is_touched_whenever_it_was(step, first, more, layer, seed):
    model, optimizer, geometry = watched(step)
    data = batches(first + more + 2, seed=seed)
    fit(model, optimizer, data[:first])
    snapshots = snapshots_at(geometry, first)
    weights, moments, steps = copies(model, optimizer, geometry)
    fit(model, optimizer, data[first:-2])
    weights_now, moments_now, steps_now = copies(model, optimizer, geometry)
    snapshots.put_back(snapshots.newest(first + more), [layer])
    weights_after, moments_after, steps_after = copies(model, optimizer, geometry)
    for index, (name, _) in enumerate(model.named_parameters()):
        own = name.startswith(layer)
        assert torch.equal(weights_after[name], (weights if own else weights_now)[name])
        assert same(moments_after[index], (moments if own else moments_now)[index])
    for name, state in steps_after.items():
        assert name == layer or same(state, steps_now[name])
        assert step != "natural" or state["step"] == steps_now[name]["step"], "of all that are stepped together"
    assert step != "riemannian" or same(steps_after[layer], steps[layer])
    fit(model, optimizer, data[-2:])
    assert all(values.isfinite().all() for values in model.state_dict().values())


@pytest.mark.parametrize("layer", ["0.gate", "1.gate"])
def test_routers_that_share_a_weight_go_back_together_by_either_name(layer):
    model = collapsing()
    model[1].gate.weight, model[1].gate.bias = model[0].gate.weight, model[0].gate.bias
    model, optimizer, geometry = watched("natural", model=model)
    fit(model, optimizer, batches(4))
    snapshots = snapshots_at(geometry, 4)
    weights, _, steps = copies(model, optimizer, geometry)
    fit(model, optimizer, batches(4, seed=2))
    snapshots.put_back(snapshots.newest(8), [layer])
    assert torch.equal(model[0].gate.weight, weights["0.gate.weight"])
    assert model[1].gate.weight is model[0].gate.weight
    assert same(geometry._steps.state_dict()["0.gate"]["momentum"], steps["0.gate"]["momentum"])


def test_a_frozen_router_and_what_else_a_router_holds_go_back():
    model = collapsing()
    model[0].gate.register_buffer("temperature", torch.tensor(1.0))
    model[1].gate.requires_grad_(False)
    model, optimizer, geometry = watched("natural", model=model)
    fit(model, optimizer, batches(4))
    snapshots = snapshots_at(geometry, 4)
    weights = copies(model, optimizer, geometry)[0]
    fit(model, optimizer, batches(4, seed=2))
    model[0].gate.temperature.fill_(2.0)
    with torch.no_grad():
        model[1].gate.weight.add_(1.0)
    snapshots.put_back(snapshots.newest(8), ["0.gate", "1.gate"])
    for name in ("0.gate.weight", "0.gate.bias", "0.gate.temperature", "1.gate.weight", "1.gate.bias"):
        assert torch.equal(model.state_dict()[name], weights[name]), name
    fit(model, optimizer, batches(2))


@pytest.mark.parametrize("scope", ["routers", "everything"])
def test_a_router_that_left_natural_steps_since_goes_back_and_goes_on(scope):
    model, optimizer, geometry = watched("natural")
    fit(model, optimizer, batches(4))
    snapshots = snapshots_at(geometry, 4, scope)
    weight = model[0].gate.weight.detach().clone()
    geometry._steps.leave_natural_steps()
    fit(model, optimizer, batches(3, seed=2))
    snapshots.put_back(snapshots.newest(7), ["0.gate"])
    assert torch.equal(model[0].gate.weight, weight)
    fit(model, optimizer, batches(2))


def test_tensors_stay_the_ones_they_were():
    model, optimizer, geometry = watched(None)
    fit(model, optimizer, batches(3))
    snapshots = snapshots_at(geometry, 3, "everything")
    held = [values for p in model.parameters() for values in (p, p.data_ptr(), *optimizer.state[p].values())]
    fit(model, optimizer, batches(3, seed=2))
    snapshots.put_back(snapshots.newest(6), [])
    now = [values for p in model.parameters() for values in (p, p.data_ptr(), *optimizer.state[p].values())]
    assert all(a == b if isinstance(a, int) else a is b for a, b in zip(held, now, strict=True))


def test_a_state_that_is_missing_is_made_and_nested_ones_are_copies():
    model, optimizer, geometry = watched(None)
    fit(model, optimizer, batches(3))
    weight = model[0].gate.weight
    optimizer.state[weight]["history"] = [torch.ones(2)]
    snapshots = snapshots_at(geometry, 3)
    optimizer.state[weight]["history"][0].zero_()
    kept = optimizer.state.pop(weight)
    snapshots.put_back(snapshots.newest(4), ["0.gate"])
    assert same(optimizer.state[weight]["exp_avg"], kept["exp_avg"])
    assert torch.equal(optimizer.state[weight]["history"][0], torch.ones(2))
    optimizer.state[weight]["later"] = torch.ones(2)
    snapshots.put_back(snapshots.newest(4), ["0.gate"])
    assert "later" not in optimizer.state[weight]


def test_learning_rates_and_speed_limits_are_settings_and_stay():
    model, optimizer, geometry = watched("natural")
    fit(model, optimizer, batches(3))
    plant, snapshots = plant_of(geometry), snapshots_at(geometry, 3, "everything")
    optimizer.param_groups[0]["lr"] = 1e-4
    plant.set_speed("1.gate", "speed", 0.5)
    limit = geometry._steps.speed_limits["1.gate"]
    snapshots.put_back(snapshots.newest(4), [])
    assert optimizer.param_groups[0]["lr"] == 1e-4
    assert geometry._steps.speed_limits["1.gate"] == limit


def test_a_rollback_of_one_router_remembers_that_one():
    model, optimizer, geometry = watched("natural")
    fit(model, optimizer, batches(3))
    rollback = Rollback(snapshots_at(geometry, 3))
    before = rollback.apply(plant_of(geometry), Order(step=4, layer="1.gate", failure="divergence")).memory["before"]
    assert [list(before[part]) for part in ("modules", "moments", "steps")] == [["1.gate"]] * 3


def test_everything_goes_back_once_a_step_and_the_first_undo_undoes_it():
    model, optimizer, geometry = watched(None)
    fit(model, optimizer, batches(3))
    plant, rollback = plant_of(geometry), Rollback(snapshots_at(geometry, 3, "everything"))
    fit(model, optimizer, batches(3, seed=2))
    now = copies(model, optimizer, geometry)
    layers = ["0.gate", "1.gate"]
    memories = [rollback.apply(plant, Order(step=6, layer=layer, failure="divergence")).memory for layer in layers]
    assert ["before" in memory for memory in memories] == [True, False]
    for layer, memory in reversed(list(zip(layers, memories, strict=True))):
        rollback.undo(plant, layer, reloaded(memory))
    assert same(copies(model, optimizer, geometry), now)


@pytest.mark.parametrize("step", ["natural", None])
def test_it_gets_slower_than_it_was_and_back_to_that(step):
    _, _, geometry = made(step)
    plant, order = plant_of(geometry), Order(step=4, layer="0.gate", failure="divergence")
    rollback = Rollback(snapshots_at(geometry, 3))

    def speed():
        if step == "natural":
            return plant.speed_of("0.gate", "rollback")
        return plant.damper.factors.get("0.gate", 1.0)

    if step is None:
        plant.set_speed("0.gate", "router_lr", 0.25)  # an intervention that stands
    start = speed()
    first = rollback.apply(plant, order)
    assert speed() == start / 2
    second = rollback.apply(plant, Order(step=9, layer="0.gate", failure="divergence", strength=2))
    assert speed() == start / 4
    rollback.undo(plant, "0.gate", second.memory)
    rollback.undo(plant, "0.gate", first.memory)
    assert speed() == start
