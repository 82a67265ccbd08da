"""``attach`` with natural steps: what it reports, what it needs, and who steps when that is missing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from tests.support.moe import D, E, LinearGateBlock, Model, batch, build, token_loss
from tests.support.routing import mean_kl, probabilities
from tests.support.stepping import LIMIT, backward, converted, natural, routers, take_over, train


@pytest.mark.parametrize("manifold", ["polar", "sphere", "orthonormal", "euclidean"])
def test_routers_move_by_the_limit_and_the_rest_by_the_optimizer(manifold):
    model = converted(manifold=manifold)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    geometry = natural(model, optimizer, router_lr=1e4, per_layer=True)
    head = model.head.weight.detach().clone()
    before = [weight.detach().clone() for weight in routers(model)]
    backward(model)
    optimizer.step()
    found = geometry.metrics()
    for index in range(2):
        assert found[f"geometry/layer{index}/movement"] == pytest.approx(LIMIT, rel=0.03)
    assert found["geometry/speed_limit"] == LIMIT
    assert found["geometry/limited"] == 1
    assert "geometry/movement_next" not in found  # there was no next batch yet
    torch.testing.assert_close(model.head.weight, head - 0.01 * model.head.weight.grad)
    assert all(not torch.equal(a, b) for a, b in zip(before, routers(model), strict=True))
    assert all(w.manifold.check_point_on_manifold(w.detach(), atol=1e-6) for w in routers(model))
    optimizer.zero_grad()
    backward(model, seed=2)
    optimizer.step()
    found = geometry.metrics()
    assert found["geometry/movement_next"] == pytest.approx(LIMIT, rel=0.5)
    assert 0 <= found["geometry/flip_rate"] < 0.5
    state = geometry.state_dict()
    del state["numbers"]["flipped"]  # a state of before there was such a number
    geometry.load_state_dict(state)
    loaded = geometry.metrics()
    assert "geometry/flip_rate" not in loaded
    assert loaded["geometry/movement"] == found["geometry/movement"]


def test_the_size_of_the_groups_rate_does_not_matter_its_schedule_does():
    def run(lr: float, scheduled: bool) -> list[Tensor]:
        model = converted()
        optimizer = torch.optim.AdamW([{"params": model.parameters(), "lr": lr, "weight_decay": 0.1}])
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 0.5) if scheduled else None
        geometry = natural(model, optimizer)
        with torch.no_grad():
            for parameter in model.head.parameters():
                parameter.requires_grad_(False)
        backward(model)
        optimizer.step()
        limit = geometry.metrics()["geometry/speed_limit"]
        assert limit == pytest.approx(LIMIT * (0.5 if schedule else 1))
        return routers(model)

    for small, large in zip(run(1e-4, False), run(1e-2, False), strict=True):
        assert torch.equal(small, large)
    assert not torch.equal(run(1e-4, True)[0], run(1e-4, False)[0])


def test_limits_can_be_set_while_it_runs_and_are_kept():
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    geometry = natural(model, optimizer, router_lr=1e4, per_layer=True)
    geometry.limit_speed(0.2)
    geometry.limit_speed(0.01, ["blocks.1.gate"])
    for _ in range(2):  # the second time after a resume
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        found = geometry.metrics()
        limits = [found[f"geometry/layer{index}/speed_limit"] for index in range(2)]
        assert limits == [0.2, 0.01]
        assert found["geometry/layer1/movement"] == pytest.approx(0.01, rel=0.03)
        state = geometry.state_dict()
        geometry.detach()
        geometry = natural(model, optimizer, router_lr=1e4, per_layer=True)
        geometry.load_state_dict(state)
    for mistake in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"speed limit of router .* must be above 0"):
            geometry.limit_speed(mistake)
    with pytest.raises(ValueError, match="router 'head' is not stepped naturally; those that are: blocks"):
        geometry.limit_speed(0.1, ["head"])
    geometry.detach()
    with pytest.raises(ValueError, match="is not stepped naturally; those that are: none"):
        take_over(model, optimizer).limit_speed(0.1, ["blocks.0.gate"])


def test_a_limit_for_all_is_one_for_those_that_are_stepped_naturally():
    model = build(LinearGateBlock)
    model.blocks[1].gate.__class__ = Doubled
    mg.geometrize(model, select="blocks.*.gate")
    optimizer = torch.optim.SGD([{"params": model.blocks[1].parameters()}, {"params": routers(model)[0]}], lr=0.01)
    geometry = natural(model, optimizer, select="blocks.*.gate", fisher=None, router_lr=1e4)
    with pytest.warns(UserWarning, match=r"Riemannian Adam steps blocks\.1\.gate instead"):
        train(model, optimizer, range(1))
    geometry.limit_speed(0.02)
    train(model, optimizer, range(1, 2))
    assert geometry.metrics()["geometry/movement"] == pytest.approx(0.02, rel=0.03)
    with pytest.raises(ValueError, match=r"router 'blocks\.1\.gate' is not stepped naturally"):
        geometry.limit_speed(0.02, ["blocks.1.gate"])
    geometry.detach()
    with pytest.raises(ValueError, match="no router is stepped naturally"):
        take_over(model, optimizer, select="blocks.*.gate").limit_speed(0.02)


def test_a_rate_of_zero_changes_no_bit():
    model = converted()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    natural(model, optimizer)
    before = [weight.detach().clone() for weight in routers(model)]
    train(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, routers(model), strict=True))


class Biased(LinearGateBlock):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=True)


def test_biases_are_stepped_along_and_limited_with_the_weights():
    model = build(Biased)
    mg.geometrize(model)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": others, "lr": 1.0}, {"params": decayed, "lr": 1e-3}])
    geometry = natural(model, optimizer)
    gate = model.blocks[0].gate
    before = gate.bias.detach().clone()
    backward(model)
    optimizer.step()
    moved = (gate.bias - before).detach().abs().max()
    assert 0 < float(moved) < 0.5  # AdamW's step would be 1
    assert geometry.metrics()["geometry/movement"] == pytest.approx(LIMIT, rel=0.03)


@pytest.mark.parametrize("manifold", ["polar", "orthonormal"])
def test_resumes_bit_for_bit(manifold):
    def run(resumed: bool) -> tuple[list[Tensor], dict[str, float]]:
        model = converted(manifold=manifold)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        geometry = natural(model, optimizer)
        for seed in range(8):
            if resumed and seed == 4:
                saved = model.state_dict(), optimizer.state_dict(), geometry.state_dict()
                model = converted(seed=5, manifold=manifold)
                model.load_state_dict(saved[0])
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
                optimizer.load_state_dict(saved[1])
                geometry = natural(model, optimizer)
                geometry.load_state_dict(saved[2])
            train(model, optimizer, range(seed, seed + 1))
        return routers(model), geometry.metrics()

    (ours, found), (theirs, expected) = run(True), run(False)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert found == expected


def test_the_state_of_another_rule_is_refused():
    model = converted()
    optimizer = torch.optim.AdamW(model.parameters())
    geometry = take_over(model, optimizer)
    train(model, optimizer)
    saved = geometry.state_dict()
    geometry.detach()
    geometry = natural(model, optimizer)
    with pytest.raises(ValueError, match="the state of a natural step has another"):
        geometry.load_state_dict(saved)
    train(model, optimizer)
    saved = geometry.state_dict()
    geometry.detach()
    with pytest.raises(ValueError, match="has no moments: it is of natural steps"):
        take_over(model, optimizer).load_state_dict(saved)


def recorded(model: Model, x: Tensor, geometry: mg.Geometry, show: bool) -> Tensor:
    for index, block in enumerate(model.blocks):
        logits = block.gate(x)
        geometry.record(f"blocks.{index}.gate", logits, x=x if show else None)
        x = block(x)
    return model.head(x)


def test_a_loop_of_ones_own_records_the_inputs():
    def run(hooks: bool) -> list[Tensor]:
        model = converted()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        geometry = natural(model, optimizer, hooks=hooks, fisher=None)
        for seed in range(3):
            x = batch(seed=seed)
            token_loss(model(x) if hooks else recorded(model, x, geometry, show=True)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return routers(model)

    for ours, theirs in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def riemannian(model: nn.Module, optimizer: object, **options: object) -> mg.Geometry:
    return take_over(model, optimizer, **{"step": "riemannian", "fisher": None} | options)


def test_without_inputs_riemannian_adam_steps_and_that_is_said_once():
    model, plain = converted(), converted()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, plain)]
    geometry = natural(model, optimizers[0], hooks=False, fisher=None)
    riemannian(plain, optimizers[1])
    for seed in range(3):
        x = batch(seed=seed)
        token_loss(recorded(model, x, geometry, show=False)).backward()
        token_loss(plain(x)).backward()
        if seed == 0:
            said = r"no tokens of blocks\.0\.gate, blocks\.1\.gate were seen .* x=\.\.\..* Riemannian Adam steps blocks"
            with pytest.warns(UserWarning, match=said):
                optimizers[0].step()
        else:
            optimizers[0].step()
        optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    for ours, theirs in zip(routers(model), routers(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert "geometry/movement" not in geometry.metrics()


class OddBlock(LinearGateBlock):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Doubled(D, E, bias=False)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("resumed", [False, True])
def test_routers_whose_logits_are_not_linear_have_riemannian_adam(resumed):
    def run(how) -> list[Tensor]:
        model = build(OddBlock)
        mg.geometrize(model, select="blocks.*.gate")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        geometry = how(model, optimizer, select="blocks.*.gate", fisher=None)
        for seed in range(4):
            backward(model, seed)
            if seed == 0 and how is natural:
                with pytest.warns(
                    UserWarning, match=r"logits of router blocks\.\d\.gate are not x Wᵀ .*: Riemannian Adam"
                ):
                    optimizer.step()
            else:
                optimizer.step()
            optimizer.zero_grad()
            if resumed and seed == 1:
                state = geometry.state_dict()
                geometry.detach()
                geometry = how(model, optimizer, select="blocks.*.gate", fisher=None)
                geometry.load_state_dict(state)
        return routers(model)

    for ours, theirs in zip(run(natural), run(riemannian), strict=True):
        assert torch.equal(ours, theirs)


def test_sigmoid_routers_are_limited_in_their_own_p():
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0})
    optimizer.param_groups[0]["lr"] = 1e-12  # the rest stays where it is, so that inputs do not change
    geometry = natural(model, optimizer, scores="sigmoid")
    gate, x = model.blocks[0].gate, batch()
    before = probabilities(gate, x, "sigmoid")
    backward(model)
    optimizer.step()
    moved = mean_kl(before.flatten(0, 1), probabilities(gate, x, "sigmoid").flatten(0, 1))
    assert 0 < geometry.metrics()["geometry/movement"] <= LIMIT
    backward(model)  # rows of another batch: the limit holds on those it was made from
    assert math.sqrt(2 * moved) <= 2 * LIMIT


def test_transformers_routers_are_stepped_naturally():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).train()
    mg.geometrize(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    geometry = mg.attach(
        model,
        optimizer,
        mg.GeometryConfig(step="natural", natural=mg.NaturalConfig(limit=0.02), on_error="raise"),
    )
    ids = torch.randint(64, (4, 16))
    for _ in range(3):
        (model(input_ids=ids, labels=ids).loss + geometry.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = geometry.metrics()
    assert 0 < found["geometry/movement"] <= 0.02
    assert found["geometry/movement_next"] <= 0.03


def test_configuration_mistakes_are_said():
    with pytest.raises(ValueError, match="step must be 'riemannian', 'natural' or None, got 'newton'"):
        mg.GeometryConfig(step="newton")
    with pytest.raises(ValueError, match=r"natural must be a NaturalConfig\(\.\.\.\), got \{'limit': 1\}"):
        mg.GeometryConfig(natural={"limit": 1})
