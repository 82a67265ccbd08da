"""What regularizers refer to: which forward, which tokens, which layers, and the reference of the step before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.observe import LayerStatistics
from moegeo_router.regularization import _sensitivity
from tests.support.moe import Block, E, batch, build, padding, token_loss
from tests.support.regularized import ALL, attached, gradients


def test_unequal_micro_batches_with_a_given_number_of_tokens():
    """Token counts differ between the parts; with the total given the gradient is that of the whole batch."""
    mask = padding("right")
    mask[0, 1:] = 0

    def run(parts: int) -> list[Tensor]:
        model = build()
        optimizer, geometry = attached(model, regularizers=mg.Regularizers(fsi=1.0, dispersion=1.0, z=0.1))
        for _ in range(2):
            optimizer.zero_grad()
            for x, m in zip(batch().chunk(parts), mask.chunk(parts), strict=True):
                per_token = (model(x, attention_mask=m) - 1).square().sum(-1)
                ((per_token * m).sum() / mask.sum() + geometry.loss(tokens=int(mask.sum()))).backward()
            found = gradients(model)
            optimizer.step()
        return found

    for ours, theirs in zip(run(4), run(1), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_loss_is_that_of_the_newest_forward():
    model = build()
    _, geometry = attached(model, regularizers=mg.Regularizers(fsi=0.0, z=1.0))
    model(batch(seed=5))  # of a probe, say
    model(batch(seed=1))
    found = float(geometry.loss().detach())
    expected = 0.0
    x = batch(seed=1)
    with torch.no_grad(), geometry.pause():
        for block in model.blocks:
            expected += float(block.router(x)[0].logsumexp(-1).square().mean())
            x = block(x)
    assert found == pytest.approx(expected)
    assert float(geometry.loss()) == 0


def test_a_forward_that_does_not_count_takes_nothing_from_the_one_before():
    """A target of consistency, say, between the forward that is trained and its ``loss()``."""
    model = build()
    _, geometry = attached(model, regularizers=mg.Regularizers(fsi=0.0, z=1.0))
    model(batch())
    expected = float(geometry.loss().detach())
    model(batch())
    with torch.no_grad():
        model(batch(seed=2))
    model.eval()(batch(seed=2))
    model.train()
    assert float(geometry.loss().detach()) == expected > 0


class Towers(nn.Module):
    """Two blocks, of which a forward runs those that it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = Block(), Block()

    def forward(self, x: Tensor, names: str) -> Tensor:
        for name in names.split():
            x = getattr(self, name)(x)
        return x


def towers() -> tuple[Towers, torch.optim.Optimizer, mg.Geometry]:
    torch.manual_seed(0)
    model = Towers().double()
    return model, *attached(model)


def step_of(model: Towers, optimizer: torch.optim.Optimizer, geometry: mg.Geometry, names: str, seed: int) -> float:
    optimizer.zero_grad()
    loss = geometry.loss if names else lambda: torch.zeros(())
    output = model(batch(seed=seed), names)
    regularizer = loss()
    (token_loss(output) + regularizer).backward()
    optimizer.step()
    return float(regularizer.detach())


def test_a_layer_that_has_its_turn_now_and_then_keeps_its_reference():
    """As if the steps without it had not been: also after a resume, and from its very first turn."""
    turns = ["text", "image", "image", "text", "text", "image", "text"]
    towers_in_turn, alone = towers(), towers()
    found, saved = [], None
    for number, name in enumerate(turns):
        if number == 3:
            saved = towers_in_turn[2].state_dict()
            towers_in_turn = towers()
            towers_in_turn[2].load_state_dict(saved)
        found.append(step_of(*towers_in_turn, name, number))
        weight = getattr(towers_in_turn[0], name).router.weight
        if name == "text":
            assert step_of(*alone, name, number) == pytest.approx(found[-1], rel=1e-12)
            assert torch.allclose(weight.grad, alone[0].text.router.weight.grad, rtol=1e-10, atol=1e-14)
    assert all(value > 0 for value in found)
    # What is measured is of the step: only the layers that were seen.
    both = towers()
    for number in range(2):
        step_of(*both, "text image", number)
    whole = both[2].metrics()["geometry/regularizer"]
    step_of(*both, "text", 1)
    assert 0 < both[2].metrics()["geometry/regularizer"] < whole


def test_a_block_that_runs_twice_in_one_forward_counts_twice():
    model = build()
    model.blocks[1] = model.blocks[0]
    _, geometry = attached(model, regularizers=mg.Regularizers(fsi=0.0, z=1.0))
    model(batch())
    found = float(geometry.loss().detach())
    x, expected = batch(), 0.0
    with torch.no_grad(), geometry.pause():
        for _ in range(2):
            expected += float(model.blocks[0].router(x)[0].logsumexp(-1).square().mean())
            x = model.blocks[0](x)
    assert found == pytest.approx(expected)


