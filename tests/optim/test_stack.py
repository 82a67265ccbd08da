"""The step itself: against geoopt, several routers at once, half precision, and resumed bit for bit."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.geometry import PolarRows
from tests.support.moe import D, E, LinearGateBlock, Model, batch, build, token_loss
from tests.support.stepping import OFF, backward, converted, routers, take_over, train


def test_many_steps_are_those_of_geoopts_optimizer_on_the_same_gradients():
    from geoopt.optim import RiemannianAdam

    ours, theirs = converted(), converted()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.01)
    take_over(ours, optimizer)
    rest = torch.optim.SGD([p for n, p in theirs.named_parameters() if "gate" not in n], lr=0.01)
    riemannian = RiemannianAdam(routers(theirs), lr=0.01 * math.sqrt(D), betas=(0.9, 0.999))
    for seed in range(5):
        train(ours, optimizer, range(seed, seed + 1))
        backward(theirs, seed)
        rest.step()
        riemannian.step()
        theirs.zero_grad()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("manifold", "unit"), [("polar", math.sqrt(D)), ("euclidean", 1.0)])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_router_that_wakes_late_has_the_bias_correction_of_its_own_steps(manifold, unit, resumed):
    """Geoopt, like torch, counts the steps of every parameter: one that wakes at step 20 begins as at step 0."""
    from geoopt.optim import RiemannianAdam

    ours, theirs = converted(manifold=manifold), converted(manifold=manifold)
    late = [routers(model)[1].requires_grad_(False) for model in (ours, theirs)]
    rest = [p for n, p in ours.named_parameters() if "gate" not in n]
    optimizer = torch.optim.SGD([{"params": rest, "lr": 0.0}, {"params": routers(ours)}], lr=0.01)
    geometry = take_over(ours, optimizer)
    riemannian = RiemannianAdam(routers(theirs), lr=0.01 * unit, betas=(0.9, 0.999))
    for step in range(26):
        if step == 20:
            for weight in late:
                weight.requires_grad_(True)
        if resumed and step in (10, 23):
            state = geometry.state_dict()
            geometry.detach()
            geometry = take_over(ours, optimizer)
            geometry.load_state_dict(state)
        before = routers(ours)[1].detach().clone()
        train(ours, optimizer, range(step, step + 1))
        backward(theirs, step)
        riemannian.step()
        theirs.zero_grad()
        if step >= 20 and manifold == "polar":
            assert (PolarRows().dist(before, routers(ours)[1].detach()) < 1.001 * 0.01 * unit).all()
    for p, q in zip(routers(ours), routers(theirs), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-14)
    assert [entry["step"] for entry in geometry.state_dict()["routers"].values()] == [26, 6]


@pytest.mark.parametrize("manifold", ["polar", "sphere", "orthonormal", "euclidean"])
def test_resumes_bit_for_bit(manifold):
    def fresh() -> tuple[Model, torch.optim.Optimizer, mg.Geometry]:
        model = converted(manifold=manifold)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, take_over(model, optimizer, regularizers=mg.Regularizers(fsi=1.0, fhs=1.0))

    def run(model: Model, optimizer: torch.optim.Optimizer, geometry: mg.Geometry, seeds: range) -> list[dict]:
        found = []
        for seed in seeds:
            (token_loss(model(batch(seed=seed))) + geometry.loss()).backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(geometry.metrics())
        return found

    unbroken = fresh()
    run(*unbroken, range(3))
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in unbroken], buffer)
    expected = run(*unbroken, range(3, 6))
    buffer.seek(0)
    resumed = fresh()
    for part, state in zip(resumed, torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert run(*resumed, range(3, 6)) == expected
    for p, q in zip(unbroken[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(p, q)


def test_half_precision_weights_have_a_master():
    model = converted().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    geometry = take_over(model, optimizer)

    def master() -> Tensor:
        return geometry.state_dict()["routers"]["blocks.0.gate"]["master"]["weight"]

    before = master()
    assert before.dtype == torch.float32
    for _ in range(20):
        token_loss(model(batch(seed=0).bfloat16()).float()).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = PolarRows().dist(before, master())
    assert (moved > 10 * 1e-5 * math.sqrt(D)).all()  # steps far below bf16's resolution add up
    weight = routers(model)[0]
    assert torch.equal(weight, master().to(torch.bfloat16))
    with torch.no_grad():  # somebody loads other weights: the master follows
        weight.fill_(0.5)
    (0 * token_loss(model(batch(seed=0).bfloat16()).float())).backward()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full_like(weight, 0.5), atol=0.01, rtol=0)


def test_routers_that_differ_are_stepped_each_in_its_own_way():
    """Two shapes, two groups, and one that gets no gradient in between: as if each were alone."""

    class Routers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.routers = nn.ModuleList(mg.GeometricRouter(D, e, bias=False) for e in (4, 4, 4, 6))

    def run(chosen: tuple[int, ...]) -> list[Tensor]:
        torch.manual_seed(0)
        model = Routers().double()
        weights = [router.weight for router in model.routers]
        optimizer = torch.optim.SGD([{"params": weights[1:]}, {"params": weights[:1], "lr": 0.02}], lr=0.01)
        geometry = mg.attach(
            model, optimizer, mg.GeometryConfig(select="routers.*", hooks=False, regularizers=OFF, step="riemannian")
        )
        for step in range(4):
            for index in chosen:
                if (index, step) != (2, 0):  # not used in the first step
                    x = batch(seed=step)[0]
                    (model.routers[index](x) ** 2 * (index + 1)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        geometry.detach()
        return [weight.detach() for weight in weights]

    together, untouched = run((0, 1, 2, 3)), run(())
    for index in (0, 1, 3):
        alone = run((index,))
        torch.testing.assert_close(together[index], alone[index], rtol=1e-12, atol=1e-14)
        assert not torch.equal(alone[index], untouched[index])
    assert not torch.equal(together[2], untouched[2])


def test_a_router_without_a_gradient_stays_where_it_is_beside_others_that_move():
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    take_over(model, optimizer)
    train(model, optimizer)
    at = routers(model)[0].detach().clone()
    backward(model)
    routers(model)[0].grad = None
    moved = routers(model)[1].detach().clone()
    optimizer.step()
    assert torch.equal(routers(model)[0], at)
    assert not torch.equal(routers(model)[1], moved)


def test_zero_rows_start_in_the_direction_of_their_own_router():
    model = build(LinearGateBlock)
    for weight in routers(model):
        weight.data[1] = 0
    with pytest.warns(UserWarning, match="1 of 4 rows are zero"):
        mg.geometrize(model)
    expected = [w.manifold.projx(w.detach().clone())[1] for w in routers(model)]
    assert not torch.equal(*expected)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    take_over(model, optimizer)
    train(model, optimizer, range(1))
    for weight, row in zip(routers(model), expected, strict=True):
        torch.testing.assert_close(weight.detach()[1], row, rtol=1e-4, atol=1e-6)


def test_the_betas_are_those_of_the_group():
    from geoopt.optim import RiemannianAdam

    ours, theirs = converted(), converted()
    rest = [p for n, p in ours.named_parameters() if "gate" not in n]
    optimizer = torch.optim.AdamW([{"params": rest, "lr": 0.0}, {"params": routers(ours)}], lr=0.01, betas=(0.5, 0.6))
    take_over(ours, optimizer)
    riemannian = RiemannianAdam(routers(theirs), lr=0.01 * math.sqrt(D), betas=(0.5, 0.6))
    for seed in range(4):
        train(ours, optimizer, range(seed, seed + 1))
        backward(theirs, seed)
        riemannian.step()
        theirs.zero_grad()
    for p, q in zip(routers(ours), routers(theirs), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("manifold", "length"), [("euclidean", 1.0), ("orthonormal", 1.0), ("sphere", 1.0)])
def test_a_coordinate_moves_by_about_the_rate_on_every_manifold(manifold, length):
    model = converted(manifold=manifold)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    take_over(model, optimizer)
    before = [w.detach().clone() for w in routers(model)]
    train(model, optimizer, range(1))
    for weight, old in zip(routers(model), before, strict=True):
        moved = float((weight.detach() - old).square().mean().sqrt()) / 1e-5
        assert moved == pytest.approx(length, rel=1e-3)  # root mean square over the coordinates


def test_the_moments_of_an_idle_router_stay():
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    geometry = take_over(model, optimizer)
    train(model, optimizer)
    before = geometry.state_dict()["routers"]["blocks.0.gate"]["moments"]
    backward(model)
    routers(model)[0].grad = None
    optimizer.step()
    after = geometry.state_dict()["routers"]["blocks.0.gate"]["moments"]
    assert before
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_step_without_any_routers_gradient_is_no_step_of_theirs():
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    geometry = take_over(model, optimizer)
    train(model, optimizer)
    before = geometry.state_dict()["routers"]
    model.head(torch.randn(3, D, dtype=torch.float64)).sum().backward()
    optimizer.step()
    after = geometry.state_dict()["routers"]
    assert [entry["step"] for entry in after.values()] == [entry["step"] for entry in before.values()] == [3, 3]


def test_loading_the_state_of_an_unstepped_run_starts_anew():
    fresh = converted()
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.01)
    geometry = take_over(fresh, optimizer)
    untouched, weights = geometry.state_dict(), [w.detach().clone() for w in routers(fresh)]
    train(fresh, optimizer, range(1))
    expected = [w.detach().clone() for w in routers(fresh)]
    train(fresh, optimizer)
    geometry.load_state_dict(untouched)
    with torch.no_grad():
        for weight, value in zip(routers(fresh), weights, strict=True):
            weight.copy_(value)
        for p, q in zip(fresh.parameters(), converted().parameters(), strict=True):
            p.copy_(q)
    train(fresh, optimizer, range(1))
    for weight, value in zip(routers(fresh), expected, strict=True):
        torch.testing.assert_close(weight.detach(), value, rtol=1e-12, atol=1e-14)


def test_the_master_of_a_half_precision_weight_is_resumed():
    def run(resumed: bool) -> list[Tensor]:
        model = converted().bfloat16()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
        geometry = take_over(model, optimizer)
        for step in range(12):
            if resumed and step == 6:  # far below bf16's resolution: all that has happened so far is in the master
                state, geometry_state = copy.deepcopy(model.state_dict()), geometry.state_dict()
                geometry.detach()
                model = converted(seed=1).bfloat16()
                model.load_state_dict(state)
                optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
                geometry = take_over(model, optimizer)
                geometry.load_state_dict(geometry_state)
            token_loss(model(batch(seed=0).bfloat16()).float()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [entry["master"]["weight"] for entry in geometry.state_dict()["routers"].values()]

    for ours, theirs in zip(run(True), run(False), strict=True):
        assert torch.equal(ours, theirs)


def test_routers_on_different_manifolds_and_of_different_types_are_not_stacked():
    class Routers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.routers = nn.ModuleList(
                [
                    mg.GeometricRouter(D, E, bias=False),
                    mg.GeometricRouter(D, E, bias=False, manifold="orthonormal"),
                    mg.GeometricRouter(D, E, bias=False, dtype=torch.bfloat16),
                ]
            )

    torch.manual_seed(0)
    model = Routers()
    weights = [router.weight for router in model.routers]
    before = [w.detach().clone() for w in weights]
    optimizer = torch.optim.SGD(weights, lr=0.01)
    mg.attach(model, optimizer, mg.GeometryConfig(select="routers.*", hooks=False, regularizers=OFF, step="riemannian"))
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    torch.testing.assert_close(
        PolarRows().dist(before[0], weights[0].detach()), torch.full((E,), 0.01 * math.sqrt(D)), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(weights[1] @ weights[1].T, torch.eye(E), rtol=0, atol=1e-5)
    assert weights[2].dtype == torch.bfloat16
    assert not any(map(torch.equal, before, weights))
