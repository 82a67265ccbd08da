"""The gentle interventions on a real training: what each changes, and that it is back when it is taken back."""

import dataclasses
import math

import pytest
import torch

import moegeo_router as mg
from moegeo_router.control.interventions import CutRate, MoreRegularization, PriorStep, SlowDown, Temperature
from moegeo_router.control.plant import Order
from moegeo_router.control.policy import Decision
from tests.control.test_attached import batches
from tests.control.test_rollback import plant_of
from tests.control.test_snapshots import watched

LAYER = "0.gate"
BALANCED = (1 / 6,) * 6
COLLAPSED = (0.5, 0.46, 0.01, 0.01, 0.01, 0.01)


def order(**more):
    return Order(step=9, layer=LAYER, failure="expert collapse", **{"load": BALANCED, **more})


def made(step, manifold="polar"):
    """A training that is only watched, without a decay of weights, and with what acting needs."""
    decayless = lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)  # noqa: E731
    return watched(step, decayless, manifold=manifold, controller="act")


def logits(model):
    with torch.no_grad():
        return model[0].gate(batches(1)[0])


def step_length(model, optimizer):
    """How far an AdamW step moves a router's weight, and how far the logits."""
    model(batches(1)[0]).sum().backward()
    before, seen = model[0].gate.weight.detach().clone(), logits(model)
    model[0].gate.weight.grad = torch.ones_like(before)
    model[0].gate.bias.grad = None
    optimizer.step()
    optimizer.zero_grad()
    return float((model[0].gate.weight.detach() - before).norm()), float((logits(model) - seen).norm())


@pytest.mark.parametrize(("scale", "factor"), [(3.0, 2.0), (30.0, 6.0), (500.0, 16.0), (None, 2.0)])
def test_a_temperature_brings_the_logits_down_to_a_scale_within_bounds(scale, factor):
    model, _, geometry = made(None)
    before, values = logits(model), {} if scale is None else {"logit_scale": scale}
    applied = Temperature().apply(plant_of(geometry), order(values=values))
    assert applied.detail == {"factor": pytest.approx(factor)}
    torch.testing.assert_close(logits(model), before / factor)
    Temperature().undo(plant_of(geometry), LAYER, applied.memory)
    torch.testing.assert_close(logits(model), before)


@pytest.mark.parametrize(("step", "manifold"), [(None, "polar"), ("riemannian", "polar"), (None, "sphere")])
def test_a_temperature_slows_a_step_as_a_division_of_the_logits_would(step, manifold):
    steps = {}
    for soft in (False, True):
        model, optimizer, geometry = made(step, manifold)
        if soft:
            Temperature().apply(plant_of(geometry), order(values={"logit_scale": 20.0}))
        steps[soft] = step_length(model, optimizer)
    assert steps[True][1] / steps[False][1] == pytest.approx(0.25, rel=0.06)  # τ is trained, too


def test_a_temperature_ends_as_it_began_although_natural_steps_were_left_in_between():
    _, _, geometry = made("natural")
    memory = Temperature().apply(plant_of(geometry), order()).memory
    geometry._steps.leave_natural_steps()
    Temperature().undo(plant_of(geometry), LAYER, memory)
    assert plant_of(geometry).damper.factors == {}


def test_a_natural_step_is_measured_in_what_it_changes_and_stays():
    _, _, geometry = made("natural")
    limit = geometry._steps.speed_limits[LAYER]
    Temperature().apply(plant_of(geometry), order(values={"logit_scale": 20.0}))
    assert geometry._steps.speed_limits[LAYER] == limit


def test_a_temperature_stays_until_it_is_released_and_then_goes_back_little_by_little():
    model, _, geometry = made(None)
    plant, temperature, before = plant_of(geometry), Temperature(anneal=4), logits(model)
    memory = temperature.apply(plant, order()).memory
    for _ in range(10):
        memory = temperature.advance(plant, LAYER, memory)
    torch.testing.assert_close(logits(model), before / 2)
    memory = temperature.release(plant, LAYER, memory)
    seen = []
    while memory is not None:
        seen.append(float((before / logits(model)).mean()))
        memory = temperature.advance(plant, LAYER, memory)
    assert seen == pytest.approx([2 ** (1 - done / 4) for done in range(4)], rel=1e-4)
    torch.testing.assert_close(logits(model), before)
    assert plant.speed_of(LAYER, "temperature") == 1
    assert plant.damper.factors == {}


