"""Signals and policy on readings that are made up: what is seen, what is done, and that it ends."""

import json
import math
import random

import pytest

from moegeo_router.control.config import ControlConfig
from moegeo_router.control.controller import Controller
from moegeo_router.control.reading import LayerReading, Reading
from moegeo_router.control.thresholds import Threshold

ALL = ("regularizers", "prior", "speed", "router_lr", "temperature", "revive", "rollback")


def reading(step, fsi=0.1, counts=(100.0,) * 8, loss=2.0, **more):
    scalars = {"fsi": fsi, **more.pop("scalars", {})}
    return Reading(step=step, loss=loss, layers={"gate": LayerReading(scalars=scalars, counts=counts, k=2)}, **more)


def controller(mode="act", available=ALL, **changes):
    return Controller(ControlConfig(**{"patience": 10, "settle": 10, **changes}), mode, {"gate": available})


def run(made, readings):
    events = []
    for one in readings:
        events += made.update(one).events
    return events


def lines(events, kind):
    return [event.detail["name"] or event.detail["kind"] for event in events if event.kind == kind]


def test_a_collapse_climbs_the_ladder_undoing_what_does_not_help_and_gives_up_with_a_report():
    events = run(controller(), [reading(step, fsi=0.9, loss=2 - step / 1000) for step in range(1, 400)])
    applied = [e.detail["name"] for e in events if e.detail.get("kind") == "apply"]
    undone = [e.detail["name"] for e in events if e.detail.get("kind") == "undo"]
    assert applied == ["regularizers", "prior", "speed", "router_lr", "rollback"], "no dead experts: nothing to revive"
    assert undone == applied
    (last,) = [event for event in events if event.detail.get("kind") == "give up"]
    assert "regularizers: did not help" in last.line
    assert "fsi 0.9" in last.line
    assert last.level == "error"


def test_an_alert_says_on_which_side_of_its_bounds_a_metric_is():
    made = controller("observe", thresholds={"fsi": {"smoothing": 1}})
    values = [*[0.6] * 60, 0.3, 0.6, 0.22, 0.1]
    said = [event.line for event in run(made, [reading(step, fsi=fsi) for step, fsi in enumerate(values, start=1)])]
    assert [line.removeprefix("expert collapse: gate fsi ") for line in said] == [
        "0.6 is above 0.45",
        "0.3 is above 0.25",
        "0.6 is above 0.45",
        "0.22 is no longer critical (bound 0.45), and well from 0.2 on",
        "0.1 is well again (bound 0.25)",
    ]


def test_a_drift_that_stops_short_of_the_warning_is_not_called_well():
    noise = random.Random(0)
    values = [0.05 + 0.001 * min(max(0, t - 100), 130) + noise.gauss(0, 0.01) for t in range(500)]
    events = run(controller("observe"), [reading(step, fsi=fsi) for step, fsi in enumerate(values, start=1)])
    began, ended = events
    assert began.line.startswith(f"expert collapse: gate fsi {began.detail['value']:.3g} drifts towards 0.25, by +")
    said = f"expert collapse: gate fsi {ended.detail['value']:.3g} no longer drifts towards 0.25, average over 20 steps"
    assert ended.line == said
    assert began.detail["value"] < ended.detail["value"] < 0.25
    assert (ended.level, ended.detail["level"]) == ("info", "calm")


def test_what_helped_is_kept_and_taken_back_when_all_is_well_for_long():
    made = controller(release_after=50)
    readings = [reading(step, fsi=0.9) for step in range(1, 55)]
    readings += [reading(step, fsi=0.05) for step in range(55, 300)]
    events = run(made, readings)
    kinds = [e.detail["kind"] for e in events if e.kind != "alert"]
    assert kinds == ["apply", "keep", "release"]
    assert {e.detail["name"] for e in events if e.kind != "alert"} == {"regularizers"}


def test_an_intervention_that_costs_loss_is_undone_although_the_signal_is_better():
    readings = [reading(step, fsi=0.9, loss=2 + 0.01 * (step % 2)) for step in range(1, 55)]
    readings += [reading(step, fsi=0.05, loss=3 + 0.01 * (step % 2)) for step in range(55, 120)]
    events = run(controller(), readings)
    undo = next(e for e in events if e.detail.get("kind") == "undo")
    assert "loss above its forecast" in undo.line


def test_dead_experts_are_revived_after_the_gentler_ways():
    counts = (800.0, *(0.0,) * 2, *(100.0,) * 5)
    made = controller()
    orders = [
        order
        for step in range(1, 200)
        for decision, orders in made.update(reading(step, counts=counts)).orders
        if decision.kind == "apply"
        for order in orders
    ]
    assert [order.dead for order in orders] == [(1, 2)] * 3
    assert orders[0].load[0] == pytest.approx(800 / 1300)
    assert orders[0].k == 2


