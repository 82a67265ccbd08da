"""Snapshots: what is put back is what was, everything else stays, and the training goes on."""

import io

import pytest
import torch

import moegeo_router as mg
from moegeo_router.control.interventions import Temperature
from moegeo_router.control.plant import Order, Plant
from moegeo_router.control.rollback import Rollback, Snapshots
from tests.control.test_attached import Layer, attached, batches, collapsing, config, fit


def made(step, optimizer_class=torch.optim.AdamW, **options):
    model = collapsing()
    mg.geometrize(model)
    optimizer = optimizer_class(model.parameters(), **{"lr": 3e-3, **options})
    settings = mg.GeometryConfig(top_k=2, renormalize=False, step=step, controller="act", on_error="raise")
    geometry = mg.attach(model, optimizer, settings)
    return model, optimizer, geometry


def plant_of(geometry) -> Plant:
    return geometry._control._plant


def copies(model, optimizer, geometry):
    moments = [
        {key: value.clone() for key, value in optimizer.state.get(p, {}).items() if isinstance(value, torch.Tensor)}
        for p in model.parameters()
    ]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return weights, moments, geometry._steps.state_dict()


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize(
    ("step", "optimizer", "options"),
    [
        ("natural", torch.optim.AdamW, {}),
        ("riemannian", torch.optim.AdamW, {"fused": True}),
        (None, torch.optim.AdamW, {}),
        (None, torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_everything_comes_back_and_the_same_batches_lead_to_the_same(step, optimizer, options):
    model, stepped, geometry = made(step, optimizer, **options)
    data = batches(30)
    fit(model, geometry, stepped, data[:10])
    snapshots = Snapshots(plant_of(geometry), "everything", 2)
    snapshots.take(10)
    at = copies(model, stepped, geometry)
    fit(model, geometry, stepped, data[10:20])
    assert not same(copies(model, stepped, geometry)[0], at[0])
    snapshots.put_back(snapshots.newest(20), [])
    assert same(copies(model, stepped, geometry), at)
    _, losses = fit(model, geometry, stepped, data[20:])
    assert all(loss == loss for loss in losses)


@pytest.mark.parametrize("step", ["natural", "riemannian", None])
def test_one_router_comes_back_and_the_rest_stays(step):
    model, optimizer, geometry = made(step)
    data = batches(20)
    fit(model, geometry, optimizer, data[:10])
    snapshots = Snapshots(plant_of(geometry), "routers", 2)
    snapshots.take(10)
    before, _, steps_before = copies(model, optimizer, geometry)
    fit(model, geometry, optimizer, data[10:])
    now, _, steps_now = copies(model, optimizer, geometry)
    snapshots.put_back(snapshots.newest(20), ["0.gate"])
    after, _, steps_after = copies(model, optimizer, geometry)
    for name in after:
        assert torch.equal(after[name], before[name] if name.startswith("0.gate") else now[name]), name
    if step is not None:
        assert same(steps_after["1.gate"], steps_now["1.gate"])
    if step == "natural":
        for key in ("momentum", "length", "count", "A", "G", "tokens"):
            assert same(steps_after["0.gate"][key], steps_before["0.gate"][key])
    elif step == "riemannian":
        assert same(steps_after["0.gate"], steps_before["0.gate"])
        assert [steps_after[name]["step"] for name in ("0.gate", "1.gate")] == [10, 20]
    else:
        for name, p in model[0].gate.named_parameters():
            assert torch.equal(optimizer.state[p]["step"], torch.tensor(10.0)), name
    fit(model, geometry, optimizer, data)


def test_memory_is_bounded_and_a_second_way_back_goes_further():
    model, optimizer, geometry = made("natural")
    fit(model, geometry, optimizer, batches(2))
    snapshots = Snapshots(plant_of(geometry), "routers", 2)
    for step in (1, 2, 3):
        snapshots.take(step)
    assert [state["step"] for state in snapshots.state()] == [2, 3]
    assert [snapshots.newest(7)["step"], snapshots.newest(7)["step"]] == [3, 3], "all layers of a step go to one"
    assert snapshots.newest(8)["step"] == 2
    assert snapshots.newest(9)["step"] == 2, "the last one stays"
    buffer = io.BytesIO()
    torch.save(snapshots.state(), buffer)
    buffer.seek(0)
    other = Snapshots(plant_of(geometry), "routers", 2)
    other.load(torch.load(buffer, weights_only=True))
    assert same(other.state(), snapshots.state())


@pytest.mark.parametrize("step", ["natural", None])
def test_a_rollback_slows_down_and_can_be_undone(step):
    model, optimizer, geometry = made(step)
    plant, snapshots = plant_of(geometry), geometry._control._snapshots
    rollback = Rollback(snapshots)
    order = Order(step=20, layer="0.gate", failure="divergence")
    assert not rollback.apply(plant, order).done
    fit(model, geometry, optimizer, batches(10))
    snapshots.take(10)
    fit(model, geometry, optimizer, batches(5, seed=9))
    now = copies(model, optimizer, geometry)
    applied = rollback.apply(plant, order)
    assert applied.done
    assert applied.detail["snapshot_of"] == 10
    assert not torch.equal(model[0].gate.weight, now[0]["0.gate.weight"])
    if step == "natural":
        assert geometry._steps.speed_limits["0.gate"] == pytest.approx(0.0075)
    else:
        assert plant.damper.factors == {"0.gate": 0.5}
    rollback.undo(plant, "0.gate", applied.memory)
    assert same(copies(model, optimizer, geometry)[0], now[0])
    assert plant.damper.factors == {}
    if step == "natural":
        assert geometry._steps.speed_limits["0.gate"] == pytest.approx(0.015)
    fit(model, geometry, optimizer, batches(3))


@pytest.mark.parametrize("step", ["natural", None])
def test_a_rollback_that_is_released_does_not_bring_back_what_was_broken(step):
    model, optimizer, geometry = made(step)
    plant, snapshots = plant_of(geometry), geometry._control._snapshots
    fit(model, geometry, optimizer, batches(3))
    snapshots.take(3)
    with torch.no_grad():
        model[0].gate.weight.mul_(100)
    rollback = Rollback(snapshots)
    applied = rollback.apply(plant, Order(step=4, layer="0.gate", failure="divergence"))
    fit(model, geometry, optimizer, batches(3))
    learnt = model[0].gate.weight.detach().clone()
    assert rollback.release(plant, "0.gate", applied.memory) is None
    assert torch.equal(model[0].gate.weight, learnt)
    assert plant.speed_of("0.gate", "rollback") == 1


@pytest.mark.parametrize("scope", ["routers", "everything"])
def test_a_rollback_does_not_lose_a_temperature_that_stands(scope):
    model, _, geometry = made(None)
    plant, healthy, temperature = plant_of(geometry), model[0].gate.weight.detach().clone(), Temperature()
    snapshots = Snapshots(plant, scope, 2)
    snapshots.take(1)
    order = Order(step=2, layer="0.gate", failure="brittle specialization", values={"logit_scale": 40.0})
    soft = temperature.apply(plant, order).memory
    back = Rollback(snapshots).apply(plant, order).memory
    torch.testing.assert_close(model[0].gate.weight.detach(), healthy / 8)
    temperature.undo(plant, "0.gate", soft)
    torch.testing.assert_close(model[0].gate.weight.detach(), healthy)
    Rollback(snapshots).undo(plant, "0.gate", back)
    torch.testing.assert_close(model[0].gate.weight.detach(), healthy)  # softened then, and not any more


def test_healthy_states_are_kept_while_it_acts():
    torch.manual_seed(0)
    healthy = torch.nn.Sequential(Layer(), Layer())
    model, optimizer, geometry = attached("act", healthy, snapshot_every=20)
    # Random inputs specialise nothing: this is about when snapshots are taken, not about what is healthy.
    fit(model, geometry, optimizer, batches(110))
    taken = [state["step"] for state in geometry._control._snapshots.state()]
    assert taken
    assert all(step > 50 and step % 20 == 0 for step in taken)
    assert config("act").control.snapshot_every == 50
