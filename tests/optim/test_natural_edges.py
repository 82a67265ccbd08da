"""Natural steps where something is missing, broken, frozen, moved or changed while the run goes on."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.observe.statistics import LayerStatistics
from tests.support.moe import D, E, LinearGateBlock, batch, build, token_loss
from tests.support.ranks import on_two_ranks
from tests.support.routing import Router, inputs
from tests.support.stepping import backward, converted, routers, take_over, train

LIMIT = 0.05


def natural(model: nn.Module, optimizer: object, **options: object) -> mg.Geometry:
    return take_over(model, optimizer, **{"step": "natural", "natural": mg.NaturalConfig(limit=LIMIT)} | options)


def one_step(model: Router, optimizer: mg.NaturalGradient, seed: int = 0) -> float:
    optimizer.zero_grad()
    model.loss(inputs("random", seed=seed)).backward()
    optimizer.step()
    return float(optimizer.movement.moved)


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
            assert optimizer.movement.moved.isnan().all()
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


class TwoSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a_router, self.b_router = nn.Linear(D, 4, bias=False), nn.Linear(D, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a_router(x).softmax(-1)[..., 0] + self.b_router(x).softmax(-1)[..., 1]


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


# --- schedules and options ---


def limits_of(schedule) -> list[float]:
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scheduler = schedule(optimizer)
    geometry = natural(model, optimizer)
    found = []
    for seed in range(5):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
        found.append(geometry.metrics()["geometry/speed_limit"] / LIMIT)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
    return found


def test_every_kind_of_schedule_is_followed():
    lr_scheduler = torch.optim.lr_scheduler
    plateau = limits_of(lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0))
    assert plateau == pytest.approx([1, 1, 0.5, 0.25, 0.125])
    cycle = limits_of(lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=5, div_factor=10))
    assert max(cycle) <= 1
    assert cycle[0] == pytest.approx(0.1)
    warm = limits_of(lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1, (step + 1) / 4)))
    assert warm == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    cyclic = limits_of(
        lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.03, step_size_up=2, cycle_momentum=False)
    )
    assert cyclic == pytest.approx([1, 1, 1, 0.02 / 0.03, 0.01 / 0.03])  # the peak is not known before it is reached


def test_weight_decay_of_the_users_group_is_not_the_routers():
    def run(decay: float) -> Tensor:
        model = converted()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=decay)
        natural(model, optimizer)
        backward(model)
        optimizer.step()
        return routers(model)[0]

    assert torch.equal(run(0.5), run(0.0))


def test_decay_is_checked_in_its_own_group():
    model = TwoSizes().double()
    mg.geometrize(model, "sphere", select="a_router", allow_change=True)
    groups = [{"select": "a_router"}, {"select": "b_router", "weight_decay": 0.1}]
    mg.NaturalGradient(model, groups=groups)


def test_options_of_a_group_change_while_it_runs():
    changed, plain = Router(manifold="polar"), Router(manifold="polar")
    first = mg.NaturalGradient(changed, limit=LIMIT, momentum=0.9)
    second = mg.NaturalGradient(plain, limit=LIMIT, momentum=0.0)
    one_step(changed, first), one_step(plain, second)
    torch.testing.assert_close(changed.router.weight, plain.router.weight)  # the first average is the gradient
    first.param_groups[0]["momentum"] = 0.0
    one_step(changed, first, 1), one_step(plain, second, 1)
    torch.testing.assert_close(changed.router.weight, plain.router.weight, rtol=1e-9, atol=1e-12)
    first.param_groups[0]["damping"] = -1.0
    with pytest.raises(ValueError, match="damping must be at least 0"):
        one_step(changed, first, 2)


def test_resuming_takes_the_configured_limit_unless_one_was_set():
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    geometry = natural(model, optimizer)
    train(model, optimizer)
    saved = geometry.state_dict()
    geometry.detach()
    geometry = natural(model, optimizer, natural=mg.NaturalConfig(limit=0.005))
    geometry.load_state_dict(saved)
    train(model, optimizer)
    assert geometry.metrics()["geometry/speed_limit"] == pytest.approx(0.005)


def test_a_diagonal_factor_is_diagonal_with_a_bias_too():
    model = Router(bias=True)
    optimizer = mg.NaturalGradient(model, block=1)
    one_step(model, optimizer)
    (state,) = optimizer.state_dict()["state"].values()
    assert state["A"].shape == (17, 1, 1)
    full = mg.NaturalGradient(Router(bias=True), block=16)
    assert full.state_dict()["state"][""]["A"].shape == (1, 17, 17)


# --- the mean over experts ---


@pytest.mark.parametrize("scale", [1.0, 1e6])
@pytest.mark.parametrize("second_moment", [0.0, 0.9])
@pytest.mark.parametrize("experts", [1, 6])
def test_a_z_loss_cannot_run_away(scale, second_moment, experts):
    model = Router(experts=experts)
    with torch.no_grad():
        model.router.weight.copy_(model.router.weight[:1].expand_as(model.router.weight))  # only a common shift is left
    optimizer = mg.NaturalGradient(model, limit=0.1, lr=1.0, second_moment=second_moment)
    x = inputs("random")
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(x).logsumexp(-1).square().mean()
        (scale * loss).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert max(losses) <= losses[0] + 0.1
    assert losses[-1] < losses[0] or losses[0] < 1e-3
    assert float(model.router.weight.detach().norm()) < 10


# --- beside others, copies, hooks ---


@pytest.mark.parametrize("first", ["optimizer", "attach"])
def test_an_observing_attach_goes_with_the_optimizer_in_any_order(first):
    model = build(LinearGateBlock)
    if first == "optimizer":
        optimizer = mg.NaturalGradient(model)
        geometry = mg.attach(model, config=mg.GeometryConfig(top_k=2, fisher=None, on_error="raise"))
    else:
        geometry = mg.attach(model, config=mg.GeometryConfig(top_k=2, fisher=None, on_error="raise"))
        optimizer = mg.NaturalGradient(model)
    token_loss(model(batch())).backward()
    optimizer.step()
    assert geometry.metrics()["geometry/fsi"] > 0
    with pytest.raises(ValueError, match="is watched already"):
        mg.attach(model)


def test_a_copied_model_does_not_feed_the_optimizer():
    model = Router()
    optimizer = mg.NaturalGradient(model)
    copy.deepcopy(model)(inputs("random"))
    model.router.weight.grad = torch.ones_like(model.router.weight)
    with pytest.raises(RuntimeError, match="were seen"):
        optimizer.step()
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(optimizer)


def test_pauses_and_masks_of_ones_own():
    model = Router()
    optimizer = mg.NaturalGradient(model)
    x = inputs("random")
    with optimizer.pause():
        model(x)
    with optimizer.tokens(torch.arange(len(x)) < 100):
        model.loss(x).backward()
    optimizer.step()
    (state,) = optimizer.state_dict()["state"].values()
    assert float(state["tokens"]) == 100


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def test_scaled_logits_are_found_once_there_are_any():
    model = build(LinearGateBlock)
    model.blocks[0].gate = Scaled(D, E, bias=False).double()
    nn.init.zeros_(model.blocks[0].gate.weight)
    mg.NaturalGradient(model)
    model(batch())
    nn.init.ones_(model.blocks[0].gate.weight)
    with pytest.raises(ValueError, match=r"router blocks\.0\.gate are not x Wᵀ"):
        model(batch())


# --- what mutants would change ---


def test_momentum_of_polar_rows_turns_with_them():
    """The momentum of a row that is turned by an angle is turned by the same, and scaled with the row's norm."""
    model = Router(manifold="polar")
    optimizer = mg.NaturalGradient(model, limit=0.5, lr=100.0, momentum=0.9)
    one_step(model, optimizer)
    (stack,) = optimizer._stacks
    before = stack.rule._tensors["momentum"][0].clone()
    old = model.router.weight.detach().clone()
    optimizer.zero_grad()
    (0 * model(inputs("random"))).sum().backward()  # only the momentum moves, and fades to nine tenths
    optimizer.step()
    carried = model.router.weight.manifold.transp(old, model.router.weight.detach(), 0.9 * before)
    found = stack.rule._tensors["momentum"][0]
    torch.testing.assert_close(found, carried, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found, 0.9 * before, rtol=1e-3)


