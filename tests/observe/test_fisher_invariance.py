"""The exact estimators give the same traces whatever the loop does: scales, micro-batches, checkpointing, padding."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn

from tests.observe.fisher_oracle import (
    Block,
    D,
    E,
    Model,
    Router,
    attach,
    build,
    close,
    gating,
    inputs,
    loss_of,
    traces_of,
)

EXACT = ["parameters", "outputs"]


def whole(fisher: str, x: Tensor, **options: object) -> list[Tensor]:
    """The traces of one backward pass of the loss summed over all tokens."""
    model = build(**options)
    geometry = attach(model, fisher)
    loss_of(model(x)).backward()
    return traces_of(geometry)


@pytest.mark.parametrize("fisher", EXACT)
@pytest.mark.parametrize("sizes", [(6,), (3, 3), (1, 3, 2)])
@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_same_traces_whatever_the_micro_batches(fisher, sizes, loss):
    model, x = build(), inputs(6)
    geometry = attach(model, fisher, loss=loss)
    for part in x.split(sizes):
        total = loss_of(model(part))
        (total / part[..., 0].numel() if loss == "mean" else total).backward()
    close(traces_of(geometry), whole(fisher, x))


@pytest.mark.parametrize("fisher", EXACT)
def test_a_factor_on_the_loss_cancels_in_fhs(fisher):
    scores = []
    for factor in (1, 65536, 1e-6):
        model = build()
        geometry = attach(model, fisher)
        (factor * loss_of(model(inputs()))).backward()
        scores.append(geometry.metrics()["geometry/fhs"])
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-9)


@pytest.mark.parametrize("fisher", EXACT)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(fisher, reentrant):
    model, x = build(reentrant=reentrant), inputs()
    geometry = attach(model, fisher)
    loss_of(model(x)).backward()
    close(traces_of(geometry), whole(fisher, x))


@pytest.mark.parametrize("fisher", EXACT)
@pytest.mark.parametrize("loss", ["mean", "sum"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_good_as_not_there(fisher, loss, side):
    model, x = build(mix=False), inputs(6)
    mask = torch.ones(6, 4, dtype=torch.long)
    mask[::2, -2:] = 0
    mask = mask if side == "right" else mask.flip(1)
    geometry = attach(model, fisher, loss=loss)
    total = loss_of(model(x, attention_mask=mask)[mask.bool()])
    (total / mask.sum() if loss == "mean" else total).backward()
    close(traces_of(geometry), whole(fisher, x[mask.bool()].unsqueeze(0), mix=False))


def test_outputs_mask_padding_that_the_loss_looks_at():
    model, x = build(mix=False), inputs(6)
    mask = torch.ones(6, 4, dtype=torch.bool)
    mask[::2, -2:] = False
    geometry = attach(model, "outputs")
    output = model(x, attention_mask=mask)
    (loss_of(output[mask]) + float("nan") * output[~mask].sum()).backward()
    close(traces_of(geometry), whole("outputs", x[mask].unsqueeze(0), mix=False))


@pytest.mark.parametrize("fisher", EXACT)
def test_bfloat16_models_have_nearly_the_same_traces(fisher):
    model, x = build(layers=1, mix=False).bfloat16(), inputs(16).bfloat16().detach()
    geometry = attach(model, fisher)
    loss_of(model(x)).backward()
    found = traces_of(geometry)
    exact = copy.deepcopy(model).float()  # of the same weights and inputs: one routing, and the model's own rounding
    geometry = attach(exact, fisher)
    loss_of(exact(x.float())).backward()
    close(found, traces_of(geometry), rtol=0.03)


@pytest.mark.parametrize("fisher", EXACT)
@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_training_is_bit_identical(fisher, kind):
    trained = []
    for watched in (False, True):
        model = build(kind).float()
        geometry = attach(model, fisher) if watched else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for seed in range(4):
            loss_of(model(inputs(seed=seed).float())).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert geometry is None or geometry.metrics()["geometry/fhs"] > 0
        trained.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*trained, strict=True))


@pytest.mark.parametrize("fisher", EXACT)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_backward_pass_that_overflows_is_left_out_of_the_step(fisher, bad):
    model, x = build("linear", layers=1, k=1, mix=False), inputs(8)
    geometry = attach(model, fisher)
    with geometry.pause():
        ids = gating(x.detach() @ model.blocks[0].router.weight.T, 1)[1]
    # Only expert 2's tokens overflow: what the others show of this pass must not be counted either.
    factor = torch.where(ids == 2, bad, 1.0)
    (factor * model(inputs(8)).square()).sum().backward()
    loss_of(model(x)).backward()
    close(traces_of(geometry), whole(fisher, x, kind="linear", layers=1, k=1, mix=False))


@pytest.mark.parametrize("fisher", EXACT)
def test_a_forward_that_failed_leaves_nothing_behind(fisher):
    model, x = build(), inputs(6)
    geometry = attach(model, fisher, loss="mean")
    broken = model.blocks[0].experts[3].down.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x[:1])
    broken.remove()
    (loss_of(model(x)) / 24).backward()
    close(traces_of(geometry), whole(fisher, x))


def test_detach_takes_every_hook_off():
    model = build()
    geometry = attach(model, "parameters")
    geometry.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    loss_of(model(inputs())).backward()
    assert geometry.metrics() == {}


def test_eval_passes_are_not_counted():
    model, x = build(), inputs()
    geometry = attach(model, "parameters")
    loss_of(model.eval()(inputs(seed=2))).backward()
    loss_of(model.train()(x)).backward()
    close(traces_of(geometry), whole("parameters", x))


def test_rows_may_change_in_place_between_two_products():
    class Expert(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(D, D).requires_grad_(False), nn.Linear(D, D)
            self.in_place = in_place

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return y.tanh() + self.second(x.mul_(2) if self.in_place else x * 2)

    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        model = Model(Block(nn.ModuleList(Expert(in_place) for _ in range(E)))).double()
        geometry = attach(model, "parameters")
        loss_of(model(inputs())).backward()
        found.append(traces_of(geometry))
    close(*found)


@pytest.mark.parametrize("fisher", EXACT)
def test_nothing_of_a_forward_pass_is_kept_after_it(fisher):
    model, kept = build(), []
    for module in model.modules():
        if isinstance(module, Router | nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: kept.append(weakref.ref(inputs[0])))
    geometry = attach(model, fisher)
    model(inputs())  # and its graph is dropped
    assert kept
    assert not any(row() is not None for row in kept)
    geometry.detach()


class _Nothing(torch.autograd.Function):
    """Sends no gradient back."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> None:
        return None


@pytest.mark.parametrize("fisher", EXACT)
def test_a_gradient_that_is_none_is_0(fisher):
    model, x = build(), inputs()
    geometry = attach(model, fisher)
    output = model(x)
    (loss_of(output) + _Nothing.apply(model(inputs(seed=2))).sum()).backward()
    close(traces_of(geometry), whole(fisher, x))
