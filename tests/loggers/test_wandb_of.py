"""``WandbLogger.of``: rows in a run that is open and the caller's own."""

from __future__ import annotations

import json

import pytest

from moegeo_router.loggers import WandbLogger
from tests.support.wandb_offline import find_runs, read_finished_run


def only_run(directory):
    return read_finished_run(*find_runs(directory))


def their_run(directory):
    import wandb

    quiet = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    return wandb.init(project="theirs", dir=str(directory), mode="offline", settings=quiet)


def test_rows_join_those_of_a_run_that_is_open(tmp_path):
    """Steps that the caller counts stay right, however much is written between them."""
    theirs = their_run(tmp_path)
    logger = WandbLogger.of(theirs)
    assert logger.run_id == theirs.id
    for step in (10, 11, 12):
        theirs.log({"loss": float(step)}, step=step)
        logger.log({"ours": step / 2}, step)
        if step == 11:
            logger.event("checkpoint", {"bytes": 12}, step)
            logger.alert("dead", "one", "first", "warning", {}, step)
            logger.alert("dead", "two", "second", "error", {}, step)
            logger.heatmap("loads", [[0.0, 1.0]], ["layer0"], step)
            logger.histogram("shares", [0.0, 1.0], step)
    logger.close()
    theirs.log({"loss": 13.0}, step=13)
    theirs.finish()
    run = only_run(tmp_path)
    assert [row["loss"] for row in run.history] == [10.0, 11.0, 12.0, 13.0]
    assert [row.get("ours") for row in run.history] == [5.0, 5.5, 6.0, None]
    row = run.history[1]
    assert (row["event/checkpoint/bytes"], row["event/dead/title"]) == (12, "two")
    assert (row["loads/_type"], row["shares/_type"]) == ("image-file", "histogram")
    assert run.alerts == [("WARN", "one", "first"), ("ERROR", "two", "second")]
    # Both parts of the table are there, and the last names the first.
    assert len(row["geometry/events/previous_increments_paths"]) == 1
    parts = [json.loads(part.read_bytes())["data"] for part in tmp_path.rglob("media/table/geometry/*.json")]
    assert sorted(part[0][3] for part in parts) == ["one", "two"]
    assert run.step_metrics == {}
    assert run.exit_code == 0


@pytest.mark.parametrize("every", [None, 3, 2])
def test_rows_that_no_row_of_the_caller_takes_along_are_kept(tmp_path, every):
    """Whether the caller writes none or every few steps, before ours of the same step."""
    theirs = their_run(tmp_path)
    logger = WandbLogger.of(theirs)
    expected = []
    for step in range(1, 7):
        expected.append({"ours": step / 2, "twice": 1.0})
        if every and step % every == 0:
            theirs.log({"loss": float(step)}, step=step)
            expected[-1]["loss"] = float(step)
        logger.log({"ours": step / 2}, step)
        logger.log({"twice": 1.0}, step)
    theirs.finish()
    assert only_run(tmp_path).history == expected


def test_rows_after_those_of_the_caller_join_the_next(tmp_path):
    theirs = their_run(tmp_path)
    logger = WandbLogger.of(theirs)
    for step in range(3):
        theirs.log({"loss": float(step)})
        logger.log({"ours": step / 2}, step)
    theirs.finish()
    rows = only_run(tmp_path).history
    assert rows == [{"loss": 0.0}, {"loss": 1.0, "ours": 0.0}, {"loss": 2.0, "ours": 0.5}, {"ours": 1.0}]


def test_rows_of_their_own_in_a_run_with_an_axis(tmp_path):
    theirs = their_run(tmp_path)
    logger = WandbLogger.of(theirs, step_metric="train/global_step")
    theirs.log({"train/loss": 1.0, "train/global_step": 4})
    logger.log({"ours": 0.5}, 5)
    theirs.log({"train/loss": 1.0, "train/global_step": 8})
    theirs.finish()
    rows = only_run(tmp_path).history
    assert [row["train/global_step"] for row in rows] == [4, 5, 8]
    assert rows[1] == {"ours": 0.5, "train/global_step": 5}


def test_what_is_no_run_is_refused():
    with pytest.raises(TypeError, match=r"run: expected what wandb.init\(\) returns, got NoneType"):
        WandbLogger.of(None)
