"""The routers' step, taken over: whatever the optimizer and the loop around it, only geometry moves a router."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from tests.support.moe import D, E, LinearGateBlock, Model, batch, build, token_loss
from tests.support.stepping import backward, converted, routers, take_over, train, turned


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


def test_a_step_without_tokens_leaves_routers_where_they_are_and_says_so():
    """The rows of an earlier step would say nothing of how far this one moves the routing."""
    model = build()
    mg.geometrize(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = mg.GeometryConfig(regularizers=mg.Regularizers.none(), on_error="raise")
    geometry = mg.attach(model, optimizer, config)

    def moved(seed: int) -> list[bool]:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        token_loss(model(batch(seed=seed))).backward()
        optimizer.step()
        return [not torch.equal(p, before[name]) for name, p in model.named_parameters() if "router" in name]

    assert moved(1) == [True, True]
    model.eval()
    with pytest.warns(UserWarning, match="no training forward was seen since the last step .the model still in eval"):
        assert moved(2) == [False, False]
    assert moved(3) == [False, False]  # said once
    assert "geometry/fsi" not in geometry.metrics()
    model.train()
    assert moved(4) == [True, True]


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


def test_frozen_routers_may_be_in_no_optimizer():
    model = build(LinearGateBlock)  # not even on a manifold
    for weight in routers(model):
        weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    geometry = take_over(model, optimizer)
    train(model, optimizer)
    assert geometry.metrics()["geometry/fsi"] > 0


def test_the_gradients_are_there_when_a_step_begins_whatever_the_optimizers():
    """``minibatch`` reads the experts' gradients once a step, before the last optimizer."""
    model = converted()
    experts = [p for n, p in model.named_parameters() if "experts" in n]
    others = [p for n, p in model.named_parameters() if "experts" not in n]
    first, last = torch.optim.SGD(experts, lr=0.0), torch.optim.SGD(others, lr=0.0)
    geometry = take_over(model, [first, last], fisher="minibatch", per_expert=True)
    backward(model)
    gradients = [sum(float(p.grad.square().sum()) for p in e.parameters()) for e in model.blocks[0].experts]
    first.step()
    last.step()
    shares = [geometry.metrics()[f"geometry/layer0/trace/{e}"] for e in range(E)]
    assert shares == pytest.approx([g / sum(gradients) for g in gradients])
    assert len(geometry.state_dict()["routers"]) == 2


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
    with pytest.raises(RuntimeError, match=r"router blocks\.0\.gate was replaced since"):
        optimizer.step()


def test_a_step_inside_of_a_step_is_one_step():
    """torch hooks every class that was made: a subclass that calls ``super().step()`` runs all hooks twice."""

    class Outer(torch.optim.Adam):
        def step(self, closure=None):
            return super().step(closure)

    def train(kind, closure):
        torch.manual_seed(0)
        model = Model()
        mg.geometrize(model)
        optimizer = kind(model.parameters(), lr=1e-2)
        geometry = mg.attach(model, optimizer, mg.GeometryConfig(inject=True))
        x = torch.randn(2, 5, D)

        def loss():
            optimizer.zero_grad()
            found = model(x).square().mean()
            found.backward()
            return found

        for _ in range(3):
            if closure:
                optimizer.step(loss)
            else:
                loss()
                optimizer.step()
        return geometry.metrics(), [p.detach().clone() for p in model.parameters()]

    torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])  # from here on Adam's own step is hooked, too
    for closure in (False, True):
        plain, weights = train(torch.optim.Adam, closure)
        metrics, others = train(Outer, closure)
        assert metrics == plain
        assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_a_step_that_failed_does_not_hide_the_next():
    class Failing(torch.optim.SGD):
        fail = False

        def step(self, closure=None):
            if self.fail:
                raise RuntimeError("no")
            return super().step(closure)

    model = Model()
    mg.geometrize(model)
    optimizer = Failing(model.parameters(), lr=1e-2)
    geometry = mg.attach(model, optimizer, mg.GeometryConfig(inject=True))
    model(torch.randn(2, 5, D)).square().mean().backward()
    optimizer.fail = True
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    optimizer.fail = False
    before = mg.find_routers(model)[0].weight.detach().clone()
    model(torch.randn(2, 5, D)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, mg.find_routers(model)[0].weight)
    assert geometry.metrics()["geometry/movement"] > 0
