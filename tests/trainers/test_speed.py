"""The speed table: pairs, ratios and verdicts; the speeds themselves are for ``make bench``, not for a test."""

import time

import pytest
import torch

import moegeo_router as mg
from moegeo_router.control.controller import Event
from trainers import speed, speed_arms
from trainers.loop import Trainer
from trainers.models.experts import SwiGLUExperts
from trainers.pairs import Comparison, Measurement, Part, measure
from trainers.speed import (
    DIM,
    HIDDEN,
    ModuleListExperts,
    compare_controller,
    compare_experts,
    compare_natural_step,
    compare_router,
    compare_traces,
    compare_training,
    compare_watching,
    compare_wide_natural_step,
    main,
    part_of_controller,
    table,
)
from trainers.studies.benchmark import ARMS

torch.set_num_threads(1)


def _measurement(ours: tuple[float, ...], theirs: tuple[float, ...], goal: float | None = None) -> Measurement:
    comparison = Comparison(name="row", ours=lambda: None, theirs=lambda: None, goal=goal)
    return Measurement(comparison=comparison, ours=ours, theirs=theirs)


def test_ratio_is_the_median_of_pairs_and_more_is_faster():
    measurement = _measurement((1.0, 1.0, 2.0), (3.0, 2.0, 2.0))
    assert measurement.ratios == [3.0, 2.0, 1.0]
    assert measurement.ratio == 2.0


@pytest.mark.parametrize(("goal", "met"), [(None, None), (2.0, True), (2.1, False)])
def test_goal(goal, met):
    assert _measurement((1.0,), (2.0,), goal).met is met


def test_sides_take_turns_and_swap_the_first_place():
    calls = []
    now = [0.0]

    def side(name: str, seconds: float):
        def call() -> None:
            calls.append(name)
            now[0] += seconds

        return call

    comparison = Comparison(name="row", ours=side("A", 1.0), theirs=side("B", 3.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: now[0])
        measurement = measure(comparison, 3, lambda: None)
    assert "".join(calls) == "AABB" + "B" + "AB" + "BA" + "AB"  # warm-up, calibration, three pairs
    assert measurement.ours == (1.0, 1.0, 1.0)
    assert measurement.theirs == (3.0, 3.0, 3.0)


def test_short_calls_are_repeated_within_a_sample():
    calls = []
    now = [0.0]

    def call() -> None:
        calls.append(1)
        now[0] += 0.025

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: now[0])
        measurement = measure(Comparison(name="row", ours=call, theirs=call), 1, lambda: None)
    assert len(calls) == 4 + 1 + 2 * 4  # 4 calls of 25 ms make a sample of 100 ms
    assert measurement.ours == pytest.approx((0.025,))


def test_device_is_waited_for_before_and_after_every_timed_call():
    waits = []
    measure(Comparison(name="row", ours=lambda: None, theirs=lambda: time.sleep(0.1)), 1, lambda: waits.append(1))
    assert len(waits) == 2 * (1 + 2)


