"""Signals of one's own on real trainings: seen, acted on, in the log, the same after a resume; and when they fail."""

import io
import math
import warnings

import pytest
import torch
from torch import nn

import moegeo_router as mg
from moegeo_router import replay
from moegeo_router.loggers import JSONLLogger
from moegeo_router.loggers.jsonl import read_jsonl
from tests.control.test_attached import Layer, batches, decided, fit
from tests.support.ranks import on_two_ranks

LADDERS = {"silent capacity loss": ("apart",), "expert collapse": (), "routing oscillation": ()}


def row(metric="twins", **changes):
    numbers = {"warning": 0.8, "critical": 0.95, "warmup": 5, "smoothing": 2, "trend": False}
    return mg.Threshold(metric=metric, failure="silent capacity loss", **numbers | changes)


class Twins(mg.Signal):
    """The largest cosine between two rows of a router."""

    name = "twins"
    thresholds = (row(),)

    def values(self, seen):
        rows = nn.functional.normalize(seen.plant.sites[seen.layer].weight, dim=1)
        return {"twins": (rows @ rows.T).fill_diagonal_(-1).max()}


class Most(Twins):
    """Has a state: the largest cosine so far, and uses all that it is shown."""

    name, thresholds = "most", (row("most_twins"),)

    def __init__(self):
        self.most = {}

    def values(self, seen):
        assert seen.k == 2
        assert seen.scalars["fsi"] >= 0
        assert (seen.before is None) == (seen.step == 1)
        assert float(seen.sums.tokens) == 96
        self.most[seen.layer] = max(self.most.get(seen.layer, -1.0), float(super().values(seen)["twins"]))
        return {"most_twins": self.most[seen.layer]}

    def state(self):
        return dict(self.most)

    def load(self, state):
        self.most = dict(state)


class Failing(Twins):
    """Fails from a step on."""

    def __init__(self, step=20, kind=KeyError, rank=None):
        self.step, self.kind, self.rank = step, kind, rank

    def values(self, seen):
        if seen.step >= self.step and (self.rank is None or torch.distributed.get_rank() == self.rank):
            raise self.kind("no such thing")
        return super().values(seen)


class Saying(mg.Signal):
    name, thresholds = "saying", (row("mine"), row("other"))

    def __init__(self, values):
        self._values = values

    def values(self, seen):
        return self._values


class Apart(mg.Intervention):
    """Turns the last row away; undone by putting it back."""

    name, cost = "apart", "one row of the router"

    def apply(self, plant, order):
        weight = plant.sites[order.layer].weight
        memory = {"row": weight.detach()[-1].clone()}
        with torch.no_grad():
            weight[-1] = -weight[-1]
        return mg.Applied(done=True, detail={"turned": 1}, memory=memory)

    def undo(self, plant, layer, memory):
        with torch.no_grad():
            plant.sites[layer].weight[-1] = memory["row"]


def twins():
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer())
    with torch.no_grad():
        model[1].gate.weight[-1] = model[1].gate.weight[0] + 0.01
    return model


