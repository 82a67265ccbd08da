"""The benchmark's command: it tunes, trains, reports and goes on; and what goes wrong in it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import configuration
from tests.support.studies import files_of_at_most
from tests.trainers.data.conftest import write_wikipedia
from trainers import benchmark as command
from trainers.studies import benchmark_stages
from trainers.studies.benchmark import ARMS, main_runs
from trainers.studies.benchmark_stages import Benchmark
from trainers.studies.benchmark_tasks import TIERS
from trainers.studies.rows import Row, RowsFile, read_rows
from trainers.studies.runs import StudyError, configurations
from trainers.train import train

torch.set_num_threads(1)

CPU, GPU, SMOKE = TIERS["cpu"], TIERS["gpu"], TIERS["smoke"]

FEW = ["smoke", "--tasks", "planted", "--arms", "linear_switch", "polar_natural"]


def ran(capsys, *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        command.main([*arguments])
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    out, error = capsys.readouterr()
    return code, out, error


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A benchmark of two arms that was run by two commands, the first of which had no time."""
    out = tmp_path_factory.mktemp("benchmark")
    benchmark = Benchmark(tier=SMOKE, out=out, command="a command", tasks=["planted"], arms=FEW[4:], until=0.0)
    said: list[str] = []
    benchmark.say = said.append
    benchmark.run()
    assert said == ["6 runs are left; the same command continues"]
    command.main([*FEW, "--out", str(out)])
    return out


def test_it_tunes_trains_and_reports(finished, capsys):
    found = read_rows(finished / "planted" / "rows.jsonl")
    assert [row["labels"]["phase"] for row in found] == ["tuning"] * 4 + ["main"] * 2
    assert {row["status"] for row in found} == {"done"}
    assert {row["study"] for row in found} == {"benchmark-smoke"}
    for row in found[4:]:
        tried = [other for other in found[:4] if other["labels"]["arm"] == row["labels"]["arm"]]
        best = min(tried, key=lambda other: other["results"]["valid/loss"])
        assert row["labels"]["setting"] == best["labels"]["setting"]
        assert row["configuration"]["optimizer"]["lr"] == best["labels"]["setting"]["optimizer.lr"]
        assert row["seed"] == 0
    text = (finished / "benchmark.md").read_text()
    assert "The baseline is linear, Switch loss, of 1 that are tuned." in text
    assert "- vision: no rows" in text
    assert "| dense | 0 of 1 (1 missing) | - | - | - | - | missing |" in text
    assert f"{found[5]['results']['valid/loss']:.4f}" in text
    assert (finished / "differences.png").stat().st_size > 1000


def test_again_there_is_nothing_to_do_and_the_choice_is_the_same(finished, capsys):
    before = (finished / "planted" / "rows.jsonl").read_bytes()
    code, out, error = ran(capsys, *FEW, "--out", str(finished), "--slice", "5")
    assert (code, error) == (0, "")
    assert "4 runs, 4 of them done before" in out
    assert "2 runs, 2 of them done before" in out
    assert (finished / "planted" / "rows.jsonl").read_bytes() == before


def test_a_run_alone_by_hydra_ends_where_the_benchmarks_did(finished, capsys, tmp_path):
    code, out, _ = ran(capsys, *FEW, "--out", str(finished), "--commands")
    lines = out.splitlines()
    assert (code, len(lines)) == (0, 2)
    assert lines[0].startswith("python -m trainers.train ")
    train(configuration(*shlex.split(lines[1])[3:], f"directory={tmp_path}/run"))
    loss = next(
        row["valid/loss"]
        for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if "valid/loss" in row
    )
    row = read_rows(finished / "planted" / "rows.jsonl")[5]
    assert row["labels"]["arm"] == "polar_natural"
    assert loss == pytest.approx(row["results"]["valid/loss"], rel=1e-6)


def test_rows_of_other_settings_stop_their_task_alone(finished, capsys, tmp_path):
    shutil.copytree(finished / "planted", tmp_path / "planted")
    path = tmp_path / "planted" / "rows.jsonl"
    path.write_text(path.read_text().replace('"dim":16', '"dim":18'))
    before = path.read_bytes()
    arguments = ("--arms", "linear_switch", "--tasks", "planted", "vision", "--out", str(tmp_path))
    code, out, error = ran(capsys, "smoke", *arguments)
    assert (code, error) == (2, "")
    line = next(line for line in out.splitlines() if line.startswith("error: "))
    assert line.startswith("error: planted is left out: ")
    assert "with other settings (model.dim: 18 then, 16 now)" in line
    assert path.read_bytes() == before
    assert len(read_rows(tmp_path / "vision" / "rows.jsonl")) == 3
    text = (tmp_path / "benchmark.md").read_text()
    assert "Not finished: " in text.partition("## Planted images")[0]
    assert "with other settings (model.dim: 18 then, 16 now)" in text

    path.write_text(path.read_text().replace('"dim":18', '"dim":16', 1))
    code, out, _ = ran(capsys, "smoke", "--report", "--out", str(tmp_path))
    assert code == 2
    assert f"error: planted is left out: {path} holds rows of different settings" in out


