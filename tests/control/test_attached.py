"""The loop on real trainings: harmless when it watches, the same after a resume and on every rank, and it repairs."""

import io
import json
import math

import pytest
import torch
from torch import nn

import moegeo_router as mg
from moegeo_router import replay
from moegeo_router.control import revive
from moegeo_router.control.thresholds import FAILURES
from moegeo_router.loggers import JSONLLogger
from moegeo_router.loggers.jsonl import read_jsonl
from tests.support.ranks import on_two_ranks


class Layer(nn.Module):
    def __init__(self, dim=12, experts=6):
        super().__init__()
        self.gate = nn.Linear(dim, experts)
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(experts))

    def forward(self, x):
        weights, ids = self.gate(x).softmax(-1).topk(2)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return x + (weights[..., None] * outputs.gather(1, ids[..., None].expand(*ids.shape, x.shape[-1]))).sum(1)


def collapsing(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(Layer(), Layer())
    with torch.no_grad():
        model[0].gate.bias[:2] = torch.tensor([5.0, 4.0])
    return model


def batches(steps, seed=1, tokens=96):
    return torch.randn(steps, tokens, 12, generator=torch.Generator().manual_seed(seed))


def config(mode, **changes):
    control = mg.ControlConfig(**{"patience": 8, "settle": 10, **changes})
    return mg.GeometryConfig(top_k=2, renormalize=False, controller=mode, control=control, on_error="raise")


def fit(model, geometry, optimizer, data, *, logger=None, broken=(), first=0):
    events, losses = [], []
    for step, x in enumerate(data, start=first):
        loss = nn.functional.mse_loss(model(x), x.roll(1, -1).tanh())
        if geometry is not None:
            geometry.record_loss(loss)
        losses.append(float(loss.detach()))
        (loss if geometry is None or optimizer is None else loss + geometry.loss()).backward()
        if step in broken:
            model[0].experts[1].weight.grad[0, 0] = math.nan
        optimizer.step()
        optimizer.zero_grad()
        if geometry is not None:
            geometry.metrics()
            events += geometry.events() if logger is None else geometry.log_control(logger, step)
    return events, losses


def decided(events):
    """What a replay comes to again: all but what is said of the run itself."""
    return [event for event in events if event.kind != "notice"]


def attached(mode, model=None, **changes):
    model = collapsing() if model is None else model
    mg.geometrize(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return model, optimizer, mg.attach(model, optimizer, config(mode, **changes))


def test_watching_without_an_optimizer_changes_no_bit():
    plain, watched = collapsing(), collapsing()
    geometry = mg.attach(watched, None, config("observe"))
    stepped = [torch.optim.AdamW(model.parameters(), lr=3e-3) for model in (plain, watched)]
    for x in batches(70):
        for model, optimizer in zip((plain, watched), stepped, strict=True):
            nn.functional.mse_loss(model(x), x.roll(1, -1).tanh()).backward()
            optimizer.step()
            optimizer.zero_grad()
        geometry.metrics()
    assert geometry.events(), "and it sees"
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["observe", "advise"])
def test_a_controller_that_does_not_act_changes_no_bit(mode):
    results = []
    for one in (None, mode):
        model, optimizer, geometry = attached(one)
        events, _ = fit(model, geometry, optimizer, batches(90))
        results.append(model.state_dict())
    assert events
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_acting_balances_a_collapsed_layer_and_the_log_replays_to_the_same(tmp_path, capsys):
    model, optimizer, geometry = attached("act")
    logger = JSONLLogger(tmp_path / "metrics.jsonl")
    events, _ = fit(model, geometry, optimizer, batches(260), logger=logger, broken=(120,))
    logger.close()
    applied = {event.detail["name"] for event in events if event.detail.get("kind") == "apply"}
    assert {"regularizers", "prior"} <= applied
    alone, optimizer_alone, geometry_alone = attached("observe")
    fit(alone, geometry_alone, optimizer_alone, batches(260))
    acted, left = (g.metrics()["geometry/fsi_load"] for g in (geometry, geometry_alone))
    assert acted < left - 0.1
    assert replay.main([str(tmp_path / "metrics.jsonl")]) == 0
    assert replay.main([str(tmp_path)]) == 0  # the run's folder
    assert f"{len(decided(events))} events, the same as in the log" in capsys.readouterr().out
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"mode": "observe", "thresholds": {"fsi": {"warning": 0.99, "critical": 1.0}}}))
    assert replay.main([str(tmp_path / "metrics.jsonl"), "--config", str(other)]) == 0
    assert " fsi " not in capsys.readouterr().out


