"""The ``logger=`` of ``MoEGeometryCallback``: one that is given, or one that is made for every run."""

from __future__ import annotations

from typing import Any

import pytest

import moegeo_router as mg
from moegeo_router.loggers import JSONLLogger, NullLogger, WandbLogger, read_jsonl
from moegeo_router.replay import differences, replay

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.support.trainer import AtStep, apart, trainer, weights, with_geometry

EARLY = {"fsi": {"warning": 0.001, "critical": 0.002, "warmup": 1, "smoothing": 1}}
CONFIG = mg.GeometryConfig(control=mg.ControlConfig(thresholds=EARLY), pictures_every=2)


class Told(NullLogger):
    """Notes from which step it is, and how it was closed."""

    def __init__(self, log: list[Any], step: int | None) -> None:
        self.log_of_tests = log
        log.append(("from", step))

    def record(self, *args: Any, **kwargs: Any) -> None:
        self.log_of_tests.append("row")

    def close(self, exit_code: int = 0) -> None:
        self.log_of_tests.append(("closed", exit_code))


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]


@pytest.mark.filterwarnings("ignore:the Trainer left 4 weights out:UserWarning")
def test_the_log_of_a_resumed_run_is_that_of_the_unbroken_one(tmp_path):
    def run(folder: str, **options: Any) -> Any:
        path = tmp_path / folder / "run.jsonl"
        return with_geometry(
            tmp_path / folder,
            config=CONFIG,
            logger=lambda step: JSONLLogger(path, resume_step=step),
            save_strategy="steps",
            save_steps=3,
            **options,
        )[0]

    run("a").train()
    unbroken = read_jsonl(tmp_path / "a/run.jsonl")
    assert [row["step"] for row in unbroken if row.get("event") == "reading"] == [1, 2, 3, 4, 5, 6]
    killed = run("b")

    def kill(_: Any) -> None:
        raise KeyboardInterrupt

    killed.add_callback(AtStep(5, kill))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    run("b").train(resume_from_checkpoint=True)
    resumed = read_jsonl(tmp_path / "b/run.jsonl")
    assert plain(resumed) == plain(unbroken)
    assert [row["step"] for row in resumed if row.get("heatmap") == "geometry/load"] == [2, 4, 6]
    assert differences(resumed, list(replay(resumed))) == []


def test_a_logger_is_made_for_every_run_and_closed_with_it(tmp_path):
    def fail(_: Any) -> None:
        if failing:
            raise ZeroDivisionError

    log: list[Any] = []
    run, _ = with_geometry(tmp_path, logger=lambda step: Told(log, step), max_steps=2)
    run.add_callback(AtStep(2, fail))
    assert log == [], "nothing before training begins"
    failing = False
    run.train()
    failing = True
    with pytest.raises(ZeroDivisionError):
        run.train()
    ends = [entry for entry in log if entry != "row"]
    assert ends == [("from", None), ("closed", 0), ("from", None), ("closed", 1)]
    assert "row" in log


def test_a_logger_that_is_given_stays_open(tmp_path):
    log: list[Any] = []
    run, _ = with_geometry(tmp_path, logger=Told(log, None), max_steps=2)
    run.train()
    assert "row" in log
    assert ("closed", 0) not in log


def test_where_the_trainer_begins_anew_so_does_the_log(tmp_path):
    failed: list[bool] = []

    def needs_memory(_: Any) -> None:
        if not failed:
            failed.append(True)
            raise RuntimeError("CUDA out of memory.")

    path = tmp_path / "run.jsonl"
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "max_steps": 3}
    run, _ = with_geometry(tmp_path, logger=lambda step: JSONLLogger(path, resume_step=step), **options)
    run.add_callback(AtStep(2, needs_memory))
    run.train()
    rows = read_jsonl(path)
    assert [row["step"] for row in rows if row.get("event") == "reading"] == [1, 2, 3]
    assert differences(rows, list(replay(rows))) == []


def test_only_the_first_process_has_a_log(tmp_path):
    log: list[Any] = []
    run, _ = with_geometry(tmp_path, logger=lambda step: Told(log, step), max_steps=2)
    run.is_world_process_zero = lambda: False
    run.train()
    assert log == []


def test_a_log_changes_no_bit(tmp_path):
    logged, _ = with_geometry(tmp_path, logger=lambda step: NullLogger())
    alone, _ = with_geometry(tmp_path)
    for run in (logged, alone):
        run.train()
    assert apart(weights(logged.model), weights(alone.model)) == 0


@pytest.mark.parametrize("logger", ["wandb", JSONLLogger, WandbLogger, object(), 3])
def test_what_is_no_logger_is_refused_at_once(tmp_path, logger):
    run = trainer(tmp_path)
    with pytest.raises(TypeError, match=r"^logger must be .*WandbLogger\.of\(wandb\.init\(\.\.\.\)\).*, got .+$"):
        mg.MoEGeometryCallback(run, logger=logger)
    assert "train" not in vars(run)


def test_a_function_that_makes_no_logger_is_said(tmp_path):
    run, _ = with_geometry(tmp_path, logger=lambda step: None)
    with pytest.raises(TypeError, match=r"logger must be .* got None$"):
        run.train()
