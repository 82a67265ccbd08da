"""Runs of transformers' ``Trainer`` with geometry: what reporters get, what checkpoints hold, and two ranks."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moegeo_router as mg
from moegeo_router.loggers import JSONLLogger, MultiLogger, NullLogger, WandbLogger, read_jsonl
from moegeo_router.replay import differences, replay
from tests.support.ranks import on_two_ranks
from tests.support.wandb_offline import find_runs, read_finished_run

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.support.trainer import (  # noqa: E402
    STRONG,
    AtStep,
    apart,
    build,
    examples,
    gates,
    lines,
    trainer,
    weights,
    with_geometry,
)

CONFIG = mg.GeometryConfig(regularizers=STRONG)
EARLY = {"fsi": {"warning": 0.001, "critical": 0.002, "warmup": 1, "smoothing": 1}}


def test_reporters_get_the_scalars_of_training(tmp_path, monkeypatch, capsys):
    import wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    wandb.teardown()  # it has read its environment if it was used before in this process
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    reports = {"report_to": ["wandb", "tensorboard"], "eval_strategy": "steps", "eval_steps": 2}
    run, _ = with_geometry(tmp_path, eval_dataset=examples(4), max_steps=4, logging_steps=2, **reports)
    run.train()
    wandb.finish()
    history = read_finished_run(*find_runs(tmp_path)).history
    logged = [row for row in history if "train/loss" in row]
    told = [line["geometry/fsi"] for line in lines(run)]
    assert [row["train/geometry/fsi"] for row in logged] == pytest.approx(told)
    assert [row["train/global_step"] for row in logged] == [2, 4]
    evaluated = [row for row in history if "eval/loss" in row]
    assert len(evaluated) == 2
    assert all(0 < row["eval/geometry/fsi"] < 1 for row in evaluated)  # of the held-out data
    scalars = EventAccumulator(str(tmp_path / "tb")).Reload().Scalars("train/geometry/fsi")
    assert [event.value for event in scalars] == pytest.approx(told)
    assert f"'geometry/fsi': '{told[-1]:.4g}'" in capsys.readouterr().out
    names = [name for name in lines(run)[-1] if name.startswith("geometry/")]
    assert {"geometry/fsi", "geometry/dispersion_1", "geometry/fhs", "geometry/movement"} <= set(names)
    assert len(names) <= 24
    ends = [line for line in run.state.log_history if not {"loss", "eval_loss"} & line.keys()]
    assert ends
    assert not any("geometry" in name for line in ends for name in line)


def test_evaluations_have_the_geometry_of_held_out_data(tmp_path):
    """The same as watching the model on that data; and the best checkpoint may be chosen by it."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_geometry/fsi", "greater_is_better": False}
    steps = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    run, _ = with_geometry(tmp_path, config=CONFIG, eval_dataset=examples(5, padded=True), **best, **steps)
    with pytest.warns(UserWarning, match="issue 48805"):  # when the best is loaded
        run.train()
    logged = {line["step"]: line["eval_geometry/fsi"] for line in run.state.log_history if "eval_loss" in line}
    assert list(logged) == [3, 6]
    assert run.state.best_metric == min(logged.values())
    model = run.model.eval()  # the best
    geometry = mg.attach(model)
    with geometry.evaluation() as held_out:
        for row in examples(5, padded=True):
            model(**{name: value[None] for name, value in row.items()})
    assert held_out.metrics()["geometry/fsi"] == pytest.approx(run.state.best_metric, rel=1e-5)
    geometry.detach()
    assert "eval_geometry/fsi" not in run.evaluate()  # train() has ended, and geometry with it


def test_alerts_are_told(tmp_path, caplog):
    config = mg.GeometryConfig(control=mg.ControlConfig(thresholds=EARLY))
    run, _ = with_geometry(tmp_path, config=config)
    with caplog.at_level(logging.WARNING, logger="moegeo_router"):
        run.train()
    assert any("fsi" in message for message in caplog.messages)


def test_alerts_and_pictures_go_to_the_trainers_run(tmp_path, monkeypatch, caplog):
    """And the readings to a log from which the controller's decisions can be had again."""
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    opened = wandb.init(project="theirs", mode="offline", settings=wandb.Settings(silent=True, console="off"))
    own = JSONLLogger(tmp_path / "metrics.jsonl")
    logger = MultiLogger([own, WandbLogger.of(opened, step_metric="train/global_step")])
    config = mg.GeometryConfig(control=mg.ControlConfig(thresholds=EARLY), pictures_every=2)
    run, _ = with_geometry(tmp_path, config=config, logger=logger, report_to="wandb", logging_steps=4)
    with caplog.at_level(logging.WARNING, logger="moegeo_router"):
        run.train()
    logger.close()
    opened.finish()
    assert any("fsi" in message for message in caplog.messages)
    found = read_finished_run(*find_runs(tmp_path))
    alerts = [row for row in found.history if "event/alert" in row]
    assert alerts
    assert len(found.alerts) >= len(alerts)
    assert all(row["train/global_step"] == row["event/alert/optimizer_step"] for row in alerts)
    pictures = [row["train/global_step"] for row in found.history if row.get("geometry/load/_type") == "image-file"]
    assert pictures == [2, 4, 6]
    assert [row["train/global_step"] for row in found.history if "train/loss" in row] == [4]
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row.get("event") == "reading"] == [1, 2, 3, 4, 5, 6]
    assert differences(rows, list(replay(rows))) == []


