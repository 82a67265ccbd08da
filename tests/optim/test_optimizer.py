"""``NaturalGradient`` as an optimizer among others: closures, groups, schedulers, scaling, resuming, ranks."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from tests.support.moe import D, E, LinearGateBlock, batch, build, padding, token_loss
from tests.support.ranks import on_two_ranks
from tests.support.routing import Router, inputs, mean_kl, probabilities

MANIFOLDS = ("polar", "sphere", "orthonormal", "euclidean", None)


def trained(model: Router, optimizer: torch.optim.Optimizer, seeds: range) -> list[Tensor]:
    for seed in seeds:
        optimizer.zero_grad()
        model.loss(inputs("random", seed=seed)).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_trains_a_model_beside_another_optimizer():
    model = build(LinearGateBlock)
    mg.geometrize(model)
    ours = mg.NaturalGradient(model, limit=0.05)
    own = {id(p) for p in ours.parameters}
    rest = torch.optim.AdamW((p for p in model.parameters() if id(p) not in own), lr=1e-2)
    losses = []
    for seed in range(60):
        loss = token_loss(model(batch(seed=seed)))
        loss.backward()
        for optimizer in (ours, rest):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert len(ours.parameters) == 2


def test_attach_makes_the_same_steps():
    def run(alone: bool) -> list[Tensor]:
        model = Router(manifold="polar", bias=True)
        if alone:
            optimizer = mg.NaturalGradient(model, limit=0.02)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            config = mg.GeometryConfig(
                step="natural",
                natural=mg.NaturalConfig(limit=0.02),
                top_k=2,
                regularizers=mg.Regularizers.none(),
                fisher=None,
                on_error="raise",
            )
            mg.attach(model, optimizer, config)
        return trained(model, optimizer, range(5))

    for ours, theirs in zip(run(True), run(False), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("manifold", MANIFOLDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("second_moment", [0.0, 0.9])
def test_resumes_bit_for_bit(manifold, bias, second_moment, tmp_path):
    make = partial(mg.NaturalGradient, limit=0.02, second_moment=second_moment, refresh_every=3)
    model = Router(manifold=manifold, bias=bias)
    unbroken = trained(model, optimizer := make(model), range(4))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved")
    unbroken, movement = trained(model, optimizer, range(4, 9)), optimizer.movement
    saved = torch.load(tmp_path / "saved", weights_only=True)
    model = Router(manifold=manifold, bias=bias, seed=7)
    model.load_state_dict(saved["model"])
    model.teacher = Router(manifold=manifold).teacher
    optimizer = make(model)
    optimizer.load_state_dict(saved["optimizer"])
    for ours, expected in zip(trained(model, optimizer, range(4, 9)), unbroken, strict=True):
        assert torch.equal(ours, expected)
    assert torch.equal(optimizer.movement.moved_next, movement.moved_next)


def test_a_half_precision_weight_has_a_master():
    def run(resumed: bool) -> list[Tensor]:
        model = Router(manifold="polar", bias=True).bfloat16()
        optimizer = mg.NaturalGradient(model, limit=1e-4)  # far below bf16's resolution
        for seed in range(6):
            if resumed and seed == 3:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer.remove()
                optimizer = mg.NaturalGradient(model, limit=1e-4)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            model.loss(inputs("random", seed=seed).bfloat16()).backward()
            optimizer.step()
        (state,) = optimizer.state_dict()["state"].values()
        return list(state["master"].values())

    start = Router(manifold="polar", bias=True).bfloat16().router.weight.detach().float()
    masters = run(False)
    assert {m.dtype for m in masters} == {torch.float32}
    assert 0 < float((masters[0] - start).abs().max()) < 1e-2
    for ours, theirs in zip(masters, run(True), strict=True):
        assert torch.equal(ours, theirs)


def test_maximize_goes_the_other_way():
    x = inputs("random")
    down, up = Router(), Router()
    plain = {"momentum": 0.0, "limit": None, "lr": 0.1}
    start = down.router.weight.detach().clone()
    for model, maximize in ((down, False), (up, True)):
        optimizer = mg.NaturalGradient(model, maximize=maximize, **plain)
        model.loss(x).backward()
        optimizer.step()
    torch.testing.assert_close(up.router.weight - start, start - down.router.weight, rtol=1e-9, atol=1e-12)


def test_closures_are_called_with_gradients_on():
    x, model = inputs("random"), Router()
    optimizer = mg.NaturalGradient(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(x)
        loss.backward()
        return loss

    before = model.router.weight.detach().clone()
    assert float(optimizer.step(closure).detach()) == pytest.approx(math.log(6), rel=0.5)
    assert not torch.equal(model.router.weight, before)


def test_groups_have_their_own_options():
    model = build(LinearGateBlock)
    groups = [{"select": "blocks.0.gate", "limit": 0.02}, {"select": "blocks.1.gate", "lr": 0.0, "momentum": 0.0}]
    optimizer = mg.NaturalGradient(model, groups=groups, limit=0.5)
    assert [group["limit"] for group in optimizer.param_groups] == [0.02, 0.5]
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.0]
    before = [block.gate.weight.detach().clone() for block in model.blocks]
    token_loss(model(batch())).backward()
    optimizer.step()
    after = [block.gate.weight.detach() for block in model.blocks]
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])  # a rate of 0 changes no bit
    assert optimizer.movement.limit.tolist() == [0.02, 0.0]
    assert float(optimizer.movement.moved[0]) == pytest.approx(0.02, rel=0.03)


def test_the_limit_follows_the_schedule():
    model = Router(manifold="polar")
    optimizer = mg.NaturalGradient(model, lr=100.0, limit=0.02)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=3)
    fixed = mg.NaturalGradient(other := Router(manifold="polar"), lr=100.0, limit=0.02, limit_follows_lr=False)
    torch.optim.lr_scheduler.LinearLR(fixed, 0.1, 0.1)
    limits = []
    for seed in range(3):
        trained(model, optimizer, range(seed, seed + 1))
        scheduler.step()
        limits.append(float(optimizer.movement.limit))
    assert limits == pytest.approx([0.02, 0.014, 0.008])
    trained(other, fixed, range(1))
    assert float(fixed.movement.limit) == 0.02
    optimizer.param_groups[0]["limit"] = 0.3  # an actuator
    trained(model, optimizer, range(1))
    assert float(optimizer.movement.limit) == pytest.approx(0.03)


def test_gradient_scaler_steps_and_skips():
    def run(scaled: bool, overflow: bool = False) -> Tensor:
        model = Router().float()
        optimizer = mg.NaturalGradient(model, limit=None, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for seed in range(3):
            optimizer.zero_grad()
            scaler.scale(model.loss(inputs("random", seed=seed).float())).backward()
            if overflow and seed == 1:
                model.router.weight.grad[0, 0] = torch.inf
            before = model.router.weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, model.router.weight) == (overflow and seed == 1)
        return model.router.weight.detach()

    torch.testing.assert_close(run(True), run(False), rtol=1e-6, atol=1e-7)
    assert run(True, overflow=True).isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(value):
    model = Router(bias=True)
    optimizer = mg.NaturalGradient(model)
    trained(model, optimizer, range(2))
    before = [p.detach().clone() for p in model.parameters()]
    momentum = copy.deepcopy(optimizer.state_dict()["state"][""]["momentum"])
    optimizer.zero_grad()
    model.loss(inputs("random")).backward()
    model.router.weight.grad[0, 0] = value
    optimizer.step()
    for ours, expected in zip(model.parameters(), before, strict=True):
        assert torch.equal(ours, expected)
    torch.testing.assert_close(optimizer.state_dict()["state"][""]["momentum"], momentum, rtol=1e-12, atol=1e-12)
    after = trained(model, optimizer, range(2, 4))  # and it goes on
    assert all(p.isfinite().all() for p in after)
    assert not torch.equal(after[0], before[0])


def test_tokens_with_nan_are_left_out_of_the_rows():
    model = Router()
    optimizer = mg.NaturalGradient(model, limit=0.01)
    x = inputs("random")
    x[::3] = torch.nan
    before = model.router.weight.detach().clone()
    model.loss(x[1::3]).backward()
    model(x)  # a forward that nobody trains on
    optimizer.step()
    assert model.router.weight.isfinite().all()
    assert not torch.equal(model.router.weight, before)


def test_a_router_without_gradient_stays():
    model = build(LinearGateBlock)
    model.blocks[1].gate.weight.requires_grad_(False)
    optimizer = mg.NaturalGradient(model)
    before = [block.gate.weight.detach().clone() for block in model.blocks]
    for seed in range(3):
        optimizer.zero_grad()
        token_loss(model(batch(seed=seed))).backward()
        optimizer.step()
    assert not torch.equal(model.blocks[0].gate.weight, before[0])
    assert torch.equal(model.blocks[1].gate.weight, before[1])


def test_masked_tokens_and_evaluation_are_not_seen():
    model = build(LinearGateBlock)
    optimizer = mg.NaturalGradient(model)
    mask = padding("right")
    model(batch(), attention_mask=mask)
    model.eval()
    model(batch())
    model.train()
    with torch.no_grad():
        model(batch())
    (rules,) = optimizer._rules
    ((rule, _),) = rules._rules
    assert [float(sample.take()[2].sum()) for sample in rule.samples] == [float(mask.sum())] * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant):
    def run(reentrant: bool | None) -> list[Tensor]:
        model = build(LinearGateBlock, reentrant)
        optimizer = mg.NaturalGradient(model)
        for seed in range(3):
            optimizer.zero_grad()
            token_loss(model(batch(seed=seed))).backward()
            optimizer.step()
        return [block.gate.weight.detach() for block in model.blocks]

    for ours, theirs in zip(run(reentrant), run(None), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_gradient_accumulation_is_the_whole_batch():
    def run(parts: int) -> list[Tensor]:
        model = build(LinearGateBlock)
        optimizer = mg.NaturalGradient(model, limit=0.02)
        for seed in range(3):
            optimizer.zero_grad()
            for part in batch(rows=8, seed=seed).detach().chunk(parts):
                (token_loss(model(part)) / parts).backward()
            optimizer.step()
        return [block.gate.weight.detach() for block in model.blocks]

    for ours, theirs in zip(run(4), run(1), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LinearGateBlock() for _ in range(2))
        self.blocks[1].gate.weight = self.blocks[0].gate.weight

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_tied_routers_are_stepped_once_from_the_rows_of_both():
    torch.manual_seed(0)
    model = Tied().double()
    optimizer = mg.NaturalGradient(model, limit=0.01)
    token_loss(model(batch())).backward()
    optimizer.step()
    assert len(optimizer.parameters) == 1
    (state,) = optimizer.state_dict()["state"].values()
    assert float(state["tokens"]) == 2 * 8 * 5


def ranks(rank: int, folder: str) -> None:
    parallel = nn.parallel.DistributedDataParallel(build(LinearGateBlock))
    optimizer = mg.NaturalGradient(parallel, limit=0.5)
    for seed in range(4):
        optimizer.zero_grad()
        token_loss(parallel(batch(seed=seed).detach().chunk(2)[rank])).backward()
        optimizer.step()
    weights = [block.gate.weight.detach() for block in parallel.module.blocks]
    torch.save((weights, torch.stack(optimizer.movement)), f"{folder}/{rank}.pt")


def test_two_ranks_make_the_step_of_the_global_batch(tmp_path):
    on_two_ranks(ranks, tmp_path, str(tmp_path))
    (first, moved), (second, again) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for ours, theirs in zip([*first, moved], [*second, again], strict=True):
        assert torch.equal(ours, theirs)
    model = build(LinearGateBlock)
    optimizer = mg.NaturalGradient(model, limit=0.5)
    for seed in range(4):
        optimizer.zero_grad()
        token_loss(model(batch(seed=seed).detach())).backward()
        optimizer.step()
    for ours, block in zip(first, model.blocks, strict=True):
        torch.testing.assert_close(ours, block.gate.weight.detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(moved, torch.stack(optimizer.movement), rtol=1e-6, atol=1e-9)
    assert 0 < float(optimizer.movement.flipped.max()) < 1


def test_edge_sizes_train():
    for experts, width in ((1, 4), (2, 1), (70, 3)):
        for manifold in ("polar", "euclidean"):
            model = Router(experts=experts, width=width, manifold=manifold, bias=True)
            optimizer = mg.NaturalGradient(model)
            for seed in range(3):
                optimizer.zero_grad()
                model.loss(inputs("random", width=width, seed=seed)).backward()
                optimizer.step()
            assert all(p.isfinite().all() for p in model.parameters())


def test_an_empty_batch_moves_nothing():
    model = Router()
    optimizer = mg.NaturalGradient(model)
    trained(model, optimizer, range(2))
    x = inputs("random")
    before = probabilities(model, x)
    optimizer.zero_grad()
    model(x[:0]).sum().backward()
    optimizer.step()
    # The gradient is 0, the momentum is not; the rows are those of the last step.
    assert model.router.weight.isfinite().all()
    assert mean_kl(before, probabilities(model, x)) <= 1.5 * 0.015**2 / 2


class Scaled(nn.Module):
    """A router whose logits are not x Wᵀ."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.router(x)


