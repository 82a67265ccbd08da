"""The study of healthy runs: its grid, what its rows keep of set-points, its report and verdicts, its command."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moegeo_router.control.config import ControlConfig, SetPoint
from moegeo_router.control.reading import LayerReading, Reading
from moegeo_router.control.setpoints import SetPointControl
from tests.support.studies import alert, decision, region_row, tiny_run
from trainers import stress
from trainers.studies import healthy as healthy_module
from trainers.studies.faults import Faults
from trainers.studies.healthy import FIRST_SEED, KINDS, OTHERS, SAME, Healthy
from trainers.studies.healthy_report import LEAST_PAIRS, LEAST_STEPS, write_healthy
from trainers.studies.rows import read_rows
from trainers.studies.runs import DataCache, StudyError, configurations, train_run
from trainers.studies.setpoints import largest_weights

# --- the grid ---------------------------------------------------------------------------------------------------------


def test_runs_are_pairs_with_seeds_of_their_own():
    runs = Healthy().runs()
    assert len(runs) == len({run.key for run in runs}) == 2 * (3 * 28 + 3 * OTHERS * (len(KINDS) - 1))
    offs, ons = runs[::2], runs[1::2]
    for off, on in zip(offs, ons, strict=True):
        changed = [pair for pair in zip(off.overrides, on.overrides, strict=True) if pair[0] != pair[1]]
        assert changed == [("controller=off", "controller=act")]
        assert (off.labels | {"controller": "on"}, off.key.replace("/off/", "/on/")) == (on.labels, on.key)
    seeds = [override for run in ons for override in run.overrides if override.startswith("seed=")]
    assert len(set(seeds)) == len(ons)
    assert min(int(seed.removeprefix("seed=")) for seed in seeds) == FIRST_SEED > 2


def test_the_runs_of_the_fault_study_alone_are_enough_for_the_claims():
    ons = [run for run in Healthy().runs() if run.labels["controller"] == "on" and run.labels["kind"] == SAME]
    steps = sum(int(o.removeprefix("loop.steps=")) for run in ons for o in run.overrides if o.startswith("loop.steps"))
    assert len(ons) >= LEAST_PAIRS
    assert steps >= LEAST_STEPS


def test_every_kind_is_the_fault_studys_healthy_run_with_its_own_change():
    runs = [run for run in Healthy(seeds=1, tokens=300_000).runs() if run.labels["controller"] == "on"]
    configs = {tuple(run.labels[name] for name in ("setting", "arm", "kind")): config for run, config in _with(runs)}
    healthy = [run for run in Faults(seeds=1).runs() if "/healthy/on/" in run.key]
    for run, config in _with(healthy):
        place = (run.labels["setting"], run.labels["arm"])
        assert _changed(configs[*place, SAME], config) == {}
        found = {kind: _changed(configs[*place, kind], config) for kind in KINDS}
        assert found["16 experts"] == {"model.num_experts": 16}
        assert found["top-1"] == {"model.top_k": 1, "model.renormalize": False}
        weights = "geometry.regularizers"
        assert found["FSI in place of balance"] == {f"{weights}.fsi": 0.01, f"{weights}.balance": 0.0}
        assert found["twice as long"] == {"loop.steps": 585, "loop.warmup": 29}


def _with(runs):
    return zip(runs, configurations(runs), strict=True)


def _changed(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in ours.keys() | theirs.keys():
        mine, other = ours.get(key), theirs.get(key)
        if isinstance(mine, dict) and isinstance(other, dict):
            found |= _changed(mine, other, f"{prefix}{key}.")
        elif mine != other and not f"{prefix}{key}".endswith("seed"):
            found[f"{prefix}{key}"] = mine
    return found


@pytest.mark.parametrize("options", [{"seeds": 0}, {"tokens": 1023}])
def test_a_grid_of_nothing_is_refused(options):
    with pytest.raises(StudyError, match="expected a seed and 1024 tokens or more"):
        Healthy(**options)


# --- what a row keeps of set-points -----------------------------------------------------------------------------------


def test_largest_weights_follow_the_set_points_law():
    point = SetPoint(metric="fsi_load", at_most=0.4, moves="balance", gain=0.0, proportional=0.05, rate=0.002)
    config = ControlConfig(setpoints=(point,), thresholds={"fsi_load": {"warmup": 10, "smoothing": 1}})
    # On the wrong side by 0.2 from step 11 on: 0.05 · 0.2 = 0.01 is wanted, 0.002 a step allowed.
    records = _records(config, "act", values=[0.6] * 13 + [0.1] * 5)
    assert largest_weights(records) == pytest.approx({"control/largest/balance": 0.006})
    assert largest_weights(records[:11]) == {}  # nothing is judged yet
    assert largest_weights(_records(config, "act", values=[0.3] * 13)) == {"control/largest/balance": 0.0}
    assert largest_weights(_records(config, "observe", values=[0.6] * 13)) == {}
    assert largest_weights([]) == {}


def _records(config: ControlConfig, mode: str, values: list[float]) -> list[dict[str, Any]]:
    first = {"event": "controller", "mode": mode, "config": config.to_fields(), "available": {"layer0": []}}
    readings = [
        Reading(step=step, loss=1.0, layers={"layer0": LayerReading(scalars={"fsi_load": value})})
        for step, value in enumerate(values, start=1)
    ]
    return [first, *({"event": "reading", **reading.to_fields()} for reading in readings)]


def test_a_run_keeps_the_largest_weights_that_were_in_force(tmp_path, monkeypatch):
    given: list[dict[str, float]] = []
    update = SetPointControl.update

    def spied(self, layer, values):
        given.append(update(self, layer, values))
        return given[-1]

    monkeypatch.setattr(SetPointControl, "update", spied)
    soon = "+geometry.control.thresholds.fsi_load.warmup=2"
    skewed = ("router=linear", "optimizer=adamw", "fault=bad_init", "geometry.regularizers.fsi=0.0")
    (config,) = configurations([tiny_run("a", "controller=act", *skewed, soon)])
    outcome = train_run(config, tmp_path, DataCache())
    in_force, again = given[: len(given) // 2], given[len(given) // 2 :]
    assert in_force == again  # the second half is that of the readings
    largest = max(weights.get("balance", 0.0) for weights in in_force)
    assert largest > 0
    assert outcome["results"]["control/largest/balance"] == pytest.approx(largest, rel=1e-6)


# --- the report -------------------------------------------------------------------------------------------------------


def row(arm: str, controller: str, seed: int, loss: float | None, steps: int = 100, events=(), **more: Any):
    kind, results = more.pop("kind", SAME), more.pop("results", {})
    labels = {"setting": "language", "arm": arm, "kind": kind, "controller": controller}
    key = f"language/{arm}/{kind}/{controller}/seed{seed}"
    found = region_row("", 1.0, 0.01, seed, loss, study="healthy", key=key, labels=labels, events=list(events), **more)
    found["results"] |= {"train/steps": steps, "train/tokens_per_second": 1.0 + (controller == "on")} | results
    return found


def cells(text: str, name: str, table: int) -> list[str]:
    """The cells of a line in the table of deeds (0) or of costs (1)."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in lines[table].strip("|").split("|")][1:]