def attached(*signals, mode="act", on_error="raise", **changes):
    model = twins()
    mg.geometrize(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    control = mg.ControlConfig(**{"patience": 8, "settle": 10, "ladders": LADDERS, **changes})
    config = mg.GeometryConfig(
        top_k=2, controller=mode, control=control, signals=signals, interventions=(Apart(),), on_error=on_error
    )
    return model, optimizer, mg.attach(model, optimizer, config)


def test_it_is_seen_acted_on_and_replayed_from_the_log_without_the_class(tmp_path, capsys):
    model, optimizer, geometry = attached(Twins())
    logger = JSONLLogger(tmp_path / "metrics.jsonl")
    events, _ = fit(model, geometry, optimizer, batches(40), logger=logger)
    logger.close()
    alert = next(event for event in events if event.detail.get("metric") == "twins")
    assert (alert.layer, alert.step) == ("1.gate", 6), "the one layer that has them, after the warm-up"
    found = [(event.detail["kind"], event.detail["name"]) for event in decided(events) if event.kind != "alert"]
    assert found == [("apply", "apart"), ("keep", "apart")]
    assert geometry.metrics()["geometry/twins"] < 0.8
    readings = [line for line in read_jsonl(tmp_path / "metrics.jsonl") if line.get("event") == "reading"]
    assert readings[0]["layers"]["1.gate"]["scalars"]["twins"] > 0.95
    assert replay.main([str(tmp_path / "metrics.jsonl")]) == 0
    assert f"{len(decided(events))} events, the same as in the log" in capsys.readouterr().out


def test_a_set_point_holds_it_and_its_row_can_be_changed():
    point = mg.SetPoint(metric="twins", at_most=0.5, moves="fsi", rate=0.01)
    model, optimizer, geometry = attached(Twins(), setpoints=(point,), thresholds={"twins": {"warmup": 12}}, ladders={})
    events, _ = fit(model, geometry, optimizer, batches(15))
    assert [event.step for event in events if event.detail.get("metric") == "twins"] == [13]
    added = geometry.state_dict()["control"]["added"]
    assert added["1.gate"]["set-point"]["fsi"] > 0
    assert not added.get("0.gate", {}).get("set-point")


def test_watching_with_it_changes_no_bit_and_it_is_asked_when_the_controller_reads():
    asked = []

    class Asked(Twins):
        def values(self, seen):
            asked.append((seen.step, seen.layer))
            return super().values(seen)

    weights = []
    for signals in ((), (Asked(),)):
        model, optimizer, geometry = attached(*signals, mode="observe", every=4)
        fit(model, geometry, optimizer, batches(10))
        weights.append(model.state_dict())
    assert asked == [(step, layer) for step in (4, 8) for layer in ("0.gate", "1.gate")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert geometry.metrics()["geometry/twins"] > 0, "the newest there is"


def _resumed(saved, *signals, on_error="raise"):
    model, optimizer, geometry = attached(*signals, on_error=on_error)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    geometry.load_state_dict(saved["geometry"])
    return model, optimizer, geometry


def _saved(model, optimizer, geometry):
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "geometry": geometry.state_dict()}
    torch.save(saved, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("stop", [10, 17])
def test_a_resumed_run_has_its_state_and_decides_as_the_unbroken_one(stop):
    data = batches(40)
    model, optimizer, geometry = attached(Twins(), Most())
    whole, losses = fit(model, geometry, optimizer, data)
    model, optimizer, geometry = attached(Twins(), Most())
    first, _ = fit(model, geometry, optimizer, data[:stop])
    metrics, saved = geometry.metrics(), _saved(model, optimizer, geometry)
    model, optimizer, geometry = _resumed(saved, Twins(), Most())
    assert geometry.metrics() == metrics
    second, rest = fit(model, geometry, optimizer, data[stop:], first=stop)
    assert [*first, *second] == whole
    assert rest == losses[stop:]


def test_a_run_goes_on_without_it_but_not_without_an_intervention_that_is_in_force():
    model, optimizer, geometry = attached(Twins())
    fit(model, geometry, optimizer, batches(17))
    saved = _saved(model, optimizer, geometry)
    model, optimizer, geometry = _resumed(saved)
    events, _ = fit(model, geometry, optimizer, batches(30, seed=3), first=17)
    assert not [event for event in events if event.kind == "action"], "its alarm is gone with it"
    saved["geometry"]["control"]["standing"][0]["name"] = "another"
    with pytest.raises(ValueError, match=r"in force that are not given: \['another'\]"):
        _resumed(saved)


def test_one_that_fails_is_off_from_then_on_and_nothing_else(tmp_path, capsys):
    model, optimizer, geometry = attached(Failing(11), Most(), on_error="warn", patience=20)
    logger = JSONLLogger(tmp_path / "metrics.jsonl")
    with pytest.warns(
        UserWarning, match=r"signal twins failed and is off, training goes on: KeyError: 'no such"
    ) as told:
        events, _ = fit(model, geometry, optimizer, batches(30), logger=logger)
    assert len(told) == 1
    assert [e.step for e in events if e.detail.get("metric") == "twins"] == [6], "an alarm before it failed"
    acted = [event for event in events if event.kind == "action"]
    assert acted
    assert all("twins" not in event.line.replace("most_twins", "") for event in acted)
    assert "geometry/most_twins" in geometry.metrics()
    assert "geometry/twins" not in geometry.metrics()
    assert "geometry/fsi" in geometry.metrics()
    saved = _saved(model, optimizer, geometry)
    more, _ = fit(model, geometry, optimizer, batches(20, seed=3), logger=logger, first=30)
    logger.close()
    assert replay.main([str(tmp_path / "metrics.jsonl")]) == 0
    assert f"{len(decided(events)) + len(more)} events, the same" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="signal twins stays off, as in the run that goes on"):
        model, optimizer, geometry = _resumed(saved, Twins(), Most(), on_error="warn")
    assert fit(model, geometry, optimizer, batches(20, seed=3), first=30)[0] == more


def test_without_the_alarm_of_one_that_failed_nothing_is_done():
    model, optimizer, geometry = attached(Failing(11), on_error="warn", patience=20)
    with pytest.warns(UserWarning, match="signal twins failed"):
        events, _ = fit(model, geometry, optimizer, batches(50))
    assert not [event for event in events if event.kind == "action"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"yours": 1.0}, "metric 'yours' has no row in its thresholds; there are mine, other"),
        ({"mine": "high"}, "metric 'mine' must be a number, got 'high'"),
        ({"mine": torch.ones(2)}, "metric 'mine' must be a number, got tensor"),
        ({"mine": None}, "metric 'mine' must be a number, got None"),
        (0.5, "must return numbers by metric, got 0.5"),
    ],
)
def test_what_it_must_not_return_is_told(values, message):
    model, optimizer, geometry = attached(Saying(values))
    with pytest.raises(RuntimeError, match=f"signal saying failed: ValueError: .*{message}"):
        fit(model, geometry, optimizer, batches(1))


