"""How regularizers reach the gradient, and what happens when they do not."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from tests.support.moe import Block, D, E, LinearGateBlock, Model, TopKRouter, batch, build, token_loss
from tests.support.regularized import ALL, attached, gradients


def gradients_both_ways(block: type[nn.Module], regularizers: mg.Regularizers) -> list[list[Tensor]]:
    """The gradients of two steps with the regularizers added to the loss, then of two with them injected."""
    found = []
    for inject in (False, True):
        model = build(block)
        optimizer, geometry = attached(model, inject=inject, regularizers=regularizers)
        for _ in range(2):
            optimizer.zero_grad()
            loss = token_loss(model(batch()))
            (loss if inject else loss + geometry.loss()).backward()
            found.append(gradients(model))
            optimizer.step()
    return found


def test_asked_for_and_not_added_is_an_error_that_says_what_to_do():
    model = build()
    optimizer, geometry = attached(model)
    token_loss(model(batch())).backward()
    with pytest.raises(
        RuntimeError, match=r"\(fsi, fhs, dispersion, information, balance, z\) reached no router of bl"
    ):
        optimizer.step()
    geometry.loss()  # asked for, but not backpropagated
    token_loss(model(batch())).backward()
    geometry.loss()
    with pytest.raises(RuntimeError, match=r"add geometry\.loss\(\) to the loss that is backpropagated"):
        optimizer.step()
    (token_loss(model(batch())) + geometry.loss()).backward()
    optimizer.step()


def test_the_defaults_are_on_with_an_optimizer_and_not_adding_them_is_a_warning_once():
    model = build()
    optimizer, geometry = attached(model, regularizers=None)
    for step in range(3):
        token_loss(model(batch())).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        assert len(caught) == (step == 0)
        assert all("the regularizers (fsi) reached no router" in str(w.message) for w in caught)
    assert "geometry/regularizer" in geometry.metrics()


def test_without_an_optimizer_there_are_none():
    model = build()
    geometry = mg.attach(model, config=mg.GeometryConfig(on_error="raise"))
    model(batch())
    assert float(geometry.loss()) == 0
    assert "geometry/regularizer" not in geometry.metrics()


def test_regularizers_without_an_optimizer_hook():
    """A loop of one's own: ``step()`` ends a step, and the next one has a reference."""
    model, found = build(), []
    geometry = mg.attach(model, config=mg.GeometryConfig(regularizers=ALL, on_error="raise"))
    for _ in range(2):
        model.zero_grad()
        (token_loss(model(batch())) + geometry.loss()).backward()
        found.append(gradients(model))
        geometry.step()
    hooked = build()
    optimizer, other = attached(hooked)
    for _ in range(2):
        hooked.zero_grad()
        (token_loss(hooked(batch())) + other.loss()).backward()
        expected = gradients(hooked)
        optimizer.step()
    for ours, theirs in zip(found[1], expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_injecting_and_adding_would_count_twice():
    model = build()
    _, geometry = attached(model, inject=True)
    model(batch())
    with pytest.raises(RuntimeError, match="injected"):
        geometry.loss()


def test_a_frozen_router_is_an_error_if_they_were_asked_for_and_left_out_if_not():
    model = build()
    model.blocks[1].router.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"regularizers were asked for, but the routers blocks\.1\.router are frozen"):
        attached(model)
    assert not any(m._forward_hooks for m in model.modules())
    optimizer, geometry = attached(model, regularizers=None)
    for _ in range(2):
        (token_loss(model(batch())) + geometry.loss()).backward()
        optimizer.step()