def test_a_logger_that_fails_is_dropped(tmp_path):
    class Full(NullLogger):
        def record(self, *args, **kwargs):
            raise OSError("No space left on device")

    run, callback = with_geometry(tmp_path, logger=Full())
    with pytest.warns(RuntimeWarning, match="Full failed at step 1 and is dropped; the run goes on"):
        run.train()
    alone, _ = with_geometry(tmp_path)
    alone.train()
    assert apart(weights(run.model), weights(alone.model)) == 0
    assert callback.geometry is None


RANDOM = {"train_sampling_strategy": "random", "gradient_accumulation_steps": 2, "save_strategy": "steps"}


def saved_run(folder: Path, **options: Any) -> Any:
    """A run of six steps with dropout and a checkpoint after the third."""
    run, _ = with_geometry(
        folder, build(attention_dropout=0.2), data=examples(24), config=CONFIG, save_steps=3, **RANDOM | options
    )
    return run


def other_weights(dropout: float = 0.2) -> Any:
    model = build(attention_dropout=dropout)
    for parameter in model.parameters():
        parameter.data.add_(0.1)
    return model


def resumed_run(folder: Path, checkpoint: Any, config: Any = CONFIG, **options: Any) -> Any:
    run, _ = with_geometry(folder, other_weights(), data=examples(24), config=config, save_steps=3, **RANDOM | options)
    with pytest.warns(UserWarning, match="they are loaded from it, too"):
        run.train(resume_from_checkpoint=checkpoint)
    return run


def same(one: Any, other: Any) -> bool:
    """Whether two states hold the same, bit for bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


def state_of(checkpoint: Path) -> Any:
    return torch.load(checkpoint / "geometry.pt", weights_only=True)


@pytest.mark.parametrize("place", ["the last", "elsewhere"])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, place):
    unbroken = saved_run(tmp_path / "a")
    unbroken.train()
    (tmp_path / "b").mkdir()
    away = (tmp_path / "b" / "checkpoint-3") if place == "the last" else tmp_path / "moved"
    shutil.copytree(tmp_path / "a" / "checkpoint-3", away)
    resumed = resumed_run(tmp_path / "b", True if place == "the last" else str(away))
    assert apart(weights(resumed.model), weights(unbroken.model)) == 0
    assert lines(resumed) == lines(unbroken)
    ends = [state_of(tmp_path / folder / "checkpoint-6") for folder in ("a", "b")]
    assert same(*ends)
    assert ends[0]["geometry"]["control"]["step"] == 6


def test_checkpoints_are_those_of_transformers(tmp_path):
    run = saved_run(tmp_path)
    run.train()
    folder = tmp_path / "checkpoint-6"
    assert sorted(path.name for path in folder.iterdir() if "geometry" in path.name) == ["geometry.pt"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is type(run.model)
    assert apart(weights(loaded), weights(run.model)) == 0
    on_disk = load_file(folder / "model.safetensors")
    for name in gates(run.model):
        assert torch.equal(on_disk[name], weights(run.model)[name])


def test_the_best_model_has_its_experts(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "metric_for_best_model": "step"}
    run, _ = with_geometry(tmp_path, eval_dataset=examples(4), save_steps=3, **RANDOM | best)
    run.compute_metrics = lambda _: {"step": -run.state.global_step}  # the first is the best
    seen: dict[str, Any] = {}
    run.add_callback(AtStep(3, lambda _: seen.update(weights(run.model))))
    with pytest.warns(UserWarning, match="they are loaded from it, too"):
        run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-3")
    assert apart(weights(run.model), seen) == 0


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    saved_run(tmp_path, max_steps=3).train()
    path = tmp_path / "checkpoint-3" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if "layers.1.mlp.experts" not in name}
    save_file(kept, path, metadata={"format": "pt"})
    run, _ = with_geometry(tmp_path, other_weights(), data=examples(24), **RANDOM)
    with pytest.raises(ValueError, match=r"lacks weights of the model: model\.layers\.1\.mlp\.experts\.down_proj"):
        run.train(resume_from_checkpoint=str(path.parent))


def test_a_write_that_fails_leaves_the_former_state(tmp_path, monkeypatch):
    run = saved_run(tmp_path)
    run.train()
    former = (tmp_path / "checkpoint-6" / "geometry.pt").read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        resumed_run(tmp_path, str(tmp_path / "checkpoint-3"))
    assert (tmp_path / "checkpoint-6" / "geometry.pt").read_bytes() == former


def test_checkpoints_of_the_model_only_hold_the_model_only(tmp_path):
    run = saved_run(tmp_path, save_only_model=True)
    run.train()
    assert (tmp_path / "checkpoint-3" / "model.safetensors").exists()
    assert not (tmp_path / "checkpoint-3" / "geometry.pt").exists()


@pytest.mark.filterwarnings("ignore:the Trainer left 4 weights out:UserWarning")
def test_a_checkpoint_without_the_state_is_gone_on_from(tmp_path):
    plain = trainer(tmp_path, build(), data=examples(24), save_steps=3, **RANDOM)
    plain.train()
    run, _ = with_geometry(tmp_path, other_weights(), data=examples(24), **RANDOM)
    with pytest.warns(UserWarning, match="begin anew") as caught:
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len([warning for warning in caught if "geometry.pt" in str(warning.message)]) == 1
    assert [line["step"] for line in lines(run) if "geometry/fsi" in line] == [4, 5, 6]


def damage(state: Any) -> bytes:
    return b"nonsense"


def code(state: Any) -> Any:
    return state | {"more": print}


def other_version(state: Any) -> Any:
    return state | {"format": 99, "version": "9.9"}


def other_layers(state: Any) -> Any:
    geometry = state["geometry"]
    experts = {name.replace("layers.1", "layers.7"): count for name, count in geometry["experts"].items()}
    return state | {"geometry": geometry | {"experts": experts}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage, r"geometry\.pt is damaged"),
        (code, r"geometry\.pt is damaged or holds more than plain data, which could run code"),
        (other_version, r"geometry\.pt was saved by another version \(9\.9\)"),
        (other_layers, r"geometry\.pt is not of this run: .*layers\.7"),
    ],
)
def test_a_state_that_does_not_fit_stops_before_training(tmp_path, change, message):
    saved_run(tmp_path, max_steps=3).train()
    path = tmp_path / "checkpoint-3" / "geometry.pt"
    changed = change(state_of(path.parent))
    if isinstance(changed, bytes):
        path.write_bytes(changed)
    else:
        torch.save(changed, path)
    with pytest.raises(ValueError, match=message):
        resumed_run(tmp_path, str(path.parent))


def labelled_unevenly() -> list[dict[str, Tensor]]:
    """The ranks' losses have different numbers of tokens; the routing has all of them."""
    return [{name: example[name] for name in ("input_ids", "labels")} for example in examples(16, padded=True)]


