"""The rows file of a study: whole rows whatever happens, which of them go, and which settings they are of."""

import pytest
import torch

from tests.support.studies import done_at_once, files_of_at_most, region_row, study, tiny_run
from trainers.studies import runner
from trainers.studies.rows import RowsFile, changed_settings, read_rows
from trainers.studies.runner import run_study
from trainers.studies.runs import StudyError, configurations

torch.set_num_threads(1)


def row(seed: int, **changes):
    return region_row("linear_adamw", 1.0, 0.0, seed, 1.5, **changes)


def test_rows_come_back_and_a_torn_one_is_dropped(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    with RowsFile(path) as file:
        file.append(row(0))
        file.append(row(1))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:100])
    assert read_rows(path) == [row(0), row(1)]
    assert len(path.read_bytes()) > len(whole), "reading changes nothing"
    with RowsFile(path) as file:
        assert file.rows == [row(0), row(1)]
        assert len(file.notes) == 1
        assert "torn" in file.notes[0]
        assert str(path) in file.notes[0]
    assert path.read_bytes() == whole
    with RowsFile(path) as file:
        assert file.notes == []


@pytest.mark.parametrize("line", [b'{"study":"x"}\n', b"3\n", b'{"study":\n', b"\n"])
def test_a_damaged_row_is_refused_and_nothing_is_changed(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    with RowsFile(path) as file:
        file.append(row(0))
    damaged = path.read_bytes() + line + path.read_bytes()
    path.write_bytes(damaged)
    for call in (read_rows, RowsFile):
        with pytest.raises(StudyError, match=r"rows\.jsonl, line 2: expected a row of a study"):
            call(path)
    assert path.read_bytes() == damaged


def test_two_studies_cannot_write_one_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    with RowsFile(path), pytest.raises(StudyError, match="another study is writing"):
        RowsFile(path)
    with RowsFile(path):
        pass


def test_a_full_disk_leaves_whole_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    with RowsFile(path) as file:
        file.append(row(0))
        whole = path.read_bytes()
        refused = pytest.raises(StudyError, match=f"cannot write to {path}: File too large; the rows before are whole")
        with files_of_at_most(len(whole) + 10), refused:
            file.append(row(1))
        assert path.read_bytes() == whole
        file.append(row(2))
    assert read_rows(path) == [row(0), row(2)]


def test_a_full_disk_is_found_out_before_a_run_is_trained(tmp_path):
    path = tmp_path / "rows.jsonl"
    with RowsFile(path) as file:
        file.append(row(0))
    whole = path.read_bytes()
    message = r"^cannot write to .*rows\.jsonl: File too large; the rows before are whole"
    with files_of_at_most(len(whole) + 10), pytest.raises(StudyError, match=message):
        run_study(study(tmp_path, [tiny_run("a")]), lambda line: None)
    assert path.read_bytes() == whole


def test_rows_that_go_go_alone_and_every_former_file_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    with RowsFile(path) as file:
        file.append(row(0))
        file.append(row(1, status="failed"))
    with RowsFile(path, drop=lambda found: found["status"] == "failed") as file:
        assert file.rows == [row(0)]
        file.append(row(1))
    assert [*tmp_path.iterdir()] == [path]
    with RowsFile(path, fresh=True, drop=lambda found: found["seed"] == 0) as file:
        assert file.rows == [row(1)]
    with RowsFile(path, fresh=True) as file:
        assert file.rows == []
    path.write_text("damaged\n")
    with RowsFile(path, fresh=True) as file:
        assert file.rows == []
    assert read_rows(tmp_path / "rows.old.jsonl") == [row(0), row(1)]
    assert read_rows(tmp_path / "rows.old2.jsonl") == [row(1)]
    assert (tmp_path / "rows.old3.jsonl").read_text() == "damaged\n"


def test_failed_runs_of_others_are_not_dropped(tmp_path, monkeypatch):
    with RowsFile(tmp_path / "rows.jsonl") as file:
        for key in ("ours", "others"):
            file.append(row(0, study="test", key=key, status="failed"))
    monkeypatch.setattr(runner, "Workers", done_at_once(1))
    said: list[str] = []
    rows = run_study(study(tmp_path, [tiny_run("ours")], retry_failed=True), said.append)
    assert [(found["key"], found["status"]) for found in rows] == [("others", "failed"), ("ours", "done")]
    assert said[-1].startswith("[1/1]"), "what others failed at is not said to be this study's"


def test_settings_are_compared_by_what_the_row_knew():
    config = configurations([tiny_run("tiny")])[0]
    known = {"overrides": ["a"], "configuration": config}
    assert changed_settings(config, ["a"], known) == []
    assert changed_settings(config | {"device": "cuda"}, ["a"], known) == []  # may differ, as in trainers.train
    later = config | {"loop": config["loop"] | {"steps": 40, "later": 1}}
    assert changed_settings(later, ["a"], known) == ["loop.steps: 12 then, 40 now"]
    assert changed_settings(later, ["b"], known) == ["loop.later: None then, 1 now", "loop.steps: 12 then, 40 now"]
