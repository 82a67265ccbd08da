"""One step and its guards: padding, NaN and inf, what is saved where, the penalty, the rates, precision."""

import functools
import math
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moegeo_router as mg
from moegeo_router.loggers import JSONLLogger, NullLogger, read_jsonl
from trainers import checkpoint
from trainers.data.base import Batch
from trainers.data.planted import PlantedImages, PlantedText
from trainers.loop import Interrupted, LoopConfig, NonFiniteError, Trainer, stop_requests
from trainers.models import LanguageModel, VisionModel
from trainers.optimizers import adamw
from trainers.progress import Silent

CPU = torch.device("cpu")
SIZES = {"dim": 16, "layers": 2, "heads": 2, "num_experts": 4, "expert_hidden": 8}
ROUTER = functools.partial(mg.GeometricRouter, bias=False)
LAYER1_ROUTER = "trunk.blocks.1.ffn.router.weight"


@pytest.fixture(autouse=True)
def _full_precision_afterwards():
    yield
    torch.set_float32_matmul_precision("highest")


def _text() -> PlantedText:
    return PlantedText(alphabet=7, documents=40, document_length=17, length=16, batch_size=4)


def _trainer(
    folder: Path, task: str = "language", sgd: bool = False, logger=None, fsi: float = 0.01, **loop: object
) -> Trainer:
    torch.manual_seed(1)
    if task == "language":
        data = _text()
        model = LanguageModel(data.vocab_size, ROUTER, **SIZES, length=16)
    else:
        data = PlantedImages(images=96, size=4, batch_size=8)
        model = VisionModel(data.num_classes, data.image_shape, ROUTER, **SIZES, patch=2)
    # Steps of plain gradient descent at rate 1: the weights move by minus the gradient.
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0) if sgd else adamw(model, routers="riemannian")
    config = LoopConfig(**{"steps": 8, "warmup": 0, "checkpoint_every": 0} | loop)
    geometry = mg.GeometryConfig(
        step=None if sgd else "riemannian", regularizers=mg.Regularizers(fsi=fsi), per_layer=True, on_error="raise"
    )
    logger = logger or NullLogger()
    return Trainer(model, data, optimizer, config, geometry=geometry, logger=logger, directory=folder, device=CPU)


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def _distance(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((before[name] - after[name]).square().sum()) for name in before))


def _padded(batch: Batch, mask: Tensor, junk: int = 0) -> Batch:
    """The batch with other positions masked, which hold ``junk``."""
    index = {name: torch.where(mask, getattr(batch, name), junk) for name in ("targets", "domains", "documents")}
    shape = (-1,) + (1,) * (batch.inputs.ndim - 1) if mask.ndim == 1 else mask.shape
    return Batch(inputs=torch.where(mask.view(shape), batch.inputs, junk), mask=mask, **index)


def _penalty_by_hand(probs: list[Tensor]) -> Tensor:
    return sum((2 * torch.arccos((p.double().mean(0) / p.shape[-1]).sqrt().sum())) ** 2 for p in probs)


