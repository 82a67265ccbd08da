"""The benchmark's rows: which can be compared with each other, and which versions they are of."""

from __future__ import annotations

import copy
from functools import reduce

import pytest

from tests.support.studies import benchmark_rows
from trainers.studies.benchmark import ARMS, main_runs, settings, tuning_runs
from trainers.studies.benchmark_results import mixed
from trainers.studies.benchmark_tasks import TIERS
from trainers.studies.origin import origin_lines
from trainers.studies.runs import configurations

CPU = TIERS["cpu"]


@pytest.fixture(scope="module")
def rows():
    """Rows of each arm in each phase, with the configurations that they have."""
    grids = {arm: settings(found, CPU.tasks["planted"]) for arm, found in ARMS.items()}
    chosen = {arm: grid[arm == "polar_natural"] for arm, grid in grids.items()}
    runs = [run for arm in ARMS for run in tuning_runs(CPU, "planted", arm)[::5]]
    runs += main_runs(CPU, "planted", chosen, dict.fromkeys(ARMS, 2))
    found = benchmark_rows(CPU, runs, [1.0] * len(runs))
    for row, configuration in zip(found, configurations(runs), strict=True):
        versions = {"python": "3.11", "torch": "2.13"}
        row |= {"configuration": configuration, "data": f"planted {row['seed']}", "versions": versions}
    assert {row["labels"]["phase"] for row in found} == {"tuning", "main", "without"}
    return found


def test_arms_may_differ_in_what_they_are_and_in_nothing_that_is_free(rows):
    assert mixed(rows) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"configuration.size.num_experts": 4}, "size.num_experts 4, not 8"),
        ({"configuration.model.num_experts": 4}, "model.num_experts 4, not 8"),
        ({"configuration.model.scores": "sigmoid"}, "model.scores sigmoid, not softmax"),
        ({"configuration.optimizer.weight_decay": 0.0}, "optimizer.weight_decay 0.0, not 0.1"),
        ({"configuration.geometry.natural.limit": 1.0}, "geometry.natural.limit 1.0, not 0.015"),
        ({"configuration.device": "cuda"}, "device cuda, not cpu"),
        ({"configuration.name": "another", "configuration.logger.wandb": "online", "versions.python": "3.12"}, None),
        ({"versions.torch": "2.14"}, "torch 2.14, not 2.13"),
        ({"data": "planted 7"}, "data planted 7, not planted 1"),
        ({"data": None}, None),
    ],
)
@pytest.mark.parametrize("key", ["planted/cosine/seed1", "planted/polar_natural_act/without/seed1"])
def test_nothing_else_may_differ(rows, key, change, message):
    changed = copy.deepcopy(rows)
    row = next(row for row in changed if row["key"] == key)
    for name, value in change.items():
        *groups, last = name.split(".")
        reduce(lambda place, group: place[group], groups, row)[last] = value
    assert mixed(changed) == (None if message is None else f"{key}: {message}")


def test_data_that_are_not_drawn_are_the_same_for_all_seeds(rows):
    changed = copy.deepcopy(rows)
    for row in changed:
        row["configuration"]["data"]["_target_"] = "trainers.data.wikipedia.enwiki"
    assert mixed(changed) == "planted/linear_switch/seed1: data planted 1, not planted 0"


def test_all_versions_are_told(rows):
    versions = ({"python": "3.11", "torch": "2.12"}, {"python": "3.11", "torch": "2.13", "geoopt": "0.5"})
    lines = origin_lines([row | {"versions": found} for row, found in zip(rows, versions, strict=False)])
    assert lines[3].endswith("; python 3.11, torch 2.12 and 2.13, geoopt 0.5")
