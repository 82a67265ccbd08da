"""The command trainers.evaluate in this process: it finds what the training found, and says what does not fit."""

import re
from pathlib import Path

import pytest

from moegeo_router.loggers import read_jsonl
from tests.support.runs import TINY, configuration, tiny, write_texts
from trainers.build import run_command
from trainers.evaluate import evaluate_run
from trainers.train import train

DATA = [override for override in TINY["language"] if override.startswith("data")]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "trained"
    train(tiny(directory, "loop.steps=3"))
    return directory


def _evaluate(capsys, *overrides: str) -> str:
    capsys.readouterr()
    run_command(evaluate_run, configuration("device=cpu", "threads=1", *overrides, name="evaluate"))
    return capsys.readouterr().out


def _refusal(capsys, *overrides: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        run_command(evaluate_run, configuration("device=cpu", "threads=1", *overrides, name="evaluate"))
    error = capsys.readouterr().err
    assert leaving.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("changed", [(), ("data.batch_size=3", "data.length=20")])
def test_it_finds_what_the_training_found_whatever_the_batches(run, changed, capsys):
    valid = read_jsonl(run / "metrics.jsonl")[-1]
    output = _evaluate(capsys, f"run={run}", *DATA, *changed)
    assert f"{run} after step 3, on planted" in output
    assert f"validation loss {valid['valid/loss']:.4f} nats" in output
    assert re.search(r"layer0 +\d\.\d{3}", output)
    assert "throughput" not in output


def test_it_evaluates_on_other_data(run, capsys):
    trained = read_jsonl(run / "metrics.jsonl")[-1]["valid/loss"]
    output = _evaluate(capsys, f"run={run}", *DATA, "data.seed=5")
    loss = float(re.search(r"validation loss ([\d.]+) nats", output)[1])
    assert loss != pytest.approx(trained, abs=1e-4)


def test_the_tokenizer_is_that_of_the_run(tmp_path, capsys):
    trained_on = write_texts(tmp_path / "trained on", "one two three four")
    other = write_texts(tmp_path / "other", "one two nine ten")
    train(tiny(tmp_path / "run", "loop.steps=1", f"data.path={trained_on}", task="folder"))
    output = _evaluate(
        capsys, f"run={tmp_path / 'run'}", "data=folder", f"data.path={other}", "data.valid_fraction=0.4"
    )
    assert "vocabulary 262" in output  # the default, bytes, has 256


def test_mistakes_are_one_line(run, tmp_path, capsys):
    assert "Missing mandatory value: run" in _refusal(capsys, *DATA)
    missing = tmp_path / "missing"
    assert f"run={missing}: no intact checkpoint in {missing / 'checkpoints'}" in _refusal(
        capsys, f"run={missing}", *DATA
    )
    message = _refusal(capsys, f"run={run}", *DATA, "data.alphabet=9")
    assert "does not fit data=planted" in message
    assert "size mismatch" in message
    message = _refusal(capsys, f"run={run}", "data=digits")
    assert "this model needs data of task language" in message
    assert "device must be auto, cpu or cuda, got mps" in _refusal(capsys, f"run={run}", *DATA, "device=mps")


def test_a_vision_run_refuses_text(tmp_path, capsys):
    train(tiny(tmp_path / "run", "loop.steps=1", task="vision"))
    assert "this model needs data of task vision" in _refusal(capsys, f"run={tmp_path / 'run'}", *DATA)


def test_of_a_damaged_checkpoint_the_one_before_is_used_and_that_is_said(tmp_path, capsys):
    train(tiny(tmp_path / "run", "loop.steps=3", "loop.checkpoint_every=2"))
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000003" / "meta.json").unlink()
    output = _evaluate(capsys, f"run={tmp_path / 'run'}", *DATA)
    assert "damaged checkpoint passed over: " in output
    assert "meta.json is missing" in output
    assert "after step 2, on planted" in output
    (checkpoints / "step-00000002" / "model.safetensors").write_bytes(b"")
    assert "no intact checkpoint" in _refusal(capsys, f"run={tmp_path / 'run'}", *DATA)