def test_the_error_of_a_signal_is_the_cause_of_the_one_that_is_raised():
    model, optimizer, geometry = attached(Failing(2))
    with pytest.raises(RuntimeError, match="signal twins failed") as raised:
        fit(model, geometry, optimizer, batches(3))
    assert isinstance(raised.value.__cause__, KeyError)


def test_what_is_not_finite_is_not_known_and_numbers_of_any_kind_are():
    model, optimizer, geometry = attached(Saying({"mine": math.nan, "other": torch.tensor([7], dtype=torch.int32)}))
    fit(model, geometry, optimizer, batches(2))
    metrics = geometry.metrics()
    assert metrics["geometry/other"] == 7.0
    assert "geometry/mine" not in metrics


class Margin(mg.Signal):
    name, thresholds = "a margin", (row("margin"),)

    def values(self, seen):
        return {"margin": 1.0}


def test_a_name_that_a_layer_has_already_is_told():
    with pytest.raises(ValueError, match="there is a row for 'fsi' already"):
        attached(type("Fsi", (Twins,), {"thresholds": (row("fsi"),)})())
    model, optimizer, geometry = attached(Margin())
    with pytest.raises(RuntimeError, match="a layer has a metric 'margin' already"):
        fit(model, geometry, optimizer, batches(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"signals": (Twins,)}, "expected a tuple of instances of Signal"),
        ({"signals": Twins()}, "expected a tuple of instances of Signal"),
        ({"signals": (Twins(), Twins())}, "signals: there are two called 'twins'"),
        ({"signals": (Twins(), type("B", (Twins,), {"name": "b"})())}, "there is a row for 'twins' already"),
        ({"signals": (type("Empty", (mg.Signal,), {})(),)}, "signal Empty: thresholds must be a Threshold for each"),
        (
            {"signals": (type("One", (Twins,), {"thresholds": row()})(),)},
            "signal twins: thresholds must be a Threshold for",
        ),
        ({"signals": (type("A", (Twins,), {"thresholds": (row("a/b"),)})(),)}, "digits and '_', got 'a/b'"),
        ({"signals": (Twins(),), "controller": None}, "signals are for the controller"),
        ({"control": mg.ControlConfig(thresholds={"twins": {"warning": 0.5}})}, "no metric 'twins'"),
    ],
)
def test_mistakes_are_one_error(changes, message):
    with pytest.raises(ValueError, match=message):
        mg.GeometryConfig(**changes)


class Rank(mg.Signal):
    """What no signal should be: another number on every rank."""

    name, thresholds = "rank", (row("rank"),)

    def values(self, seen):
        return {"rank": torch.distributed.get_rank()}


def _train_one_rank(rank, folder):
    warnings.simplefilter("always")
    model, optimizer, geometry = attached(Failing(15, rank=1), Rank(), Most(), on_error="warn")
    model = nn.parallel.DistributedDataParallel(model)
    lines, metrics = [], []
    with warnings.catch_warnings(record=True) as told:
        for x in batches(25, seed=rank, tokens=48):
            loss = nn.functional.mse_loss(model(x), x.roll(1, -1).tanh())
            (loss + geometry.loss()).backward()
            optimizer.step()
            optimizer.zero_grad()
            metrics.append(geometry.metrics())
            lines += [event.line for event in geometry.events()]
    failed = [str(one.message) for one in told if "signal twins failed" in str(one.message)]
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    torch.save((lines, metrics, failed, weights), f"{folder}/{rank}.pt")


def test_two_ranks_see_and_lose_the_same(tmp_path):
    on_two_ranks(_train_one_rank, tmp_path, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    lines, metrics, failed, weights = first
    assert (lines, metrics) == second[:2]
    assert torch.equal(weights, second[3])
    assert len(failed) == len(second[2]) == 1
    assert any(line.startswith("apart against") for line in lines)
    assert "geometry/twins" in metrics[13]
    assert "geometry/twins" not in metrics[14]
    assert metrics[-1]["geometry/rank"] == 0, "that of the first"
    assert "geometry/most_twins" in metrics[-1]
