"""Studies: the numbers of a run, worker processes that die, and the statistics."""

import errno
import itertools
import json
import math
import multiprocessing
import os
import subprocess
import threading

import pytest
import torch
from scipy import stats

from moegeo_router.loggers import read_jsonl
from tests.support.runs import tiny
from tests.support.studies import broken_data, done_at_once, study, tiny_run
from trainers.studies import runner
from trainers.studies.intervals import mean_interval, paired_difference, share_interval
from trainers.studies.origin import commit
from trainers.studies.rows import read_rows
from trainers.studies.runner import Study, run_study
from trainers.studies.runs import (
    CURVE_POINTS,
    DataCache,
    StudyError,
    configurations,
    train_run,
    training_curve,
    training_results,
)
from trainers.studies.workers import READY, _WhileParentLives, work
from trainers.train import train

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def config():
    return configurations([tiny_run("tiny", "data.seed=0")])[0]


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.5, 0.95])
@pytest.mark.parametrize("values", [(1.0, 2.0), (1.7, 1.9, 1.8, 2.4), (3.0, 3.0, 3.0)])
def test_mean_interval_is_students(values, confidence):
    found = mean_interval(values, confidence)
    scale = stats.sem(values)
    low, high = stats.t.interval(confidence, len(values) - 1, loc=sum(values) / len(values), scale=scale or 1)
    assert found.mean == pytest.approx(sum(values) / len(values))
    assert (found.low, found.high) == pytest.approx((low, high) if scale else (3.0, 3.0))
    assert found.n == len(values)


def test_interval_of_two_values_in_closed_form():
    # With one degree of freedom the quantile is tan(π (q - 1/2)), and the standard error |a - b| / 2.
    assert mean_interval([1.0, 2.0]).half_width == pytest.approx(math.tan(math.pi * 0.475) / 2)


def test_a_single_value_has_no_interval():
    found = mean_interval([2.0])
    assert found.mean == 2.0
    assert all(math.isnan(value) for value in (found.half_width, found.low, found.high))


def test_shares_stay_within_0_and_1():
    found = share_interval([0.0, 0.0, 0.25])
    assert found.low == 0.0
    assert found.high == pytest.approx(mean_interval([0.0, 0.0, 0.25]).high)
    assert share_interval([1.0, 1.0, 0.75]).high == 1.0


def test_paired_difference_is_the_paired_t_test_over_common_seeds():
    ours, theirs = {0: 1.7, 1: 1.9, 2: 1.8, 7: 9.0}, {0: 1.8, 1: 1.95, 2: 1.81, 3: 0.0}
    found = paired_difference(ours, theirs)
    expected = stats.ttest_rel([1.7, 1.9, 1.8], [1.8, 1.95, 1.81]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.n == 3
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    "call",
    [lambda: mean_interval([]), lambda: mean_interval([1.0], 1.0), lambda: share_interval([0.5, 1.5])],
    ids=["empty", "confidence", "share"],
)
def test_statistics_refuse_what_has_no_answer(call):
    with pytest.raises(ValueError, match="expected"):
        call()


# --- one run ----------------------------------------------------------------------------------------------------------


def test_a_run_is_that_of_the_trainer_and_always_the_same(config, tmp_path, capsys):
    cache = DataCache()
    first = train_run(config, tmp_path / "first", cache)
    assert (first["status"], first["reason"], first["warnings"]) == ("done", None, [])
    torch.randn(7)
    second = train_run(config, tmp_path / "second", cache)  # its data are there already
    for clock in ("train/tokens_per_second", "train/step_ms"):
        assert first["results"].pop(clock) != second["results"].pop(clock)
    assert first["results"] == second["results"]
    assert first["curve"] == second["curve"]

    train(tiny(tmp_path / "run", "data.seed=0", "geometry.per_layer=true"))
    log = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert "step" in log[-1]
    targets = {name: value for name, value in first["results"].items() if name.endswith("/targets")}
    assert set(targets) == {f"valid/domain/source{source}/targets" for source in range(4)}
    assert sum(targets.values()) == 132 - 1  # the last token has none that follows
    for name, value in first["results"].items():
        if name.startswith("valid/") and name not in targets:
            assert value == pytest.approx(log[-1][name], rel=1e-6), name
    last = [row["train/loss"] for row in log if "train/loss" in row]
    assert first["results"]["train/loss"] == pytest.approx(sum(last) / len(last), rel=1e-6)
    assert {"valid/geometry/layer1/dead_experts", "valid/bits_per_byte", "train/dead_share"} <= first["results"].keys()
    assert train_run(config | {"seed": 1}, tmp_path / "third", cache)["results"] != first["results"]


def test_a_diverging_run_says_where_and_keeps_its_training(config, tmp_path):
    config = config | {"optimizer": config["optimizer"] | {"lr": 1e20}}
    found = train_run(config, tmp_path, DataCache())
    assert found["status"] == "diverged"
    assert "NaN or inf" in found["reason"]
    assert str(tmp_path) not in found["reason"]
    assert 0 < found["results"]["train/steps"] < 12
    assert found["curve"]["steps"][-1] == found["results"]["train/steps"]
    json.dumps(found, allow_nan=False)


