import json
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from moegeo_router.loggers import JSONLLogger, read_jsonl


def write(path, steps, **kwargs):
    logger = JSONLLogger(path, **kwargs)
    for step in steps:
        logger.log({"train/loss": step / 7}, step)
    logger.close()


def steps(path):
    return [row["step"] for row in read_jsonl(path)]


def test_a_row_is_one_line_of_plain_json(tmp_path):
    path = tmp_path / "new" / "folder" / "log.jsonl"
    before = time.time()
    logger = JSONLLogger(path)
    logger.log({"train/loss": 0.1, "train/tokens": 12}, step=3)
    logger.event("checkpoint", {"path": "a/ü\nb", "sizes": [1, 2]}, step=4)
    logger.close()
    logger.close()
    row, event = [json.loads(line) for line in path.read_text().splitlines()]
    assert before <= row.pop("time") <= event.pop("time") <= time.time()
    assert row == {"step": 3, "train/loss": 0.1, "train/tokens": 12}
    assert event == {"step": 4, "event": "checkpoint", "path": "a/ü\nb", "sizes": [1, 2]}


def test_a_record_and_an_alert_are_the_rows_of_events(tmp_path):
    fields = {"layer": "0", "loss": math.nan, "shares": [0.5, math.inf]}
    logger = JSONLLogger(tmp_path / "log.jsonl")
    logger.event("rollback", fields | {"title": "Went back", "text": "To\n3.", "level": "error"}, 4)
    logger.alert("rollback", "Went back", "To\n3.", "error", fields, 4)
    logger.event("reading", fields, 5)
    logger.record("reading", fields, 5)
    logger.close()
    event, alert, other_event, record = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    for row in (event, alert, other_event, record):
        row.pop("time")
    assert (alert, record) == (event, other_event)
    assert list(fields) == ["layer", "loss", "shares"]  # the caller's is left alone


def test_non_finite_numbers_are_null_named_and_come_back(tmp_path):
    path = tmp_path / "log.jsonl"
    logger = JSONLLogger(path)
    logger.log({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0, "e": np.float32("nan")}, 0)
    logger.event("non_finite", {"loss": math.nan, "layers": {"0": [math.inf, 2.0, (-math.inf,)]}}, 1)
    logger.log({"a": 2.0}, 2)
    logger.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    raw = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert raw[0]["a"] is None
    assert raw[0]["non_finite"] == {"a": "nan", "b": "inf", "c": "-inf", "e": "nan"}
    assert "non_finite" not in raw[2]

    first, event, last = read_jsonl(path)
    assert math.isnan(first["a"])
    assert math.isnan(first["e"])
    assert (first["b"], first["c"], first["d"]) == (math.inf, -math.inf, 1.0)
    assert math.isnan(event["loss"])
    assert event["layers"] == {"0": ["inf", 2.0, ["-inf"]]}
    assert last["a"] == 2.0
    assert not any("non_finite" in row for row in (first, event, last))


def test_floats_come_back_bit_for_bit(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, float(np.float32(0.1))]
    logger = JSONLLogger(tmp_path / "log.jsonl")
    logger.log({str(i): value for i, value in enumerate(values)}, 0)
    logger.close()
    (row,) = read_jsonl(tmp_path / "log.jsonl")
    assert [row[str(i)].hex() for i in range(len(values))] == [value.hex() for value in values]


def test_a_histogram_is_its_counts_and_edges(tmp_path):
    values = [0.3, 0.1, np.float32(0.5), 0.1, 1]
    logger = JSONLLogger(tmp_path / "log.jsonl")
    logger.histogram("geometry/load", values, 3)
    logger.close()
    (row,) = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert row.pop("time") <= time.time()
    counts, edges = np.histogram(np.array(values, dtype=float), bins=20)
    assert row.pop("counts") == counts.tolist()
    np.testing.assert_allclose(row.pop("edges"), edges, rtol=1e-14)
    assert row == {"step": 3, "histogram": "geometry/load"}


def test_a_heatmap_keeps_its_numbers(tmp_path):
    logger = JSONLLogger(tmp_path / "log.jsonl")
    logger.heatmap("geometry/load", [[1 / 3, 0, 0.5], np.array([0.25, 2.5], dtype=np.float32)], ("a", "ü"), 3)
    logger.close()
    (row,) = read_jsonl(tmp_path / "log.jsonl")
    assert row.pop("time") <= time.time()
    rows = [[1 / 3, 0, 0.5], [0.25, 2.5]]
    assert row == {"step": 3, "heatmap": "geometry/load", "labels": ["a", "ü"], "rows": rows}


