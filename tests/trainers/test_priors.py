"""Priors in the trainers' models: where they live, what they see of a step, what a watching ``attach`` sees of them."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import moegeo_router as mg
from moegeo_router.metrics import expert_counts, max_violation
from trainers.data.planted import PlantedText
from trainers.evaluation import target_losses
from trainers.models import LanguageModel, VisionModel
from trainers.models.moe import MoELayer
from trainers.priors import expert_priors, update_priors

SIZES = {"dim": 16, "layers": 3, "heads": 2, "num_experts": 4, "expert_hidden": 8}
ROUTER = functools.partial(mg.GeometricRouter, bias=False)
LOGITS = functools.partial(mg.ExpertPrior, where="logits")
NATURAL = functools.partial(mg.ExpertPrior, where="logits", rule="natural", speed=1.0)


def language(prior=None, router=ROUTER, **options) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(11, router, prior, **SIZES | options, length=12)


def tokens() -> torch.Tensor:
    return torch.randint(0, 11, (4, 12), generator=torch.Generator().manual_seed(1))


def shifted(model: nn.Module) -> nn.Module:
    """Priors that are not uniform."""
    for prior in expert_priors(model):
        value = next(prior.buffers()).data
        value.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    return model


@pytest.mark.parametrize("prior", [mg.ExpertPrior, LOGITS, NATURAL, mg.SignBias])
def test_a_fresh_prior_is_no_prior(prior):
    plain, model = language(), language(prior)
    output, expected = model(tokens()), plain(tokens())
    assert torch.equal(output.logits, expected.logits)
    keys = set(model.state_dict()) - set(plain.state_dict())
    place = "router.prior.pi" if prior in (LOGITS, NATURAL) else "prior.bias" if prior is mg.SignBias else "prior.pi"
    assert keys == {f"trunk.blocks.{layer}.ffn.{place}" for layer in range(3)}
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    assert expert_priors(plain) == []


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("prior", [mg.ExpertPrior, mg.SignBias, LOGITS])
def test_the_layer_routes_with_its_prior(prior, scores):
    layer = shifted(MoELayer(16, 8, 4, 2, ROUTER, scores=scores, renormalize=False, prior=prior))
    x = torch.randn(50, 16)
    logits = x @ layer.router.weight.T
    native = logits.softmax(-1) if scores == "softmax" else logits.sigmoid()
    pi = torch.tensor([0.1, 0.2, 0.3, 0.4])
    if prior is LOGITS:
        logits = logits + (4 * pi).log()
        native = logits.softmax(-1) if scores == "softmax" else logits.sigmoid()
        ranking = native
    else:
        ranking = native + pi if prior is mg.SignBias else native * pi
    _, routing = layer(x)
    ids = ranking.topk(2).indices
    assert torch.equal(routing.ids.sort(-1).values, ids.sort(-1).values)
    torch.testing.assert_close(routing.logits, logits)
    torch.testing.assert_close(routing.weights, native.gather(-1, routing.ids))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prior", [mg.ExpertPrior, LOGITS, mg.SignBias])
def test_every_layer_counts_its_unmasked_tokens(prior, masked):
    model = language(prior, moe_every=1)
    routing = model(tokens()).routing
    mask = (torch.arange(48).view(4, 12) % 3 > 0) if masked else None
    update_priors(model, routing, mask)
    for ours, record in zip(expert_priors(model), routing.values(), strict=True):
        alone = prior(4)
        ids = record.ids if mask is None else record.ids[mask.flatten()]
        alone.update(expert_counts(ids, 4))
        assert torch.equal(next(ours.buffers()), next(alone.buffers()))
        assert not torch.equal(next(ours.buffers()), next(prior(4).buffers()))


def test_images_that_do_not_count():
    model = VisionModel(3, (1, 4, 4), ROUTER, mg.ExpertPrior, **SIZES, patch=2)
    routing = model(torch.randn(6, 1, 4, 4)).routing
    mask = torch.arange(6) < 4
    update_priors(model, routing, mask)
    alone = mg.ExpertPrior(4)
    alone.update(expert_counts(routing["layer0"].ids[: 4 * 4], 4))
    assert torch.equal(expert_priors(model)[0].pi, alone.pi)


def test_natural_priors_follow_the_loss_with_the_schedule():
    model = language(NATURAL)
    output = model(tokens())
    output.logits.square().mean().backward()
    priors = expert_priors(model)
    gradients = [prior.pi.grad.clone() for prior in priors]
    update_priors(model, output.routing, lr_scale=0.5)
    for prior, gradient in zip(priors, gradients, strict=True):
        alone = NATURAL(4)
        alone.pi.grad = gradient
        alone.step(0.5)
        assert torch.equal(prior.pi, alone.pi)
        assert gradient.abs().max() > 0


def test_a_model_without_priors_is_left_alone():
    model = language()
    update_priors(model, model(tokens()).routing)


def test_a_linear_router_has_no_place_for_a_prior_in_the_logits():
    linear = functools.partial(nn.Linear, bias=False)
    with pytest.raises(ValueError, match="where='logits' lives in a GeometricRouter, the router is Linear"):
        language(LOGITS, linear)
    assert expert_priors(language(mg.ExpertPrior, linear))


@pytest.mark.parametrize("prior", [mg.ExpertPrior, mg.SignBias, LOGITS])
def test_attach_sees_what_the_prior_did(prior):
    """The load of the ids, and p of the logits: with the prior only where that is inside of them."""
    model = shifted(language(prior))
    geometry = mg.attach(model, config=mg.GeometryConfig(per_layer=True, on_error="raise"))
    output = model(tokens())
    output.logits.square().mean().backward()
    metrics = geometry.metrics()
    for layer, record in output.routing.items():
        counts = expert_counts(record.ids, 4).double()
        assert metrics[f"geometry/{layer}/max_violation"] == pytest.approx(float(max_violation(counts)), rel=1e-5)
        assert metrics[f"geometry/{layer}/fsi"] == pytest.approx(
            mg.fsi(record.probs.detach(), normalized=True).item(), rel=1e-4
        )


@pytest.mark.parametrize("prior", [mg.ExpertPrior, LOGITS])
def test_training_with_a_prior_is_balanced(prior):
    """A router that sends everything to one expert: balanced in tens of steps, which the loss alone does not do."""
    data = PlantedText(alphabet=11, documents=40, document_length=33, length=32, batch_size=8)
    found = {}
    for name, factory in (("none", None), ("prior", prior)):
        torch.manual_seed(0)
        model = LanguageModel(data.vocab_size, mg.GeometricRouter, factory, **SIZES, length=32)
        late = torch.zeros(3, 4)  # the load of the last 20 steps, by layer
        for block in model.trunk.blocks:
            with torch.no_grad():
                block.ffn.router.bias[1] += 2
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(120):
            batch = data.train_batch(step)
            output = model(batch.inputs)
            target_losses(output, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            update_priors(model, output.routing)
            if step >= 100:
                late += torch.stack([expert_counts(record.ids, 4) for record in output.routing.values()])
        found[name] = max_violation(late).max().item()
    assert found["prior"] < 0.2
    assert found["none"] > 0.8