class OddRouter(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


MISTAKES = {
    "unknown option 'limits'; known are": {"limits": 0.1},
    "natural.limit must be above 0": {"limit": 0.0},
    "natural.momentum must be at least 0 and below 1, got 1.0": {"momentum": 1.0},
    "natural.second_moment must be": {"second_moment": -0.1},
    "natural.decay must be": {"decay": 1.5},
    "natural.damping must be at least 0, got -1": {"damping": -1},
    "natural.floor must be at least 0": {"floor": math.nan},
    "natural.refresh_every must be a whole number of at least 1, got 0": {"refresh_every": 0},
    "natural.rows must be a whole number": {"rows": 2.5},
    "natural.block must be a whole number": {"block": True},
    "lr must be at least 0, got -1": {"lr": -1.0},
    "weight_decay must be at least 0, got nan": {"weight_decay": math.nan},
    "no router found": {"select": "nothing.*"},
    "router  is in two groups": {"groups": [{}, {}]},
    "unknown option 'speed'": {"groups": [{"speed": 1}]},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_said(message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        mg.NaturalGradient(Router(), **MISTAKES[message])


def test_what_cannot_be_done_raises():
    model = Router()
    optimizer = mg.NaturalGradient(model)
    with pytest.raises(ValueError, match="takes its groups at the beginning"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    model.router.weight.grad = torch.ones_like(model.router.weight)
    with pytest.raises(RuntimeError, match="were seen: natural steps need a forward in training mode"):
        optimizer.step()
    other = mg.NaturalGradient(build(LinearGateBlock))
    with pytest.raises(ValueError, match="the state is of routers"):
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"has another momentum than \(6, 16\)"):
        optimizer.load_state_dict(mg.NaturalGradient(Router(bias=True)).state_dict())


def test_logits_that_are_not_linear_raise_with_the_routers_name():
    model = build(LinearGateBlock)
    odd = OddRouter(D, E).double()
    model.blocks[1].gate = odd
    mg.NaturalGradient(model)
    with pytest.raises(ValueError, match=r"logits of router blocks.1.gate are not x Wᵀ \+ b \(off by 67%\)"):
        model(batch())


def test_undamped_singular_factors_are_said():
    model = Router()
    optimizer = mg.NaturalGradient(model, damping=0.0, floor=0.0, scores="sigmoid")
    (model(torch.ones(1, 16, dtype=torch.float64)) * torch.arange(6)).sum().backward()
    with pytest.raises(ValueError, match=r"set natural\.damping above 0"):
        optimizer.step()


def test_removed_hooks_leave_nothing():
    model = Router()
    optimizer = mg.NaturalGradient(model)
    optimizer.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
