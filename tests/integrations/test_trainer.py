"""transformers' ``Trainer`` with geometry: real trainers, reporters and checkpoints around tiny models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import moegeo_router as mg

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.support.trainer import (  # noqa: E402
    STRONG,
    AtStep,
    apart,
    as_found,
    build,
    examples,
    gates,
    hooks,
    lines,
    trainer,
    weights,
    with_geometry,
)

CONFIG = mg.GeometryConfig(regularizers=STRONG)


def half_labelled() -> list[dict[str, Any]]:
    """Examples in whose losses some have more tokens than others; the routing has all of them."""
    return [example | {"attention_mask": torch.ones(8, dtype=torch.long)} for example in examples(padded=True)]


def by_hand(folder, windows, data, mixed=False, epochs=2) -> nn.Module:
    """The training of the Trainer as a loop of one's own: windows of batches of two, the loss over all their items."""
    model = build().train()
    steps = trainer(folder, model)  # for its optimizer and schedule only
    mg.geometrize(model)
    optimizer = steps.create_optimizer()
    scheduler = steps.create_scheduler(epochs * len(windows))
    config = mg.GeometryConfig(regularizers=STRONG, loss="sum")
    geometry = mg.attach(model, optimizer, config)
    for window in windows * epochs:
        batches = [
            {name: torch.stack([example[name] for example in data[2 * b : 2 * b + 2]]) for name in data[0]}
            for b in window
        ]
        items = sum(batch["labels"][:, 1:].ne(-100).sum() for batch in batches)
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = model(**batch, num_items_in_batch=items).loss
            (loss + geometry.loss() / len(window)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    geometry.detach()
    return model


@pytest.mark.parametrize(
    ("accumulation", "windows"),
    [(1, [[b] for b in range(8)]), (3, [[0, 1, 2], [3, 4, 5], [6, 7]])],
    ids=["one batch", "windows of 3, 3 and 2"],
)
def test_the_run_is_a_loop_written_by_hand(tmp_path, accumulation, windows):
    data, start = half_labelled(), weights(build())
    options = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 2, "max_steps": -1}
    run, _ = with_geometry(tmp_path, data=data, config=CONFIG, **options)
    run.train()
    ours, theirs = weights(run.model), weights(by_hand(tmp_path, windows, data))
    assert apart(ours, theirs) < 1e-6
    # And what is compared did move: by the regularizers, and by geometry.
    plain, _ = with_geometry(
        tmp_path, data=data, config=mg.GeometryConfig(regularizers=mg.Regularizers.none()), **options
    )
    plain.train()
    for name in gates(run.model):
        assert float((ours[name] - start[name]).norm()) > 1e-4
        assert float((ours[name] - weights(plain.model)[name]).norm()) > 1e-4


def test_autocast(tmp_path):
    data = examples()
    run, _ = with_geometry(tmp_path, data=data, config=CONFIG, bf16=True, num_train_epochs=2, max_steps=-1)
    run.train()
    windows = [[b] for b in range(8)]
    ours, theirs = weights(run.model), weights(by_hand(tmp_path, windows, data, mixed=True))
    fp32 = weights(by_hand(tmp_path, windows, data))
    assert apart(ours, theirs) < 0.1 * apart(ours, fp32)


def test_scaled_losses(tmp_path):
    runs = [with_geometry(tmp_path, config=CONFIG, max_grad_norm=0.0)[0] for _ in range(2)]
    # That of fp16 needs an accelerator; this one goes the same way, through accelerate's optimizer.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    runs[1].accelerator.scaler = scaler
    for run in runs:
        run.train()
    assert scaler.get_scale() == 2.0**12
    assert apart(*(weights(run.model) for run in runs)) < 1e-6


def test_only_geometry_steps_the_routers(tmp_path):
    # What AdamW would do to them shows: a learning rate of 1 and decay, against steps of 0.015 radians.
    run, callback = with_geometry(tmp_path, learning_rate=1.0, weight_decay=0.5, max_grad_norm=0.01, max_steps=3)
    before, seen = weights(run.model), {}

    def look(_):
        seen["manifold"] = {type(p.manifold).__name__ for p in gates(run.model).values()}
        held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        seen["held"] = all(id(p) in held for p in gates(run.model).values())
        seen["stepped"] = [name for name, p in run.model.named_parameters() if run.optimizer.state[p]]

    run.add_callback(AtStep(2, look))
    run.train()
    assert seen["manifold"] == {"PolarRows"}
    assert seen["held"]
    assert len(seen["stepped"]) == len(list(run.model.parameters())) - 2
    assert not set(gates(run.model)) & set(seen["stepped"])
    for name in gates(run.model):
        assert 0 < float((weights(run.model)[name] - before[name]).abs().max()) < 0.1
    assert callback.geometry is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(tmp_path, reentrant):
    kinds = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    runs = [with_geometry(tmp_path, config=CONFIG, **options)[0] for options in ({}, kinds)]
    for run in runs:
        run.train()
    assert apart(*(weights(run.model) for run in runs)) < 1e-5
    for plain, checkpointed in zip(*(lines(run) for run in runs), strict=True):
        assert plain["geometry/fsi_load"] == pytest.approx(checkpointed["geometry/fsi_load"], abs=1e-5)
        assert plain["geometry/fhs"] == pytest.approx(checkpointed["geometry/fhs"], rel=1e-3)


