"""A training that goes wrong, repaired by the controller and killed on the way, decides as the unbroken one."""

import random
import time

import pytest
import torch

from moegeo_router import replay
from moegeo_router.control.thresholds import THRESHOLDS
from tests.support.processes import start, wait_for_rows
from tests.support.runs import Killed, after_step, kill, rows, tiny, tiny_overrides
from trainers import checkpoint
from trainers.train import train

STEPS = 100
#: Alarms of every kind, which are soon acted on.
HASTY = (
    "controller=act",
    "geometry.on_error=raise",
    f"geometry.control.thresholds={{{','.join(f'{row.metric}:{{warmup:5}}' for row in THRESHOLDS)}}}",
    "geometry.control.patience=4",
    "geometry.control.settle=6",
    "geometry.control.release_after=15",
    "geometry.control.snapshot_every=3",
    f"loop.steps={STEPS}",
    "loop.checkpoint_every=7",
)
#: What goes wrong, and the ladders, with what is hardest to continue on their first rungs.
FAULTS = {
    # From the beginning, so that nothing is ever healthy: without a snapshot a rollback is refused.
    "bad_init": (
        "fault=bad_init",
        "router=polar",
        "geometry.control.ladders={expert collapse:[revive,regularizers,rollback],silent capacity loss:[revive,prior],"
        "brittle specialization:[speed,temperature,rollback],inference bottleneck:[temperature,regularizers],"
        "divergence:[speed,temperature,router_lr,rollback]}",
    ),
    # After a healthy beginning, to which it goes back.
    "row_drift": (
        *("fault=row_drift", "fault.step=30", "fault.speed=1.0"),
        *("router=linear", "optimizer=adamw"),
        "geometry.control.ladders={expert collapse:[rollback,router_lr,regularizers,rollback],"
        "inference bottleneck:[rollback,regularizers],divergence:[router_lr,rollback]}",
    ),
}
#: What must have been done for the test to be worth something.
DONE = {"bad_init": {"revive", "temperature", "speed"}, "row_drift": {"rollback", "router_lr", "regularizers"}}


def decisions(directory):
    made = [row for row in rows(directory) if row.get("event") in ("action", "outcome")]
    return [(row["optimizer_step"], row["layer"], row["kind"], row["name"]) for row in made]


def assert_same_run(directory, unbroken):
    assert decisions(directory) == decisions(unbroken)
    assert rows(directory) == rows(unbroken)
    (one, _), (other, _) = (checkpoint.latest(folder / "checkpoints") for folder in (directory, unbroken))
    assert one.model.keys() == other.model.keys()
    assert all(torch.equal(value, other.model[name]) for name, value in one.model.items())


@pytest.fixture(scope="module", params=list(FAULTS))
def unbroken(request, tmp_path_factory):
    """The overrides of a run, and the folder in which it went through."""
    overrides, directory = (*HASTY, *FAULTS[request.param]), tmp_path_factory.mktemp("unbroken") / "run"
    train(tiny(directory, *overrides))
    done = {row["name"] for row in rows(directory) if row.get("kind") == "apply" and "done" in row}
    assert done >= DONE[request.param]
    return overrides, directory


def test_killed_between_steps_it_decides_as_the_unbroken_run(tmp_path, unbroken):
    overrides, whole = unbroken
    for stop in sorted(random.Random(3).sample(range(1, STEPS), 3)):
        with after_step(stop, kill), pytest.raises(Killed):
            train(tiny(tmp_path / "run", *overrides))
    train(tiny(tmp_path / "run", *overrides))
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_killed_at_any_moment_it_decides_as_the_unbroken_run(tmp_path, unbroken, capsys):
    overrides, whole = unbroken
    directory, moments, killed = tmp_path / "run", random.Random(1), []
    command, last = tiny_overrides(directory, *overrides), len(rows(whole))
    for count in sorted(moments.sample(range(5, last - 40), 4)):
        reached = len(rows(directory)) if killed else 0
        process = start(*command)
        wait_for_rows(directory, process, max(count, reached + 5))  # not in the same place again
        time.sleep(0.05 * moments.random())
        process.kill()
        process.communicate()
        killed.append(process.returncode)
    assert killed == [-9] * 4, "a kill came too late to test anything"
    process = start(*command)
    output, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert "continuing run after step" in output
    assert_same_run(directory, whole)
    assert replay.main([str(directory / "metrics.jsonl")]) == 0
    assert "the same as in the log" in capsys.readouterr().out