def test_a_log_that_was_changed_is_told(tmp_path, capsys):
    model, optimizer, geometry = attached("act")
    path = tmp_path / "metrics.jsonl"
    logger = JSONLLogger(path)
    fit(model, geometry, optimizer, batches(70), logger=logger)
    logger.close()
    rows = read_jsonl(path)
    at = next(i for i, row in enumerate(rows) if row.get("event") == "alert")
    events = list(replay.replay(rows))
    rows[at]["text"] = "in other words"
    assert replay.differences(rows, events) == [], "the words of another version"
    for changed in (
        {"severity": "calm"},
        {"optimizer_step": 7},
        {"value": 0.5},
        {"metric": "fhs"},
        {"event": "action"},
    ):
        other = [*rows[:at], rows[at] | changed, *rows[at + 1 :]]
        assert replay.differences(other, events)[0] == "event 1 differs:"
    assert "the replay" in replay.differences(rows, events[:-1])[0]
    (tmp_path / "empty.jsonl").write_text('{"step": 1}\n')
    assert replay.main([str(tmp_path / "empty.jsonl")]) == 2
    assert replay.main([str(tmp_path / "none.jsonl")]) == 2
    assert "no readings of a controller" in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    assert replay.main([str(tmp_path / "folder")]) == 2
    assert "folder/metrics.jsonl" in capsys.readouterr().err


def test_a_broken_step_is_not_taken_and_nothing_else_is_lost():
    model, optimizer, geometry = attached("act")
    fit(model, geometry, optimizer, batches(5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {p: s["exp_avg"].clone() for p, s in optimizer.state.items()}
    events, _ = fit(model, geometry, optimizer, batches(1, seed=5), broken=(0,))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(moments[p], s["exp_avg"]) for p, s in optimizer.state.items())
    assert [event.detail["metric"] for event in events] == ["non_finite"]
    _, losses = fit(model, geometry, optimizer, batches(5))
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("stop", [40, 75, 130])
def test_a_resumed_run_decides_as_the_unbroken_one(stop):
    data = batches(200)
    model, optimizer, geometry = attached("act")
    whole, losses = fit(model, geometry, optimizer, data)
    assert {event.detail.get("kind") for event in whole} >= {"apply", "undo"}
    model, optimizer, geometry = attached("act")
    first, _ = fit(model, geometry, optimizer, data[:stop])
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "geometry": geometry.state_dict()}
    torch.save(saved, buffer := io.BytesIO())
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    model, optimizer, geometry = attached("act")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    geometry.load_state_dict(saved["geometry"])
    second, rest = fit(model, geometry, optimizer, data[stop:], first=stop)
    assert [*first, *second] == whole
    assert rest == losses[stop:]


def _train_one_rank(rank, folder):
    model, optimizer, geometry = attached("act")
    model = nn.parallel.DistributedDataParallel(model)
    lines = []
    for step, x in enumerate(batches(130, seed=rank, tokens=48)):
        loss = geometry.record_loss(nn.functional.mse_loss(model(x), x.roll(1, -1).tanh()))
        (loss + geometry.loss()).backward()
        if rank == 1 and step == 20:
            optimizer.param_groups[0]["params"][0].grad[0] = math.nan
        optimizer.step()
        optimizer.zero_grad()
        geometry.metrics()
        lines += [event.line for event in geometry.events()]
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    torch.save((lines, weights), f"{folder}/{rank}.pt")


def test_two_ranks_with_different_data_decide_alike(tmp_path):
    on_two_ranks(_train_one_rank, tmp_path, str(tmp_path))
    (lines, weights), (others, other_weights) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert lines == others
    assert any("non_finite" in line for line in lines), "broken on one rank, skipped on both"
    assert any(line.startswith("regularizers against") for line in lines)
    assert torch.equal(weights, other_weights)


