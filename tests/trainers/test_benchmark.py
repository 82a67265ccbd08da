"""The benchmark: its arms and tasks, the tuning grid and what it chooses, its command, and what goes wrong in it."""

from __future__ import annotations

import json
import shlex
import shutil
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.runs import CONFIGS, configuration
from tests.support.studies import benchmark_rows
from trainers import benchmark as command
from trainers.models.language import LanguageModel
from trainers.studies import benchmark_stages
from trainers.studies.benchmark import (
    ARMS,
    CANDIDATES,
    LEADING,
    TIERS,
    TOY,
    TUNING_SEED,
    main_runs,
    seeds_of,
    settings,
    tuning_runs,
)
from trainers.studies.benchmark_stages import Benchmark
from trainers.studies.benchmark_tuning import choices, reference
from trainers.studies.rows import read_rows
from trainers.studies.runs import DataCache, Run, StudyError, configurations, train_run
from trainers.train import train

torch.set_num_threads(1)

CPU, SMOKE = TIERS["cpu"], TIERS["smoke"]


def main_config(arm: str, task: str = "planted", tier: Any = CPU) -> dict[str, Any]:
    setting = settings(ARMS[arm], tier.tasks[task])[-1]
    return configurations(main_runs(tier, task, {arm: setting}, {arm: 1}))[0]


# --- arms and tasks ---------------------------------------------------------------------------------------------------


def test_every_arm_is_a_configuration():
    assert {path.stem for path in (CONFIGS / "arm").glob("*.yaml")} == {*ARMS, "base"}
    experiments = {path.stem for path in (CONFIGS / "experiment" / "benchmark").glob("*.yaml")}
    assert experiments == {task.experiment for task in CPU.tasks.values()}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_composes_in_every_task_and_has_nothing_but_its_own(arm):
    places = ((CPU, "language"), (CPU, "fashion_mnist"), (TOY, "language_64"))
    runs = [tuning_runs(tier, task, arm)[-1] for tier, task in places]
    for run, config in zip(runs, configurations(runs), strict=True):
        weights = {name: value for name, value in config["geometry"]["regularizers"].items() if name != "_target_"}
        on = {name for name in ("fsi", "fhs", "dispersion", "information", "balance", "z") if weights[name]}
        assert on == {
            "linear_z": {"balance", "z"},
            "polar_natural_regularized": {"balance", "fsi", "dispersion"},
        }.get(arm, set() if ARMS[arm].knob is None or arm == "linear_bias" else {"balance"})
        assert weights["balance_scope"] == "micro_batch"
        acting = arm == "polar_natural_act"
        assert config["geometry"]["controller"] == ("act" if acting else None)
        assert config["geometry"]["fisher"] == ("outputs" if acting else None)
        assert config["seed"] == config["data"]["seed"] == TUNING_SEED
        assert bool(config["prior"]) == (arm == "linear_bias")
        assert config["optimizer"]["lr"] == run.labels["setting"]["optimizer.lr"]
        assert config["device"] == (
            "cuda" if "cuda" in str(run.overrides) and "device=cpu" not in run.overrides else "cpu"
        )


def test_dense_and_soft_take_their_size_from_the_task_whatever_the_tier():
    for tier, task in (
        (CPU, "multidomain"),
        (CPU, "cifar10"),
        (CPU, "planted"),
        (SMOKE, "vision"),
        (TOY, "language_8"),
    ):
        plain, soft, dense = (main_config(arm, task, tier) for arm in ("linear_switch", "soft", "dense"))
        experts, top_k, hidden = (plain["model"][name] for name in ("num_experts", "top_k", "expert_hidden"))
        assert top_k < experts
        assert (soft["model"]["num_experts"], soft["model"]["top_k"]) == (experts, experts)
        assert (dense["model"]["num_experts"], dense["model"]["top_k"]) == (1, 1)
        assert dense["model"]["expert_hidden"] == top_k * hidden


def test_steps_of_the_cpu_tier_are_those_of_the_experiments():
    for name, share in (("language", 1 / 8), ("planted", 1 / 2)):
        run = main_runs(CPU, name, {"dense": {}}, {"dense": 1})[0]
        alone = Run("x", [f"experiment=benchmark/{name}", "seed=0", "arm=dense"], {})
        ours, theirs, tuned = configurations([run, alone, tuning_runs(CPU, name, "dense")[0]])
        assert ours == theirs | {"geometry": ours["geometry"]}
        assert tuned["loop"]["steps"] == ours["loop"]["steps"] * share
    for task in CPU.tasks.values():
        path = CONFIGS / "experiment" / "benchmark" / f"{task.experiment}.yaml"
        assert "steps:" not in path.read_text() or f"steps: {task.steps}\n" in path.read_text()


def test_gpu_models_have_60_to_125_million_parameters():
    for task in TIERS["gpu"].tasks:
        model = main_config("linear_switch", task, TIERS["gpu"])["model"]
        sizes = {name: value for name, value in model.items() if not name.startswith("_")}
        with torch.device("meta"):
            built = LanguageModel(257, partial(nn.Linear, bias=False), **sizes)
        assert 60e6 < sum(p.numel() for p in built.parameters()) < 125e6
        assert 8 <= model["num_experts"] <= 64