def test_budgets_hold():
    made = controller(layer_budget=2)
    events = run(made, [reading(step, fsi=0.9) for step in range(1, 500)])
    assert len([e for e in events if e.detail.get("kind") == "apply"]) == 2
    assert any("budget is spent" in event.line for event in events)


def test_observe_only_alerts_and_advise_says_what_it_would_do():
    readings = [reading(step, fsi=0.9) for step in range(1, 200)]
    assert {event.kind for event in run(controller("observe"), readings)} == {"alert"}
    made = controller("advise")
    turns = [made.update(one) for one in readings]
    assert all(not turn.orders and not turn.weights for turn in turns)
    advice = [e for turn in turns for e in turn.events if e.kind == "action"]
    assert advice
    assert all(e.line.startswith("advice: ") and not e.detail["taken"] for e in advice)


def test_a_refused_order_is_followed_by_the_next_rung():
    made, applied = controller(), []
    for step in range(1, 120):
        for decision, _ in made.update(reading(step, fsi=0.9)).orders:
            if decision.kind == "apply":
                applied.append((decision.step, decision.name))
                made.refuse(decision, "cannot")
    assert [name for _, name in applied] == ["regularizers", "prior", "speed", "router_lr", "rollback"]
    assert applied[-1][0] - applied[0][0] == 4, "nothing to wait for"


def test_decisions_are_the_same_after_any_interruption_and_from_the_log():
    noise = random.Random(0)
    readings = [
        reading(
            step,
            fsi=min(1, max(0, noise.gauss(0.002 * step, 0.1))),
            counts=tuple(float(noise.randrange(0, 200)) for _ in range(8)),
            loss=noise.gauss(3 - step / 200, 0.1),
            scalars={"fhs": abs(noise.gauss(1.2, 0.5)), "dispersion_1": noise.random(), "z_loss": 4.0},
        )
        for step in range(1, 400)
    ]
    whole = run(controller(), readings)
    assert len([event for event in whole if event.kind == "action"]) > 3
    made, events = controller(), []
    for one in readings:
        events += made.update(Reading.of_fields(json.loads(json.dumps(one.to_fields())))).events
        if noise.random() < 0.3:
            state = json.loads(json.dumps(made.state()))
            made = controller()
            made.load(state)
    assert events == whole


def test_a_step_that_was_not_taken_is_an_alert_at_once():
    events = run(controller(), [reading(1), reading(2, skipped=True), reading(3)])
    assert [(e.step, e.detail["metric"], e.detail["level"]) for e in events] == [
        (2, "non_finite", "critical"),
        (3, "non_finite", "calm"),
    ]


def test_a_loss_that_gives_its_progress_back_is_divergence_whatever_its_scale():
    for scale, shift in ((1.0, 0.0), (1e-3, 0.0), (1.0, -10.0)):
        losses = [5 - 3 * min(1, step / 100) + 0.05 * (-1) ** step for step in range(1, 200)] + [4.0] * 60
        events = run(controller("observe"), [reading(i + 1, loss=scale * x + shift) for i, x in enumerate(losses)])
        found = {(e.detail["metric"], e.detail["level"]) for e in events if e.step > 199}
        assert ("progress_lost", "critical") in found
        assert not [e for e in events if e.step <= 199]


def test_a_brake_is_held_against_where_things_were_going():
    def events_of(values):
        made = controller(settle=25, ladders={"expert collapse": ["speed"]})
        return run(made, [reading(step, fsi=fsi) for step, fsi in enumerate(values, start=1)])

    def first(events, *kinds):
        return next(e for e in events if e.detail.get("kind") in kinds)

    rising = [0.1] * 60 + [0.1 + 0.005 * step for step in range(150)]
    at = first(events_of(rising), "apply").step
    stopped = rising[:at] + [rising[at]] * 100
    assert first(events_of(stopped), "keep", "undo").detail["kind"] == "keep", "no better, and it was getting worse"
    assert first(events_of([0.4] * 200), "keep", "undo").detail["kind"] == "undo", "no better, and it stood still"


