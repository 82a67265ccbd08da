"""Who is stepped by whom, what is decayed, that rows stay on their manifold, and the schedule in closed form."""

import functools
import itertools
import math

import pytest
import torch
from torch import nn

import moegeo_router as mg
from trainers.models import LanguageModel
from trainers.optimizers import adamw, learning_rate_scale, set_learning_rates

SIZES = {"dim": 16, "layers": 2, "heads": 2, "num_experts": 4, "top_k": 2, "expert_hidden": 8, "length": 12}
MANIFOLDS = ("polar", "sphere", "orthonormal", "euclidean")


def _model(manifold: str | None = "polar", bias: bool = True) -> LanguageModel:
    kind = nn.Linear if manifold is None else functools.partial(mg.GeometricRouter, manifold=manifold)
    return LanguageModel(11, functools.partial(kind, bias=bias), **SIZES)


def _attached(model: LanguageModel, **options: object) -> torch.optim.Optimizer:
    optimizer = adamw(model, routers="riemannian", **options)
    mg.attach(
        model, optimizer, mg.GeometryConfig(step="riemannian", regularizers=mg.Regularizers.none(), on_error="raise")
    )
    return optimizer


def _step(model: LanguageModel, optimizer: torch.optim.Optimizer, seed: int) -> None:
    tokens = torch.randint(0, 11, (2, 12), generator=torch.Generator().manual_seed(seed))
    output = model(tokens)
    loss = output.logits.logsumexp(-1).mean() + sum(r.probs.square().sum(-1).mean() for r in output.routing.values())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _groups_of(model: LanguageModel, optimizer: torch.optim.Optimizer) -> dict[str, list[dict]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, list[dict]] = {name: [] for name in names.values()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found[names[id(parameter)]].append(group)
    return found


@pytest.mark.parametrize("routers", [None, "riemannian"])
@pytest.mark.parametrize("manifold", ["polar", "sphere", "euclidean"])
def test_every_parameter_is_in_one_group(manifold, routers):
    model = _model(manifold)
    assert {len(groups) for groups in _groups_of(model, adamw(model, routers=routers)).values()} == {1}


def test_decay_is_on_matrices_only_and_never_on_routers_that_geometry_steps():
    model = _model("sphere")
    decay = {
        name: group["weight_decay"]
        for name, (group,) in _groups_of(model, adamw(model, weight_decay=0.3, routers="riemannian")).items()
    }
    free = ("norm.weight", "router.bias", "router.temperature_logit", "router.weight")
    assert decay == {name: 0 if name.endswith(free) else 0.3 for name in decay}
    for suffix in free:  # each kind is there, or the line above says nothing of it
        assert any(name.endswith(suffix) for name in decay)


def test_adamw_without_geometry_decays_the_router_as_people_do():
    model = _model(None)
    (group,) = _groups_of(model, adamw(model, weight_decay=0.3))["trunk.blocks.0.ffn.router.weight"]
    assert group["weight_decay"] == 0.3


def test_options_arrive():
    optimizer = adamw(_model(), lr=0.5, betas=[0.1, 0.2], weight_decay=0.0, routers="riemannian", router_lr=0.25)
    assert [(group["lr"], group["betas"]) for group in optimizer.param_groups] == [
        (0.5, (0.1, 0.2)),
        (0.5, (0.1, 0.2)),
        (0.25, (0.1, 0.2)),
    ]
    assert {group["lr"] for group in adamw(_model(), lr=0.5, routers="riemannian").param_groups} == {0.5}


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_rows_stay_on_their_manifold_and_move(manifold):
    model = _model(manifold)
    weight = model.trunk.blocks[0].ffn.router.weight
    before = weight.detach().clone()
    optimizer = _attached(model, router_lr=0.0125)
    for seed in range(50):
        _step(model, optimizer, seed)
    assert weight.isfinite().all()
    cosine = torch.cosine_similarity(weight.detach(), before, dim=-1)
    assert (cosine < 0.99).all(), "a row has not turned"
    if manifold == "sphere":
        torch.testing.assert_close(weight.norm(dim=-1), torch.ones(4), rtol=0, atol=1e-5)
    if manifold == "orthonormal":
        torch.testing.assert_close(weight @ weight.T, torch.eye(4), rtol=0, atol=1e-5)
    if manifold == "polar":
        assert (weight.norm(dim=-1) > 0.01).all()


def test_the_first_polar_step_turns_a_row_by_the_learning_rate_times_the_root_of_its_width():
    # Adam's first step has length 1 in the metric of a row: √(angle² + log(radius ratio)²) on polar rows.
    model = _model("polar", bias=False)
    weight = model.trunk.blocks[0].ffn.router.weight
    before = weight.detach().clone()
    _step(model, _attached(model, router_lr=0.005), 0)
    angle = torch.arccos(torch.cosine_similarity(weight.detach().double(), before.double(), dim=-1))
    stretch = (weight.detach().norm(dim=-1) / before.norm(dim=-1)).log().double()
    turned = torch.full((4,), 0.005 * math.sqrt(16)).double()
    torch.testing.assert_close(torch.hypot(angle, stretch), turned, rtol=0.03, atol=0)


def test_riemannian_without_manifold_routers_says_what_to_do():
    with pytest.raises(ValueError, match=r"optimizer=riemannian needs routers on a manifold.*router=polar"):
        adamw(_model(None), routers="riemannian")


@pytest.mark.parametrize("option", ["lr", "weight_decay", "router_lr"])
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_negative_options_are_named(option, value):
    with pytest.raises(ValueError, match=rf"^{option} must be at least 0, got {value}$"):
        adamw(_model(), routers="riemannian", **{option: value})


def test_schedule_in_closed_form():
    scale = functools.partial(learning_rate_scale, steps=110, warmup=10, final=0.2)
    assert [scale(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert scale(10) == 1.0
    assert scale(60) == pytest.approx(0.6)  # half-way: the mean of 1 and 0.2
    assert scale(35) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert scale(110) == pytest.approx(0.2)
    assert scale(500) == pytest.approx(0.2)
    values = [scale(step) for step in range(9, 111)]
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert max(a - b for a, b in itertools.pairwise(values)) < 0.8 * math.pi / 2 / 100 + 1e-9


def test_schedule_without_warmup_and_with_nothing_else():
    assert learning_rate_scale(0, steps=10, warmup=0, final=0.1) == 1.0
    assert learning_rate_scale(5, steps=10, warmup=0, final=0.0) == pytest.approx(0.5)
    assert [learning_rate_scale(s, steps=3, warmup=5, final=0.1) for s in range(3)] == pytest.approx([0.2, 0.4, 0.6])


def test_learning_rates_are_factors_on_the_peaks_and_survive_a_reload():
    model = _model()
    optimizer = adamw(model, lr=0.4, routers="riemannian", router_lr=0.8)
    set_learning_rates(optimizer, 0.5)
    set_learning_rates(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1, 0.2]
    again = adamw(model, lr=0.4, routers="riemannian", router_lr=0.8)
    again.load_state_dict(optimizer.state_dict())
    set_learning_rates(again, 1.0)
    assert [group["lr"] for group in again.param_groups] == [0.4, 0.4, 0.8]