def test_the_running_sensitivity_by_hand():
    def sums(traces: list[float], squares: list[float]) -> LayerStatistics:
        zeros = LayerStatistics.zeros(4)
        return replace(zeros, traces=torch.tensor(traces).double(), gates_squared=torch.tensor(squares).double())

    first = _sensitivity(sums([6.0, 2.0, 0.0, 0.0], [2.0, 1.0, 4.0, 0.0]), None)
    # Ratios 3, 2, 0 of the experts that were used, over their mean 5/3; the unused one counts as average.
    torch.testing.assert_close(first, torch.tensor([1.8, 1.2, 0.0, 1.0]).double())
    second = _sensitivity(sums([0.0, 4.0, 0.0, 4.0], [0.0, 1.0, 0.0, 2.0]), first)
    expected = [1.8, 0.9 * 1.2 + 0.1 * 4 / 3, 0.0, 0.9 * 1.0 + 0.1 * 2 / 3]
    torch.testing.assert_close(second, torch.tensor(expected).double())
    torch.testing.assert_close(_sensitivity(sums([0.0] * 4, [1.0] * 4), second), second)  # no signal, nothing learnt


def test_a_frozen_layer_has_no_part_in_the_loss():
    model = build()
    optimizer, geometry = attached(model, regularizers=mg.Regularizers(fsi=0.0, z=1.0))
    model.blocks[0].router.weight.requires_grad_(False)
    loss = geometry_loss(model, geometry)
    with torch.no_grad(), geometry.pause():
        logits = model.blocks[1].router(model.blocks[0](batch()))[0]
    assert float(loss.detach()) == pytest.approx(float(logits.logsumexp(-1).square().mean()))
    loss.backward()
    optimizer.step()


def geometry_loss(model: nn.Module, geometry: mg.Geometry) -> Tensor:
    model(batch())
    return geometry.loss()


def test_a_loss_that_was_added_once_does_not_count_for_the_next_step():
    model = build()
    optimizer, geometry = attached(model)
    (token_loss(model(batch())) + geometry.loss()).backward()
    optimizer.step()
    token_loss(model(batch())).backward()
    with pytest.raises(RuntimeError, match="reached no router"):
        optimizer.step()


def test_what_is_recorded_under_no_grad_is_not_regularized():
    config = mg.GeometryConfig(hooks=False, fisher=None, top_k=2, regularizers=ALL_BUT_FHS, on_error="raise")
    geometry = mg.attach(nn.Linear(1, 1), config=config)
    with torch.no_grad():
        geometry.record("a", torch.randn(3, E))
    assert float(geometry.loss()) == 0
    logits = torch.randn(3, E, requires_grad=True)
    geometry.record("a", logits)
    geometry.loss().backward()
    assert bool(logits.grad.any())


ALL_BUT_FHS = replace(ALL, fhs=0.0)


def test_logits_only_layers_get_ids_and_gates_as_the_configuration_says():
    """FHS of a layer that shows logits only: its gates are made of them, renormalised or not, softmax or sigmoid."""
    for scores in ("softmax", "sigmoid"):
        for renormalize in (False, True):
            logits = (2 * torch.randn(32, E, dtype=torch.float64)).requires_grad_()
            config = mg.GeometryConfig(
                hooks=False, top_k=2, scores=scores, renormalize=renormalize, regularizers=mg.Regularizers(fhs=1.0)
            )
            geometry = mg.attach(nn.Linear(1, 1), config=config)
            gating = mg.topk_gating(logits, 2, scores=scores, renormalize=renormalize)
            for _ in range(2):
                output = torch.zeros(32, 3, requires_grad=True) * 1
                geometry.record("a", logits, output=output)
                loss = geometry.loss()
                (loss + (output * torch.arange(32)[:, None]).sum()).backward(retain_graph=True)
                found, logits.grad = logits.grad, None
                squares = torch.zeros(32, E).double().scatter(1, gating.ids, gating.weights).square()
                geometry.step()
            strength = (squares.detach() * 3 * torch.arange(32)[:, None].double().square()).sum(0)
            c = strength / squares.detach().sum(0)
            p = mg.routing_probabilities(logits, scores)
            regularizer = mg.metrics.fhs_squared(c * squares.mean(0)) + 0.01 * mg.fsi(p).square()
            (expected,) = torch.autograd.grad(regularizer, logits)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_after_detach_there_is_no_loss():
    model = build()
    _, geometry = attached(model, regularizers=mg.Regularizers(z=1.0))
    model(batch())
    geometry.detach()
    assert float(geometry.loss()) == 0