def test_a_run_that_raises_is_a_failed_one(config, tmp_path):
    config = config | {"model": config["model"] | {"top_k": 9}}
    found = train_run(config, tmp_path, DataCache())
    assert found["status"] == "failed"
    assert found["reason"].startswith("ValueError: ")
    assert "\n" not in found["reason"]
    assert found["results"] == {}


def test_warnings_of_a_run_are_in_its_row(config, tmp_path):
    config = config | {"model": config["model"] | {"top_k": 1}}  # with renormalised gates
    assert any("gradient" in line for line in train_run(config, tmp_path, DataCache())["warnings"])


def test_training_numbers_come_from_the_last_steps_and_all_layers():
    rows = [
        {
            "train/loss": 5.0 if step == 6 else 1.0 + step / 100,
            "train/tokens_per_second": float(step),
            "geometry/dead_fraction": 1.0,  # the worst layer's
            "geometry/layer0/dead_fraction": 1.0 if step < 20 else 0.25,
            "geometry/layer1/dead_fraction": 0.0,
            "geometry/movement": float(step),
        }
        for step in range(40)
    ]
    found = training_results([*rows, {"valid/loss": 1.0}])
    assert found["train/steps"] == 40
    assert found["train/loss"] == pytest.approx(1.295)
    assert found["train/dead_share"] == pytest.approx(0.125)
    assert found["train/loss_spike"] == pytest.approx(5.0 - 1.025)
    assert found["train/tokens_per_second"] == 19.5
    assert found["train/mean/geometry/movement"] == 19.5
    assert "train/mean/geometry/limited" not in found
    assert training_results([]) == {"train/steps": 0}
    assert not {"train/step_ms", "train/tokens_seen"} & found.keys()
    timed = [rows[0] | {"train/tokens": 50.0, "train/tokens_per_second": speed} for speed in (1, 5, 25)]
    found = training_results(timed)
    assert (found["train/step_ms"], found["train/tokens_seen"]) == (10_000, 150)


def test_a_curve_has_the_means_since_the_point_before():
    rows = [
        {"train/loss": float(step), "train/tokens": 10.0, "geometry/max_violation": 2.0 * step}
        | ({"geometry/dispersion_1": 0.5} if step else {})
        for step in range(7)
    ]
    found = training_curve([*rows[:3], {"valid/loss": 99.0}, *rows[3:]])
    assert found["steps"] == list(range(1, 8))
    assert found["tokens"] == [10 * step for step in range(1, 8)]
    assert found["loss"] == [float(step) for step in range(7)]
    assert found["max_violation"] == [2.0 * step for step in range(7)]
    assert found["dispersion"] == [None, *[0.5] * 6]
    assert found["dead_fraction"] == [None] * 7
    assert training_curve([{"valid/loss": 1.0}]) == {}


@pytest.mark.parametrize("steps", [100, 250, 1037])
def test_a_curve_has_a_hundred_points_that_hold_every_step_once(steps):
    source = torch.Generator().manual_seed(0)
    loss, tokens = torch.rand(steps, generator=source), torch.randint(100, (steps,), generator=source)
    rows = zip(loss.tolist(), tokens.tolist(), strict=True)
    found = training_curve([{"train/loss": a, "train/tokens": b} for a, b in rows])
    assert {len(column) for column in found.values()} == {CURVE_POINTS}
    assert found["tokens"][-1] == int(tokens.sum())
    sizes = [b - a for a, b in itertools.pairwise([0, *found["steps"]])]
    assert max(sizes) - min(sizes) <= 1
    weighed = sum(size * mean for size, mean in zip(sizes, found["loss"], strict=True)) / steps
    assert weighed == pytest.approx(float(loss.mean()), abs=1e-5)
    middle = found["steps"][42]
    assert found["tokens"][42] == int(tokens[:middle].sum())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loop.stepz=3", "wrong: Could not override 'loop.stepz'."),
        ("optimizer=cubic", "wrong: In 'train': Could not find 'optimizer/cubic'"),
        ("loop.steps=???", "wrong: Missing mandatory value: steps"),
    ],
)
def test_mistaken_overrides_are_found_before_anything_runs(override, message):
    with pytest.raises(StudyError) as raised:
        configurations([tiny_run("right"), tiny_run("wrong", override)])
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


# --- processes --------------------------------------------------------------------------------------------------------


