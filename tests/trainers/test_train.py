"""The command in this process: runs that are killed, stopped, damaged and mistaken, and what is left of them."""

import math
import signal
from pathlib import Path

import pytest
import torch

from moegeo_router.loggers import read_jsonl
from tests.support.runs import (
    Killed,
    after_step,
    configuration,
    kill,
    rows,
    tiny,
    tiny_overrides,
    train_rows,
    write_texts,
)
from tests.support.wandb_offline import find_runs, read_finished_run
from tests.trainers.data.conftest import write_wikipedia
from trainers import checkpoint
from trainers.build import run_command
from trainers.loop import Interrupted
from trainers.train import train


@pytest.fixture(autouse=True)
def _no_data_root(monkeypatch):
    monkeypatch.delenv("MOEGEO_DATA", raising=False)


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def refusal(capsys, *overrides: str) -> str:
    """The one line on stderr of a command that exits with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        run_command(train, configuration(*overrides))
    error = capsys.readouterr().err
    assert leaving.value.code == 2
    assert error.startswith("error: "), error
    assert error.count("\n") == 1, error
    return error


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "finished"
    train(tiny(directory))
    return directory


VARIANTS = {
    "polar": ("language", "loop.eval_every=3", "geometry.per_layer=true"),
    "sphere": ("language", "router=sphere"),
    "orthonormal": ("language", "router=orthonormal"),
    "euclidean": ("language", "router=euclidean"),
    "adamw-linear": ("language", "router=linear", "optimizer=adamw"),
    "adamw-polar": ("language", "optimizer=adamw"),
    "natural": ("language", "optimizer=natural", "geometry.natural.refresh_every=3"),
    "natural-sphere": ("language", "optimizer=natural", "router=sphere"),
    "vision": ("vision",),
    "vision-sphere-bf16": ("vision", "router=sphere", "loop.precision=bf16"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_run_goes_on_as_the_unbroken_one(tmp_path, variant, capsys):
    task, *overrides = VARIANTS[variant]
    overrides = [*overrides, "loop.steps=9"]
    train(tiny(tmp_path / "unbroken", *overrides, task=task))
    config = tiny(tmp_path / "killed", *overrides, task=task)
    with after_step(6, kill), pytest.raises(Killed):
        train(config)
    assert [row["step"] for row in train_rows(tmp_path / "killed")] == [1, 2, 3, 4, 5, 6]
    torch.randn(7)  # another process would not have this process's random state either
    capsys.readouterr()
    with after_step(9, lambda: None) as progress:
        train(config)
    assert "continuing killed after step 4" in capsys.readouterr().out
    assert progress.steps == [5, 6, 7, 8, 9]
    assert rows(tmp_path / "killed") == rows(tmp_path / "unbroken")
    assert [row["step"] for row in train_rows(tmp_path / "killed")] == list(range(1, 10))
    last = [checkpoint.latest(tmp_path / run / "checkpoints")[0] for run in ("killed", "unbroken")]
    assert all(torch.equal(value, last[1].model[name]) for name, value in last[0].model.items())


def test_a_run_killed_before_its_first_scheduled_checkpoint_goes_on_from_the_start(tmp_path, finished):
    with after_step(2, kill), pytest.raises(Killed):
        train(tiny(tmp_path / "killed"))
    train(tiny(tmp_path / "killed"))
    assert rows(tmp_path / "killed") == rows(finished)


def test_a_run_stopped_by_ctrl_c_goes_on_after_the_very_step(tmp_path, finished, capsys):
    directory = tmp_path / "stopped"
    with after_step(6, lambda: signal.raise_signal(signal.SIGINT)), pytest.raises(SystemExit) as leaving:
        run_command(train, tiny(directory))
    assert leaving.value.code == 130
    saved = directory / "checkpoints" / "step-00000006"
    assert capsys.readouterr().err == (
        f"stopped after step 6; saved {saved}. The same command with name=stopped continues.\n"
    )
    with after_step(12, lambda: None) as progress:
        train(tiny(directory))
    assert progress.steps == [7, 8, 9, 10, 11, 12]
    assert rows(directory) == rows(finished)


def test_a_second_ctrl_c_leaves_at_once_and_the_run_can_still_go_on(tmp_path, finished, capsys):
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    directory = tmp_path / "twice"
    with after_step(6, twice), pytest.raises(SystemExit) as leaving:
        run_command(train, tiny(directory))
    assert leaving.value.code == 130
    assert capsys.readouterr().err == "interrupted; what was saved before is intact\n"
    assert checkpoint.latest(directory / "checkpoints")[0].step == 4
    train(tiny(directory))
    assert rows(directory) == rows(finished)


def test_a_finished_run_is_only_shown_again(finished, capsys):
    before = snapshot(finished)
    capsys.readouterr()
    with after_step(0, lambda: None) as progress:
        train(tiny(finished))
    output = capsys.readouterr().out
    assert progress.steps == []
    assert snapshot(finished) == before
    valid = read_jsonl(finished / "metrics.jsonl")[-1]
    assert f"validation loss {valid['valid/loss']:.4f} nats" in output
    assert "layer0" in output
    assert "layer1" in output


def test_what_cannot_change_the_result_may_change_in_a_continuation(tmp_path, finished):
    moved = tmp_path / "elsewhere"
    with after_step(6, kill), pytest.raises(Killed):
        train(tiny(tmp_path / "killed"))
    (tmp_path / "killed").rename(moved)
    train(tiny(moved, "loop.keep_checkpoints=3", "loop.checkpoint_every=5", "threads=null"))
    assert train_rows(moved) == train_rows(finished)


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "loop.steps=13",
        "router=sphere",
        "optimizer.lr=0.003",
        "data.batch_size=5",
        "model.layers=1",
        "data.seed=4",
    ],
)
def test_other_settings_in_a_run_folder_are_named_and_nothing_is_touched(finished, override, capsys):
    before = snapshot(finished)
    message = refusal(capsys, *tiny_overrides(finished, override))
    assert "the run folder holds a run with other settings" in message
    assert "take another name=" in message
    key, _, value = override.partition("=")
    assert (f"{key}: " in message and f"{value} now" in message) or "router.manifold: polar then, sphere now" in message
    assert snapshot(finished) == before


def test_a_setting_that_came_later_does_not_lock_an_older_run(finished):
    saved = checkpoint.latest(finished / "checkpoints")[0]
    del saved.meta["config"]["geometry"]["regularizers"]["fhs"]
    checkpoint.save(finished / "checkpoints", saved)
    train(configuration(*tiny_overrides(finished)))


def test_another_corpus_is_refused_before_anything_is_touched(tmp_path, capsys):
    text = write_texts(tmp_path / "text", "one two three")
    command = tiny_overrides(tmp_path / "run", f"data.path={text}", task="folder")
    with after_step(6, kill), pytest.raises(Killed):
        train(configuration(*command))
    before = snapshot(tmp_path / "run")
    assert "tokenizer.json" in before
    write_texts(text, "four five six seven")
    assert "holds a run on other data than folder is now" in refusal(capsys, *command)
    assert snapshot(tmp_path / "run") == before

    elsewhere = write_texts(tmp_path / "elsewhere", "one two three")
    train(tiny(tmp_path / "run", f"data.path={elsewhere}", task="folder"))  # only its place is another
    assert [row["step"] for row in train_rows(tmp_path / "run")] == list(range(1, 13))


def test_resume_never_refuses_a_run_folder_and_takes_a_new_one(tmp_path, finished, capsys):
    before = snapshot(finished)
    assert "resume=never, but" in refusal(capsys, *tiny_overrides(finished, "resume=never"))
    assert snapshot(finished) == before
    assert "resume must be auto or never, got 'maybe'" in refusal(capsys, *tiny_overrides(finished, "resume=maybe"))
    train(tiny(tmp_path / "new", "resume=never", "loop.steps=1"))


def test_of_a_damaged_checkpoint_the_one_before_is_used_and_that_is_said(tmp_path, finished, capsys):
    with after_step(10, kill), pytest.raises(Killed):
        train(tiny(tmp_path / "run"))
    newest = tmp_path / "run" / "checkpoints" / "step-00000008" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()
    train(tiny(tmp_path / "run"))
    output = capsys.readouterr().out
    assert "damaged checkpoint passed over: " in output
    assert "step-00000008: model.safetensors is damaged" in output
    assert "continuing run after step 4" in output
    assert rows(tmp_path / "run") == rows(finished)


def test_if_all_checkpoints_are_damaged_the_command_says_so(tmp_path, capsys):
    train(tiny(tmp_path / "run", "loop.steps=1"))
    for path in (tmp_path / "run" / "checkpoints").glob("*/training.pt"):
        path.write_bytes(b"")
    before = snapshot(tmp_path / "run")
    message = refusal(capsys, *tiny_overrides(tmp_path / "run", "loop.steps=1"))
    assert "every checkpoint in" in message
    assert "is damaged: take another name= to start anew" in message
    assert snapshot(tmp_path / "run") == before


BAD = {
    "model.top_k=5": "top_k must lie in [1, num_experts = 4], got 5",
    "model.num_experts=0": "num_experts must be at least 1, got 0",
    "model.heads=3": "dim must be an even multiple of heads = 3 for rotary positions, got 16",
    "model.dim=wide": "model.dim must be int, got 'wide'",
    "model.dim=null": "model.dim must be int, got None",
    "model.tied=2": "model.tied must be bool, got 2",
    "model.experts=fast": "experts",
    "optimizer.lr=-0.1": "lr must be at least 0, got -0.1",
    "optimizer.router_lr=-1": "router_lr must be at least 0, got -1",
    "optimizer.lr=fast": "optimizer.lr must be float, got 'fast'",
    "router=linear": "optimizer=natural needs routers on a manifold and this model has none: take router=polar",
    "router.manifold=torus": "torus",
    "geometry.regularizers.fsi=-1": "regularizers.fsi must be a weight of at least 0, got -1",
    "geometry.fisher=exact": "fisher must be 'parameters', 'outputs', 'minibatch' or None, got 'exact'",
    "loop.precision=fp64": "loop.precision must be one of fp32, tf32, bf16, got 'fp64'",
    "loop.steps=1.5": "loop.steps must be int, got 1.5",
    "loop.steps=0": "loop.steps must be at least 1, got 0",
    "device=cuda": "device=cuda: this machine has no CUDA device",
    "device=mps": "device must be auto, cpu or cuda, got mps",
    "device=gpu": "device=gpu: ",
    "threads=0": "threads: expected an integer >= 1, got 0",
    "seed=few": "seed: expected an integer >= 0, got 'few'",
    "data.batch_size=0": "batch_size: expected an integer >= 1, got 0",
    "data.length=ten": "data.length must be int, got 'ten'",
    "data.length=5000": "take a smaller length or more text",
    "loop.warmup=-1": "loop.warmup must be at least 0, got -1",
    "+loop.stepz=5": "stepz",
    "name=../elsewhere": "name must be letters, digits, '.', '_' or '-', got '../elsewhere'",
    "model=vision": "this model needs data of task vision, e.g. data=digits; planted is of task language",
}


@pytest.mark.parametrize("override", BAD)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, override, capsys):
    if override == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    command = tiny_overrides(tmp_path / "run", override)
    if override == "model=vision":
        command = [o for o in command if not o.startswith("model.")]
    assert BAD[override] in refusal(capsys, *command)
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_the_logger_leaves_a_folder_that_a_corrected_command_takes(tmp_path, capsys):
    assert "got 'sometimes'" in refusal(capsys, *tiny_overrides(tmp_path / "run", "logger.wandb=sometimes"))
    train(tiny(tmp_path / "run", "loop.steps=1"))


DATA_MISTAKES = {
    "data=digits": "this model needs data of task language, e.g. data=stdlib; digits is of task vision",
    "data=enwiki": "root: expected the folder that holds enwiki-2015/",
    "data=multidomain": "root: expected the folder that holds multidomain",
    "data=wikitext2": "MOEGEO_DATA",
    "data=folder": "Missing mandatory value: data.path",
}


@pytest.mark.parametrize("data", DATA_MISTAKES)
def test_data_that_do_not_fit_or_are_not_there(tmp_path, data, capsys):
    command = (data, "logger=jsonl", "name=run", f"directory={tmp_path / 'run'}", "device=cpu", "threads=1")
    assert DATA_MISTAKES[data] in refusal(capsys, *command)
    assert not (tmp_path / "run").exists()


def test_missing_data_folders_are_named(tmp_path, capsys):
    command = ("logger=jsonl", "name=run", f"directory={tmp_path / 'run'}")
    nowhere = tmp_path / "nowhere"
    assert f"{nowhere}" in refusal(capsys, *command, "data=folder", f"data.path={nowhere}")
    message = refusal(capsys, *command, "model=vision", "data=cifar10", f"data.root={nowhere}")
    assert f"under {nowhere} (option data.root or MOEGEO_DATA)" in message


def test_evaluation_data_cannot_be_trained_on(tmp_path, capsys):
    write_wikipedia(tmp_path)
    command = ("logger=jsonl", "name=run", f"directory={tmp_path / 'run'}", f"data.root={tmp_path}", "data.length=16")
    message = refusal(capsys, *command, "data=wikitext2", "data.valid_tokens=null")
    assert "wikitext2 has no train split: train with data=enwiki" in message
    assert not (tmp_path / "run").exists()


def test_nan_stops_the_command_with_status_3_and_one_line(tmp_path, capsys):
    trainers = []

    def poison() -> None:
        trainers[0].model.get_parameter("trunk.blocks.1.ffn.router.weight").data[2, 3] = math.nan

    with pytest.MonkeyPatch.context() as patch:
        from trainers import train as module

        original = module.Trainer
        patch.setattr(module, "Trainer", lambda *a, **k: trainers.append(original(*a, **k)) or trainers[0])
        with after_step(6, poison), pytest.raises(SystemExit) as leaving:
            run_command(train, tiny(tmp_path / "run"))
    assert leaving.value.code == 3
    saved = tmp_path / "run" / "non_finite" / "step-00000006"
    assert capsys.readouterr().err == (
        f"NaN or inf in the router logits of layer1 at step 6; the step was not taken; saved {saved}\n"
    )
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["event"] == "non_finite"
    train(tiny(tmp_path / "run"))  # from the healthy checkpoint of step 4
    assert "valid/loss" in rows(tmp_path / "run")[-1]
    assert [row["step"] for row in train_rows(tmp_path / "run")] == list(range(1, 13))


def test_wandb_holds_what_jsonl_holds_and_a_continuation_is_the_same_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = tiny(tmp_path / "run", "logger=wandb", "logger.wandb=offline", "loop.eval_every=4")
    with after_step(6, lambda: signal.raise_signal(signal.SIGINT)), pytest.raises(Interrupted):
        train(config)
    train(config)
    assert "wandb sync" in capsys.readouterr().out
    first, second = (read_finished_run(path) for path in find_runs(tmp_path / "run"))
    assert first.run_id == second.run_id
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert first.project == "moegeo-router"
    assert first.config["model"]["dim"] == 16
    written = [{k: v for k, v in row.items() if k != "time"} for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    # What the controller read is for programs: wandb does not have it.
    shown = [row for row in written if row.get("event") not in ("controller", "reading", "notice")]
    history = [*first.history, *second.history]
    (notice,) = [row for row in history if "event/notice" in row]
    assert notice["step"] == 1
    assert [row for row in history if row is not notice] == shown
    assert {"train/loss", "train/tokens_per_second", "geometry/fsi", "geometry/fhs"} <= written[0].keys()
    assert {"valid/loss", "valid/geometry/fsi_domain", "valid/geometry/fsi_domain_null"} <= written[-1].keys()
