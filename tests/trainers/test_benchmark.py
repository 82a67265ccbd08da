"""The benchmark: its arms and tasks, the tuning grid and what it chooses."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.runs import CONFIGS
from tests.support.studies import benchmark_rows
from trainers.models.language import LanguageModel
from trainers.studies.benchmark import ARMS, LEADING, TUNING_SEED, main_runs, seeds_of, settings, tuning_runs
from trainers.studies.benchmark_tasks import CANDIDATES, TIERS, TOY, Task
from trainers.studies.benchmark_tuning import choices, reference
from trainers.studies.runs import DataCache, Run, configurations, train_run

torch.set_num_threads(1)

CPU, GPU, SMOKE = TIERS["cpu"], TIERS["gpu"], TIERS["smoke"]


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
    loss_free = {"linear_bias": "SignBias", "polar_natural_prior": "ExpertPrior"}
    places = (
        (CPU, "language", "cpu"),
        (CPU, "fashion_mnist", "cpu"),
        (GPU, "language_64", "cuda"),
        (TOY, "language_64", "cpu"),
    )
    runs = [tuning_runs(tier, task, arm)[-1] for tier, task, _ in places]
    for run, config, (_, _, device) in zip(runs, configurations(runs), places, strict=True):
        weights = {name: value for name, value in config["geometry"]["regularizers"].items() if name != "_target_"}
        on = {name for name in ("fsi", "fhs", "dispersion", "information", "balance", "z") if weights[name]}
        assert on == {
            "linear_z": {"balance", "z"},
            "polar_natural_regularized": {"balance", "fsi", "dispersion"},
        }.get(arm, set() if ARMS[arm].knob is None or arm in loss_free else {"balance"})
        assert weights["balance_scope"] == "micro_batch"
        acting = arm == "polar_natural_act"
        assert config["geometry"]["controller"] == ("act" if acting else None)
        assert config["geometry"]["fisher"] == ("outputs" if acting else None)
        assert config["seed"] == config["data"]["seed"] == TUNING_SEED
        assert config["prior"].get("_target_", "").rpartition(".")[2] == loss_free.get(arm, "")
        assert config["optimizer"]["lr"] == run.labels["setting"]["optimizer.lr"]
        assert config["device"] == device


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
    assert found["linear_switch"].setting == {"optimizer.lr": 0.008, "geometry.regularizers.balance": 0.01}  # the first
    assert found["linear_switch"].tried[2][1] is None
    assert found["linear_bias"].setting == {"optimizer.lr": 0.008, "prior.speed": 0.001}
    assert reference(found) == "linear_bias"  # soft is no linear baseline
    assert reference({}) is None


def test_what_the_question_is_about_comes_first_and_has_more_seeds():
    found = choices(CPU, "planted", rows({arm: [1.0] * 6 for arm in ARMS}))
    counts = seeds_of(CPU, tuple(ARMS))
    assert {*LEADING} == {arm for arm in ARMS if ARMS[arm].ours or ARMS[arm].linear}
    assert counts == {arm: 10 if arm in LEADING else 5 for arm in ARMS}
    first = seeds_of(CPU, LEADING)
    runs = main_runs(CPU, "planted", {arm: found[arm].setting for arm in first}, first)
    assert [run.key for run in runs[:9]] == [
        *(f"planted/{arm}/seed0" for arm in LEADING),
        "planted/linear_switch/seed1",
    ]
    assert len(runs) == 80
    assert f"seed={TUNING_SEED}" not in {override for run in runs for override in run.overrides}
    assert seeds_of(CPU, ["dense", "polar_natural"], 2) == {"polar_natural": 2, "dense": 2}
    assert seeds_of(CPU, ["dense", "polar_natural"], 7) == {"polar_natural": 7, "dense": 5}


def test_the_gpus_tasks_train_at_toy_size_in_bf16(tmp_path):
    configs = [main_config("polar_natural", task, TOY) for task in TOY.tasks]
    assert [config["model"]["num_experts"] for config in configs] == [8, 64]
    for config in configs:
        found = train_run(config, tmp_path, DataCache())
        assert (found["status"], found["warnings"]) == ("done", [])
        assert config["loop"]["precision"] == "bf16"


def test_tasks_say_what_they_are_tuned_on():
    said = {
        f"{tier.name}/{name}": task.tuned_on for tier in (*TIERS.values(), TOY) for name, task in tier.tasks.items()
    }
    judging = {name for name, tuned_on in said.items() if tuned_on == Task.tuned_on}
    assert judging == {"smoke/vision", "gpu-toy/language_8", "gpu-toy/language_64"}
    assert said["smoke/planted"] == said["cpu/planted"] == "planted data of another seed"