def test_a_study_goes_on_whatever_its_runs_do(tmp_path):
    runs = [
        tiny_run("killed", broken_data("killed")),
        tiny_run("killed-once", broken_data("killed_once"), f"+data.name={tmp_path / 'marker'}"),
        tiny_run("diverged", "optimizer.lr=1e20"),
        tiny_run("failed", "model.top_k=9"),
        tiny_run("done", "seed=3", arm="x"),
    ]
    said: list[str] = []
    rows = {found["key"]: found for found in run_study(study(tmp_path, runs), said.append)}
    assert {key: found["status"] for key, found in rows.items()} == {
        "killed": "failed",
        "killed-once": "done",
        "diverged": "diverged",
        "failed": "failed",
        "done": "done",
    }
    assert rows["killed"]["reason"] == "the worker process was killed by signal 9, out of memory?, 2 times"
    done = rows["done"]
    assert (done["study"], done["labels"], done["seed"], done["command"]) == ("test", {"arm": "x"}, 3, "a command")
    assert done["configuration"]["seed"] == 3
    assert {"commit", "versions", "hardware", "started", "seconds", "data", "overrides"} <= done.keys()
    lines = [line for line in said if line.startswith("[")]
    assert [line.split()[0] for line in lines] == [f"[{n}/5]" for n in range(1, 6)]
    assert any(line.startswith("[5/5]") and line.endswith("0 min 00 s left") for line in lines)
    assert said[-1] == "2 runs failed, their rows say why; --retry-failed runs them again"

    # Again: nothing is left to do, and no process is started for it.
    before = (tmp_path / "rows.jsonl").read_bytes()
    said.clear()
    run_study(study(tmp_path, runs), said.append)
    assert said[0].startswith("test: 5 runs, 5 of them done before")
    assert (tmp_path / "rows.jsonl").read_bytes() == before

    with pytest.raises(StudyError, match=r"rows\.jsonl holds done with other settings \(loop.steps: 12 then, 13 now\)"):
        run_study(study(tmp_path, [tiny_run("done", "seed=3", "loop.steps=13")]), said.append)
    with pytest.raises(StudyError, match="holds rows of the study test: take another --out"):
        run_study(Study(name="other", runs=runs[4:], path=tmp_path / "rows.jsonl", command=""), said.append)
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_a_failed_run_leaves_its_process_to_nobody(tmp_path):
    runs = [tiny_run("first", broken_data("spoils")), tiny_run("second", broken_data("spoilt"))]
    first, second = run_study(study(tmp_path, runs, processes=1), lambda line: None)
    assert (first["status"], first["reason"]) == ("failed", "ValueError: an illegal memory access")
    assert second["status"] == "done", second["reason"]


def test_ctrl_c_says_how_to_continue_and_a_full_disk_ends_the_study(tmp_path, monkeypatch):
    runs = [tiny_run(str(seed), f"seed={seed}") for seed in range(3)]
    said: list[str] = []

    def interrupted(line: str) -> None:
        said.append(line)
        if line.startswith("[1/3]"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(study(tmp_path, runs, processes=1), interrupted)
    assert said[-1] == f"stopped; 1 of 3 runs are in {tmp_path / 'rows.jsonl'}; the same command continues"
    assert multiprocessing.active_children() == []
    assert [found["key"] for found in read_rows(tmp_path / "rows.jsonl")] == ["0"]

    runs.insert(1, tiny_run("full", broken_data("disk_full")))
    with pytest.raises(StudyError, match=r"the folder of temporary files \(.*\) is full"):
        run_study(study(tmp_path, runs, processes=1), said.append)
    assert multiprocessing.active_children() == []


def test_rows_that_cannot_be_written_end_the_study_in_one_line(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(runner, "Workers", done_at_once(1, lambda: monkeypatch.setattr(os, "fsync", full)))
    message = r"cannot write to .*rows\.jsonl: No space left on device; the rows before are whole; go on so"
    with pytest.raises(StudyError, match=message):
        run_study(study(tmp_path, [tiny_run("a")], fresh=True, resume="go on so"), lambda line: None)


def test_a_worker_answers_until_the_study_is_gone(config, tmp_path):
    ours, theirs = multiprocessing.Pipe()
    ours.send(config)
    ours.send(config | {"data": config["data"] | {"_target_": "tests.support.studies.disk_full"}})
    messages = []

    def listen() -> None:
        messages.extend(ours.recv() for _ in range(3))
        ours.close()

    thread = threading.Thread(target=listen)
    thread.start()
    work(theirs, os.getppid(), str(tmp_path))
    thread.join()
    assert messages[0] == READY
    assert messages[1]["status"] == "done"
    assert messages[2] == f"the folder of temporary files ({tmp_path}) is full"
    assert list(tmp_path.iterdir()) == []


def test_a_worker_ends_itself_when_the_study_is_gone():
    _WhileParentLives(os.getppid()).update(1, {})
    with pytest.raises(SystemExit):
        _WhileParentLives(os.getppid() + 1).update(1, {})


def test_a_study_needs_names_and_processes(tmp_path):
    with pytest.raises(StudyError, match="two runs of the study test are called a"):
        study(tmp_path, [tiny_run("a"), tiny_run("b"), tiny_run("a")])
    with pytest.raises(StudyError, match="processes must be at least 1, got 0"):
        study(tmp_path, [], processes=0)


def test_commit_is_dirty_when_code_changed_and_not_when_results_did(tmp_path):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=x", "-c", "user.email=x@y")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert commit(tmp_path) == "unknown"
    git("init", "-q")
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "x")
    head = git("rev-parse", "HEAD")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "rows.jsonl").write_text("{}")
    assert commit(tmp_path) == head
    (tmp_path / "trainers" / "a.py").write_text("2")
    assert commit(tmp_path) == f"{head}-dirty"
