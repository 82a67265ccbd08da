import http.server
import math
import statistics
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moegeo_router.loggers import JSONLLogger, MultiLogger, WandbLogger, read_jsonl
from moegeo_router.loggers.base import bin_values
from moegeo_router.loggers.picture import heatmap_caption, heatmap_picture
from tests.support.wandb_offline import find_runs, read_finished_run, shown_table


class Refusal(http.server.BaseHTTPRequestHandler):
    """A server that is there and lets nobody in."""

    def do_GET(self):
        self.send_error(401)

    do_POST = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def refusing_server(port):
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Refusal) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


@pytest.fixture(autouse=True)
def _logged_out_afterwards():
    """wandb keeps the credentials of a login for the life of the process."""
    yield
    from wandb.sdk.lib import wbauth

    wbauth.unauthenticate_session()


def start(directory, **kwargs):
    return WandbLogger(**{"project": "tests", "directory": directory, "config": {}, "mode": "offline"} | kwargs)


def only_run(directory):
    (path,) = find_runs(directory)
    return read_finished_run(path)


def comparable(row):
    return {key: "nan" if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


def test_an_offline_run_holds_the_rows_of_the_json_lines(tmp_path):
    config = {"model": {"experts": 8}, "lr": 1e-3}
    offline = start(tmp_path, name="n", config=config, tags=("a", "b"))
    logger = MultiLogger([JSONLLogger(tmp_path / "log.jsonl"), offline])
    for step in range(0, 3000, 10):  # more than one 32 KiB block
        logger.log({"train/loss": 1 / (step + 3), "geometry/layer0/fsi": step / 7, "train/tokens": step}, step)
    logger.log({"train/loss": math.nan, "geometry/fsi": math.inf}, 3000)
    logger.close(exit_code=5)

    run = only_run(tmp_path)
    rows = [{key: value for key, value in row.items() if key != "time"} for row in read_jsonl(tmp_path / "log.jsonl")]
    assert len(rows) == 301
    assert [comparable(row) for row in run.history] == [comparable(row) for row in rows]
    assert {key: run.config[key] for key in config} == config
    assert (run.project, run.tags, run.run_id, run.exit_code) == ("tests", ["a", "b"], offline.run_id, 5)
    assert run.step_metrics["*"] == "step"


def test_an_event_is_a_row_with_its_numbers_and_texts(tmp_path):
    logger = start(tmp_path)
    logger.log({"train/loss": 1.0}, 7)
    logger.event("checkpoint", {"bytes": 12, "path": "a/b", "kept": [1, 2]}, 7)
    logger.close()
    row, event = only_run(tmp_path).history
    assert row == {"step": 7, "train/loss": 1.0}
    assert event == {
        "step": 7,
        "event/checkpoint": 1,
        "event/checkpoint/bytes": 12,
        "event/checkpoint/path": "a/b",
        "event/checkpoint/kept": "[1, 2]",
    }


def test_an_alert_is_a_notification_a_row_and_a_row_of_a_table(tmp_path):
    logger = start(tmp_path)
    logger.log({"train/loss": 1.0}, 6)
    logger.record("reading", {"a": 1}, 6)
    logger.alert("rollback", "Went back", "To step 3.\n", "error", {"from": 7, "kept": [1, 2]}, 7)
    logger.alert("dead", "x" * 64, "", "warning", {}, 7)
    logger.alert("fine", "x" * 63, "", "info", {"loss": math.nan}, 9)
    logger.close()
    run = only_run(tmp_path)
    assert run.alerts == [
        ("ERROR", "Went back", "To step 3.\n"),
        ("WARN", "x" * 62 + "…", ""),
        ("INFO", "x" * 63, ""),
    ]
    rows = [{key: value for key, value in row.items() if "geometry/events" not in key} for row in run.history]
    assert rows[:3] == [
        {"step": 6, "train/loss": 1.0},
        {
            "step": 7,
            "event/rollback": 1,
            "event/rollback/title": "Went back",
            "event/rollback/level": "error",
            "event/rollback/from": 7,
            "event/rollback/kept": "[1, 2]",
        },
        {"step": 7, "event/dead": 1, "event/dead/title": "x" * 64, "event/dead/level": "warning"},
    ]
    (path,) = find_runs(tmp_path)
    assert shown_table(path, "geometry/events") == [
        [7, "rollback", "error", "Went back", "To step 3.\n", '{"from": 7, "kept": [1, 2]}'],
        [7, "dead", "warning", "x" * 64, "", "{}"],
        [9, "fine", "info", "x" * 63, "", '{"loss": NaN}'],
    ]
    assert [row["geometry/events/nrows"] for row in run.history[1:]] == [1, 2, 3]


def test_the_table_of_alerts_survives_resumes_and_many_of_them(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("moegeo_router.loggers.wandb.PARTS", 3)
    run_id = None
    for first in (0, 4, 6):
        if run_id:
            time.sleep(1.1)  # wandb names the folder by the second
        logger = start(tmp_path, run_id=run_id)
        run_id = logger.run_id
        for step in range(first, first + 4):  # the third run begins at a checkpoint before the end of the second
            logger.alert("dead", f"in run {first}", "", "info", {}, step)
        logger.close()
    other = start(tmp_path)
    other.alert("dead", "of another run", "", "info", {}, 0)
    other.close()
    expected = [(step, first) for first in (0, 4, 6) for step in range(first, first + 4)]
    paths = [path for path in find_runs(tmp_path) if read_finished_run(path).run_id == run_id]
    assert len(paths) == 3
    for number, path in enumerate(paths, start=1):
        shown = shown_table(path, "geometry/events")
        assert [(row[0], row[3]) for row in shown] == [(s, f"in run {first}") for s, first in expected[: 4 * number]]
        logged = [row for row in read_finished_run(path).history if "geometry/events/increment_num" in row]
        assert max(row["geometry/events/increment_num"] for row in logged) == 2
    assert capfd.readouterr() == ("", "")


def test_a_table_that_a_kill_cut_short_stops_no_run(tmp_path):
    logger = start(tmp_path)
    for step in range(2):
        logger.alert("dead", "a", "", "info", {}, step)
    logger.close()
    last = max(tmp_path.glob("wandb/*run-*/files/media/table/geometry/*.json"), key=lambda path: path.name)
    last.write_bytes(last.read_bytes()[:-3])
    time.sleep(1.1)
    resumed = start(tmp_path, run_id=logger.run_id)
    resumed.alert("dead", "a", "", "info", {}, 2)
    resumed.close()
    *_, path = find_runs(tmp_path)
    read_finished_run(path)
    assert [row[0] for row in shown_table(path, "geometry/events")] == [0, 2]


def test_a_histogram_and_a_heatmap_are_wandbs_own(tmp_path):
    values, rows, labels = [0.5, 0.25, 0.25, 0.75], [[0.25, 0.75], [1.0]], ["layer0", "layer1"]
    logger = start(tmp_path)
    logger.histogram("geometry/load", values, 7)
    logger.heatmap("geometry/loads", rows, labels, 7)
    logger.close()
    histogram, heatmap = only_run(tmp_path).history
    counts, edges = bin_values(values)
    assert histogram == {
        "step": 7,
        "geometry/load/_type": "histogram",
        "geometry/load/values": counts,
        "geometry/load/bins": edges,
    }
    assert heatmap["step"] == 7
    assert heatmap["geometry/loads/_type"] == "image-file"
    assert heatmap["geometry/loads/caption"] == heatmap_caption(rows, labels)
    (run,) = find_runs(tmp_path)
    with Image.open(run.parent / "files" / heatmap["geometry/loads/path"]) as picture:
        np.testing.assert_array_equal(picture, heatmap_picture(rows))


def test_a_resumed_run_keeps_its_id_and_may_repeat_steps(tmp_path):
    logger = start(tmp_path)
    for step in (1, 2, 3, 2):  # 2 again, as after a kill at 3 with the checkpoint at 1
        logger.log({"train/loss": float(step)}, step)
    logger.close()
    time.sleep(1.1)  # wandb names the folder by the second
    resumed = start(tmp_path, run_id=logger.run_id)
    resumed.log({"train/loss": 20.0}, 2)
    resumed.close()
    first, second = (read_finished_run(path) for path in find_runs(tmp_path))
    assert [row["step"] for row in first.history] == [1, 2, 3, 2]
    assert [row["step"] for row in second.history] == [2]
    assert first.run_id == second.run_id == logger.run_id


def test_a_run_of_the_users_own_is_left_alone(tmp_path):
    import wandb

    theirs = wandb.init(project="theirs", dir=str(tmp_path), mode="offline", settings=wandb.Settings(silent=True))
    logger = start(tmp_path)
    logger.log({"ours": 1.0}, 0)
    logger.close()
    theirs.log({"theirs": 2.0})
    theirs.finish()
    histories = [read_finished_run(path).history for path in find_runs(tmp_path)]
    assert sorted(histories, key=str) == sorted([[{"step": 0, "ours": 1.0}], [{"theirs": 2.0}]], key=str)


def test_auto_is_offline_and_silent_when_nobody_is_logged_in(tmp_path, capfd):
    logger = start(tmp_path, mode="auto")
    folder = find_runs(tmp_path)[0].parent
    assert folder.name.startswith("offline-run-")
    assert f"`wandb leet {folder}`" in logger.how_to_open
    assert f"`wandb sync {folder}`" in logger.how_to_open
    assert "\n" not in logger.how_to_open
    logger.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("login", ["environment", "netrc"])
def test_logged_in_without_a_network_goes_offline_and_loses_nothing(tmp_path, monkeypatch, port, login):
    if login == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    else:
        (tmp_path / "netrc").write_text(f"machine 127.0.0.1:{port}\n  login user\n  password {'b' * 40}\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.warns(RuntimeWarning, match="refused.*logging offline instead") as caught:
        logger = start(tmp_path, mode="auto", run_id="resumed1")
    logger.log({"train/loss": 0.5}, 1)
    logger.close()
    assert len(caught) == 1
    run = only_run(tmp_path)
    assert run.history == [{"step": 1, "train/loss": 0.5}]
    assert run.run_id == logger.run_id == "resumed1"


def test_a_server_that_refuses_is_told_once_and_the_run_goes_offline(tmp_path, monkeypatch, refusing_server):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    with pytest.warns(RuntimeWarning, match="logging offline instead") as caught:
        logger = start(tmp_path, mode="online", init_timeout=2.0)
    logger.log({"train/loss": 0.5}, 1)
    logger.close()
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    (offline,) = [path for path in find_runs(tmp_path) if path.parent.name.startswith("offline-run-")]
    run = read_finished_run(offline)
    assert run.history == [{"step": 1, "train/loss": 0.5}]
    assert run.run_id == logger.run_id
    assert str(offline.parent) in logger.how_to_open


def test_a_malformed_key_goes_offline_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.warns(RuntimeWarning, match="WANDB_API_KEY"):
        start(tmp_path, mode="auto").close()
    assert len(find_runs(tmp_path)) == 1


def test_the_environment_wins_over_the_mode(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logger = start(tmp_path, mode="online")
    logger.log({"a": 1.0}, 0)
    logger.event("stop", {}, 0)
    logger.record("stop", {}, 0)
    for step in range(2):
        logger.alert("stop", "Stopped", "", "error", {}, step)
    logger.histogram("b", [1.0], 0)
    logger.heatmap("c", [[1.0]], ["layer0"], 0)
    logger.close()
    assert logger.how_to_open == "wandb is disabled: nothing was written"
    assert find_runs(tmp_path) == []


@pytest.mark.parametrize("argument", ["mode", "WANDB_MODE"])
def test_an_unknown_mode_is_an_error(tmp_path, monkeypatch, argument):
    monkeypatch.setenv("WANDB_MODE", "of-line" if argument == "WANDB_MODE" else "")
    with pytest.raises(
        ValueError, match=f"^{argument}: expected one of auto, offline, online, disabled, got 'of-line'"
    ):
        start(tmp_path, mode="of-line" if argument == "mode" else "offline")


def test_without_wandb_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install moegeo-router\[train\]"):
        start(tmp_path)


def test_an_unwritable_directory_is_an_error_not_another_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("moegeo_router.loggers.wandb.os.access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ValueError, match="directory: expected a writable folder"):
        start(tmp_path)


def test_mistakes_are_refused(tmp_path):
    logger = start(tmp_path, mode="disabled")
    with pytest.raises(ValueError, match="metrics"):
        logger.log({"a": Path()}, 0)
    with pytest.raises(ValueError, match="fields"):
        logger.event("stop", {"a": object()}, 0)
    with pytest.raises(ValueError, match="fields"):
        logger.record("stop", {"a": object()}, 0)
    with pytest.raises(ValueError, match="level"):
        logger.alert("stop", "a", "", "warn", {}, 0)
    with pytest.raises(ValueError, match="values"):
        logger.histogram("a", [], 0)
    with pytest.raises(ValueError, match="labels"):
        logger.heatmap("a", [[1.0]], [], 0)
    logger.close()


def test_a_row_costs_less_than_a_millisecond(tmp_path):
    logger = start(tmp_path)
    metrics = {f"geometry/metric{i}": i / 7 for i in range(12)}
    costs = []
    for step in range(300):
        begin = time.process_time()
        logger.log(metrics, step)
        costs.append(time.process_time() - begin)
    logger.close()
    assert statistics.median(costs) < 1e-3