def test_a_cosine_router_has_a_temperature_of_its_own():
    model, _, geometry = made(None, "sphere")
    plant = plant_of(geometry)
    assert Temperature().unavailable(plant, LAYER) is None
    before, temperature = logits(model), float(model[0].gate.temperature.detach())
    memory = Temperature().apply(plant, order()).memory
    torch.testing.assert_close(logits(model), before / 2)
    Temperature().undo(plant, LAYER, memory)
    assert float(model[0].gate.temperature.detach()) == pytest.approx(temperature)


def test_brakes_multiply_whoever_set_them_and_each_takes_back_its_own():
    model, optimizer, geometry = made(None)
    plant, cut = plant_of(geometry), CutRate()
    free, _ = step_length(model, optimizer)
    first, soft = cut.apply(plant, order()).memory, Temperature().apply(plant, order()).memory
    second = cut.apply(plant, order(strength=2)).memory
    braked, _ = step_length(model, optimizer)
    assert braked / free == pytest.approx(1 / 32, rel=1e-3)
    state = plant.brakes()
    Temperature().undo(plant, LAYER, soft)
    cut.undo(plant, LAYER, second)
    assert plant.damper.factors == {LAYER: 0.25}
    cut.undo(plant, LAYER, first)
    assert plant.damper.factors == {}
    plant.set_brakes(state)
    assert plant.damper.factors == {LAYER: pytest.approx(1 / 32)}


def test_a_brake_holds_the_bias_too():
    moved = {}
    for braked in (False, True):
        model, optimizer, geometry = made(None)
        if braked:
            CutRate().apply(plant_of(geometry), order())
        before = model[0].gate.bias.detach().clone()
        model(batches(1)[0]).sum().backward()
        optimizer.step()
        moved[braked] = float((model[0].gate.bias.detach() - before).norm())
    assert moved[True] / moved[False] == pytest.approx(0.25, rel=1e-3)


def test_a_natural_router_is_slowed_by_its_limit_and_not_by_its_rate():
    _, _, geometry = made("natural")
    plant, limit = plant_of(geometry), geometry._steps.speed_limits[LAYER]
    assert "stepped naturally" in CutRate().unavailable(plant, LAYER)
    first = SlowDown().apply(plant, order()).memory
    second = SlowDown().apply(plant, order(strength=2)).memory
    assert geometry._steps.speed_limits[LAYER] == pytest.approx(limit / 4)
    plant.set_speed(LAYER, "set-point", 0.5)
    assert geometry._steps.speed_limits[LAYER] == pytest.approx(limit / 8)
    plant.set_speed(LAYER, "set-point", 1.0)
    SlowDown().undo(plant, LAYER, second)
    assert geometry._steps.speed_limits[LAYER] == pytest.approx(limit / 2)
    SlowDown().undo(plant, LAYER, first)
    assert geometry._steps.speed_limits[LAYER] == pytest.approx(limit)


def test_brakes_multiply_the_limit_that_the_user_set_last():
    _, _, geometry = made("natural")
    plant = plant_of(geometry)
    SlowDown().undo(plant, LAYER, SlowDown().apply(plant, order()).memory)
    geometry.limit_speed(0.002)
    memory = SlowDown().apply(plant, order()).memory
    assert geometry._steps.speed_limits[LAYER] == pytest.approx(0.001)
    geometry.limit_speed(0.004, [LAYER])
    assert geometry._steps.speed_limits[LAYER] == pytest.approx(0.002)
    SlowDown().undo(plant, LAYER, memory)
    assert geometry._steps.speed_limits[LAYER] == pytest.approx(0.004)


def test_a_step_of_the_prior_is_as_long_as_it_says_and_helps_those_with_less():
    model, _, geometry = made(None)
    before = model[0].gate.bias.detach().clone()
    applied = PriorStep(length=0.2).apply(plant_of(geometry), order(load=COLLAPSED))
    change = (model[0].gate.bias.detach() - before).double()
    prior = change.exp() / 6
    assert float(prior.sum()) == pytest.approx(1.0, abs=1e-6)
    distance = 2 * math.acos(float((prior / 6).sqrt().sum()))
    assert distance == pytest.approx(0.2, rel=1e-4)
    assert change.argsort().tolist()[:2] == [0, 1]
    PriorStep().undo(plant_of(geometry), LAYER, applied.memory)
    torch.testing.assert_close(model[0].gate.bias.detach(), before)


def test_a_prior_that_has_moved_on_keeps_what_it_moved_when_the_step_is_taken_back():
    _, _, geometry = made(None)
    plant, prior = plant_of(geometry), mg.ExpertPrior(6)
    plant.sites[LAYER].module.prior = prior
    memory = PriorStep().apply(plant, order(load=COLLAPSED)).memory
    other = torch.tensor([1.0, 2.0, 3.0, 1.0, 1.0, 2.0])
    prior.pi.copy_(prior.pi * other / (prior.pi * other).sum())
    PriorStep().undo(plant, LAYER, memory)
    torch.testing.assert_close(prior.pi, other / 10)