def verdicts(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("- No discrete", "- Loss higher"))]


def test_report_has_costs_in_percent_of_the_same_seed(tmp_path):
    losses = {1000: (2.0, 2.2), 1003: (1.0, 1.3), 1006: (4.0, 3.8)}  # +10%, +30%, -5%
    rows = [row("polar_natural", "off", seed, off) for seed, (off, _) in losses.items()]
    rows += [row("polar_natural", "on", seed, on) for seed, (_, on) in reversed(losses.items())]
    rows += [row("linear_adamw", name, 1001, 1.5) for name in ("off", "on")]
    rows += [row("linear_adamw", "on", 1004, 1.5), row("linear_adamw", "off", 1007, 1.5)]  # without a partner
    text = write_healthy(rows, tmp_path).read_text()
    # Mean 35/3, deviations -5/3, 55/3, -50/3: standard deviation 17.559, standard error 10.138. Student's quantile of
    # two degrees of freedom is (2p - 1) / √(2p(1 - p)): 4.3027 at 97.5%, 2.9200 at 95%.
    error = math.sqrt((5**2 + 55**2 + 50**2) / 9 / 2 / 3)
    half, bound = 0.95 / math.sqrt(0.04875) * error, 35 / 3 + 0.9 / math.sqrt(0.095) * error
    expected = ["3", "0", "2.333", f"+11.667 ± {half:.3f}", f"{bound:+.3f}", "+30.000"]
    assert cells(text, f"language, polar_natural, {SAME}", 1) == expected
    assert (half, bound) == (pytest.approx(43.62, abs=0.01), pytest.approx(41.27, abs=0.01))
    assert cells(text, f"language, linear_adamw, {SAME}", 1) == ["1", "1", "1.500", "+0.000", "-", "+0.000"]
    pooled = cells(text, "all", 1)
    assert (pooled[:2], pooled[3].split()[0], pooled[5]) == (["4", "1"], "+8.750", "+30.000")
    assert "numbers of the seeds: 1000 … 1007; the controller was tuned on 0 … 2" in text


def test_pairs_that_differ_in_anything_but_speed_are_not_equal(tmp_path):
    rows = [row("linear_adamw", name, 1000, 1.5, results={"valid/geometry/fsi": 0.1}) for name in ("off", "on")]
    rows += [row("linear_adamw", "off", 1001, 1.5, results={"valid/geometry/fsi": 0.1})]
    rows += [row("linear_adamw", "on", 1001, 1.5, results={"valid/geometry/fsi": 0.2, "control/largest/speed": 0.1})]
    assert cells(write_healthy(rows, tmp_path).read_text(), "all", 1)[:2] == ["2", "1"]


