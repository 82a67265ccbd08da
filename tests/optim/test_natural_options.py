"""Natural steps under schedules, changing options and losses, beside other watchers, and what mutants would change."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from tests.support.moe import D, E, LinearGateBlock, batch, build, token_loss
from tests.support.routing import Router, TwoSizes, inputs, one_step
from tests.support.stepping import LIMIT, backward, converted, natural, routers, train

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


def limits_by_hand(factors: list[float], at_attach: float = 1.0, resumed: bool = False) -> list[float]:
    """The speed limit under a schedule that the loop writes into the groups, of peaks of their own."""
    model, peaks = converted(), (0.01, 0.3)
    groups = [{"params": [w], "lr": at_attach * peak} for w, peak in zip(routers(model), peaks, strict=True)]
    optimizer = torch.optim.SGD(groups)
    geometry, found = natural(model, optimizer, per_layer=True), []
    for seed, factor in enumerate(factors):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = factor * peak
        if resumed and seed == 2:
            state = geometry.state_dict()
            geometry.detach()
            geometry = natural(model, optimizer, per_layer=True)
            geometry.load_state_dict(state)
        train(model, optimizer, range(seed, seed + 1))
        limits = [geometry.metrics()[f"geometry/layer{index}/speed_limit"] / LIMIT for index in range(2)]
        assert limits[0] == pytest.approx(limits[1])
        found.append(limits[0])
    return found


@pytest.mark.parametrize("resumed", [False, True])
def test_a_schedule_by_hand_has_the_rate_at_attach_for_its_peak(resumed):
    factors = [0.25, 0.5, 0.75, 1, 0.5]
    assert limits_by_hand(factors, resumed=resumed) == pytest.approx(factors)
    # What nobody could know: the rate was not at its peak, and went past it.
    assert limits_by_hand(factors, at_attach=0.5, resumed=resumed) == pytest.approx([0.5, 1, 1, 1, 0.5])


def test_an_optimizer_of_its_own_has_the_rate_it_was_made_with_for_its_peak():
    model = Router(manifold="polar")
    optimizer = mg.NaturalGradient(model, limit=LIMIT, lr=2.0)
    for factor in (0.25, 1.0, 0.5):
        optimizer.param_groups[0]["lr"] = 2.0 * factor
        one_step(model, optimizer)
        assert float(optimizer.movement.limit) == pytest.approx(factor * LIMIT)


def test_a_rate_on_its_way_to_an_unknown_peak_is_said_once():
    rising = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 0.5]
    with pytest.warns(UserWarning, match="passed all that was known of its peak 5 times.* Attach while") as caught:
        found = limits_by_hand(rising, at_attach=0.1)
    assert len(caught) == 2, "of each group"
    assert found == pytest.approx([1.0] * 9 + [0.5])
    limits_by_hand([0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5], at_attach=0.1)  # a few steps up are none


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


@pytest.mark.parametrize("changed", [2, 4])  # the factors are inverted at steps 3 and 6
def test_options_that_changed_are_resumed_bit_for_bit(changed):
    def run(resumed: bool) -> Tensor:
        model = Router(manifold="polar")
        optimizer = mg.NaturalGradient(model, limit=None, lr=0.01, refresh_every=3)
        for seed in range(8):
            if seed == changed:
                optimizer.param_groups[0] |= {"damping": 0.01, "floor": 0.1}
            if resumed and seed == 5:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer.remove()
                optimizer = mg.NaturalGradient(model, limit=None, lr=0.01, refresh_every=3)
                optimizer.load_state_dict(state)
            one_step(model, optimizer, seed)
        return model.router.weight.detach()

    assert torch.equal(run(True), run(False))


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