@pytest.mark.parametrize("optim", ["adafactor", "sgd", "adamw_torch_fused"])
def test_other_optimizers(tmp_path, optim):
    run, _ = with_geometry(tmp_path, build("Mixtral"), optim=optim, max_steps=2)
    before = weights(run.model)
    run.train()
    assert all(float((weights(run.model)[name] - before[name]).norm()) > 0 for name in gates(run.model))
    assert lines(run)[-1]["geometry/movement"] > 0


def losses_told(run, callback) -> list[float]:
    """What the controller makes of the losses of each step."""
    told: list[float] = []

    def look(_):
        told.append(callback.geometry._control._readings[-1].loss)

    for step in range(1, 7):
        run.add_callback(AtStep(step, look))
    run.train()
    return told


def mean_of_batch(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 3}, {"label_smoothing_factor": 0.2}, {"compute_loss_func": mean_of_batch}],
    ids=["plain", "accumulation", "smoothed", "own loss"],
)
def test_the_controller_sees_the_loss_that_is_trained(tmp_path, options):
    run, callback = with_geometry(tmp_path, data=half_labelled(), **options)
    told = losses_told(run, callback)
    assert told == pytest.approx([line["loss"] for line in lines(run)], rel=1e-5)
    assert all(math.isfinite(loss) for loss in told)