@pytest.mark.parametrize("inject", [False, True])
def test_gradient_scaling(inject):
    """Under a gradient scaler an injected gradient is scaled like the others."""

    def run(scaled: bool) -> list[Tensor]:
        model = build().float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled)
        config = mg.GeometryConfig(
            step=None, on_error="raise", regularizers=ALL, inject=inject, grad_scaler=scaler if scaled else None
        )
        geometry = mg.attach(model, optimizer, config)
        for _ in range(2):
            optimizer.zero_grad()
            loss = token_loss(model(batch().float()))
            scaler.scale(loss if inject else loss + geometry.loss()).backward()
            scaler.unscale_(optimizer)
            found = gradients(model)
            scaler.step(optimizer)
            scaler.update()
        return found

    for ours, theirs in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_logits_that_the_block_does_not_use_are_found_out():
    class Deaf(LinearGateBlock):
        def forward(self, x: Tensor) -> Tensor:
            self.gate(x)
            return x + sum(expert(x) for expert in self.experts)

    model = build(Deaf)
    optimizer, _ = attached(model, inject=True, top_k=2)
    token_loss(model(batch())).backward()
    with pytest.raises(RuntimeError, match="their block does not use the logits that were tapped"):
        optimizer.step()


def test_gates_may_be_changed_in_place_after_they_were_passed_on():
    class FreshRouter(TopKRouter):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits, gates, ids = super().forward(x)
            return logits, gates + 0, ids

    class InPlace(Block):
        def __init__(self) -> None:
            super().__init__()
            self.router = FreshRouter()

        def forward(self, x: Tensor) -> Tensor:
            _, gates, ids = self.router(x)
            gates /= gates.sum(-1, keepdim=True)
            return x + self.experts(x.reshape(-1, D), ids, gates).view_as(x)

    found = gradients_both_ways(InPlace, mg.Regularizers(fsi=1.0, z=0.1))
    for ours, theirs in zip(found[1], found[3], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_injection_changes_no_output():
    model = build()
    plain = model(batch()).detach()
    attached(model, inject=True)
    assert torch.equal(model(batch()), plain)


def test_regularizers_work():
    """A router that sends everything to one expert is brought back to balance, and its tokens are told apart."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"router": nn.Linear(D, E)})
    with torch.no_grad():
        model["router"].bias[0] = 4.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    weights = mg.Regularizers(fsi=1.0, dispersion=1.0, dispersion_floor=0.8)
    geometry = mg.attach(model, optimizer, mg.GeometryConfig(top_k=1, step=None, fisher=None, regularizers=weights))
    x, rows = torch.randn(256, D), []
    for _ in range(300):
        model["router"](x)
        geometry.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        rows.append(geometry.metrics())
    assert rows[0]["geometry/fsi"] > 0.6
    assert rows[-1]["geometry/fsi"] < 0.05
    assert rows[-1]["geometry/dispersion_1"] > 0.7
    assert rows[-1]["geometry/dead_fraction"] == 0


def test_a_model_with_an_auxiliary_loss_of_its_own_gets_a_warning():
    model = build()
    model.config = type("Config", (), {"output_router_logits": True, "router_aux_loss_coef": 0.02})()
    with pytest.warns(UserWarning, match=r"an auxiliary loss of its own.*router_aux_loss_coef=0\.02"):
        attached(model)
    model.config.output_router_logits = False
    attached(build_like(model))


def build_like(model: Model) -> Model:
    fresh = build()
    fresh.config = model.config
    return fresh


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [Block, LinearGateBlock])
def test_injected_gradients_take_the_dtype_of_the_model(block, dtype):
    model = build(block).to(dtype)
    optimizer, _ = attached(model, inject=True, regularizers=mg.Regularizers(fsi=1.0, fhs=0.5), top_k=2)
    for _ in range(2):
        optimizer.zero_grad()
        token_loss(model(batch().detach().to(dtype)).float()).backward()
        optimizer.step()
    assert all(p.grad.dtype == dtype and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_gradients_are_injected_into_gates_that_come_from_the_experts_inputs():
    """The router returns logits, its gates are seen where the experts are called: a hook on them, no identity."""

    class GatingBlock(Block):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(D, E, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            gating = mg.topk_gating(self.router(x.reshape(-1, D)), 2, renormalize=False)
            return x + self.experts(x.reshape(-1, D), gating.ids, gating.weights).view_as(x)

    found = gradients_both_ways(GatingBlock, mg.Regularizers(fsi=0.0, fhs=1.0))
    for ours, theirs in zip(found[1], found[3], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not all(map(torch.equal, found[0], found[1]))  # the regularizer has an effect