def test_what_helps_and_does_not_suffice_is_ordered_again_and_stronger_before_the_next_rung():
    made, fsi, orders = controller(least_gain=0.2), 1.0, []
    for step in range(1, 900):
        for decision, found in made.update(reading(step, fsi=fsi)).orders:
            orders.append((decision.kind, decision.name, found[0].strength))
            if decision.kind == "apply" and decision.name == "regularizers":
                fsi -= 0.12  # from the release to critical it is 0.25
    applied = [(name, strength) for kind, name, strength in orders if kind == "apply"]
    assert applied[:4] == [("regularizers", 1), ("regularizers", 2), ("regularizers", 3), ("prior", 1)]
    assert not [name for kind, name, _ in orders if kind == "undo" and name == "regularizers"]


def test_of_equally_bad_failures_the_cause_is_acted_on_first():
    readings = [reading(step, fsi=0.9, scalars={"z_loss": 900.0}) for step in range(1, 100)]
    made = controller(thresholds={"logit_scale": {"warmup": 50}})
    applied = [e.detail["name"] for e in run(made, readings) if e.detail.get("kind") == "apply"]
    assert applied[0] == "temperature"


def test_what_could_not_be_done_costs_no_budget():
    made, applied = controller(layer_budget=1), []
    for step in range(1, 120):
        for decision, _ in made.update(reading(step, fsi=0.9)).orders:
            applied += [decision.name] if decision.kind == "apply" else []
            if decision.name in ("regularizers", "prior") and decision.kind == "apply":
                made.refuse(decision, "cannot")
    assert applied == ["regularizers", "prior", "speed"]


def test_what_stands_is_released_although_a_second_order_was_refused():
    made, kinds, fsi = (
        controller(least_gain=0.2, release_after=50, ladders={"expert collapse": ["regularizers"]}),
        [],
        1.0,
    )
    for step in range(1, 300):
        for decision, _ in made.update(reading(step, fsi=fsi)).orders:
            kinds.append((decision.kind, decision.strength))
            if decision.kind == "apply":
                fsi = 0.88 if decision.strength == 1 else 0.05
            if decision.strength == 2:
                made.refuse(decision, "cannot")
    assert kinds == [("apply", 1), ("keep", 1), ("apply", 2), ("release", 1)]


def test_a_run_goes_on_without_a_metric_that_is_no_longer_known():
    twins = Threshold(metric="twins", failure="expert collapse", warning=0.5, critical=1.0)
    made = controller(more_thresholds=(twins,))
    run(made, [reading(step, fsi=0.9, scalars={"twins": 0.9}) for step in range(1, 80)])
    fresh = controller()
    fresh.load(json.loads(json.dumps(made.state())))
    events = run(fresh, [reading(step, fsi=0.05) for step in range(80, 140)])
    assert fresh.signals.calm
    assert [e for e in events if e.detail.get("kind") == "keep"]


def test_a_layer_that_was_given_up_is_acted_on_again_after_it_was_well_for_long():
    values = [0.9] * 200 + [0.05] * 150 + [0.9] * 60
    made = controller(release_after=50, layer_budget=20)
    events = run(made, [reading(step, fsi=fsi) for step, fsi in enumerate(values, start=1)])
    (given_up,) = [e.step for e in events if e.detail.get("kind") == "give up"]
    again = [e.step for e in events if e.detail.get("kind") == "apply" and e.step > given_up]
    assert again
    assert again[0] > 350


def test_what_was_missed_when_it_was_released_comes_back_at_once_and_stays():
    made, events, soft = controller(release_after=40, layer_budget=50), [], False
    for step in range(1, 900):
        scalars = {"z_loss": 4.0 if soft else 900.0}  # saturated, unless a temperature stands
        for event in made.update(reading(step, scalars=scalars)).events:
            events.append(event)
            if event.detail.get("name") == "temperature":
                soft = event.detail["kind"] in ("apply", "keep")
    kinds = [(e.detail["kind"], e.detail["name"]) for e in events if e.kind != "alert"]
    names = [kind for kind, name in kinds if name == "temperature"]
    assert names == ["apply", "keep", "release", "apply", "keep"]
    assert kinds == [(kind, "temperature") for kind in names]


def test_a_number_that_is_not_finite_is_passed_over_and_leaves_no_trace():
    def alerts(broken):
        made, events = controller("observe"), []
        for step in range(1, 200):
            z_loss, entropy = (math.nan, math.nan) if step == broken else (4.0, 0.5)
            scalars = {"z_loss": z_loss, "entropy_share": entropy if step < 150 else 0.001, "dispersion_1": z_loss / 40}
            events += made.update(reading(step, scalars=scalars)).events
        return [(e.step, e.line) for e in events], made.signals.layers["gate"].averages["entropy_slow"].value

    whole, _ = alerts(broken=None)
    found, slow = alerts(broken=30)
    assert [line.split(",")[0] for _, line in found] == [line.split(",")[0] for _, line in whole]
    assert math.isfinite(slow)
