"""Faults: each does what it says and nothing else; without one, and before one, a run is the same to the last bit."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from hydra.utils import get_object
from omegaconf import OmegaConf
from torch import nn

import moegeo_router as mg
from moegeo_router.loggers import NullLogger
from tests.support.runs import CONFIGS, Killed, after_step, configuration, kill, tiny, train_rows
from trainers import build, checkpoint
from trainers.data.base import Batch
from trainers.data.planted import PlantedImages, PlantedText
from trainers.faults import BadInit, Bf16Logits, DomainShift, Fault, NanGradient, Restarts, RowDrift, ZeroExpert
from trainers.loop import LoopConfig, NonFiniteError, Trainer
from trainers.models import LanguageModel
from trainers.models.moe import MoELayer
from trainers.optimizers import adamw, learning_rate_scale
from trainers.progress import Silent
from trainers.train import train

CPU = torch.device("cpu")
LATER = 10**6
LINEAR = functools.partial(nn.Linear, bias=False)
ROUTERS = {
    "linear": LINEAR,
    **{m: functools.partial(mg.GeometricRouter, bias=False, manifold=m) for m in ("polar", "sphere", "orthonormal")},
}
NAMES = sorted(path.stem for path in (CONFIGS / "fault").glob("*.yaml") if path.stem != "none")


def data() -> PlantedText:
    return PlantedText(alphabet=7, documents=40, document_length=17, length=16, batch_size=4)


def trainer(folder, fault: Fault | None = None, router="linear", steps: int = 6) -> Trainer:
    torch.manual_seed(1)
    model = LanguageModel(
        data().vocab_size, ROUTERS[router], dim=16, layers=2, heads=2, num_experts=4, expert_hidden=8, length=16
    )
    routers = None if router == "linear" else "riemannian"
    geometry = mg.GeometryConfig(step=routers, regularizers=mg.Regularizers.none(), on_error="raise")
    return Trainer(
        model,
        data(),
        adamw(model, routers=routers),
        LoopConfig(steps=steps, warmup=0, checkpoint_every=0),
        geometry=geometry,
        logger=NullLogger(),
        directory=folder,
        device=CPU,
        fault=fault,
    )


def layers(run: Trainer) -> list[MoELayer]:
    return [module for module in run.model.modules() if isinstance(module, MoELayer)]


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in run.model.named_parameters()}


def inputs_of(run: Trainer, action) -> list[torch.Tensor]:
    """The inputs of the MoE layers, (T, D) each, in what ``action`` does."""
    seen: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().reshape(-1, 16).clone()))
        for layer in layers(run)
    ]
    action()
    for handle in handles:
        handle.remove()
    return seen


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    "fault",
    [
        Fault(),
        RowDrift(step=LATER),
        DomainShift(step=LATER),
        ZeroExpert(step=LATER),
        NanGradient(step=LATER, again=LATER),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_before_a_fault_a_run_is_the_same_to_the_last_bit(tmp_path, fault):
    plain, faulty = trainer(tmp_path / "a"), trainer(tmp_path / "b", fault)
    found, expected = faulty.run(Silent()), plain.run(Silent())
    assert changed(weights(plain), weights(faulty)) == set()
    assert found == expected


def test_no_fault_keeps_the_schedule():
    for step in range(20):
        options = {"steps": 20, "warmup": 5, "final": 0.1}
        assert Fault().learning_rate(step, **options) == learning_rate_scale(step, **options)


def test_restarts_are_whole_cosines_one_after_the_other():
    fault, options = Restarts(restarts=2, peak=3.0), {"steps": 100, "warmup": 10, "final": 0.2}
    for step in range(10):
        assert fault.learning_rate(step, **options) == learning_rate_scale(step, **options)
    for cycle, peak in enumerate((1.0, 3.0, 3.0)):
        for step in range(30):
            alone = learning_rate_scale(step, steps=30, warmup=0, final=0.2)
            assert fault.learning_rate(10 + 30 * cycle + step, **options) == pytest.approx(peak * alone)
    assert fault.learning_rate(99, **options) < 0.7  # and the very last step does not restart


@pytest.mark.parametrize("router", ["linear", "polar", "sphere"])
def test_bad_init_shrinks_half_the_rows_and_favours_one(tmp_path, router):
    plain, faulty = trainer(tmp_path, router=router), trainer(tmp_path, BadInit(small=0.1, favour=7.0), router)
    with torch.no_grad():
        inputs = inputs_of(plain, lambda: plain.model.eval()(data().train_batch(0).inputs))
    # Of the second layer, the mean input is that of the model as it was, too.
    for before, after, x_TD in zip(layers(plain), layers(faulty), inputs, strict=True):
        mean_D, old_ED, new_ED = x_TD.mean(0), before.router.weight.detach(), after.router.weight.detach()
        favoured_D = old_ED[0] + 7.0 * mean_D / mean_D.square().sum()
        if router == "sphere":
            assert torch.allclose(new_ED.norm(dim=1), torch.ones(4))
            assert torch.allclose(new_ED[0], favoured_D / favoured_D.norm(), atol=1e-6)
            continue
        assert torch.allclose(new_ED[0] @ mean_D - old_ED[0] @ mean_D, torch.tensor(7.0), atol=1e-4)
        assert torch.allclose(new_ED[0], favoured_D, atol=1e-6)
        assert torch.equal(new_ED[1], old_ED[1])
        assert torch.allclose(new_ED[2:], 0.1 * old_ED[2:])
    routers = {f"trunk.blocks.{i}.ffn.router.weight" for i in range(2)}
    assert changed(weights(plain), weights(faulty)) <= routers
    assert faulty.model.training


@pytest.mark.parametrize("router", ["linear", "polar", "sphere", "orthonormal"])
def test_row_drift_lowers_one_logit_at_the_mean_input(tmp_path, router):
    fault = RowDrift(step=1, speed=0.3, row=2)
    plain, faulty = trainer(tmp_path, router=router), trainer(tmp_path, fault, router)
    for run in (plain, faulty):
        run.train_step(data().train_batch(0))
    assert changed(weights(plain), weights(faulty)) == set()  # not yet
    plain.train_step(data().train_batch(1))
    inputs = inputs_of(faulty, lambda: faulty.train_step(data().train_batch(1)))
    for before, after, x_TD in zip(layers(plain), layers(faulty), inputs, strict=True):
        old_ED, new_ED, mean_D = before.router.weight.detach(), after.router.weight.detach(), x_TD.mean(0)
        if router == "orthonormal":
            assert torch.allclose(new_ED @ new_ED.T, torch.eye(4), atol=1e-5)
            continue
        assert torch.equal(new_ED[[0, 1, 3]], old_ED[[0, 1, 3]]) or router == "sphere"
        pushed_D = old_ED[2] - 0.3 * mean_D / mean_D.square().sum()
        if router == "sphere":
            pushed_D /= pushed_D.norm()
        else:
            assert torch.allclose((old_ED[2] - new_ED[2]) @ mean_D, torch.tensor(0.3), atol=1e-5)
        assert torch.allclose(new_ED[2], pushed_D, atol=1e-6)
    assert changed(weights(plain), weights(faulty)) == {f"trunk.blocks.{i}.ffn.router.weight" for i in range(2)}


def test_row_drift_starves_its_expert(tmp_path):
    faulty = trainer(tmp_path, RowDrift(step=2, speed=1.0, row=1), steps=40)
    faulty.run(Silent())
    output = faulty.model(data().train_batch(0).inputs)
    for record in output.routing.values():
        assert int((record.ids == 1).sum()) < 32 / 4  # 32 of the 128 choices are its fair share


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_domain_shift_permutes_token_ids(share):
    text, fault = data(), DomainShift(step=3, share=share)
    assert fault.batch(2, healthy := text.train_batch(2), text) is healthy
    before, after = text.train_batch(3), fault.batch(3, text.train_batch(3), text)
    table: dict[int, set[int]] = {}
    for old, new in ((before.inputs, after.inputs), (before.targets, after.targets)):
        for a, b in zip(old[before.mask].tolist(), new[before.mask].tolist(), strict=True):
            table.setdefault(a, set()).add(b)
    assert all(len(images) == 1 for images in table.values())  # inputs and targets by one map
    images = [min(found) for found in table.values()]
    assert len(set(images)) == len(images)  # one to one
    moved = sum(old != min(found) for old, found in table.items())
    assert moved == round(share * text.vocab_size)
    assert torch.equal(after.mask, before.mask)
    assert torch.equal(after.domains, before.domains)
    later = fault.batch(9, text.train_batch(3), text)
    assert torch.equal(later.inputs, after.inputs)  # the same permutation at every step


def test_domain_shift_leaves_padding_alone():
    text = data()
    full = text.train_batch(0)
    mask = torch.arange(16).expand(4, 16) < 9
    batch = Batch(**{n: getattr(full, n) * mask for n in ("inputs", "targets", "domains", "documents")}, mask=mask)
    shifted = DomainShift(step=0).batch(0, batch, text)
    assert int(shifted.inputs[~mask].abs().sum()) == int(shifted.targets[~mask].abs().sum()) == 0
    assert not torch.equal(shifted.inputs[mask], batch.inputs[mask])


def test_domain_shift_turns_and_inverts_images():
    images = PlantedImages(images=96, size=4, batch_size=8)
    before = images.train_batch(0)
    after = DomainShift(step=0).batch(0, before, images)
    for row in range(4):
        for column in range(4):
            assert torch.equal(after.inputs[..., row, column], -before.inputs[..., column, 3 - row])
    assert torch.equal(after.targets, before.targets)


@pytest.mark.parametrize("source", [data(), PlantedImages(images=96, size=4, batch_size=8)], ids=lambda d: d.task)
def test_domain_shift_validates_what_it_trains_on(source):
    fault = DomainShift(step=3)
    assert fault.validation(2, source) is source
    for _ in range(2):  # every time anew
        found = list(fault.validation(3, source).valid_batches())
        expected = [fault.batch(3, batch, source) for batch in source.valid_batches()]
        assert len(found) == len(expected) > 0
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.inputs, theirs.inputs)
            assert torch.equal(ours.targets, theirs.targets)
    assert not torch.equal(next(iter(source.valid_batches())).inputs, found[0].inputs)


def test_a_run_with_a_domain_shift_trains_and_ends_on_the_new_kind(tmp_path):
    plain, faulty = trainer(tmp_path / "a"), trainer(tmp_path / "b", DomainShift(step=3))
    for run in (plain, faulty):
        run.config = LoopConfig(steps=3, warmup=0, checkpoint_every=0)
    found, expected = faulty.run(Silent()), plain.run(Silent())
    assert changed(weights(plain), weights(faulty)) == set()
    assert found.loss != expected.loss
    assert found.layers != expected.layers


def test_zero_expert_stays_zero_and_nothing_else_is(tmp_path):
    plain, faulty = trainer(tmp_path), trainer(tmp_path, ZeroExpert(step=2, expert=1))
    for step in range(3):
        for run in (plain, faulty):
            run.train_step(data().train_batch(step))
        if step < 2:
            assert changed(weights(plain), weights(faulty)) == set()
    rest = [0, 2, 3]
    for before, after in zip(layers(plain), layers(faulty), strict=True):
        assert torch.equal(after.router.weight, before.router.weight)
        for old, new in zip(before.experts.parameters(), after.experts.parameters(), strict=True):
            assert int(new[1].count_nonzero()) == 0
            assert torch.equal(new[rest], old[rest])
            state, former = faulty.optimizer.state[new], plain.optimizer.state[old]
            for name in ("exp_avg", "exp_avg_sq"):
                assert int(state[name][1].count_nonzero()) == 0
                assert torch.equal(state[name][rest], former[name][rest])
            assert torch.equal(state["step"], former["step"])
    faulty.train_step(data().train_batch(3))
    assert all(int(p[1].count_nonzero()) == 0 for layer in layers(faulty) for p in layer.experts.parameters())


def test_zero_expert_happens_once(tmp_path):
    fault = ZeroExpert(step=0, expert=1)
    faulty = trainer(tmp_path, fault)
    fault.after_step(0, faulty.model, faulty.optimizer)
    layer = layers(faulty)[0]
    with torch.no_grad():
        layer.experts.w_up[1] = 1.0
    fault.after_step(0, faulty.model, faulty.optimizer)
    assert bool((layer.experts.w_up[1] == 1).all())


def test_nan_gradient_hits_a_router_then_an_expert_each_once(tmp_path):
    plain, faulty = trainer(tmp_path), trainer(tmp_path, NanGradient(step=1, again=2))
    for step, place in ((1, r"gradient of trunk\.blocks\.0\.ffn\.router\.weight at step 1"), (2, r"1\.ffn\.experts\.")):
        for run in (plain, faulty):
            run.train_step(data().train_batch(step - 1))
        with pytest.raises(NonFiniteError, match=place):
            faulty.train_step(data().train_batch(step))
        assert changed(weights(plain), weights(faulty)) == set()
    faulty.train_step(data().train_batch(2))
    assert all(bool(p.isfinite().all()) for p in faulty.model.parameters())


@pytest.mark.parametrize("router", ["linear", "polar"])
def test_bf16_logits_are_large_and_coarse(tmp_path, router):
    plain, faulty = trainer(tmp_path, router=router), trainer(tmp_path, Bf16Logits(scale=30.0), router)
    batch = data().train_batch(0)
    logits = {name: record.logits for name, record in faulty.model(batch.inputs).routing.items()}
    for layer in range(2):
        assert logits[f"layer{layer}"].dtype == torch.float32
        assert torch.equal(logits[f"layer{layer}"], logits[f"layer{layer}"].bfloat16().float())
    exact = 30 * plain.model(batch.inputs).routing["layer0"].logits
    assert torch.allclose(logits["layer0"], exact, rtol=2**-8, atol=1e-6)
    assert not torch.allclose(logits["layer0"], exact, rtol=2**-12, atol=1e-6)
    assert changed(weights(plain), weights(faulty)) == {f"trunk.blocks.{i}.ffn.router.weight" for i in range(2)}
    faulty.run(Silent())  # gradients pass the rounding


@pytest.mark.parametrize("name", NAMES)
def test_the_choices_have_the_keys_and_the_defaults_of_their_classes(name):
    node = OmegaConf.load(CONFIGS / "fault" / f"{name}.yaml")
    parameters = inspect.signature(get_object(node._target_)).parameters
    assert {key: parameter.default for key, parameter in parameters.items()} == {
        key: value for key, value in node.items() if key != "_target_"
    }
    built = build.build_fault(configuration(f"fault={name}"))
    assert type(built) is get_object(node._target_)


def test_without_a_fault_none_is_built():
    config = configuration()
    assert build.build_fault(config) is None
    del config.fault  # as in the configuration of a run from before
    assert build.build_fault(config) is None


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Restarts, {"restarts": 0}, "restarts must be at least 1, got 0"),
        (Restarts, {"peak": 0.0}, "peak must be above 0"),
        (BadInit, {"small": -1.0}, "small must be above 0"),
        (RowDrift, {"row": -1}, "row must be at least 0, got -1"),
        (DomainShift, {"share": 1.5}, "share must be above 0 and at most 1, got 1.5"),
        (DomainShift, {"step": -1}, "step must be at least 0"),
        (ZeroExpert, {"expert": -1}, "expert must be at least 0"),
        (NanGradient, {"again": -1}, "again must be at least 0"),
        (Bf16Logits, {"scale": 0.0}, "scale must be above 0"),
    ],
)
def test_numbers_out_of_range_are_named(kind, options, message):
    with pytest.raises(ValueError, match=rf"fault\.{message}"):
        kind(**options)


@pytest.mark.parametrize("fault", [RowDrift(row=4), ZeroExpert(expert=4)], ids=["row", "expert"])
def test_an_expert_that_is_not_there_is_named_at_once(tmp_path, fault):
    with pytest.raises(ValueError, match=r"fault\.(row|expert) must be below num_experts = 4, got 4"):
        trainer(tmp_path, fault)


@pytest.mark.parametrize(
    "overrides",
    [
        ("fault=restarts",),
        ("fault=bad_init",),
        ("fault=row_drift", "fault.step=2"),
        ("fault=domain_shift", "fault.step=6"),
        ("fault=zero_expert", "fault.step=5"),
        ("fault=bf16_logits",),
    ],
    ids=lambda overrides: overrides[0],
)
def test_a_killed_run_with_a_fault_goes_on_as_the_unbroken_one(tmp_path, overrides):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ("router=linear", "optimizer=adamw", *overrides)
    train(tiny(whole, *more))
    with after_step(7, kill), pytest.raises(Killed):
        train(tiny(broken, *more))
    train(tiny(broken, *more))
    assert train_rows(broken) == train_rows(whole)
    ours, theirs = (checkpoint.latest(folder / "checkpoints")[0].model for folder in (broken, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(ValueError, match="other settings"):
        train(tiny(broken, "router=linear", "optimizer=adamw", "fault=nan_gradient"))


def test_a_run_from_before_there_were_faults_goes_on(tmp_path):
    config = tiny(tmp_path)
    old = config.copy()
    del old.fault
    with after_step(7, kill), pytest.raises(Killed):
        train(old)
    train(config)
    assert len(train_rows(tmp_path)) == 12