def test_a_task_without_its_files_is_left_out_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("MOEGEO_DATA", raising=False)
    said: list[str] = []
    benchmark = Benchmark(
        tier=CPU, out=tmp_path, command="", tasks=["language", "cifar10"], arms=["dense"], say=said.append
    )
    benchmark.run()
    assert [*benchmark.broken] == ["language", "cifar10"]
    assert len(said) == 2
    assert said[0].startswith("error: language is left out: expected the folder that holds enwiki-2015/")
    assert "MOEGEO_DATA" in said[0]
    code, _, error = ran(capsys, "cpu", "--tasks", "language", "--out", str(tmp_path))
    assert (code, error) == (2, f"error: there are no rows in {tmp_path}, and nothing to report\n")


def test_an_arm_that_does_not_compose_and_one_that_diverges_leave_the_others_alone(tmp_path, monkeypatch):
    whole = configurations

    def refused(runs):
        runs = list(runs)
        if any("arm=soft" in run.overrides for run in runs):
            raise StudyError("x: In 'train': Could not find 'router/none'")
        return whole(runs)

    monkeypatch.setattr(benchmark_stages, "configurations", refused)
    monkeypatch.setitem(ARMS, "dense", type(ARMS["dense"])(title="dense", knob=("optimizer.lr", (1e20, 1e19))))
    said: list[str] = []
    arms = ["linear_switch", "soft", "dense"]
    benchmark = Benchmark(tier=SMOKE, out=tmp_path, command="", tasks=["planted"], arms=arms, say=said.append)
    benchmark.run()
    assert [line for line in said if line.startswith("error")] == [
        "error: arm soft of planted is left out: x: In 'train': Could not find 'router/none'"
    ]
    found = read_rows(tmp_path / "planted" / "rows.jsonl")
    assert [(row["labels"]["arm"], row["labels"]["phase"], row["status"]) for row in found] == [
        ("linear_switch", "tuning", "done"),
        ("linear_switch", "tuning", "done"),
        ("dense", "tuning", "diverged"),
        ("dense", "tuning", "diverged"),
        ("linear_switch", "main", "done"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["huge"], "argument TIER: invalid choice: 'huge'"),
        (["smoke", "--arms", "none"], "there is no arm none; the arms are linear_switch, "),
        (["smoke", "--tasks", "language"], "there is no task language; the tasks are planted, vision"),
        (["smoke", "--seeds", "0"], "expected a seed or more, got 0"),
        (["cpu", "--toy"], "--toy is the gpu tier at toy size"),
        (["smoke", "--report", "--out", "nowhere"], "there are no rows in nowhere"),
        (["smoke", "--commands", "--out", "nowhere"], "nothing in nowhere is tuned yet"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    code, _, error = ran(capsys, *arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


# --- what is missing --------------------------------------------------------------------------------------------------


def left_out(out: Path, tier: Any, *tasks: str) -> list[str]:
    """What a benchmark of one arm says that has nothing to train with; it leaves no failed runs."""
    said: list[str] = []
    benchmark = Benchmark(tier=tier, out=out, command="", tasks=tasks, arms=["dense"], say=said.append)
    benchmark.run()
    assert [*benchmark.broken] == [*benchmark.tasks]
    assert not any(read_rows(path) for path in out.glob("*/rows.jsonl"))
    return said


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is what is missing")
def test_without_a_gpu_its_tasks_are_left_out(tmp_path):
    why = "is left out: device=cuda: this machine has no CUDA device"
    assert left_out(tmp_path, GPU) == [f"error: language_8 {why}", f"error: language_64 {why}"]


def test_every_file_of_tuning_data_and_probes_is_looked_for(tmp_path, monkeypatch):
    tuned = replace(CPU, tasks={"language": replace(CPU.tasks["language"], tuning=("data.split=test",))})
    monkeypatch.setenv("MOEGEO_DATA", str(root := tmp_path / "sets"))
    for tier, file, where in (
        (tuned, "enwiki-2015/enwiki2015.test.txt.xz", ""),
        (CPU, "wikitext-2/wiki.test.tokens.xz", "probes=wikitext2_test: "),
        (CPU, "enwiki-2015/enwiki2015.valid.txt.xz", ""),
    ):
        write_wikipedia(root)
        (root / file).unlink()
        assert left_out(tmp_path / "out", tier, "language") == [
            f"error: language is left out: {where}no file {file} under {root} ($MOEGEO_DATA)"
        ]


def test_a_full_disk_is_said_for_each_task_before_anything_is_trained(tmp_path):
    with files_of_at_most(1000):
        said = left_out(tmp_path, SMOKE)
    assert said == [
        f"error: {task} is left out: cannot write to {tmp_path / task / 'rows.jsonl'}: File too large; "
        "the rows before are whole"
        for task in ("planted", "vision")
    ]


# --- how it goes on ---------------------------------------------------------------------------------------------------


def rewritten(finished: Path, out: Path, change: Callable[[list[Row]], list[Row]]) -> Path:
    """Copy the rows of ``finished``, changed: of both arms two of tuning each, then one that is judged each."""
    with RowsFile(out / "planted" / "rows.jsonl") as file:
        for row in change(read_rows(finished / "planted" / "rows.jsonl")):
            file.append(row)
    return file.path


@pytest.mark.parametrize(
    ("arguments", "how"),
    [
        (["smoke"], "the same command with --out runs/benchmark-smoke continues"),
        (["gpu", "--toy"], "the same command with --out runs/benchmark-gpu-toy continues"),
        (["smoke", "--out", "here"], "the same command continues"),
        (["smoke", "--out", "here", "--fresh"], "the same command without --fresh continues"),
    ],
)
def test_how_it_goes_on_depends_on_how_it_was_begun(monkeypatch, tmp_path, capsys, arguments, how):
    monkeypatch.chdir(tmp_path)
    code, out, _ = ran(capsys, *arguments, "--arms", "dense", "--slice", "0")
    assert (code, out) == (2, f"6 runs are left; {how}\n")


def test_ctrl_c_in_a_later_stage_says_the_same(finished, tmp_path):
    path = rewritten(finished, tmp_path, lambda rows: rows[:5])
    said: list[str] = []

    def interrupted(line: str) -> None:
        said.append(line)
        if line.startswith("["):
            raise KeyboardInterrupt

    benchmark = Benchmark(tier=SMOKE, out=tmp_path, command="", tasks=["planted"], arms=FEW[4:], resume="go on so")
    benchmark.say = interrupted
    with pytest.raises(KeyboardInterrupt):
        benchmark.run()
    assert said[-1] == f"stopped; 2 of 2 runs are in {path}; go on so"


def retried(finished, capsys, tmp_path) -> tuple[Path, str]:
    """Retry a failed tuning run that changes what is chosen; return the rows file and the line that says it."""

    def with_failures(rows: list[Row]) -> list[Row]:
        chosen = next(row for row in rows[2:4] if row["labels"]["setting"] == rows[5]["labels"]["setting"])
        other = next(row for row in rows[2:4] if row is not chosen)
        run = main_runs(SMOKE, "planted", {"polar_natural": other["labels"]["setting"]}, {"polar_natural": 1})[0]
        then = {"labels": run.labels, "overrides": run.overrides, "configuration": configurations([run])[0]}
        of_hash = rows[0] | {"key": "planted/tuning/hash/x", "labels": rows[0]["labels"] | {"arm": "hash"}}
        failed = {"status": "failed", "reason": "out of memory", "results": {}}
        return [*rows[:2], other, chosen | failed, of_hash | failed, rows[5] | then]

    path = rewritten(finished, tmp_path, with_failures)
    code, out, _ = ran(capsys, *FEW, "--out", str(tmp_path), "--retry-failed")
    (line,) = (line for line in out.splitlines() if line.startswith("error: "))
    assert code == 2
    return path, line


def test_a_retried_tuning_run_that_changes_the_choice_costs_its_arm_alone(finished, capsys, tmp_path):
    path, line = retried(finished, capsys, tmp_path)
    assert line.startswith("error: arm polar_natural of planted is left out: planted/polar_natural/seed0 has ")
    assert line.endswith("; --tasks planted --arms polar_natural --fresh begins it anew and leaves the others")
    rows = read_rows(path)
    assert rows[-1]["key"] == "planted/linear_switch/seed0", "the others go on"
    assert [row["key"] for row in rows if row["status"] == "failed"] == ["planted/tuning/hash/x"], "not asked for"
    text = (tmp_path / "benchmark.md").read_text()
    assert "| missing: planted/polar_natural/seed0 has " in text
    assert "Not finished" not in text
    assert ran(capsys, "smoke", "--report", "--out", str(tmp_path))[0] == 2


@pytest.mark.slow
def test_an_arm_alone_begins_anew(finished, capsys, tmp_path):
    path, _ = retried(finished, capsys, tmp_path)
    before = read_rows(path)
    anew = ("smoke", "--tasks", "planted", "--arms", "polar_natural", "--fresh")
    code, _, error = ran(capsys, *anew, "--out", str(tmp_path))
    assert (code, error) == (0, "")
    after = read_rows(path)
    assert {row["key"] for row in after} == {row["key"] for row in before}
    assert after[:4] == [row for row in before if row["labels"]["arm"] != "polar_natural"]
    assert read_rows(path.with_name("rows.old.jsonl")) == before
    assert "missing: " not in (tmp_path / "benchmark.md").read_text()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("data", "planted 0123", r"\(planted/linear_switch/seed0: data planted \w{16}, not planted 0123\)"),
        ("versions", {"torch": "1.0"}, r"\(planted/\w+/seed0: torch \S+, not \S+\)"),
    ],
)
def test_what_cannot_be_compared_is_not_trained(finished, tmp_path, name, value, message):
    path = rewritten(finished, tmp_path, lambda rows: [*rows[:4], rows[5] | {name: value}])
    before = path.read_bytes()
    benchmark = Benchmark(tier=SMOKE, out=tmp_path, command="", tasks=["planted"], arms=FEW[4:])
    benchmark.run()
    assert re.search(message, benchmark.broken["planted"])
    assert path.read_bytes() == before
