"""The benchmark's report: what the rows say, verdicts, tables, and what is missing."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
from scipy import stats

from tests.support.studies import benchmark_rows, decision
from trainers.studies.benchmark import ARMS, main_runs, tuning_runs
from trainers.studies.benchmark_report import write_benchmark
from trainers.studies.benchmark_results import mixed, results_of
from trainers.studies.benchmark_stages import Benchmark
from trainers.studies.benchmark_tasks import TIERS
from trainers.studies.benchmark_tuning import choices
from trainers.studies.files import write_whole
from trainers.studies.rows import RowsFile
from trainers.studies.runs import StudyError

CPU = TIERS["cpu"]


def curve(speed: float, points: int = 8) -> dict[str, list[float]]:
    steps = range(1, points + 1)
    return {"tokens": [1000.0 * step for step in steps], "loss": [4.0 - speed * step / points for step in steps]}


def rows_of(task: str = "planted", ours: float = -0.0001, seeds: int = 10):
    """Rows in which ours differ from the baseline by ``ours``, hash is worse and dense diverged once."""
    noise = random.Random(0)
    found = []
    for number, arm in enumerate(("linear_switch", "linear_bias", "polar_natural", "hash", "dense")):
        # The loss-free baseline tunes best, the other one ends better.
        tuned = [2.0 + 0.1 * abs(index - 2) - 0.01 * (number == 1) for index in range(6)]
        found += benchmark_rows(CPU, tuning_runs(CPU, task, arm), tuned)
    shared = [1.9 + noise.random() / 10 for _ in range(max(seeds, 5))]
    tuned_to = {arm: choice.setting for arm, choice in choices(CPU, task, found).items()}
    for arm, count, difference in (
        ("linear_bias", seeds, 0.0),
        ("polar_natural", seeds, ours),
        ("linear_switch", 5, -0.05),
        ("hash", 4, 0.2),
        ("dense", 5, 0.0),
    ):
        losses = [loss + difference + noise.random() / 1000 for loss in shared[:count]]
        runs = main_runs(CPU, task, {arm: tuned_to[arm]}, {arm: count})
        done = [None if arm == "dense" and seed == 1 else loss for seed, loss in enumerate(losses)]
        speed = 2000.0 if arm == "polar_natural" else 1600.0
        own = benchmark_rows(
            CPU,
            runs,
            done,
            train__tokens_per_second=[speed] * count,
            valid__recovery=[0.75] * count,
            valid__accuracy=[1 - loss / 10 for loss in losses],
            valid__geometry__dead_experts=[2.0] * count,
            valid__geometry__layer0__max_load=[1.2] * count,
            valid__geometry__layer1__max_load=[1.4] * count,
        )
        for row in own:
            row["curve"] = curve(2.0 if arm == "polar_natural" else 0.5 if arm == "hash" else 1.0)
        found += own
    return found


def written(tmp_path, rows, task: str = "planted") -> str:
    with RowsFile(tmp_path / task / "rows.jsonl") as file:
        for row in rows:
            file.append(row)
    paths = write_benchmark(Benchmark(tier=CPU, out=tmp_path, command=""))
    assert [path.name for path in paths] == ["benchmark.md", "differences.png", "curves.png"]
    assert all(path.stat().st_size > 1000 for path in paths[1:])
    return paths[0].read_text()


def cells(text: str, arm: str, table: int = 0) -> list[str]:
    tables = text.partition("\n## ")[2]
    lines = [line for line in tables.splitlines() if line.startswith(f"| {ARMS[arm].title} |")]
    return [cell.strip() for cell in lines[table].strip("|").split("|")][1:]


def test_report_says_what_the_rows_say(tmp_path):
    rows = rows_of()
    text = written(tmp_path, rows)
    assert "The baseline is linear, loss-free bias, of 2 that are tuned." in text
    assert "In these runs linear, Switch loss is the best linear baseline. Compared with it:" in text
    behind, *_, verdict = cells(text, "polar_natural", 1)
    assert behind == "+0.0499 ± 0.0004 (5)"
    assert verdict == "worse (too few pairs)"
    head = text.partition("![")[0].splitlines()
    summary = dict(line.strip("| ").split(" | ") for line in head if line.startswith("| ") and "| |" not in line)
    baseline = [row["results"]["valid/loss"] for row in rows if row["key"].startswith("planted/linear_bias/seed")]
    assert summary["linear, loss-free bias"] == f"{sum(baseline) / 10:.4g}: the baseline"
    assert summary["soft (all experts)"] == "-"
    assert summary["hash"].startswith("-10.")  # of a loss: more is worse
    assert summary["hash"].endswith(" (4), worse")
    runs, mean, difference, percent, p, verdict = cells(text, "polar_natural")
    ours, theirs = (
        [
            row["results"]["valid/loss"]
            for row in rows
            if row["labels"]["arm"] == arm and row["labels"]["phase"] == "main"
        ]
        for arm in ("polar_natural", "linear_bias")
    )
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    width = (expected.high - expected.low) / 2
    assert difference == f"{(expected.high + expected.low) / 2:+.4f} ± {width:.4f} (10)"
    assert (runs, p, verdict) == ("10", "<0.001", "equivalent")
    assert mean.startswith(f"{sum(ours) / 10:.4f} ± ")
    assert percent in ("+0.00", "-0.00", "-0.01")
    assert cells(text, "linear_bias")[-1] == "the baseline"
    assert cells(text, "linear_switch")[-1] == "better"
    assert cells(text, "linear_switch")[0] == "5 of 10 (5 missing)"
    assert cells(text, "hash")[0] == "4 of 5 (1 missing)"
    assert cells(text, "hash")[-1] == "worse"
    assert cells(text, "dense")[0] == "4 of 5 (1 without a result)"
    assert cells(text, "dense")[-1].endswith(" (1 without a result)")
    assert summary["dense"].endswith(" (1 without a result)")
    assert cells(text, "soft") == ["0 of 5 (5 missing)", "-", "-", "-", "-", "missing"]
    assert "- planted/dense/seed1: diverged, NaN or inf at step 3" in text
    missing = "".join(f"- {task}: no rows\n" for task in ("language", "fashion_mnist", "cifar10", "multidomain"))
    assert text.endswith(f"## Missing\n\n{missing}")
    assert (
        "2 layers of width 96, 8 experts, top-2; 390 steps of 8 windows of 128 tokens; judged on all held-out tokens."
        in text
    )
    assert "- seeds: 10; 34 runs, 20 s each\n- besides: 30 tuning runs\n" in text


def test_one_pair_is_no_result_in_the_summary(tmp_path):
    text = written(tmp_path, rows_of(seeds=1)).partition("![")[0]
    assert "| ours: polar, natural gradient | - |" in text
    assert ": the baseline |" in text


def test_what_somebody_wrote_beside_the_rows_is_in_the_report(tmp_path):
    (tmp_path / "notes.md").write_text("- The grid was changed.\n")
    assert "\n## On the way\n\n- The grid was changed.\n" in written(tmp_path, rows_of())


def test_data_that_judge_and_data_of_the_routing_are_told_apart(tmp_path):
    rows = rows_of("language")
    for row in rows:
        if row["status"] == "done":
            row["results"]["probe/enwiki_valid/bits_per_byte"] = row["results"]["valid/loss"]
        row["configuration"] = row["configuration"] | {"probes": {"enwiki_valid": {"valid_tokens": 200000}}}
    text = written(tmp_path, rows, "language")
    assert "judged on 200,000 held-out tokens; loads and metrics of the routing are of all." in text
    assert "Tuning: 6 runs an arm, 0.125 of the length" in text
    assert "validation loss is of 32,768 bytes of the split that judges" in text


def test_report_has_routing_speed_and_tuning(tmp_path):
    text = written(tmp_path, rows_of())
    assert cells(text, "polar_natural", 2) == ["0.7500 ± 0.0000 (+0.0000 ± 0.0000, equivalent)", "-"]
    violation, dead, *_, speed, step, tokens = cells(text, "polar_natural", 3)
    assert (violation, dead, speed) == ("0.3000 ± 0.0000", "2.0 ± 0.0", "2,000")
    # 1,600 tokens a second are to 2,000 as 0.8 to 1; a curve twice as steep is there in half of the tokens.
    assert (step, tokens) == ("0.80 (0.80 to 0.80)", "0.50 (0.50 to 0.50)")
    assert cells(text, "hash", 2)[-1] == "not reached in 4 of 4"
    assert cells(text, "dense", 1) == ["-", "-"]  # nothing is chosen there: no recovery, no balance
    assert cells(text, "dense", 2)[:4] == ["-"] * 4
    assert cells(text, "hash", 3) == ["2.200", "2.100", "**2.000**", "2.100", "2.200", "2.300", ""]
    assert "| arm | lr 0.0028 | lr 0.004 | lr 0.0057 | lr 0.008 | lr 0.011 | lr 0.016 | |" in text
    assert "Not tuned: linear, Switch loss and z-loss; " in text


def test_runs_of_different_hours_say_nothing_of_speed(tmp_path):
    rows = rows_of()
    for row in rows:
        if row["key"].startswith("planted/polar_natural/seed"):
            # All but two began 61 minutes later; of these two one was twice as fast as the baseline, one half as fast.
            row["started"] = {0: "2026-01-02T03:50:00Z", 1: "2026-01-02T02:10:00Z"}.get(
                row["seed"], "2026-01-02T04:05:05Z"
            )
            row["results"]["train/tokens_per_second"] = {0: 3200.0, 1: 800.0}.get(row["seed"], 9999.0)
        elif row["labels"]["arm"] == "linear_switch":
            row["started"] = "2026-01-03T03:04:05Z"
    text = written(tmp_path, rows)
    assert cells(text, "polar_natural", 3)[-2].startswith("1.00 (0.00 to ")
    assert cells(text, "linear_switch", 2)[-2] == "-"


def test_seeds_that_either_side_lost_are_told_beside_the_verdict(tmp_path):
    rows = rows_of()
    for row in rows:
        if row["key"] in ("planted/linear_bias/seed3", "planted/linear_bias/seed7", "planted/linear_switch/seed0"):
            row |= {"status": "failed", "reason": "out of memory", "results": {}}
        if row["key"].startswith("planted/hash/seed"):
            row |= {"status": "diverged", "results": {}}
    text = written(tmp_path, rows)
    assert cells(text, "polar_natural")[-1] == "equivalent (too few pairs) (2 without a result)"
    assert cells(text, "linear_switch")[-1] == "better (2 without a result)"  # its seed 0, and seed 3; it has no seed 7
    assert cells(text, "hash")[-1] == "missing (4 without a result)"
    assert cells(text, "polar_natural", 1)[-1] == "worse (too few pairs) (1 without a result)"
    assert "| hash | - (4 without a result) |" in text


def test_what_a_controller_did_not_do_is_said(tmp_path):
    rows = [row for row in rows_of(ours=0.0) if row["labels"]["arm"] != "polar_natural_act"]
    setting = {"optimizer.lr": 0.008, "geometry.regularizers.balance": 0.001}
    tuned = tuning_runs(CPU, "planted", "polar_natural_act")
    tuned_rows = benchmark_rows(CPU, tuned, [1.0 if run.labels["setting"] == setting else 2.0 for run in tuned])
    both = dict.fromkeys(("polar_natural", "polar_natural_act"), setting)
    runs = main_runs(CPU, "planted", both, {"polar_natural_act": 4})
    theirs = [row["results"]["valid/loss"] for row in rows if row["key"].startswith("planted/polar_natural/seed")]
    acting = benchmark_rows(CPU, runs, [*theirs[:3], 1.0])
    for row, balance in zip(acting, (0.0, 0.0031, 0.0, 0.002), strict=True):
        row["configuration"] = row["configuration"] | {"geometry": {"controller": "act"}}
        row["results"] |= {"control/largest/balance": balance, "control/largest/speed": 0.0}
    acting[3]["events"] = [
        decision(9, "apply", "revive"),
        decision(20, "apply", "revive"),
        decision(20, "apply", "revive") | {"event": "outcome", "reason": "no place"},
    ]
    text = written(tmp_path, rows + tuned_rows + acting)
    assert (
        "ours: natural, controller acting: the controller gave orders in 1 of 4 runs (2 orders, 1 of them carried "
        "out: revive); its set-points were at work in 2 of 4 (largest weights: balance 0.0031); against the same runs "
        "without it -0.23" in text
    )
    assert " (4), inconclusive, 3 of them the very same numbers." in text
    # Tuned to another setting, it is not compared with runs of that one, but with its own.
    other = {"optimizer.lr": 0.008, "geometry.regularizers.balance": 0.01}
    tuned = tuning_runs(CPU, "planted", "polar_natural_act")
    acting += benchmark_rows(CPU, tuned, [1.0 if run.labels["setting"] == other else 2.0 for run in tuned])
    found = results_of(CPU, "planted", rows + acting)
    assert found.effect("polar_natural_act", "valid/loss") is None
    runs = main_runs(CPU, "planted", {"polar_natural_act": other}, {"polar_natural_act": 4})
    in_turn = [loss for acted in (*theirs[:3], 1.0) for loss in (acted, 1.5)]  # with it and without
    acting = acting[4:] + benchmark_rows(CPU, runs, in_turn)
    found = results_of(CPU, "planted", rows + acting)
    effect = found.effect("polar_natural_act", "valid/loss")
    assert effect is not None
    assert effect.difference.mean == pytest.approx((sum(theirs[:3]) + 1.0) / 4 - 1.5)
    assert mixed(acting) is None


def test_domains_with_little_text_have_a_star_and_edges_are_said(tmp_path):
    rows = rows_of("multidomain")
    for row in rows:
        if row["labels"]["phase"] == "main" and row["status"] == "done":
            row["results"] |= {"valid/bits_per_byte": 2.0, "valid/domain/go/loss": 1.5, "valid/domain/go/targets": 1999}
            row["results"] |= {"valid/domain/maths/loss": 1.25, "valid/domain/maths/targets": 2000}
    for row in rows:
        if row["labels"]["arm"] == "hash" and row["labels"]["phase"] == "tuning":
            row["results"]["valid/loss"] = 10 - 100 * row["labels"]["setting"]["optimizer.lr"]
        elif row["labels"]["arm"] == "hash":
            row["labels"] |= {"setting": {"optimizer.lr": 0.008}}
    text = written(tmp_path, rows, "multidomain")
    assert "| go | 1,999* | 1.500 | " in text
    assert "| maths | 2,000 | 1.250 | " in text
    assert cells(text, "hash", 2)[-2:] == ["**9.200**", "at the edge of the rates"]
    assert cells(text, "polar_natural", 3)[-1] == ""


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("planted/hash/seed1", {"geometry": {"fisher": "x"}, "model": {"dim": 97}}, "model.dim 97, not 96"),
        ("planted/polar_natural/seed3", {"optimizer": {"lr": 0.008}}, "optimizer.lr 0.008, not 0.004"),
    ],
)
def test_rows_of_mixed_settings_are_no_report(tmp_path, key, change, message):
    rows = rows_of()
    for row in rows:
        row["configuration"] = row["configuration"] | {"optimizer": {"lr": 0.004}}
    assert mixed(rows) is None
    for row in rows:
        if row["key"] == key:
            row["configuration"] = row["configuration"] | change
    assert mixed(rows) == f"{key}: {message}"
    with RowsFile(tmp_path / "planted" / "rows.jsonl") as file:
        for row in rows:
            file.append(row)
    with pytest.raises(StudyError, match=f"rows of different settings .{key}: {message}"):
        write_benchmark(Benchmark(tier=CPU, out=tmp_path, command=""))


@pytest.mark.parametrize("phase", ["main", "without"])
def test_an_arm_whose_runs_tuning_did_not_choose_is_missing(tmp_path, phase):
    rows = rows_of()
    tuned = [row for row in rows if row["key"].startswith("planted/tuning/polar_natural/")]
    losses = {row["key"]: row["results"]["valid/loss"] for row in tuned}
    now = max(tuned, key=lambda row: losses[row["key"]])  # tuned again, another one is the best
    now["results"] |= {"valid/loss": 0.1}
    first = next(row for row in rows if row["key"] == "planted/polar_natural/seed0")
    if phase == "without":
        rows = [row for row in rows if row is first or row in tuned or row["labels"]["arm"] != "polar_natural"]
        first["labels"] |= {"phase": "without"}
    text = written(tmp_path, rows)
    verdict = "missing: planted/polar_natural/seed0 has optimizer.lr 0.008, and tuning chose 0.016"
    assert cells(text, "polar_natural") == ["0 of 10 (10 missing)", "-", "-", "-", "-", verdict]
    assert cells(text, "hash")[-1] == "worse"


def test_a_report_that_cannot_be_written_leaves_the_former_one(tmp_path, monkeypatch):
    written(tmp_path, rows_of())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StudyError, match=r"cannot write .*differences.png: No space left on device; the rows "):
        write_benchmark(Benchmark(tier=CPU, out=tmp_path, command=""))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_two_that_write_one_report_do_not_meet(tmp_path, monkeypatch):
    path, write = tmp_path / "benchmark.md", Path.write_bytes

    def beside_another(unfinished, content):
        monkeypatch.setattr(Path, "write_bytes", write)
        write(unfinished, content)
        write_whole(path, "theirs")
        assert path.read_text() == "theirs"

    monkeypatch.setattr(Path, "write_bytes", beside_another)
    write_whole(path, "ours")
    assert path.read_text() == "ours"
    assert [*tmp_path.iterdir()] == [path]


def test_one_damaged_file_is_said_beside_the_other_tasks(tmp_path):
    (tmp_path / "cifar10").mkdir(parents=True)
    (tmp_path / "cifar10" / "rows.jsonl").write_text("no row\n{}\n")
    benchmark = Benchmark(tier=CPU, out=tmp_path, command="", broken={"planted": "the disk is full"})
    with RowsFile(tmp_path / "planted" / "rows.jsonl") as file:
        for row in rows_of():
            file.append(row)
    text = write_benchmark(benchmark)[0].read_text()
    assert f"- cifar10: {tmp_path / 'cifar10' / 'rows.jsonl'}" in text
    assert "Not finished: the disk is full" in text


def test_more_accuracy_is_better_and_few_pairs_are_said(tmp_path):
    rows = rows_of("cifar10", ours=0.3, seeds=4)
    text = written(tmp_path, rows, "cifar10")
    assert cells(text, "polar_natural")[-1] == "worse (too few pairs)"
    assert cells(text, "hash")[-1] == "worse"
    assert cells(text, "linear_switch")[-1] == "better"


def test_without_a_baseline_nothing_is_compared(tmp_path):
    rows = [row for row in rows_of() if not ARMS[row["labels"]["arm"]].linear]
    found = results_of(CPU, "planted", rows)
    assert found.reference is None
    assert found.compared("polar_natural", "valid/loss") is None
    with RowsFile(tmp_path / "planted" / "rows.jsonl") as file:
        for row in rows:
            file.append(row)
    (text, *_) = write_benchmark(Benchmark(tier=CPU, out=tmp_path, command=""))
    assert "there is nothing to compare with" in text.read_text()


def test_rows_of_another_tier_are_refused(tmp_path):
    with RowsFile(tmp_path / "planted" / "rows.jsonl") as file:
        file.append(rows_of()[0] | {"study": "benchmark-smoke"})
    with pytest.raises(StudyError, match="holds rows of benchmark-smoke, not of benchmark-cpu"):
        write_benchmark(Benchmark(tier=CPU, out=tmp_path, command=""))