def test_a_revival_weighs_hidden_gates_as_the_configuration_says(monkeypatch):
    given, place_row = [], revive.place_row
    monkeypatch.setattr(revive, "place_row", lambda *rows, **how: given.append(how) or place_row(*rows, **how))
    only = dict.fromkeys(FAILURES, ()) | {"silent capacity loss": ("revive",)}
    model, optimizer, geometry = attached("act", ladders=only, thresholds={"dead_fraction": {"warmup": 5}})
    fit(model, geometry, optimizer, batches(15))
    assert given
    assert not any(how["renormalize"] for how in given), "the toy's gates are not over their sum"


def test_frozen_routers_are_only_watched():
    model = collapsing()
    mg.geometrize(model)
    for layer in model:
        layer.gate.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    with pytest.warns(UserWarning, match="every router is frozen"):
        geometry = mg.attach(model, optimizer, config("act"))
    events, _ = fit(model, geometry, optimizer, batches(80))
    assert {event.kind for event in events if event.layer != "run"} <= {"alert", "outcome"}
    assert not [event for event in events if event.detail.get("kind") == "apply"]


def test_mistakes_are_one_error():
    with pytest.raises(ValueError, match="controller must be 'observe', 'advise', 'act' or None"):
        mg.GeometryConfig(controller="on")
    with pytest.raises(ValueError, match="no intervention 'magic'"):
        attached("act", ladders={"divergence": ("magic",)})
    with pytest.raises(ValueError, match="no failure"):
        mg.ControlConfig(ladders={"bad luck": ()})
    with pytest.raises(ValueError, match="patience must be a whole number"):
        mg.ControlConfig(patience=1.5)
    _, _, geometry = attached("act")
    with pytest.raises(ValueError, match="loss must be a scalar"):
        geometry.record_loss(torch.ones(3))


def test_losses_are_not_kept_after_detach():
    model, optimizer, geometry = attached("observe")
    fit(model, geometry, optimizer, batches(2))
    geometry.record_loss(torch.ones(()))  # of a step that did not end
    geometry.detach()
    kept = len(geometry._control._losses)
    for _ in range(5):
        assert geometry.record_loss(loss := torch.ones(())) is loss
    assert len(geometry._control._losses) == kept


def test_one_expert_no_tokens_and_bf16_are_no_news():
    torch.manual_seed(0)
    model = nn.Sequential(Layer(experts=2)).bfloat16()
    mg.geometrize(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    geometry = mg.attach(model, optimizer, config("act"))
    for x in batches(60).bfloat16():
        (model(x).square().mean() + geometry.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not [event for event in geometry.events() if event.level == "error"]


class Unknown(torch.optim.SGD):
    """An optimizer with moments of a shape that nobody knows."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sketch"] = torch.zeros(3)
        return super().step(closure)


def test_what_can_be_done_is_logged_as_it_was_found_at_the_first_step(tmp_path):
    model = collapsing()
    mg.geometrize(model)
    optimizer = Unknown(model.parameters(), lr=1e-2)
    geometry = mg.attach(model, optimizer, config("act"))
    logger = JSONLLogger(tmp_path / "metrics.jsonl")
    geometry.log_control(logger, 0)  # an accelerator's first reading comes a step later
    fit(model, geometry, optimizer, batches(2), logger=logger)
    logger.close()
    (row,) = [row for row in read_jsonl(logger.path) if row.get("event") == "controller"]
    assert row["available"] == {name: list(names) for name, names in geometry._control.available.items()}
    assert "revive" not in row["available"]["0.gate"]


def test_what_cannot_be_done_is_said_once_with_the_reason():
    model = collapsing()
    mg.geometrize(model)
    optimizer = Unknown(model.parameters(), lr=1e-2)
    geometry = mg.attach(model, optimizer, config("act"))
    events, _ = fit(model, geometry, optimizer, batches(4))
    (notice,) = [event for event in events if event.kind == "notice"]
    assert "revive in 2 of 2 layers (the optimizer's moments cannot be reset: Unknown's state 'sketch'" in notice.line
    assert "router_lr in 2 of 2 layers (stepped naturally" in notice.line
    assert notice.level == "info"
    loop = geometry._control
    assert "revive" not in loop.available["0.gate"]

    state = geometry.state_dict()
    geometry.detach()
    fresh = mg.attach(model, optimizer, config("act"))
    fresh.load_state_dict(state)
    assert fresh._control.available == loop.available
    assert not fresh.events(), "not once more"