def test_all_padding_is_an_error_and_changes_nothing(tmp_path):
    trainer = _trainer(tmp_path)
    before = _weights(trainer)
    batch = trainer.data.train_batch(0)
    with pytest.raises(ValueError, match="step 0: the batch has no targets, every position is padding"):
        trainer.train_step(_padded(batch, torch.zeros_like(batch.mask)))
    assert trainer.step == 0
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_partly_padded_text_counts_as_its_unpadded_tokens_alone(tmp_path):
    trainer = _trainer(tmp_path, sgd=True, clip_norm=1e9, fsi=0.5)
    before, lengths = _weights(trainer), (16, 5, 1, 9)
    batch = trainer.data.train_batch(0)
    mask = torch.arange(16) < torch.tensor(lengths)[:, None]
    (group,) = trainer.optimizer.param_groups
    group["initial_lr"] = 0.0  # at the second step the reference is then where the penalty's gradient is taken
    trainer.train_step(_padded(batch, mask))
    group["initial_lr"], trainer.step = 1.0, 0

    outputs = [trainer.model(batch.inputs[i : i + 1, :n]) for i, n in enumerate(lengths)]
    losses = [
        F.cross_entropy(o.logits[0].double(), batch.targets[i, :n], reduction="sum")
        for i, (n, o) in enumerate(zip(lengths, outputs, strict=True))
    ]
    loss = sum(losses) / sum(lengths)
    probs = [torch.cat([o.routing[layer].probs for o in outputs]) for layer in ("layer0", "layer1")]
    gradients = torch.autograd.grad(loss + 0.5 * _penalty_by_hand(probs), list(trainer.model.parameters()))

    scalars = trainer.train_step(_padded(batch, mask))
    assert scalars["train/loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert scalars["train/tokens"] == sum(lengths)
    overlaps = [float((p.detach().double().mean(0) / 4).sqrt().sum()) for p in probs]
    fsi = [2 * math.acos(overlap) / (2 * math.acos(0.5)) for overlap in overlaps]
    assert scalars["geometry/fsi"] == pytest.approx(sum(fsi) / 2, abs=1e-5)
    loads = [torch.bincount(p.topk(2).indices.flatten(), minlength=4) * 4 / (2 * sum(lengths)) for p in probs]
    assert scalars["geometry/max_violation"] == pytest.approx(float(torch.stack(loads).max()) - 1)
    assert scalars["geometry/regularizer"] == pytest.approx(0.5 * float(_penalty_by_hand(probs).detach()), rel=1e-4)
    for (name, parameter), gradient in zip(trainer.model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(before[name] - parameter, gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_partly_padded_images_count_as_the_others_alone(tmp_path):
    trainer = _trainer(tmp_path, "vision", sgd=True, clip_norm=1e9, fsi=0.0)
    before, batch = _weights(trainer), trainer.data.train_batch(0)
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1]).bool()
    output = trainer.model(batch.inputs[mask])
    loss = F.cross_entropy(output.logits, batch.targets[mask])
    gradients = torch.autograd.grad(loss, list(trainer.model.parameters()), allow_unused=True)
    scalars = trainer.train_step(_padded(batch, mask))
    assert scalars["train/loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert scalars["train/tokens"] == 5 * 4  # 2x2 patches
    for (name, parameter), gradient in zip(trainer.model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(before[name] - parameter, gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("task", ["language", "vision"])
def test_what_stands_in_masked_positions_has_no_influence(tmp_path, task):
    scalars, weights = [], []
    for junk in (0, 3):
        trainer = _trainer(tmp_path, task)
        batch = trainer.data.train_batch(0)
        mask = torch.arange(8) < 6 if task == "vision" else (torch.arange(16) < 11).expand(4, 16)
        scalars.append(trainer.train_step(_padded(batch, mask, junk)))
        weights.append(_weights(trainer))
    assert scalars[0] == pytest.approx(scalars[1], abs=1e-6)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-5)


def test_the_gradient_is_clipped_and_scaled_by_the_schedule(tmp_path):
    trainer = _trainer(tmp_path, sgd=True, clip_norm=0.5, warmup=4)
    before = _weights(trainer)
    scalars = trainer.train_step(trainer.data.train_batch(0))
    moved = _distance(before, _weights(trainer))
    assert scalars["train/grad_norm"] > 0.5
    assert scalars["train/lr_scale"] == 0.25
    assert moved == pytest.approx(0.25 * 0.5, rel=1e-3)


def test_a_small_gradient_is_not_clipped(tmp_path):
    trainer = _trainer(tmp_path, sgd=True, clip_norm=1e6)
    before = _weights(trainer)
    scalars = trainer.train_step(trainer.data.train_batch(0))
    moved = _distance(before, _weights(trainer))
    assert moved == pytest.approx(scalars["train/grad_norm"], rel=1e-3)


class _At(Silent):
    """A progress that acts after a step."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step, self.action = step, action

    def update(self, step, scalars):
        if step == self.step:
            self.action()


def _fill(trainer: Trainer, name: str, value: float) -> Callable[[], object]:
    return lambda: trainer.model.get_parameter(name).data.fill_(value)


def _stopped(trainer: Trainer, action: Callable[[], object]) -> str:
    with pytest.raises(NonFiniteError) as stopped:
        trainer.run(_At(3, action))
    trainer.logger.close()
    return str(stopped.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("name", "place"), [(LAYER1_ROUTER, "layer1"), ("embedding.weight", "layer0")])
def test_poisoned_weights_stop_the_run_and_leave_the_healthy_checkpoints(tmp_path, value, name, place):
    trainer = _trainer(tmp_path, logger=JSONLLogger(tmp_path / "log"), checkpoint_every=2)
    message = _stopped(trainer, _fill(trainer, name, value))
    saved = tmp_path / "non_finite" / "step-00000003"
    assert message == (f"NaN or inf in the router logits of {place} at step 3; the step was not taken; saved {saved}")
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000000", "step-00000002"]
    assert not checkpoint.load(saved).model[name].isfinite().any()
    event = read_jsonl(tmp_path / "log")[-1]
    assert (event["event"], event["step"], event["checkpoint"]) == ("non_finite", 3, str(saved))
    assert event["reason"] in message

    again = _trainer(tmp_path)
    healthy, damaged = checkpoint.latest(tmp_path / "checkpoints")
    assert damaged == []
    again.restore(healthy)
    assert again.step == 2
    again.run(Silent())
    assert all(bool(p.isfinite().all()) for p in again.model.parameters())


def test_an_overflow_in_the_gradient_names_the_weight_and_saves_a_checkpoint(tmp_path):
    trainer = _trainer(tmp_path, logger=JSONLLogger(tmp_path / "log"))
    weights = {}

    def poison() -> None:
        weights.update(_weights(trainer))
        trainer.model.get_parameter(LAYER1_ROUTER).register_hook(lambda gradient: gradient * math.inf)

    message = _stopped(trainer, poison)
    saved = tmp_path / "checkpoints" / "step-00000003"
    assert message == (
        f"the loss is finite, NaN or inf in the gradient of {LAYER1_ROUTER} at step 3; "
        f"the step was not taken; saved {saved}"
    )
    found = checkpoint.load(saved).model
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert all(p.grad is None for p in trainer.model.parameters())
    assert not (tmp_path / "non_finite").exists()


def test_a_norm_that_overflows_with_finite_gradients_is_said(tmp_path):
    trainer = _trainer(tmp_path)
    for parameter in trainer.model.parameters():
        parameter.register_hook(lambda gradient: torch.full_like(gradient, 3e38))
    with pytest.raises(NonFiniteError, match="the gradient norm is inf, with finite gradients, at step 0"):
        trainer.train_step(trainer.data.train_batch(0))


def test_a_loss_that_is_nan_beside_finite_logits_is_said(tmp_path):
    trainer = _trainer(tmp_path)
    trainer.model.trunk.norm.weight.data.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="the loss is nan, with finite router logits, at step 0"):
        trainer.train_step(trainer.data.train_batch(0))


@pytest.mark.parametrize("step", [4, 8])
def test_weights_that_a_step_has_ruined_do_not_become_a_checkpoint(tmp_path, step):
    # 4: a scheduled checkpoint, 8: the last one. No later forward would have found them.
    trainer = _trainer(tmp_path, logger=JSONLLogger(tmp_path / "log"), checkpoint_every=4)
    with pytest.raises(NonFiniteError, match=f"NaN or inf in {LAYER1_ROUTER} after step {step}; saved .*non_finite"):
        trainer.run(_At(step, _fill(trainer, LAYER1_ROUTER, math.nan)))
    trainer.logger.close()
    assert (tmp_path / "non_finite" / f"step-{step:08d}").is_dir()
    assert checkpoint.latest(tmp_path / "checkpoints")[0].step == step - 4
    assert read_jsonl(tmp_path / "log")[-1]["event"] == "non_finite"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_the_step_and_saves(tmp_path, number):
    trainer = _trainer(tmp_path)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    saved = tmp_path / "checkpoints" / "step-00000003"
    with pytest.raises(Interrupted, match=f"^stopped after step 3; saved {saved}$"):
        trainer.run(_At(3, lambda: signal.raise_signal(number)))
    assert checkpoint.load(saved).step == 3
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_the_second_ctrl_c_interrupts_at_once():
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_in_the_last_step_lets_the_run_finish(tmp_path):
    trainer = _trainer(tmp_path, logger=JSONLLogger(tmp_path / "log"))
    trainer.run(_At(8, lambda: signal.raise_signal(signal.SIGINT)))
    trainer.logger.close()
    assert "valid/loss" in read_jsonl(tmp_path / "log")[-1]


def test_validation_and_checkpoints_are_due_when_they_say(tmp_path):
    trainer = _trainer(
        tmp_path, logger=JSONLLogger(tmp_path / "log"), eval_every=3, checkpoint_every=4, keep_checkpoints=9
    )
    trainer.run(Silent())
    trainer.logger.close()
    rows = read_jsonl(tmp_path / "log")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 9))
    assert [row["step"] for row in rows if "valid/loss" in row] == [3, 6, 8]
    steps = [int(path.name.removeprefix("step-")) for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert steps == [0, 4, 8]


@pytest.mark.parametrize("task", ["language", "vision"])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_lower_precision_starts_with_nearly_the_same_loss_and_stays_finite(tmp_path, precision, task):
    exact, trainer = _trainer(tmp_path, task), _trainer(tmp_path, task, precision=precision)
    reference = exact.train_step(exact.data.train_batch(0))["train/loss"]
    losses = [trainer.train_step(trainer.data.train_batch(step))["train/loss"] for step in range(3)]
    assert losses[0] == pytest.approx(reference, rel=0.02)
    assert all(map(math.isfinite, losses))
    assert (losses[0] != reference) or precision == "tf32"
    assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")


def test_a_checkpoint_of_something_else_is_refused_in_one_line(tmp_path):
    saved = checkpoint.load(_trainer(tmp_path).save())
    other_model, other_data, fewer = _trainer(tmp_path, "vision"), _trainer(tmp_path), _trainer(tmp_path)
    other_model.data.fingerprint = saved.meta["data"]
    other_data.data.fingerprint = "another"
    fewer.optimizer.param_groups.pop()
    for other, message in (
        (other_model, "is of another model or optimizer: "),
        (fewer, "is of another model or optimizer: "),
        (other_data, "was trained on other data than planted is now"),
    ):
        with pytest.raises(ValueError, match=f"^the checkpoint of step 0 {message}") as refused:
            other.restore(saved)
        assert "\n" not in str(refused.value)
        assert other.step == 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("steps", 0, "loop.steps must be at least 1, got 0"),
        ("warmup", -1, "loop.warmup must be at least 0, got -1"),
        ("eval_every", -1, "loop.eval_every must be at least 0"),
        ("checkpoint_every", -2, "loop.checkpoint_every must be at least 0, got -2"),
        ("keep_checkpoints", 0, "loop.keep_checkpoints must be at least 1, got 0"),
        ("clip_norm", 0.0, "clip_norm > 0"),
        ("clip_norm", math.nan, "clip_norm > 0"),
        ("final_lr", 1.5, "final_lr <= 1"),
        ("precision", "fp64", "loop.precision must be one of fp32, tf32, bf16, got 'fp64'"),
    ],
)
def test_values_out_of_range_are_refused(option, value, message):
    with pytest.raises(ValueError, match=message):
        LoopConfig(**{option: value})


def test_whatever_stops_a_run_its_last_step_is_saved(tmp_path):
    trainer = _trainer(tmp_path)
    batch = trainer.data.train_batch
    trainer.data.train_batch = lambda step: (
        _padded(batch(step), torch.zeros(4, 16, dtype=bool)) if step == 5 else batch(step)
    )
    with pytest.raises(ValueError, match="step 5: the batch has no targets"):
        trainer.run(Silent())
    saved, damaged = checkpoint.latest(tmp_path / "checkpoints")
    assert (saved.step, damaged) == (5, [])


def test_random_numbers_go_on_where_they_were(tmp_path):
    trainer = _trainer(tmp_path)
    torch.rand(3)
    saved = checkpoint.load(trainer.save())
    expected = torch.rand(5)
    other = _trainer(tmp_path / "other")
    other.restore(saved)
    assert torch.equal(torch.rand(5), expected)
