"""The stable-region study: its grid, its report, its command, and a kill in the middle of it."""

import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.studies import region_row
from trainers import stress
from trainers.stress import main
from trainers.studies.region import ARMS, LR, REFERENCE, Region, arms
from trainers.studies.region_figure import spread_out
from trainers.studies.region_grid import grid_of
from trainers.studies.region_report import write_report
from trainers.studies.rows import RowsFile, read_rows
from trainers.studies.runs import StudyError, configurations

torch.set_num_threads(1)

REPOSITORY = Path(__file__).parents[2]
EXISTING = ("linear_adamw", "polar_riemannian", "sphere_riemannian")
TINY = ["--smoke", "--arms", *EXISTING[:2], "--multipliers", "1", "4", "16", "--balances", "0.01"]


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_the_whole_grid_has_seeds_outermost():
    runs = Region(seeds=2).runs()
    assert len(runs) == len({run.key for run in runs}) == 2 * 2 * 5 * 7
    assert [run.overrides.index("seed=0") >= 0 for run in runs[:70]] == [True] * 70
    assert all("seed=1" in run.overrides and "data.seed=1" in run.overrides for run in runs[70:])
    assert runs[0].labels == {"arm": REFERENCE, "multiplier": 1.0, "balance": 0.0}


def test_arms_differ_in_what_they_are_named_for():
    runs = Region(seeds=1, arms=EXISTING, multipliers=(16.0,), balances=(0.01,)).runs()
    linear, polar, sphere = configurations(runs)
    assert linear["optimizer"]["router_lr"] == LR * 16
    assert linear["optimizer"]["lr"] == LR
    assert linear["geometry"]["step"] is None
    for config, manifold in ((polar, "polar"), (sphere, "sphere")):
        assert config["router"]["manifold"] == manifold
        assert config["geometry"]["router_lr"] == 16
        assert config["geometry"]["step"] == "riemannian"
    for config in (linear, polar, sphere):
        assert config["loop"] | {"steps": 390, "warmup": 20} == config["loop"]
        assert (config["model"]["dim"], config["model"]["expert_hidden"], config["model"]["layers"]) == (96, 192, 2)
        regularizers = config["geometry"]["regularizers"]
        assert (regularizers["fsi"], regularizers["balance"]) == (0.0, 0.01)
        assert regularizers["balance_scope"] == "micro_batch"
        assert config["geometry"]["fisher"] is None


def test_natural_arms_name_their_speed_limits():
    found = arms(4.0)
    assert found["polar_natural_a"] == (
        "router=polar",
        "optimizer=natural",
        "geometry.router_lr=4",
        "geometry.natural.limit=0.0075",
    )
    limits = [found[f"polar_natural_{name}"][-1] for name in "abc"]
    assert limits == [f"geometry.natural.limit={limit}" for limit in (0.0075, 0.015, 0.03)]
    assert found["sphere_natural"][0::3] == ("router=sphere", "geometry.natural.limit=0.015")


# --- the report -------------------------------------------------------------------------------------------------------


def rows_of_everything():
    noise = random.Random(0)
    return [
        region_row(
            arm, multiplier, balance, seed, 1.7 + noise.random() / 50 + multiplier * number / 1e4, noise.random()
        )
        for seed in range(4)
        for balance in (0.0, 0.01)
        for multiplier in (1.0, 4.0, 16.0, 64.0, 256.0)
        for number, arm in enumerate(ARMS)
    ]