def test_report_counts_what_was_done_with_the_controller(tmp_path):
    severe = {"warning": "warning", "critical": "error", "drift": "info", "calm": "info"}
    told = [alert(60 + n, level, severity=name) for n, (name, level) in enumerate(severe.items())]
    done = [decision(80, "apply", "prior"), decision(81, "apply", "revive", taken=True)]
    refused = decision(81, "apply", "revive", reason="nothing to do") | {"event": "outcome"}
    kept = [decision(105, "keep", "prior"), decision(200, "release", "prior")]
    weights = {"control/largest/balance": 0.0125, "control/largest/speed": 0.5}
    rows = [
        row("linear_adamw", "off", 1000, 1.5, steps=400),
        row("linear_adamw", "on", 1000, 1.5, steps=400, events=[*told, *done, refused, *kept], results=weights),
        row("linear_adamw", "on", 1001, 1.5, steps=100, events=told[:1], results={"control/largest/balance": 0.02}),
    ]
    text = write_healthy(rows, tmp_path).read_text()
    assert cells(text, "all", 0) == ["2", "500", "2", "1", "2", "1", "6.00", "balance 0.02, speed 0.5"]
    assert "**does not hold** (2 in 500 steps of 2 runs; 30,000 steps needed)" in text


def pairs(differences: list[float], **more: Any) -> list[dict[str, Any]]:
    """Pairs of 400 steps with these differences in percent."""
    rows = []
    for seed, percent in enumerate(differences, start=1000):
        rows.append(row("linear_adamw", "off", seed, 2.0, steps=400, **more))
        rows.append(row("linear_adamw", "on", seed, 2.0 * (1 + percent / 100), steps=400, **more))
    return rows


def test_claims_hold_only_where_rows_say_so(tmp_path):
    # 0.1 ± 0.5, 40 times each: standard error 0.5 · √(80/79) / √80, times 1.6644 (one-sided, 79 degrees of freedom).
    rows = pairs([0.6, -0.4] * 40)
    same = f"all {SAME}"
    actions, losses, of_all, _ = verdicts(write_healthy(rows, tmp_path).read_text())
    assert actions == f"- No discrete action, {same}: **holds** (0 in 32,000 steps of 80 runs)."
    assert losses == f"- Loss higher by less than 0.2%, {same}: **holds** (upper bound +0.194% over 80 pairs)."
    assert of_all == "- No discrete action, all: **holds** (0 in 32,000 steps of 80 runs)."
    worse = write_healthy(pairs([0.65, -0.4] * 40), tmp_path).read_text()
    assert "**does not hold** (upper bound +0.223% over 80 pairs)" in worse  # 0.125 ± 0.525
    few = verdicts(write_healthy(pairs([0.0] * 79), tmp_path).read_text())
    assert "**holds** (0 in 31,600 steps of 79 runs)" in few[0]
    assert "**does not hold** (upper bound +0.000% over 79 pairs; 80 pairs needed)" in few[1]
    one = row("linear_adamw", "on", 999, 2.0, events=[decision(80, "apply", "prior")])
    acted = verdicts(write_healthy([*rows, one], tmp_path).read_text())
    assert "**does not hold** (1 in 32,100 steps of 81 runs)" in acted[0]
    assert "**holds**" in acted[1]


def test_a_lost_run_or_another_kind_is_not_passed_over(tmp_path):
    rows = pairs([0.0] * 80)
    lost = verdicts(write_healthy([*rows, row("linear_adamw", "on", 999, None, steps=3)], tmp_path).read_text())
    assert "**does not hold** (0 in 32,003 steps of 81 runs; 1 without a result)" in lost[0]
    assert "**does not hold** (upper bound +0.000% over 80 pairs; 1 without a result)" in lost[1]
    acted = row("linear_adamw", "on", 999, 2.0, kind="top-1", events=[decision(80, "apply", "prior")])
    found = verdicts(write_healthy([*rows, acted], tmp_path).read_text())
    assert ["does not hold" in line for line in found] == [False, False, True, False]


# --- the command ------------------------------------------------------------------------------------------------------


def test_command_runs_and_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(healthy_module, "KINDS", {SAME: KINDS[SAME]})
    monkeypatch.setattr(healthy_module, "SETTINGS", {"language": ("polar_natural",), "vision": ("linear_adamw",)})
    arguments = ["healthy", "--smoke", "--out", str(tmp_path), "--processes", "1"]
    stress.main(arguments)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert len(rows) == 4
    assert {(found["status"], found["results"]["train/steps"]) for found in rows} == {("done", 16)}
    report = (tmp_path / "healthy.md").read_text()
    assert cells(report, "all", 0)[:3] == ["2", "32", "0"]
    # Within its warm-up the controller does nothing, and then a run is the same to the last digit.
    assert cells(report, "all", 1)[:2] == ["2", "2"]
    assert f"{rows[0]['results']['valid/loss']:.3f}" in report
    stress.main([*arguments, "--report"])
    assert (tmp_path / "healthy.md").read_text() == report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "5"], "expected a seed and 1024 tokens or more, got 28, 5"),
        (["--seeds", "0"], "expected a seed and 1024 tokens or more, got 0, 370000"),
        (["--arms", "x"], "unrecognized arguments: --arms x"),
        (["--report"], "there are no rows in "),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as leaving:
        stress.main(["healthy", "--out", str(tmp_path), *arguments])
    error = capsys.readouterr().err
    assert leaving.value.code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
