import io
import json
import math
import shutil
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from moegeo_router.loggers import JSONLLogger, MultiLogger, TensorBoardLogger, read_jsonl
from moegeo_router.loggers.picture import heatmap_picture


@pytest.fixture(autouse=True)
def _files_in_order(monkeypatch):
    """Files of the same second are ordered by the text of a counter: "10" would come before "9"."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def read(directory):
    everything = dict.fromkeys(("scalars", "histograms", "images", "tensors"), 0)
    return EventAccumulator(str(directory), size_guidance=everything).Reload()


def scalars(directory, key):
    return [(event.step, event.value) for event in read(directory).Scalars(key)]


def texts(directory, key):
    events = read(directory).Tensors(f"{key}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]


def test_numbers_come_back_with_their_steps(tmp_path, capfd):
    logger = TensorBoardLogger(tmp_path / "new" / "folder")
    logger.log({"train/loss": 1 / 3, "geometry/layer0/fsi": np.float32(0.5), "train/tokens": 12}, 7)
    logger.log({"train/loss": math.nan, "train/tokens": math.inf}, 8)
    logger.log({"train/loss": 1e300}, 9)
    logger.close()
    logger.close()
    (first, nan, huge) = scalars(tmp_path / "new" / "folder", "train/loss")
    assert first == (7, float(np.float32(1 / 3)))
    assert nan[0] == 8
    assert math.isnan(nan[1])
    assert huge == (9, math.inf)  # TensorBoard's numbers have single precision
    assert scalars(tmp_path / "new" / "folder", "geometry/layer0/fsi") == [(7, 0.5)]
    assert scalars(tmp_path / "new" / "folder", "train/tokens") == [(7, 12.0), (8, math.inf)]
    assert capfd.readouterr() == ("", "")


def write_all(logger, step):
    logger.log({"train/loss": float(step)}, step)
    logger.event("checkpoint", {"number": step}, step)
    logger.histogram("load", [float(step), 0.0], step)
    logger.heatmap("loads", [[float(step), 1.0]], ["layer0"], step)


def steps(directory):
    """The steps of every key, as the program `tensorboard` reads them (it turns every kind into tensors)."""
    everything = dict.fromkeys(("scalars", "histograms", "images", "text"), 0)
    found = plugin_event_accumulator.EventAccumulator(str(directory), tensor_size_guidance=everything).Reload()
    return {tag: [event.step for event in found.Tensors(tag)] for tag in found.Tags()["tensors"]}


def every_key(expected):
    keys = ("train/loss", "event/checkpoint/text_summary", "load", "loads", "loads/text_summary")
    return dict.fromkeys(keys, expected)


@pytest.mark.parametrize(
    ("method", "arguments", "last_key"),
    [
        ("log", ({str(i): 1.0 for i in range(50)},), "49"),
        ("event", ("stop", {"why": "x" * 100_000}), "event/stop/text_summary"),
        ("alert", ("stop", "Stopped", "x" * 100_000, "error", {}), "event/stop/text_summary"),
        ("histogram", ("load", [0.5, 1.0]), "load"),
        ("heatmap", ("loads", [[0.5, 1.0]] * 20, ["layer"] * 20), "loads/text_summary"),
    ],
)
def test_a_row_can_be_read_before_the_log_is_closed(tmp_path, method, arguments, last_key):
    logger = TensorBoardLogger(tmp_path)
    getattr(logger, method)(*arguments, 3)
    assert steps(tmp_path)[last_key] == [3]
    logger.close()


@pytest.mark.parametrize(("resume_step", "expected"), [(0, [0, 9]), (2, [0, 1, 2, 9]), (4, [0, 1, 2, 3, 4, 9])])
@pytest.mark.parametrize("torn", [0, 5])
def test_resuming_drops_the_rows_after_the_checkpoint(tmp_path, resume_step, expected, torn):
    killed = TensorBoardLogger(tmp_path)
    for step in range(5):
        write_all(killed, step)
    if torn:  # what the kill left of one more row
        write_all(killed, 5)
        (path,) = tmp_path.iterdir()
        path.write_bytes(path.read_bytes()[:-torn])
    resumed = TensorBoardLogger(tmp_path, resume_step=resume_step)
    assert steps(tmp_path) == every_key(expected[:-1])
    write_all(resumed, 9)
    assert steps(tmp_path) == every_key(expected)
    other_reader = read(tmp_path)
    assert [event.step for event in other_reader.Scalars("train/loss")] == expected
    assert [event.step for event in other_reader.Histograms("load")] == expected
    assert [event.step for event in other_reader.Images("loads")] == expected
    killed.close()
    resumed.close()


def test_a_new_run_is_not_mixed_with_what_the_folder_holds(tmp_path):
    for last in (3, 2):
        logger = TensorBoardLogger(tmp_path)
        for step in range(last):
            write_all(logger, step)
        logger.close()
    assert steps(tmp_path) == every_key([0, 1])
    assert scalars(tmp_path, "train/loss") == [(0, 0.0), (1, 1.0)]


def test_an_event_is_a_text_with_its_fields(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    fields = {"path": "a/ü\nb", "sizes": [1, 2], "loss": math.nan}
    logger.event("checkpoint", fields, 4)
    logger.close()
    ((step, text),) = texts(tmp_path, "event/checkpoint")
    fence, *lines, end = text.splitlines()
    assert (step, fence, end) == (4, "```", "```")
    got = json.loads("\n".join(lines))
    assert math.isnan(got.pop("loss"))
    assert got == {"path": "a/ü\nb", "sizes": [1, 2]}


def test_an_alert_is_a_text_that_begins_with_what_it_tells(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.alert("rollback", "Went back", "To step 3.\nSlower.", "error", {"layer": "ü"}, 4)
    logger.record("reading", {"layer": "ü"}, 5)
    logger.close()
    ((step, text),) = texts(tmp_path, "event/rollback")
    assert step == 4
    assert text == '**error: Went back**\n\nTo step 3.\nSlower.\n\n```\n{\n  "layer": "ü"\n}\n```'
    assert steps(tmp_path) == {"event/rollback/text_summary": [4]}


@pytest.mark.parametrize("values", [[0.5, 0.1, 0.1, 0.3], [0.125] * 8, [1e200, -1e300], [np.float32(2), 1]])
def test_a_histogram_has_the_bins_of_the_json_lines(tmp_path, values):
    logger = MultiLogger([TensorBoardLogger(tmp_path / "tb"), JSONLLogger(tmp_path / "log.jsonl")])
    logger.histogram("geometry/load", values, 4)
    logger.close()
    assert len(logger.loggers) == 2  # neither was dropped
    (event,) = read(tmp_path / "tb").Histograms("geometry/load")
    (row,) = read_jsonl(tmp_path / "log.jsonl")
    assert event.step == 4
    assert event.histogram_value.bucket == [0, *row["counts"]]
    assert event.histogram_value.bucket_limit == row["edges"]
    assert (event.histogram_value.min, event.histogram_value.max) == (min(values), max(values))
    assert (event.histogram_value.num, event.histogram_value.sum) == (len(values), sum(map(float, values)))
    assert event.histogram_value.sum_squares == sum(float(value) * float(value) for value in values)


def test_a_heatmap_is_a_picture_and_its_caption(tmp_path):
    rows, labels = [[0.1, 0.2, 0.7], [0.5, 0.5]], ["layer0", "layer2"]
    logger = TensorBoardLogger(tmp_path)
    logger.heatmap("geometry/load", rows, labels, 4)
    logger.close()
    (event,) = read(tmp_path).Images("geometry/load")
    assert event.step == 4
    np.testing.assert_array_equal(Image.open(io.BytesIO(event.encoded_image_string)), heatmap_picture(rows))
    ((step, caption),) = texts(tmp_path, "geometry/load")
    assert step == 4
    assert caption.startswith("from top: layer0, layer2; ")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # tensorboard's thread ends so
def test_a_folder_that_vanishes_stops_neither_the_run_nor_the_other_loggers(tmp_path):
    others = threading.enumerate()
    logger = MultiLogger([TensorBoardLogger(tmp_path / "tb"), JSONLLogger(tmp_path / "log.jsonl")])
    (writing,) = set(threading.enumerate()).difference(others)
    shutil.rmtree(tmp_path / "tb")

    def run():
        for step in range(20):
            logger.heatmap("load", [[1.0]], ["layer0"], step)

    with pytest.warns(RuntimeWarning, match="TensorBoardLogger failed at step .* and is dropped") as caught:
        run()
    writing.join(10.0)  # so that its end is not said in the middle of another test
    logger.close()
    assert len(caught) == 1
    assert [row["step"] for row in read_jsonl(tmp_path / "log.jsonl")] == list(range(20))


def test_mistakes_are_refused_before_anything_is_written(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    for call in (
        lambda: logger.log({"good": 1.0, "a": [1.0]}, 0),
        lambda: logger.event("stop", {"path": tmp_path}, 0),
        lambda: logger.record("stop", {"path": tmp_path}, 0),
        lambda: logger.alert("stop", "", "", "info", {}, 0),
        lambda: logger.histogram("a", [math.nan], 0),
        lambda: logger.heatmap("a", [[1.0]], [], 0),
    ):
        with pytest.raises(ValueError, match="expected"):
            call()
    logger.close()
    assert steps(tmp_path) == {}


def test_without_tensorboard_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install moegeo-router\[tensorboard\]"):
        TensorBoardLogger(tmp_path)


def test_a_person_is_told_how_to_open_it(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    assert f"`tensorboard --logdir {tmp_path}`" in logger.how_to_open
    assert "\n" not in logger.how_to_open
    logger.close()