def test_a_window_fades_by_its_steps():
    model = Router()
    optimizer = mg.NaturalGradient(model, refresh_every=3, decay=0.5, lr=0.0)
    for seed in range(4):
        one_step(model, optimizer, seed)
    (state,) = optimizer.state_dict()["state"].values()
    # Refreshes at steps 0, 1, 2 and 3: 400 tokens, each step's halved by every later one.
    assert float(state["tokens"] + state["window_tokens"]) == pytest.approx(400 * (1 + 0.5 + 0.25 + 0.125))
    for seed in range(4, 6):
        one_step(model, optimizer, seed)
    one_step(model, optimizer, 6)
    (state,) = optimizer.state_dict()["state"].values()
    assert float(state["tokens"]) == pytest.approx(400 * sum(0.5**age for age in range(7)))


def test_which_tokens_are_kept_is_resumed_too():
    def run(resumed: bool) -> Tensor:
        model = Router()
        optimizer = mg.NaturalGradient(model, rows=64)
        for seed in range(6):
            if resumed and seed == 3:
                state = optimizer.state_dict()
                optimizer.remove()
                optimizer = mg.NaturalGradient(model, rows=64)
                optimizer.load_state_dict(state)
            one_step(model, optimizer, seed)
        return model.router.weight.detach()

    assert torch.equal(run(True), run(False))


def test_no_step_warns():
    model = Router(manifold="polar", bias=True)
    optimizer = mg.NaturalGradient(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            assert not math.isnan(one_step(model, optimizer, seed))
