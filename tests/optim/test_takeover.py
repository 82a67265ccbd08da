"""The routers' step, taken over: whatever the optimizer and the loop around it, only geometry moves a router."""

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

OFF = mg.Regularizers.none()


def converted(seed: int = 0, manifold: str = "polar") -> Model:
    model = build(LinearGateBlock, seed=seed)
    mg.geometrize(model, manifold, allow_change=True)
    return model


def take_over(model: nn.Module, optimizer: object, **options: object) -> mg.Geometry:
    config = {"top_k": 2, "regularizers": OFF, "on_error": "raise"} | options
    return mg.attach(model, optimizer, mg.GeometryConfig(**config))


def backward(model: nn.Module, seed: int = 1, scale: float = 1.0) -> None:
    (scale * token_loss(model(batch(seed=seed)))).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range = range(3)) -> None:
    for seed in seeds:
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()


def routers(model: Model) -> list[Tensor]:
    return [block.gate.weight for block in model.blocks]


def turned(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """Polar distance that every row of every router went."""
    return torch.stack([PolarRows().dist(a, b.detach()) for a, b in zip(before, after, strict=True)])


def test_the_first_step_turns_every_row_by_the_learning_rate_and_leaves_the_rest_to_the_optimizer():
    model, plain = converted(), build(LinearGateBlock)
    before = [w.detach().clone() for w in routers(model)]
    optimizer, other = (torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.3) for m in (model, plain))
    take_over(model, optimizer)
    train(model, optimizer, range(1))
    train(plain, other, range(1))
    # Adam's first direction has norm 1 on the manifold, so each row goes lr · √D along its geodesic.
    torch.testing.assert_close(turned(before, routers(model)), torch.full((2, E), 0.01 * math.sqrt(D)).double())
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q) == ("gate" not in name)


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


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
        lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), fused=True),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.01),
    ],
    ids=["adamw", "fused", "foreach", "tensor lr", "sgd", "adagrad"],
)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_any_optimizer(make, set_to_none):
    model = converted()
    before = [w.detach().clone() for w in routers(model)]
    optimizer = make(model.parameters())
    take_over(model, optimizer)
    backward(model)
    gradients = [w.grad.clone() for w in routers(model)]
    optimizer.step()
    for weight, gradient in zip(routers(model), gradients, strict=True):
        assert torch.equal(weight.grad, gradient)  # the user's own again
        assert not optimizer.state.get(weight, {}).get("step", 0)  # the user's optimizer passed it by
    optimizer.zero_grad(set_to_none=set_to_none)
    torch.testing.assert_close(turned(before, routers(model)), torch.full((2, E), 0.01 * math.sqrt(D)).double())


def test_schedulers_and_groups_and_the_factor():
    model = converted()
    first, second = routers(model)
    rest = [p for n, p in model.named_parameters() if "gate" not in n]
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": [first], "lr": 0.02}, {"params": [second]}], lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    take_over(model, optimizer, router_lr=0.5)
    before = [first.detach().clone(), second.detach().clone()]
    train(model, optimizer, range(1))
    scheduler.step()
    expected = 0.5 * math.sqrt(D) * torch.tensor([[0.02] * E, [0.01] * E]).double()
    torch.testing.assert_close(turned(before, [first, second]), expected)
    at = [w.detach().clone() for w in (first, second)]
    train(model, optimizer, range(1, 3))
    assert all(map(torch.equal, at, (first.detach(), second.detach())))  # a rate of 0 is no step


def test_an_optimizer_made_before_geometrize_and_two_optimizers():
    model = build(LinearGateBlock)
    of_routers = torch.optim.SGD(routers(model), lr=0.01)
    of_rest = torch.optim.AdamW([p for n, p in model.named_parameters() if "gate" not in n], lr=0.01)
    mg.geometrize(model)
    geometry = take_over(model, [of_routers, of_rest])
    before = [w.detach().clone() for w in routers(model)]
    sums = []
    for seed in range(2):
        backward(model, seed)
        of_routers.step()
        now = geometry.state_dict()["sums"]  # only the last of them ends the step
        assert now is None if not sums else torch.equal(now, sums[-1])
        of_rest.step()
        model.zero_grad()
        sums.append(geometry.state_dict()["sums"])
    assert not torch.equal(*sums)
    assert (turned(before, routers(model)) > 0.01).all()


