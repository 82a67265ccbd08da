"""The two runs side by side: both are shown, what the controller did is in the picture, and a death is told."""

import math

import pytest
from PIL import Image

from tests.support.runs import TINY
from trainers import rescue
from trainers.rescue import RUNS, Course, report, show, watch
from trainers.rescue_picture import _top, actions, draw
from trainers.studies.runs import Run, StudyError, configurations

#: As collapsing as the real one, and small.
SMALL = [
    *TINY["language"],
    "router=linear",
    "optimizer=adamw",
    "optimizer.router_lr=0.5",
    "geometry.control.thresholds={logit_scale: {warning: 3.0, critical: 4.0, warmup: 2}}",
    "geometry.control.patience=4",
    "geometry.control.settle=4",
    "loop.steps=24",
    "loop.warmup=2",
]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    configs = configurations(Run(name, [*SMALL, switch], {}) for name, switch in RUNS.items())
    return show(watch(configs, tmp_path_factory.mktemp("rescue")), 24)


def test_two_real_runs_are_the_same_until_the_controller_acts(watched):
    without, with_ = watched
    assert [len(course.scalars["loss"]) for course in watched] == [24, 24]
    done = actions(with_)
    assert done
    assert not actions(without)
    assert not without.messages
    first = done[0]["step"]
    assert without.scalars["loss"][:first] == with_.scalars["loss"][:first]
    assert without.scalars["loss"] != with_.scalars["loss"]
    assert any(done[0]["name"] in line for _, line in with_.messages)
    for course in watched:
        assert all(map(math.isfinite, course.scalars["FSI, worst layer"]))


def test_the_report_and_the_picture_are_of_these_runs(watched, tmp_path):
    lines = report(watched).splitlines()
    losses = [course.outcome["results"]["valid/loss"] for course in watched]
    assert lines[1].split()[-2:] == [f"{loss:.4f}" for loss in losses]
    draw(watched, tmp_path / "rescue.png")
    with Image.open(tmp_path / "rescue.png") as picture:
        assert picture.width > 500
        assert len(picture.convert("RGB").getcolors(2**24)) > 50


def test_dead_experts_are_those_of_the_layers_and_not_of_the_worst_once_more():
    course = Course()
    course.add({"train/loss": 2.0, "geometry/a/dead_fraction": 0.0, "geometry/b/dead_fraction": 0.5})
    course.add({"train/loss": 2.0, "geometry/dead_fraction": 0.5} | dict.fromkeys(["geometry/a/dead_fraction"], 0.0))
    assert course.scalars["dead experts"] == [0.25, 0.0]


@pytest.mark.parametrize("losses", [[5.0, 4.0, 3.0], [5.0, math.nan, *[4.0] * 40], [5.0] * 30 + [math.inf]])
def test_short_and_broken_runs_have_a_picture(losses, tmp_path):
    courses = [Course(), Course()]
    for course in courses:
        for loss in losses:
            course.add({"train/loss": loss})
        course.outcome = {"events": []}
    assert 3.0 < _top(courses) <= 5.0
    draw(courses, tmp_path / "rescue.png")
    assert (tmp_path / "rescue.png").exists()


def test_an_order_that_was_refused_is_no_action():
    course = Course()
    identity = {"step": 9, "layer": "gate", "name": "rollback", "failure": "divergence"}
    other = identity | {"name": "speed"}
    events = [
        identity | {"kind": "apply"},
        identity | {"kind": "apply", "reason": "no snapshot"},
        other | {"kind": "apply"},
        other | {"kind": "undo", "step": 20},
    ]
    course.outcome = {"events": events}
    assert [(event["name"], event["ended"]) for event in actions(course)] == [("speed", "undo")]


def test_a_run_that_diverges_is_reported_and_one_that_fails_is_an_error():
    courses = [Course(), Course()]
    courses[0].outcome = {"status": "diverged", "results": {}, "events": []}
    courses[1].outcome = {"status": "done", "results": {"valid/loss": 2.0}, "events": []}
    assert report(courses).splitlines()[1].split()[-2:] == ["diverged", "2.0000"]
    courses[1].outcome = {"status": "failed", "reason": "no memory", "results": {}, "events": []}
    with pytest.raises(StudyError, match="no memory"):
        report(courses)


def test_a_process_that_dies_is_told_and_takes_the_other_with_it(tmp_path):
    configs = configurations(Run(name, [*SMALL, "loop.steps=100000"], {}) for name in RUNS)
    configs[1]["data"]["_target_"] = "tests.support.studies.killed"
    with pytest.raises(StudyError, match="died"):
        for _ in watch(configs, tmp_path):
            pass


@pytest.mark.parametrize("name", ["", "picture", "picture.xyz", "file/picture.png"])
def test_a_picture_that_cannot_be_written_is_told_before_the_training(name, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(rescue, "watch", lambda *_: pytest.fail("it trains"))
    with pytest.raises(SystemExit) as stopped:
        rescue.main(["--picture", str(tmp_path / name)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_a_mistaken_override_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        rescue.main(["loop.stepps=3"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "loop.stepps" in said
    assert said.count("\n") == 1