def in_ranks(folder: Path, model: Any, checkpoint: Any = None, **options: Any) -> Any:
    # After the fourth step each rank has sums of its own: no factors of natural steps were computed from them yet.
    known = {"max_steps": 6, "save_steps": 4, "save_strategy": "steps", "gradient_accumulation_steps": 2}
    run, _ = with_geometry(folder, model, data=labelled_unevenly(), config=CONFIG, **known | options)
    run.train(resume_from_checkpoint=checkpoint)
    return run


def as_rank(rank: int, folder: str) -> None:
    place = Path(folder)
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    os.environ |= {name: str(value) for name, value in known.items()}
    options = {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    run = in_ranks(place / "ranks", build(), **options)
    assert type(run.model_wrapped).__name__ == "DistributedDataParallel"
    again = in_ranks(place / "ranks", other_weights(0.0), str(place / "ranks" / "checkpoint-4"), **options)
    assert apart(weights(again.model), weights(run.model)) == 0
    torch.save({"weights": weights(run.model), "lines": lines(run)}, place / f"rank{rank}.pt")


def test_two_ranks_train_as_one(tmp_path):
    on_two_ranks(as_rank, tmp_path, str(tmp_path))
    alone = in_ranks(tmp_path / "alone", build(), per_device_train_batch_size=4)
    start = weights(build())
    for rank in (0, 1):
        saved = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert apart(saved["weights"], weights(alone.model)) < 1e-5
        for name in gates(alone.model):
            assert float((saved["weights"][name] - start[name]).norm()) > 1e-3
        for line, expected in zip(saved["lines"], lines(alone), strict=True):
            for name in ("loss", "geometry/fsi", "geometry/fhs", "geometry/max_violation", "geometry/regularizer"):
                assert line[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6)
    files = sorted(path.name for path in (tmp_path / "ranks" / "checkpoint-4").glob("geometry*"))
    assert files == ["geometry.pt", "geometry_1.pt"]


@pytest.mark.gpu
@pytest.mark.parametrize("mixed", ["fp16", "bf16"])
def test_on_an_accelerator(tmp_path, mixed):
    run, callback = with_geometry(tmp_path, config=CONFIG, use_cpu=False, max_steps=8, **{mixed: True})
    seen: dict[str, Any] = {}
    run.add_callback(AtStep(8, lambda _: seen.update(scaler=callback.geometry.config.grad_scaler)))
    before = weights(run.model)
    run.train()
    assert (seen["scaler"] is not None) is (mixed == "fp16")
    assert all(0 < float((weights(run.model)[name] - before[name]).abs().max()) < 1 for name in gates(run.model))
    assert lines(run)[-1]["geometry/fsi"] > 0