def test_a_killed_process_loses_no_row(tmp_path):
    path = tmp_path / "log.jsonl"
    code = (
        "import os, sys; from moegeo_router.loggers import JSONLLogger; logger = JSONLLogger(sys.argv[1])\n"
        "for step in range(500): logger.log({'train/loss': float(step)}, step)\n"
        "os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    assert [(row["step"], row["train/loss"]) for row in read_jsonl(path)] == [(s, float(s)) for s in range(500)]


def test_resuming_drops_the_rows_after_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    logger = JSONLLogger(path)
    for step in range(6):
        logger.log({"train/loss": float(step)}, step)
        logger.event("checkpoint", {}, step)
        logger.histogram("load", [0.5, 1.0], step)
        logger.heatmap("loads", [[0.5, 1.0]], ["layer0"], step)
    logger.close()
    kept = b"".join(path.read_bytes().splitlines(keepends=True)[:16])  # four rows for each of the steps 0, 1, 2, 3
    logger = JSONLLogger(path, resume_step=3)
    assert path.read_bytes() == kept
    logger.log({"train/loss": 40.0}, 4)
    logger.close()
    assert steps(path) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4]
    assert read_jsonl(path)[-1]["train/loss"] == 40.0
    assert os.listdir(tmp_path) == ["log.jsonl"]


def test_a_row_torn_at_any_byte_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, range(3))
    content = path.read_bytes()
    last_row = len(content.splitlines(keepends=True)[-1])
    for missing in range(2, last_row):  # 1 missing: only the newline, the row itself is whole
        path.write_bytes(content[:-missing])
        assert steps(path) == [0, 1]
        write(path, [2, 3], resume_step=9)
        assert steps(path) == [0, 1, 2, 3]
    path.write_bytes(content[:-1])
    write(path, [3], resume_step=9)
    assert steps(path) == [0, 1, 2, 3]
    path.write_bytes(content + b"\0" * 40)  # what a power cut can leave
    assert steps(path) == [0, 1, 2]


def test_resuming_a_missing_or_empty_file_starts_it(tmp_path):
    write(tmp_path / "missing.jsonl", [5], resume_step=4)
    (tmp_path / "empty.jsonl").touch()
    write(tmp_path / "empty.jsonl", [5])
    assert steps(tmp_path / "missing.jsonl") == steps(tmp_path / "empty.jsonl") == [5]


def test_a_crash_while_dropping_rows_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    write(path, range(4))
    content = path.read_bytes()

    def crash(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moegeo_router.loggers.jsonl.os.replace", crash)
    with pytest.raises(OSError, match="No space left"):
        JSONLLogger(path, resume_step=1)
    assert path.read_bytes() == content


def test_an_existing_log_is_never_overwritten_or_mixed(tmp_path):
    path = tmp_path / "log.jsonl"
    write(path, range(2))
    with pytest.raises(FileExistsError, match="resume_step"):
        JSONLLogger(path)
    assert steps(path) == [0, 1]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1.0}', '{"step": null}'])
def test_a_foreign_line_is_an_error_that_names_it(tmp_path, line):
    path = tmp_path / "log.jsonl"
    write(path, range(2))
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{line}\n{second}\n")
    with pytest.raises(ValueError, match="line 2: expected a JSON object"):
        read_jsonl(path)
    with pytest.raises(ValueError, match="line 2: expected a JSON object"):
        JSONLLogger(path, resume_step=5)


def test_reading_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_jsonl(tmp_path / "none.jsonl")


def test_mistakes_are_refused_before_anything_is_written(tmp_path):
    logger = JSONLLogger(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match="metrics"):
        logger.log({"a": [1.0]}, 0)
    with pytest.raises(ValueError, match="fields"):
        logger.event("stop", {"path": tmp_path}, 0)
    with pytest.raises(ValueError, match="fields"):
        logger.record("stop", {"path": tmp_path}, 0)
    with pytest.raises(ValueError, match="level"):
        logger.alert("stop", "a", "", "warn", {}, 0)
    with pytest.raises(ValueError, match="values"):
        logger.histogram("a", [], 0)
    with pytest.raises(ValueError, match="rows"):
        logger.heatmap("a", [[math.nan]], ["layer0"], 0)
    logger.close()
    assert read_jsonl(tmp_path / "log.jsonl") == []
