"""Natural steps where something is missing, broken, frozen or moved while the run goes on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import moegeo_router as mg
from moegeo_router.observe.statistics import LayerStatistics
from tests.support.moe import D, E, LinearGateBlock, batch, build, token_loss
from tests.support.ranks import on_two_ranks
from tests.support.routing import Router, TwoSizes, inputs, one_step
from tests.support.stepping import LIMIT, backward, converted, natural, routers, take_over, train

# --- steps without tokens ---


@pytest.mark.parametrize("second_moment", [0.0, 0.9])
@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize("kind", ["masked", "empty"])
def test_a_step_without_tokens_leaves_no_trace(second_moment, when, kind):
    model = Router(manifold="polar").float()
    optimizer = mg.NaturalGradient(model, limit=LIMIT, lr=1e4, second_moment=second_moment)
    for step in range(8):
        optimizer.zero_grad()
        x = inputs("random", seed=step).float()
        if step == when:
            before = model.router.weight.detach().clone()
            with optimizer.tokens(torch.zeros(len(x))):
                (model(x) if kind == "masked" else model(x[:0])).square().sum().backward()
            optimizer.step()
            assert torch.equal(model.router.weight, before)
            assert all(values.isnan().all() for values in optimizer.movement)
            continue
        model.loss(x).backward()
        optimizer.step()
        assert float(optimizer.movement.moved) == pytest.approx(LIMIT, rel=0.03)
    (state,) = optimizer.state_dict()["state"].values()
    assert float(state["momentum"].abs().max()) < 1e3


def test_one_huge_activation_is_not_the_end():
    model = Router().float()
    optimizer = mg.NaturalGradient(model, limit=LIMIT, lr=1e4)
    x = inputs("random").float()
    x[5] = 1e19
    model(x)
    optimizer.zero_grad()
    model.loss(inputs("random").float()).backward()
    optimizer.step()
    assert float(optimizer.movement.moved) == pytest.approx(LIMIT, rel=0.03)


def riemannian(model: nn.Module, optimizer: object) -> mg.Geometry:
    return take_over(model, optimizer, fisher=None, router_lr=1e2)


def test_one_router_without_inputs_and_its_stack_has_riemannian_adam():
    model, plain = converted(), converted()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, plain)]
    geometry = natural(model, optimizers[0], hooks=False, fisher=None, router_lr=1e2)
    riemannian(plain, optimizers[1])
    x = batch()
    geometry.record("blocks.0.gate", model.blocks[0].gate(x), x=x)
    for m in (model, plain):
        token_loss(m(x)).backward()
    with pytest.warns(UserWarning, match=r"no tokens of blocks\.1\.gate were seen"):
        optimizers[0].step()
    optimizers[1].step()
    for ours, theirs in zip(routers(model), routers(plain), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"'layer7' is none of them: blocks\.0\.gate, blocks\.1\.gate"):
        geometry.record("layer7", model.blocks[0].gate(x), x=x)


def test_an_input_of_another_width_is_said():
    model = converted()
    geometry = natural(model, torch.optim.SGD(model.parameters(), lr=0.01), hooks=False, fisher=None)
    with pytest.raises(ValueError, match=r"x of router blocks\.0\.gate must be \(\.\.\., 8\), got \(3, 5\)"):
        geometry.record("blocks.0.gate", torch.zeros(3, E, dtype=torch.float64), x=torch.zeros(3, 5))


def ranks_without_inputs(rank: int, folder: str) -> None:
    model, plain = converted(), converted()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, plain)]
    geometry = natural(model, optimizers[0], hooks=False, fisher=None, router_lr=1e2)
    riemannian(plain, optimizers[1])
    x = batch()
    for index, block in enumerate(model.blocks):
        geometry.record(f"blocks.{index}.gate", block.gate(x))
    for m in (model, plain):
        token_loss(m(x)).backward()
    with pytest.warns(UserWarning, match="Riemannian Adam steps"):
        optimizers[0].step()
    optimizers[1].step()
    for ours, theirs in zip(routers(model), routers(plain), strict=True):
        assert torch.equal(ours, theirs)


def test_ranks_without_inputs_agree_on_riemannian_adam(tmp_path):
    on_two_ranks(ranks_without_inputs, tmp_path, str(tmp_path))


def test_when_the_watching_fails_riemannian_adam_steps_on(monkeypatch):
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    natural(model, optimizer, on_error="warn", router_lr=1e2)
    train(model, optimizer, range(2))

    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(LayerStatistics, "of", broken)
    with pytest.warns(UserWarning, match="switched off, Riemannian Adam steps the routers, training goes on: broken"):
        train(model, optimizer, range(2, 3))
    monkeypatch.undo()
    plain = converted()
    plain.load_state_dict(model.state_dict())
    other = torch.optim.SGD(plain.parameters(), lr=0.01)
    riemannian(plain, other)
    for m, o in ((model, optimizer), (plain, other)):
        train(m, o, range(3, 6))
    for ours, theirs in zip(routers(model), routers(plain), strict=True):
        assert torch.equal(ours, theirs)


# --- frozen, tied, moved ---


class Biased(LinearGateBlock):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=True)


def biased() -> nn.Module:
    model = build(Biased)
    mg.geometrize(model)
    return model


def test_a_bias_that_is_frozen_later_stays():
    model = biased()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    natural(model, optimizer, router_lr=1e4)
    train(model, optimizer, range(3))
    model.blocks[0].gate.bias.requires_grad_(False)
    before = model.blocks[0].gate.bias.detach().clone()
    other = model.blocks[1].gate.bias.detach().clone()
    train(model, optimizer, range(3, 6))
    assert torch.equal(model.blocks[0].gate.bias, before)
    assert not torch.equal(model.blocks[1].gate.bias, other)


def test_the_bias_of_a_frozen_weight_is_the_optimizers():
    model = biased()
    for block in model.blocks:
        block.gate.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    natural(model, optimizer)
    bias = model.blocks[0].gate.bias
    before = bias.detach().clone()
    backward(model)
    gradient = bias.grad.clone()
    optimizer.step()
    torch.testing.assert_close(bias.detach(), before - 0.01 * gradient)


def test_a_bias_in_another_optimizer_is_stepped_once():
    model = biased()
    biases = [block.gate.bias for block in model.blocks]
    rest = [p for p in model.parameters() if all(p is not b for b in biases)]
    optimizers = [torch.optim.SGD(rest, lr=0.01), torch.optim.SGD(biases, lr=10.0)]
    natural(model, optimizers)
    before = biases[0].detach().clone()
    backward(model)
    gradient = biases[0].grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(biases[0].detach(), before - 10 * gradient)


def test_biases_of_tied_weights_are_left_to_the_optimizer():
    model = build(Biased)
    model.blocks[1].gate.weight = model.blocks[0].gate.weight
    optimizer = mg.NaturalGradient(model)
    assert [id(p) for p in optimizer.parameters] == [id(model.blocks[0].gate.weight)]


def test_idle_routers_keep_their_state_and_report_nothing():
    model = build(LinearGateBlock)
    optimizer = mg.NaturalGradient(model, limit=LIMIT, lr=1e4)
    for seed in range(3):
        optimizer.zero_grad()
        token_loss(model(batch(seed=seed))).backward()
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict()["state"]["blocks.0.gate"])
    optimizer.zero_grad()
    token_loss(model(batch(seed=9))).backward()
    model.blocks[0].gate.weight.grad = None
    optimizer.step()
    after = optimizer.state_dict()["state"]["blocks.0.gate"]
    for name in ("momentum", "count", "length"):
        assert torch.equal(after[name], state[name]), name
    assert optimizer.names == ["blocks.0.gate", "blocks.1.gate"]
    assert optimizer.movement.moved[0].isnan()
    assert float(optimizer.movement.moved[1]) == pytest.approx(LIMIT, rel=0.03)


def test_movement_is_of_the_router_that_it_names():
    model = TwoSizes().double()
    mg.geometrize(model, select="*_router")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    geometry = natural(model, optimizer, select="*_router", per_layer=True, fisher=None, router_lr=1e4)
    model.a_router.weight.requires_grad_(False)
    for _ in range(3):
        model(batch(rows=64)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = geometry.metrics()
    names = [name for name in found if name.endswith("/movement")]
    assert names[1:] == ["geometry/b_router/movement"] or names == ["geometry/movement", "geometry/b_router/movement"]
    assert found["geometry/b_router/movement"] == pytest.approx(LIMIT, rel=0.03)


def test_nothing_grows_while_all_routers_are_frozen():
    model = Router()
    model.router.weight.requires_grad_(False)
    optimizer = mg.NaturalGradient(model)
    for seed in range(50):
        model(inputs("random", tokens=40, seed=seed))
        optimizer.step()
    (((rule, _),),) = [rules._rules for rules in optimizer._rules]
    assert rule.samples[0]._parts == []
    model.router.weight.requires_grad_(True)
    assert one_step(model, optimizer) > 0


def test_the_optimizer_follows_its_model_to_another_dtype():
    model = Router().float()
    optimizer = mg.NaturalGradient(model, limit=LIMIT, lr=1e4)
    model.loss(inputs("random").float()).backward()
    optimizer.step()
    model.double()
    assert one_step(model, optimizer) == pytest.approx(LIMIT, rel=0.03)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_weight_and_bias_may_have_two_dtypes(dtypes):
    model = Router(bias=True)
    with torch.no_grad():
        model.router.weight.data, model.router.bias.data = (
            p.to(dtype) for p, dtype in zip((model.router.weight, model.router.bias), dtypes, strict=True)
        )
    optimizer = mg.NaturalGradient(model)
    x = inputs("random").to(dtypes[0])
    for parameter in model.router.parameters():
        parameter.grad = torch.randn_like(parameter)
    from moegeo_router.observe.forward import LayerForward

    logits = x @ model.router.weight.detach().T + model.router.bias.detach().to(dtypes[0])
    optimizer.observe(LayerForward(layer=optimizer.names[0], logits=logits, x=x))
    before = model.router.bias.detach().clone()
    optimizer.step()
    assert not torch.equal(model.router.bias, before)