def test_a_weight_that_two_routers_share_is_stepped_once():
    model = build(LinearGateBlock)
    model.blocks[1].gate.weight = model.blocks[0].gate.weight
    mg.geometrize(model)
    before = [model.blocks[0].gate.weight.detach().clone()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    take_over(model, optimizer)
    train(model, optimizer, range(1))
    torch.testing.assert_close(turned(before, routers(model)[:1]), torch.full((1, E), 0.01 * math.sqrt(D)).double())


def test_clipping_acts_on_the_gradients_the_step_sees():
    norms = []
    for clip in (1e9, 1e-12):
        model = converted()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        take_over(model, optimizer)
        before = [w.detach().clone() for w in routers(model)]
        backward(model)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        norms.append(float(turned(before, routers(model)).max()))
    assert norms[0] == pytest.approx(0.01 * math.sqrt(D))
    assert norms[1] < 0.5 * norms[0]  # gradients far below Adam's epsilon


def test_closures():
    def run(with_closure: bool) -> Model:
        model = converted()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        take_over(model, optimizer)
        for seed in range(3):

            def closure(seed=seed):
                optimizer.zero_grad()
                loss = token_loss(model(batch(seed=seed)))
                loss.backward()
                return loss

            if with_closure:
                assert isinstance(optimizer.step(closure) if seed % 2 else optimizer.step(closure=closure), Tensor)
            else:
                closure()
                optimizer.step()
        return model

    for p, q in zip(run(True).parameters(), run(False).parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_optimizer_that_calls_its_closure_many_times():
    model = converted()
    before = [w.detach().clone() for w in routers(model)]
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=4)
    take_over(model, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = token_loss(model(batch()))
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(turned(before, routers(model)), torch.full((2, E), 0.01 * math.sqrt(D)).double())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_gradient_scaler(fused, unscale):
    """Scaled gradients give the same steps; a step with inf is skipped and leaves no trace."""

    def run(scaled: bool) -> tuple[Model, dict[str, float]]:
        model = converted().float()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        geometry = take_over(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for seed in range(4):
            overflow = scaled and seed == 2
            if seed == 2 and not scaled:
                continue
            loss = token_loss(model(batch(seed=seed).float()))
            scaler.scale(loss * (math.inf if overflow else 1)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return model, geometry.metrics()

    (ours, metrics), (plain, expected) = run(True), run(False)
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
    if fused:  # there the skipped step ends a step of the statistics, too: the last one is the same
        assert metrics["geometry/fhs"] == pytest.approx(expected["geometry/fhs"], rel=1e-3)
    assert math.isfinite(metrics["geometry/fhs"])


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
        return geometry.state_dict()["routers"]["blocks.0.gate"]["master"]

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
    weight.grad = torch.zeros_like(weight)
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
        geometry = mg.attach(model, optimizer, mg.GeometryConfig(select="routers.*", hooks=False, regularizers=OFF))
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


def test_maximize_goes_the_other_way():
    def moved(maximize: bool) -> Tensor:
        model = converted()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, maximize=maximize)
        take_over(model, optimizer)
        before = routers(model)[0].detach().clone()
        train(model, optimizer, range(1))
        return routers(model)[0].detach() - before

    torch.testing.assert_close(moved(True), -moved(False), rtol=1e-2, atol=1e-7)


def test_detach_gives_the_step_back():
    model = converted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    geometry = take_over(model, optimizer)
    train(model, optimizer)
    geometry.detach()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    backward(model)
    expected = [w.detach() - 0.1 * w.grad for w in routers(model)]
    optimizer.step()
    for weight, value in zip(routers(model), expected, strict=True):
        torch.testing.assert_close(weight.detach(), value)


def test_step_none_watches_and_leaves_the_step():
    model, plain = build(LinearGateBlock), build(LinearGateBlock)
    for m in (model, plain):
        optimizer = torch.optim.AdamW(m.parameters(), lr=0.01)
        if m is model:
            take_over(m, optimizer, step=None)
        train(m, optimizer)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_frozen_routers_are_watched_only():
    model = converted()
    model.blocks[0].gate.weight.requires_grad_(False)
    before = [w.detach().clone() for w in routers(model)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    geometry = take_over(model, optimizer, per_layer=True)
    train(model, optimizer)
    assert torch.equal(before[0], routers(model)[0])
    assert (turned(before[1:], routers(model)[1:]) > 0).all()
    assert "geometry/layer0/fhs" in geometry.metrics()


def test_mistakes_are_one_clear_error_and_leave_nothing_behind():
    def hooks(model: nn.Module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    plain = build(LinearGateBlock)
    with pytest.raises(ValueError, match=r"router blocks\.0\.gate is on no manifold: call geometrize"):
        take_over(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    model = converted()
    with pytest.raises(ValueError, match=r"router blocks\.0\.gate is in no optimizer given to attach"):
        take_over(model, torch.optim.SGD(model.head.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"must be a torch\.optim\.Optimizer or a list of them, got 'dict'"):
        take_over(model, [{}])
    assert not hooks(plain)
    assert not hooks(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    take_over(model, optimizer)
    with pytest.raises(ValueError, match=r"router blocks\.0\.gate is watched already: detach"):
        take_over(model, optimizer)
    with pytest.raises(ValueError, match="taken over already"):
        take_over(model, optimizer, hooks=False)
    with pytest.raises(ValueError, match="one of them is given twice"):
        take_over(converted(), [optimizer, optimizer])
    replaced = converted()
    optimizer = torch.optim.SGD(replaced.parameters(), lr=0.1)
    take_over(replaced, optimizer)
    replaced.load_state_dict(copy.deepcopy(replaced.state_dict()), assign=True)
    backward(replaced)
    with pytest.raises(RuntimeError, match=r"router blocks\.0\.gate was replaced since attach"):
        optimizer.step()