def table_row(text: str, arm: str, table: int) -> list[str]:
    """The cells of an arm in the n-th table."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {arm} |")]
    return [cell.strip() for cell in lines[table].strip("|").split("|")][1:]


def test_report_has_means_intervals_and_what_is_missing(tmp_path):
    rows = [
        region_row(REFERENCE, 1.0, 0.0, 0, 1.70, 0.0),
        region_row(REFERENCE, 1.0, 0.0, 1, 1.72, 0.5),
        region_row(REFERENCE, 4.0, 0.0, 0, 1.60),  # lower, but of one seed only
        region_row("polar_riemannian", 1.0, 0.0, 0, 1.68),
        region_row("polar_riemannian", 1.0, 0.0, 1, 1.66, started="2026-01-03T00:00:00Z"),
        region_row("polar_riemannian", 4.0, 0.0, 0, 1.50),
        region_row("polar_riemannian", 4.0, 0.0, 1, None),
        region_row("polar_riemannian", 16.0, 0.0, 0, None),
        region_row("polar_riemannian", 16.0, 0.0, 1, None, status="failed", reason="MemoryError: x"),
        region_row("polar_riemannian", 1.0, 0.01, 0, 1.0),
    ]
    text, picture = write_report(rows, tmp_path)
    found = text.read_text()
    # With two values the half-width is 12.706 times half their distance.
    assert table_row(found, REFERENCE, 0) == ["1.710 ± 0.127 (25%)", "1.600 (0%), n = 1", "-"]
    assert table_row(found, "polar_riemannian", 0) == [
        "1.670 ± 0.127 (0%)",
        "1.500 (0%), 1 diverged",
        "1 diverged, 1 failed",
    ]
    assert "at its best multiplier here, ×1 (1.710 ± 0.127)" in found
    assert table_row(found, REFERENCE, 1) == ["0", "-0.100 (1)", "-"]
    assert table_row(found, "polar_riemannian", 1) == ["-0.040 ± 0.254 (2)", "-0.200 (1)", "-"]
    assert found.count("No run of linear_adamw to compare with.") == 1
    for part in (
        "- command: `python -m trainers.stress region`\n",
        "- date: 2026-01-02 to 2026-01-03\n",
        "- commit: abc\n",
        "- hardware: a processor, 2 cores; one thread a run; python 3.11.7, torch 2.13.0\n",
        "- seeds: 2; 10 runs, 20 s each\n",
        "- size: 399,360 tokens a run (390 steps)\n",
        "polar_riemannian/x16/balance0/seed1: failed, MemoryError: x",
    ):
        assert part in found, part
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_figure_of_the_whole_grid_is_small(tmp_path):
    _, picture = write_report(rows_of_everything(), tmp_path)
    assert 20_000 < picture.stat().st_size < 200_000


def test_report_of_nothing_but_failures(tmp_path):
    text, picture = write_report([region_row(REFERENCE, 1.0, 0.0, 0, None)], tmp_path)
    assert table_row(text.read_text(), REFERENCE, 0) == ["1 diverged"]
    assert picture.exists()


def test_rows_that_do_not_compare_are_refused():
    first, second = (region_row(REFERENCE, 1.0, 0.0, seed, 1.7) for seed in (0, 1))
    second["configuration"] = second["configuration"] | {"loop": {"steps": 100}}
    with pytest.raises(StudyError, match="of different size"):
        grid_of([first, second])
    with pytest.raises(StudyError, match="of the study benchmark, not of region"):
        grid_of([first | {"study": "benchmark"}])


@given(st.lists(st.floats(0, 1), max_size=9).map(sorted), st.sampled_from([0.05, 0.1, 0.3]))
def test_labels_are_apart_in_order_and_within_the_panel(places, gap):
    moved = spread_out(places, gap)
    room = min(gap, 1 / max(1, len(places) - 1))
    assert all(upper - lower >= room - 1e-9 for lower, upper in itertools.pairwise(moved))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in moved)
    if all(upper - lower >= room for lower, upper in itertools.pairwise(places)):
        assert moved == pytest.approx(places, abs=1e-12)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: STUDY"),
        (["area"], "invalid choice: 'area'"),
        (["region", "--seed"], "unrecognized arguments: --seed"),
        (["region", "--seeds", "x"], "argument --seeds: invalid int value: 'x'"),
        (["region", "--seeds", "0"], "expected a seed and 1024 tokens or more, got 0, 400000"),
        (["region", "--tokens", "5"], "expected a seed and 1024 tokens or more, got 4, 5"),
        (["region", "--arms", "cubic"], "there is no arm cubic; the arms are linear_adamw, "),
        (["region", "--multipliers", "0"], "multipliers must be above 0"),
        (["region", "--processes", "0"], "processes must be at least 1, got 0"),
        (["region", "--smoke", "--data", "nowhere"], "Could not find 'data/nowhere'"),
        (["region", "--smoke", "--data", "digits"], "Could not override 'data.length'"),
        (["region", "--report"], "there are no rows in "),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as leaving:
        main([*arguments, *(["--out", str(tmp_path)] if "region" in arguments else [])])
    error = capsys.readouterr().err
    assert leaving.value.code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "how"),
    [
        ([], "the same command continues"),
        (["--fresh"], "the same command without --fresh continues"),
        (["--smoke"], "the same command with --out runs/region-smoke continues"),
        (["--smoke", "--fresh"], "the same command with --out runs/region-smoke and without --fresh continues"),
        (["--smoke", "--out", "there"], "the same command continues"),
    ],
)
def test_how_a_study_goes_on_depends_on_how_it_was_begun(monkeypatch, arguments, how):
    def run(study):
        assert study.resume == how
        assert study.fresh == (how != "the same command continues")
        raise StudyError("enough")

    monkeypatch.setattr(stress, "run_study", run)
    with pytest.raises(SystemExit):
        main(["region", *arguments])


def test_rows_of_other_settings_are_refused_in_one_line(tmp_path, capsys):
    (run,) = Region(seeds=1, arms=[REFERENCE], multipliers=[1.0], balances=[0.0]).runs()
    row = region_row(REFERENCE, 1.0, 0.0, 0, 1.7, configuration=configurations([run])[0])
    with RowsFile(tmp_path / "rows.jsonl") as file:
        file.append(row | {"overrides": list(run.overrides)})
    command = ["region", "--out", str(tmp_path), "--seeds", "1", "--arms", REFERENCE, "--multipliers", "1"]
    main([*command, "--balances", "0"])  # it is there: nothing to train
    with pytest.raises(SystemExit):
        main([*command, "--balances", "0", "--tokens", "204800"])
    error = capsys.readouterr().err
    assert "holds linear_adamw/x1/balance0/seed0 with other settings (loop.steps: 390 then, 200 now; loop.warm" in error
    assert error.count("\n") == 1


def start(*arguments: str, temporary: str | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trainers.stress", "region", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": temporary or tempfile.gettempdir()},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def lives(group: int) -> bool:
    """Whether a process of the group does."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_rows(path: Path, process: subprocess.Popen[str], count: int) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_a_killed_study_goes_on_run_by_run(tmp_path, capsys):
    path, command = tmp_path / "rows.jsonl", [*TINY, "--out", str(tmp_path)]
    process = start(*command)
    wait_for_rows(path, process, 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = path.read_bytes()
    done = before.count(b"\n")
    assert 2 <= done < 6, "the kill came too late to test anything"
    with path.open("ab") as file:
        file.write(before[:50])  # as if the kill had come while a row was written

    main(["region", *command, "--processes", "1"])
    output = capsys.readouterr().out
    assert "the last row was torn" in output
    assert f"region: 6 runs, {done} of them done before" in output
    assert "[6/6] " in output
    assert path.read_bytes().startswith(before)
    rows = read_rows(path)
    assert len({row["key"] for row in rows}) == len(rows) == 6
    assert {row["status"] for row in rows} == {"done"}
    assert "python -m trainers.stress region --smoke" in (tmp_path / "region.md").read_text()

    os.remove(tmp_path / "region.png")
    main(["region", "--out", str(tmp_path), "--report"])
    assert (tmp_path / "region.png").exists()


@pytest.mark.slow
def test_ctrl_c_ends_the_command_in_one_line_and_its_workers_with_it(tmp_path):
    path, command = tmp_path / "rows.jsonl", [*TINY, "--tokens", "400000", "--out", str(tmp_path)]
    process = start(*command)
    wait_for_rows(path, process, 1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    output, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "")
    assert output.splitlines()[-1].endswith(f"of 6 runs are in {path}; the same command continues")
    wait_until(lambda: not lives(process.pid))  # multiprocessing has a helper process that goes last


@pytest.mark.slow
def test_workers_end_when_the_study_alone_is_killed(tmp_path):
    process = start(*TINY, "--tokens", "40000000", "--out", str(tmp_path), "--processes", "1", temporary=str(tmp_path))
    wait_until(lambda: any(tmp_path.glob("moegeo-study-*/*/checkpoints/*")))  # it trains
    process.kill()
    process.communicate()
    wait_until(lambda: not lives(process.pid))


@pytest.mark.slow
def test_the_smoke_grid_runs_on_the_default_data(tmp_path):
    process = start("--smoke", "--out", str(tmp_path))
    output, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (0, ""), output
    assert {row["status"] for row in read_rows(tmp_path / "rows.jsonl")} == {"done"}
