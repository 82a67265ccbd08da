"""Runs with priors: the configuration reaches the model, the loop moves them, checkpoints carry them."""

from __future__ import annotations

import pytest
import torch

from moegeo_router import ExpertPrior, SignBias
from moegeo_router.metrics import expert_counts
from tests.support.runs import Killed, after_step, configuration, kill, rows, tiny, train_rows
from trainers import build, checkpoint
from trainers.evaluate import evaluate_run
from trainers.loop import Trainer
from trainers.observation import token_values
from trainers.priors import expert_priors
from trainers.train import train


def saved(folder):
    state, _ = checkpoint.latest(folder / "checkpoints")
    return {name: value for name, value in state.model.items() if "prior" in name}


@pytest.mark.parametrize(
    ("choice", "kind", "where"),
    [("balance", ExpertPrior, "selection"), ("natural", ExpertPrior, "logits"), ("sign", SignBias, "selection")],
)
def test_the_choice_reaches_the_model(tmp_path, choice, kind, where):
    config = tiny(tmp_path, f"prior={choice}", "prior.speed=0.07")
    model = build.build_model(config, build.build(config, "data"))
    priors = expert_priors(model)
    assert [(type(prior), prior.where, prior.speed) for prior in priors] == [(kind, where, 0.07)] * 2
    without = tiny(tmp_path)
    assert expert_priors(build.build_model(without, build.build(without, "data"))) == []
    del without.prior  # as in the configuration of a run from before
    assert expert_priors(build.build_model(without, build.build(without, "data"))) == []


def test_a_number_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"prior\.speed must be float, got 'fast'"):
        build.build_model(config := tiny(tmp_path, "prior=sign", "prior.speed=fast"), build.build(config, "data"))


@pytest.mark.parametrize("task", ["language", "vision"])
@pytest.mark.parametrize("choice", ["balance", "sign"])
def test_the_loop_moves_them_by_the_load_of_every_step(tmp_path, monkeypatch, choice, task):
    expected = []
    step = Trainer.train_step

    def watched(trainer, batch):
        outputs = []
        handle = trainer.model.register_forward_hook(lambda module, args, output: outputs.append(output))
        result = step(trainer, batch)
        handle.remove()
        alone = expected or [type(prior)(4) for prior in expert_priors(trainer.model)]
        expected[:] = alone
        for prior, record in zip(alone, outputs[0].routing.values(), strict=True):
            mask = token_values(batch.mask, len(record.ids))
            prior.update(expert_counts(record.ids[mask], 4))
        return result

    monkeypatch.setattr(Trainer, "train_step", watched)
    train(tiny(tmp_path, f"prior={choice}", task=task))
    values = list(saved(tmp_path).values())
    assert len(values) == 2
    for value, prior in zip(values, expected, strict=True):
        assert torch.equal(value, next(prior.buffers()))
        assert len(value.unique()) > 1


@pytest.mark.parametrize("choice", ["balance", "natural", "sign"])
@pytest.mark.parametrize("optimizer", ["riemannian", "natural"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, choice, optimizer):
    overrides = (f"prior={choice}", "prior.speed=0.5", f"optimizer={optimizer}")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(tiny(whole, *overrides))
    with after_step(6, kill), pytest.raises(Killed):
        train(tiny(broken, *overrides))
    train(tiny(broken, *overrides))
    assert train_rows(broken) == train_rows(whole)
    a, b = saved(whole), saved(broken)
    assert len(a) == 2
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(len(value.unique()) > 1 for value in a.values())


def test_a_prior_that_is_far_from_uniform_goes_with_natural_steps(tmp_path):
    """The check that the logits are linear must know the prior in them, after a resume from the first step on."""
    overrides = ("prior=balance", "prior.where=logits", "prior.speed=1.0", "optimizer=natural", "model.top_k=1")
    overrides += ("model.renormalize=false",)
    with after_step(9, kill), pytest.raises(Killed):
        train(tiny(tmp_path, *overrides))
    state = checkpoint.latest(tmp_path / "checkpoints")[0].model
    assert max(float(v.max() / v.min()) for name, v in state.items() if "prior" in name) > 1.5
    train(tiny(tmp_path, *overrides))
    assert [row["step"] for row in train_rows(tmp_path)] == list(range(1, 13))


def test_a_run_with_a_prior_is_evaluated(tmp_path, capsys):
    train(tiny(tmp_path, "prior=balance"))
    capsys.readouterr()
    evaluate_run(configuration(f"run={tmp_path}", "data=planted", "data.alphabet=8", "device=cpu", name="evaluate"))
    assert "after step 12" in capsys.readouterr().out


def test_none_changes_nothing(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    train(tiny(first))
    train(tiny(second, "prior=none"))
    assert rows(first) == rows(second)