class Clock:
    """Time that passes only in work: one second inside of a part of it, three outside."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def inside(self) -> None:
        self.now += 1

    def work(self) -> None:
        self.inside()
        self.now += 3


def test_a_part_is_timed_inside_of_its_work(monkeypatch):
    made, inside = [], Clock.inside

    def build():
        made.append(Clock())
        monkeypatch.setattr(time, "perf_counter", made[0])
        made[0].work()  # a warm-up that does not count
        return made[0].work

    part = Part(name="row", build=build, functions=[(Clock, "inside")], calls=2, goal=4.0)
    measurement = measure(part, 3, lambda: None)
    assert (measurement.ours, measurement.theirs) == ((1.0,) * 3, (4.0,) * 3)
    assert measurement.met
    assert made[0].now == 4 * (2 + 3 * 2)
    assert Clock.inside is inside
    with pytest.raises(ZeroDivisionError):
        measure(Part(name="row", build=lambda: 1 / 0, functions=[(Clock, "inside")]), 1, lambda: None)
    assert Clock.inside is inside


def test_no_repeats_is_an_error():
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measure(Comparison(name="row", ours=int, theirs=int), 0, lambda: None)


def test_table_shows_times_ratio_range_and_verdict():
    header, first, second = table(
        [_measurement((0.001, 0.001, 0.002), (0.003, 0.002, 0.002), 2.5), _measurement((0.002,), (0.004,))]
    ).splitlines()
    assert header.split() == ["ours", "ms", "theirs", "ms", "ratio", "min..max", "goal"]
    assert first.split() == ["row", "1.000", "2.000", "2.00", "1.00..3.00", "2.50", "MISSED"]
    assert second.split() == ["row", "2.000", "4.000", "2.00", "2.00..2.00", "-"]


def test_both_routers_and_both_expert_layers_compute_the_same():
    torch.manual_seed(0)
    router = compare_router(torch.device("cpu"))
    assert torch.equal(router.ours(), router.theirs())
    experts = compare_experts(torch.device("cpu"), 3, "loop", goal=None)
    for ours, theirs in zip(experts.ours(), experts.theirs(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_separate_experts_compute_the_same():
    torch.manual_seed(0)
    stacked, separate = SwiGLUExperts(3, DIM, HIDDEN), ModuleListExperts(3)
    with torch.no_grad():
        for index, expert in enumerate(separate.experts):
            for name in ("w_gate", "w_up", "w_down"):
                getattr(expert, name).weight.copy_(getattr(stacked, name)[index].T)
    x_TD = torch.randn(7, DIM)
    weights_TK, ids_TK = torch.rand(7, 2), torch.tensor([[0, 1], [2, 0]] * 3 + [[1, 2]])
    torch.testing.assert_close(separate(x_TD, weights_TK, ids_TK), stacked(x_TD, weights_TK, ids_TK))


def test_both_training_steps_start_from_the_same_loss():
    torch.manual_seed(0)
    comparison = compare_training(torch.device("cpu"), batch_size=1)
    assert comparison.ours()["train/loss"] == pytest.approx(comparison.theirs().item(), abs=1e-5)


def test_what_is_watched_is_the_same_training_step():
    watched = compare_watching(torch.device("cpu"), batch_size=1)
    found = watched.ours()
    assert {"geometry/fsi", "geometry/fhs", "geometry/max_violation", "geometry/regularizer"} <= found.keys()
    assert watched.theirs().isfinite()
    traces = compare_traces(torch.device("cpu"), batch_size=1)
    ours, theirs = traces.ours(), traces.theirs()
    assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-6)
    assert "geometry/fhs" in ours
    assert "geometry/fhs" not in theirs


@pytest.mark.parametrize("mode", ["observe", "act"])
def test_a_controller_that_has_nothing_to_do_is_timed_in_the_same_training_step(mode):
    comparison = compare_controller(torch.device("cpu"), mode, batch_size=1)
    for _ in range(2):
        assert comparison.ours()["train/loss"] == pytest.approx(comparison.theirs()["train/loss"], rel=1e-6)
    measurement = measure(part_of_controller(torch.device("cpu"), mode, batch_size=1, warm=1), 2, lambda: None)
    assert all(0 < ours < theirs for ours, theirs in zip(measurement.ours, measurement.theirs, strict=True))


def test_a_step_in_which_the_controller_acts_is_no_healthy_one(monkeypatch):
    action = Event(kind="action", level="warning", step=1, layer="a", title="", line="speed in a")
    monkeypatch.setattr(mg.Geometry, "events", lambda self: [action])
    with pytest.raises(RuntimeError, match="not a healthy one: speed in a"):
        part_of_controller(torch.device("cpu"), "act", batch_size=1, warm=1).build()


def test_the_natural_steps_that_are_timed_move_the_routers():
    for comparison, routers in (
        (compare_natural_step(torch.device("cpu"), width=32, batch_size=1), 4),
        (compare_wide_natural_step(torch.device("cpu"), width=32, num_experts=4), 1),
    ):
        movement = comparison.ours()
        assert len(movement.moved) == routers
        assert ((movement.moved > 0) & (movement.moved <= 0.015)).all()
        comparison.theirs()


def test_command_prints_a_row_for_every_comparison(capsys, monkeypatch):
    rows = [Comparison(name=name, ours=lambda: None, theirs=lambda: time.sleep(0.1)) for name in ("first", "second")]
    monkeypatch.setattr(speed, "comparisons", lambda device: rows)
    main(["--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["first", "second"]
    main(["--repeats", "1", "--only", "sec"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["second"]


@pytest.mark.slow
def test_command_measures_everything(capsys):
    main(["--repeats", "1"])
    output = capsys.readouterr().out
    for row in ("router forward, 8 experts", "expert layer forward + backward, 32 experts", "training step"):
        assert row in output


def test_missing_accelerator_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_arms_of_the_benchmark_are_measured_in_their_own_runs():
    toy = (*speed_arms.SIZE, "model.dim=16", "size.expert_hidden=8", "size.dense_hidden=16", "data.documents=100")
    rows = list(speed_arms.rows(torch.device("cpu"), toy))
    assert [row.name.split(", ", 1)[1].removesuffix(" vs linear, Switch loss") for row in rows] == [
        ARMS[arm].title for arm in ARMS if arm != "linear_switch"
    ]
    assert len({id(row.theirs) for row in rows}) == 1
    with pytest.MonkeyPatch.context() as patch:
        stepped: list[Trainer] = []
        own = Trainer.train_step
        patch.setattr(Trainer, "train_step", lambda self, batch: stepped.append(self) or own(self, batch))
        rows[3].ours()
        rows[3].theirs()
        rows[3].ours()
    assert [trainer.step for trainer in dict.fromkeys(stepped)] == [2 * speed_arms.STEPS, speed_arms.STEPS]
    assert [trainer.geometry.config.step for trainer in dict.fromkeys(stepped)] == ["natural", None]
