"""Studies and the clock: slices of them, and how much time is left."""

import multiprocessing
from dataclasses import replace
from types import SimpleNamespace

import torch

from tests.support.studies import done_at_once, study, tiny_run
from trainers.studies import runner
from trainers.studies.runner import run_study

torch.set_num_threads(1)


def test_no_run_begins_when_the_time_is_up_and_the_same_command_continues(tmp_path, monkeypatch):
    runs = [tiny_run(str(seed), f"seed={seed}") for seed in range(3)]
    said: list[str] = []
    clock = {"now": 0.0}
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: clock["now"]))

    def late(line: str) -> None:
        said.append(line)
        clock["now"] += 100.0 * line.startswith("[")

    # The second has begun when the first is told, and is finished.
    rows = run_study(study(tmp_path, runs, processes=1, until=50.0), late)
    assert [row["key"] for row in rows] == ["0", "1"]
    assert said[-1] == f"the time is up; 2 of 3 runs are in {tmp_path / 'rows.jsonl'}; the same command continues"
    assert len(run_study(study(tmp_path, runs, processes=1, until=1.0), said.append)) == 2  # it is over already
    assert len(run_study(study(tmp_path, runs, processes=1), said.append)) == 3
    assert multiprocessing.active_children() == []


def test_the_time_left_weighs_runs_and_counts_what_comes_later(tmp_path, monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(runner, "time", SimpleNamespace(monotonic=lambda: clock["now"]))
    monkeypatch.setattr(runner, "Workers", done_at_once(2, lambda: clock.update(now=clock["now"] + 10.0)))
    runs = [replace(tiny_run("short"), weight=1.0), replace(tiny_run("long", "seed=1"), weight=4.0)]
    said: list[str] = []
    run_study(study(tmp_path, runs, later=5.0), said.append)
    # 10 s for 1 of 10; 20 s for 5 of 10.
    assert [line.split("; ")[-1] for line in said if line.startswith("[")] == ["1 min 30 s left", "0 min 20 s left"]