# --- tuning -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_tuned_on_the_same_budget(arm):
    task = CPU.tasks["language"]
    grid = settings(ARMS[arm], task)
    assert len(grid) == len({tuple(setting.items()) for setting in grid}) == CANDIDATES == 6
    rates = {setting["optimizer.lr"] for setting in grid}
    assert {0.002, 0.004, 0.008} <= rates
    assert len(rates) == (6 if ARMS[arm].knob is None else 3)
    runs = tuning_runs(CPU, "language", arm)
    assert all({"loop.steps=195", f"seed={TUNING_SEED}"} <= {*run.overrides} for run in runs)
    assert len({run.key for run in runs}) == 6


def test_images_that_choose_settings_are_not_those_that_judge():
    for name in ("fashion_mnist", "cifar10"):
        tuned, judged = configurations(
            [tuning_runs(CPU, name, "dense")[0], main_runs(CPU, name, {"dense": {}}, {"dense": 1})[0]]
        )
        assert (tuned["data"]["split"], judged["data"]["split"]) == ("valid", "test")
        assert judged["data"]["valid_images"] is None  # all of them
        assert {*judged["probes"]} == {"noise10", "noise20", "blur", "contrast", "rotation"}
        assert not tuned.get("probes")


def test_a_controller_that_tuning_set_otherwise_is_compared_with_itself_switched_off():
    one, other = {"optimizer.lr": 0.002}, {"optimizer.lr": 0.004}
    seeds = {"polar_natural": 2, "polar_natural_act": 2}
    same = main_runs(CPU, "planted", dict.fromkeys(seeds, one), seeds)
    assert [run.labels["phase"] for run in same] == ["main"] * 4
    runs = main_runs(CPU, "planted", {"polar_natural": one, "polar_natural_act": other}, seeds)
    assert [run.key.removeprefix("planted/") for run in runs[:3]] == [
        "polar_natural/seed0",
        "polar_natural_act/seed0",
        "polar_natural_act/without/seed0",
    ]
    assert runs[2].labels == runs[1].labels | {"phase": "without"}
    acting, without = configurations(runs[1:3])
    assert acting["optimizer"] == without["optimizer"]
    assert acting["geometry"] == without["geometry"] | {
        name: acting["geometry"][name] for name in ("controller", "control", "fisher") if name in acting["geometry"]
    }
    assert (acting["geometry"]["controller"], without["geometry"]["controller"]) == ("act", None)


def rows(losses: dict[str, list[float | None]], task: str = "planted") -> list[dict[str, Any]]:
    return [
        row
        for arm, found in losses.items()
        for row in benchmark_rows(CPU, tuning_runs(CPU, task, arm)[: len(found)], found)
    ]


def test_the_least_loss_is_chosen_once_all_are_there():
    found = choices(
        CPU,
        "planted",
        rows(
            {
                "linear_switch": [2.0, 1.9, None, 1.8, 1.8, 1.95],
                "linear_bias": [2.0, 1.9, 1.7, 1.8, 1.8, 1.95],
                "polar_natural": [1.0] * 5,  # one is still to come
                "dense": [None] * 6,
                "soft": [1.1] * 6,
            }
        ),
    )
    assert [*found] == ["linear_switch", "linear_bias", "soft"]
    assert found["linear_switch"].setting == {"optimizer.lr": 0.004, "geometry.regularizers.balance": 0.01}  # the first
    assert found["linear_switch"].tried[2][1] is None
    assert found["linear_bias"].setting == {"optimizer.lr": 0.004, "prior.speed": 0.001}
    assert reference(found) == "linear_bias"  # soft is no linear baseline
    assert reference({}) is None


def test_what_the_question_is_about_comes_first_and_has_more_seeds():
    found = choices(CPU, "planted", rows({arm: [1.0] * 6 for arm in ARMS}))
    counts = seeds_of(CPU, tuple(ARMS))
    assert {*LEADING} == {arm for arm in ARMS if ARMS[arm].ours or ARMS[arm].linear}
    assert counts == {arm: 10 if arm in LEADING else 5 for arm in ARMS}
    first = seeds_of(CPU, LEADING)
    runs = main_runs(CPU, "planted", {arm: found[arm].setting for arm in first}, first)
    assert [run.key for run in runs[:8]] == [
        *(f"planted/{arm}/seed0" for arm in LEADING),
        "planted/linear_switch/seed1",
    ]
    assert len(runs) == 70
    assert f"seed={TUNING_SEED}" not in {override for run in runs for override in run.overrides}
    assert seeds_of(CPU, ["dense", "polar_natural"], 2) == {"polar_natural": 2, "dense": 2}
    assert seeds_of(CPU, ["dense", "polar_natural"], 7) == {"polar_natural": 7, "dense": 5}


# --- the command ------------------------------------------------------------------------------------------------------

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


def test_a_full_disk_is_said_for_each_task(tmp_path, monkeypatch):
    def full(study, say):
        raise StudyError(f"cannot write to {study.path}: No space left on device; the rows before are whole.")

    monkeypatch.setattr(benchmark_stages, "run_study", full)
    said: list[str] = []
    benchmark = Benchmark(tier=SMOKE, out=tmp_path, command="", arms=["dense"], say=said.append)
    benchmark.run()
    assert [*benchmark.broken] == ["planted", "vision"]
    assert [line.split(": ")[1] for line in said] == ["planted is left out", "vision is left out"]
    assert all("No space left on device" in line for line in said)


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


def test_the_gpus_tasks_train_at_toy_size_in_bf16(tmp_path):
    configs = [main_config("polar_natural", task, TOY) for task in TOY.tasks]
    assert [config["model"]["num_experts"] for config in configs] == [8, 64]
    for config in configs:
        found = train_run(config, tmp_path, DataCache())
        assert (found["status"], found["warnings"]) == ("done", [])
        assert config["loop"]["precision"] == "bf16"