def test_taken_back_is_the_newest_of_its_kind_and_what_is_on_its_way_back_is_left_to_it():
    _, _, geometry = made(None)
    loop, plant = geometry._control, plant_of(geometry)
    decision = Decision(kind="apply", step=9, layer=LAYER, failure="expert collapse", name="router_lr")
    for strength in (1, 2):
        loop._apply(decision, [order(strength=strength)])
    assert plant.speed_of(LAYER, "router_lr") == 1 / 16
    undo = dataclasses.replace(decision, kind="undo")
    loop._undo(undo)
    assert plant.speed_of(LAYER, "router_lr") == 1 / 4
    loop._undo(undo)
    assert plant.speed_of(LAYER, "router_lr") == 1
    assert not loop._standing

    release = dataclasses.replace(decision, kind="release", name="temperature")
    loop._apply(dataclasses.replace(release, kind="apply"), [order()])
    loop._undo(release)
    loop._undo(dataclasses.replace(release, kind="undo"))  # of another that is no more
    (standing,) = loop._standing
    assert standing.released
    for _ in range(100):
        loop._go_on()
    assert not loop._standing
    assert plant.speed_of(LAYER, "temperature") == 1


@pytest.mark.parametrize("older_first", [True, False])
def test_brakes_of_the_layer_and_of_the_whole_run_end_in_any_order(older_first):
    _, _, geometry = made(None)
    loop, plant = geometry._control, plant_of(geometry)
    of_run = Decision(kind="apply", step=9, layer="run", failure="divergence", name="router_lr")
    of_layer = dataclasses.replace(of_run, layer=LAYER)
    for decision in (of_run, of_layer):
        loop._apply(decision, [order()])
    for decision in (of_run, of_layer) if older_first else (of_layer, of_run):
        assert plant.damper.factors
        loop._undo(dataclasses.replace(decision, kind="undo"))
    assert not loop._standing
    assert plant.damper.factors == {}


def test_an_order_for_the_whole_run_is_carried_out_where_it_can_be():
    _, _, geometry = made(None)
    loop = geometry._control
    decision = Decision(kind="apply", step=9, layer="run", failure="divergence", name="prior")
    orders = [order(), dataclasses.replace(order(), layer="1.gate", load=())]
    done, refused = loop._apply(decision, orders)
    assert list(done) == [LAYER], "the other's load is not known"
    assert not refused
    assert [standing.layer for standing in loop._standing] == [LAYER]
    loop._undo(dataclasses.replace(decision, kind="undo"))
    assert not loop._standing
    loop.controller.policy._record("run").standing.append([decision.name, decision.failure])
    _, (event,) = loop._apply(decision, orders[1:])
    assert "the load is not known" in event.line


def test_regularization_grows_with_orders_and_severity_and_each_takes_back_its_own():
    _, _, geometry = made(None)
    plant, more = plant_of(geometry), MoreRegularization(balance=0.005, fsi=0.04)

    def weights():
        found = plant.regularization.weights_of(LAYER)
        return found.balance, found.fsi

    assert weights() == (0, 0)
    first = more.apply(plant, order())
    assert weights() == pytest.approx((0.005, 0.0))
    second = more.apply(plant, dataclasses.replace(order(), step=40, strength=2))
    assert weights() == pytest.approx((0.01, 0.0))
    third = more.apply(plant, dataclasses.replace(order(), step=80, failure="divergence", critical=True))
    assert weights() == pytest.approx((0.03, 0.04))
    for memory, left in ((first, (0.025, 0.04)), (third, (0.005, 0.0)), (second, (0.0, 0.0))):
        more.undo(plant, LAYER, memory.memory)
        assert weights() == pytest.approx(left)
    assert more.apply(plant, order(load=())).detail == {"fsi": 0.04}, "the balance loss needs the choices"


def test_a_cosine_router_at_the_bound_of_its_temperature_comes_back_to_where_it_was():
    model, _, geometry = made(None, "sphere")
    plant, router = plant_of(geometry), model[0].gate
    with torch.no_grad():
        router.set_temperature(torch.tensor([6.0]))
    before = logits(model)
    applied = Temperature().apply(plant, order(values={"logit_scale": 50.0}))
    assert applied.detail["factor"] < 10, "the bound"
    torch.testing.assert_close(logits(model), before / applied.detail["factor"])
    Temperature().undo(plant, LAYER, applied.memory)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4)
