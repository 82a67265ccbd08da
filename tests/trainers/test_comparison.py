"""Comparisons of arms with a reference: their runs, their report, their command."""

from __future__ import annotations

import pytest

from tests.support.studies import region_row
from trainers import stress
from trainers.studies.comparison import COMPARISONS, Comparison, comparison
from trainers.studies.comparison_report import write_comparison
from trainers.studies.rows import read_rows
from trainers.studies.runs import StudyError, configurations

STUDY = Comparison(
    title="Two arms",
    question="Which?",
    arms={"plain": ("router=linear", "optimizer=adamw"), "ours": ("router=polar", "prior=balance")},
    settings={"short": (), "wide": ("model.num_experts=6",)},
    seeds=3,
)


def row(arm: str, seed: int, loss: float | None, loads: tuple[float, ...] = (1.5, 2.5), setting: str = "short"):
    found = region_row(arm, 1.0, 0.0, seed, loss, 0.125, labels={"arm": arm, "setting": setting})
    if loss is not None:
        found["results"] |= {f"valid/geometry/layer{i}/max_load": load for i, load in enumerate(loads)}
    return found


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_run_of_every_comparison_composes(name):
    study = comparison(name, seeds=1)
    runs = study.runs()
    assert len({run.key for run in runs}) == len(study.arms) * len(study.settings)
    for config, run in zip(configurations(runs), runs, strict=True):
        assert config["geometry"]["regularizers"]["fsi"] == 0
        assert config["model"]["dim"] == 96
        natural = run.labels["arm"].startswith("natural")
        assert (config["optimizer"]["routers"] == "natural") == natural
        if natural:
            assert run.labels["arm"].endswith(f"{config['geometry']['natural']['limit']:g}")
    assert comparison(name).seeds >= 3


def test_seeds_are_outermost_and_settings_reach_the_runs():
    runs = STUDY.runs()
    assert [run.key for run in runs[:4]] == [
        "short/plain/seed0",
        "short/ours/seed0",
        "wide/plain/seed0",
        "wide/ours/seed0",
    ]
    found = configurations(runs[4:])
    assert [config["seed"] for config in found] == [1] * 4 + [2] * 4
    assert [config["model"]["num_experts"] for config in found[:4]] == [8, 8, 6, 6]
    assert [bool(config["prior"]) for config in found[:4]] == [False, True] * 2
    with pytest.raises(StudyError, match="expected a seed or more, got 0"):
        Comparison(title="", question="", arms={}, settings={}, seeds=0)


def test_report_pairs_seeds_and_counts_what_is_missing(tmp_path):
    rows = [row("plain", seed, loss) for seed, loss in enumerate((1.70, 1.72, 1.71))]
    rows += [row("ours", 0, 1.68, (1.1, 1.3)), row("ours", 1, 1.71, (1.1, 1.5)), row("ours", 2, None)]
    rows += [row("plain", 0, 2.0, setting="wide")]
    text = write_comparison(STUDY, rows, tmp_path / "two.md").read_text()
    # Differences -.02 and -.01: mean -.015, standard error .005, times 12.706 (Student, one degree of freedom).
    assert "| ours | 1.695 ± 0.191, 1 without a result | -0.015 ± 0.064 (2) | 0.250 ± 0.635 | 12.5% |" in text
    assert "| plain | 1.710 ± 0.025 | - | 1.000 ± 0.000 | 12.5% |" in text
    short, wide = text.split("## wide")
    assert "# Two arms" in short
    assert "| plain | 2.000 | - | 1.000 | 12.5% |" in wide
    assert "| ours | - | - | - | - |" in wide
    assert "short" in short
    assert "python -m trainers.stress region" in short  # the command of the rows


def test_command_runs_and_continues_a_comparison(tmp_path, monkeypatch, capsys):
    def small(name: str, *, seeds: int | None, smoke: bool) -> Comparison:
        return Comparison(
            title="Two arms", question="Which?", arms=STUDY.arms, settings={"short": ()}, seeds=seeds, smoke=smoke
        )

    monkeypatch.setattr(stress, "comparison", small)
    arguments = ["priors", "--smoke", "--out", str(tmp_path), "--seeds", "1", "--processes", "1"]
    stress.main(arguments)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [found["status"] for found in rows] == ["done", "done"]
    report = (tmp_path / "priors.md").read_text()
    assert f"{rows[1]['results']['valid/loss']:.3f}" in report
    stress.main([*arguments, "--report"])
    assert (tmp_path / "priors.md").read_text() == report
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        stress.main(["limits", "--multipliers", "2"])
    assert leaving.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err