def test_a_step_with_a_gradient_that_is_not_finite_is_not_taken(tmp_path):
    class Broken(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 2 else loss

    run, _ = with_geometry(tmp_path, cls=Broken, config=mg.GeometryConfig(controller="act"))
    seen = []
    for step in (2, 3, 4):
        run.add_callback(AtStep(step, lambda _: seen.append(weights(run.model))))
    run.train()
    assert apart(seen[0], seen[1]) == 0
    assert apart(seen[1], seen[2]) > 0
    assert all(value.isfinite().all() for value in weights(run.model).values())


def test_losses_that_the_trainer_divides(tmp_path):
    class Own(transformers.Trainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

    run, callback = with_geometry(tmp_path, cls=Own, gradient_accumulation_steps=3)
    seen: dict[str, Any] = {}
    run.add_callback(AtStep(1, lambda _: seen.update(loss=callback.geometry.config.loss)))
    assert losses_told(run, callback) == pytest.approx([line["loss"] for line in lines(run)], rel=1e-5)
    assert seen["loss"] == "mean"


def test_unequal_micro_batches_are_one_batch(tmp_path):
    data, none = examples(padded=True), mg.GeometryConfig(regularizers=mg.Regularizers.none())
    sizes = [{"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size} for size in (4, 1)]
    whole, parts = (with_geometry(tmp_path, data=data, config=none, max_steps=2, **size)[0] for size in sizes)
    whole.train()
    parts.train()
    for one, other in zip(lines(whole), lines(parts), strict=True):
        for name in ("loss", "geometry/fsi", "geometry/fhs", "geometry/fhs_per_token"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)


def test_evaluation_and_generation_are_not_counted(tmp_path):
    def disturb(_):
        ids = examples(2)[0]["input_ids"][None]
        for mode in (True, False):
            disturbed.model.train(mode)
            disturbed.model.generate(ids, max_new_tokens=3, do_sample=False)
        disturbed.evaluate(examples(8))

    quiet, _ = with_geometry(tmp_path)
    disturbed, _ = with_geometry(tmp_path)
    disturbed.add_callback(AtStep(3, disturb, after=True))
    quiet.train()
    disturbed.train()
    assert lines(disturbed) == lines(quiet)
    evaluated = [line for line in disturbed.state.log_history if "eval_loss" in line]
    assert len(evaluated) == 1
    assert not any(name.startswith("geometry/") for name in evaluated[0])
    assert apart(weights(disturbed.model), weights(quiet.model)) == 0


@pytest.mark.parametrize(
    ("config", "watch"),
    [(None, True), (mg.GeometryConfig(step=None, regularizers=mg.Regularizers.none()), False)],
    ids=["watch", "step=None"],
)
def test_a_run_that_is_watched_is_the_same(tmp_path, config, watch):
    options = {"gradient_accumulation_steps": 2, "train_sampling_strategy": "random"}
    plain = trainer(tmp_path, build(attention_dropout=0.2), **options)
    plain.train()
    watched, _ = with_geometry(tmp_path, build(attention_dropout=0.2), config=config, watch=watch, **options)
    kinds: list[Any] = []
    watched.add_callback(AtStep(1, lambda _: kinds.extend(type(p) for p in watched.model.parameters())))
    watched.train()
    assert set(kinds) == {nn.Parameter}
    assert apart(weights(watched.model), weights(plain.model)) == 0
    for one, other in zip(lines(watched), lines(plain), strict=True):
        assert {name: value for name, value in one.items() if not name.startswith("geometry/")} == other
        assert one["geometry/fsi"] > 0
        assert "geometry/movement" not in one


def test_nothing_is_left_behind_and_train_can_be_called_again(tmp_path):
    run, callback = with_geometry(tmp_path)
    run.add_callback(transformers.TrainerCallback())
    order = list(run.callback_handler.callbacks)
    for _ in range(2):
        run.train()
        as_found(run)
        assert run.callback_handler.callbacks == order
        assert len(lines(run)) == 6
        assert all("geometry/movement" in line for line in lines(run))
    run.remove_callback(callback)
    run.train()
    assert not any("geometry/fsi" in line for line in lines(run))


def test_a_method_that_was_replaced_on_the_trainer_is_called_and_stays(tmp_path):
    run, _ = with_geometry(tmp_path, max_steps=2)
    theirs, called = run.training_step, []

    def own(*args, **kwargs):
        called.append(run.state.global_step)
        return theirs(*args, **kwargs)

    run.training_step = own
    run.train()
    assert called == [0, 1]
    assert run.training_step is own


def test_routers_on_a_manifold_stay_on_theirs(tmp_path):
    model = build()
    mg.geometrize(model, manifold="euclidean", select="*.0.mlp.gate")
    run, _ = with_geometry(tmp_path, model, max_steps=1)
    seen: list[str] = []
    run.add_callback(AtStep(1, lambda _: seen.extend(type(p.manifold).__name__ for p in gates(model).values())))
    run.train()
    assert seen == ["EuclideanRows", "PolarRows"]
    assert [type(p).__name__ for p in gates(model).values()] == ["ManifoldParameter", "Parameter"]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_run_that_breaks_off_leaves_the_model_as_it_was(tmp_path, error):
    run, _ = with_geometry(tmp_path)

    def fail(_):
        if not failed:
            failed.append(True)
            raise error

    failed: list[bool] = []
    run.add_callback(AtStep(3, fail))
    with pytest.raises(error):
        run.train()
    as_found(run)
    mg.attach(run.model).detach()
    run.train()
    assert len(lines(run)) == 6


def test_a_smaller_batch_after_running_out_of_memory(tmp_path):
    def needs_memory(outputs, labels, num_items_in_batch=None):
        if len(labels) > 2:
            raise RuntimeError("CUDA out of memory.")
        return mean_of_batch(outputs, labels)

    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "max_steps": 2}
    run, _ = with_geometry(tmp_path, compute_loss_func=needs_memory, **options)
    run.train()
    assert [line["step"] for line in lines(run)] == [1, 2]
    as_found(run)


def test_frozen_routers_are_watched(tmp_path):
    model = build()
    for parameter in gates(model).values():
        parameter.requires_grad_(False)
    run, _ = with_geometry(tmp_path, model, max_steps=2)
    before = weights(model)
    with pytest.warns(UserWarning, match=r"model\.layers\.1\.mlp\.gate are frozen: they are watched, not stepped"):
        run.train()
    assert all(torch.equal(weights(model)[name], before[name]) for name in gates(model))
    assert lines(run)[-1]["geometry/fsi"] > 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks for it
def test_adapters_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    run, _ = with_geometry(tmp_path, model, max_steps=2)
    with pytest.warns(UserWarning, match="are frozen: they are watched"):
        run.train()
    assert lines(run)[-1]["geometry/fhs"] > 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 asks for it
def test_routers_that_adapters_train_are_not_called_frozen(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(), peft.LoraConfig(target_modules=[], target_parameters=["gate.weight"], r=2))
    run, _ = with_geometry(tmp_path, model, max_steps=2)
    with pytest.warns(UserWarning, match="adapters") as told:
        run.train()
    about = [str(warning.message) for warning in told if "routers" in str(warning.message)]
    assert len(about) == 1
    assert "are trained by adapters (LoRA)" in about[0]


def test_without_training_nothing_happens(tmp_path):
    run, callback = with_geometry(tmp_path)
    before = weights(run.model)
    assert "eval_loss" in run.evaluate(examples(4))
    assert callback.geometry is None
    assert hooks(run.model) == 0
    assert apart(before, weights(run.model)) == 0
