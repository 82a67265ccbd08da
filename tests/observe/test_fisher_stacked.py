"""Exact Fisher traces of experts with stacked weights, which call a tap after every product."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moegeo_router as mg
from tests.observe.fisher_oracle import (
    HIDDEN,
    Block,
    D,
    E,
    Model,
    attach,
    close,
    gating,
    inputs,
    loss_of,
    traces_by_copies,
    traces_of,
)
from tests.support.moe import Experts as UntappedExperts
from trainers.models.experts import SwiGLUExperts
from trainers.models.language import LanguageModel

COMPUTATIONS = ["loop", "split", "grouped", "batched", "auto"]
DTYPES = [pytest.param(c, torch.float32 if c == "grouped" else torch.float64, id=c) for c in COMPUTATIONS]


def build(compute: str = "auto", dtype: torch.dtype = torch.float64, **options: object) -> Model:
    torch.manual_seed(0)
    experts = [SwiGLUExperts(E, D, HIDDEN, compute) for _ in range(2)]
    for each in experts:
        each.reset_parameters(0.3, 0.3)
    return Model(*map(Block, experts), **options).to(dtype)


def swiglu(p: dict[str, Tensor], x: Tensor) -> Tensor:
    gate = x @ p["w_gate"]
    return (gate / (1 + torch.exp(-gate)) * (x @ p["w_up"])) @ p["w_down"]


def expected(model: Model, formula: Callable[[dict[str, Tensor], Tensor], Tensor], x: Tensor) -> list[Tensor]:
    def traces(layer: int) -> Tensor:
        block, x_in = model.blocks[layer], model.before(layer, x)
        parameters = dict(block.experts.named_parameters())
        return traces_by_copies(
            formula, parameters, x_in, block.router.weight, lambda y: loss_of(model.after(layer, x_in, y))
        )

    return [traces(layer) for layer in range(len(model.blocks))]


@pytest.mark.parametrize(("compute", "dtype"), DTYPES)
def test_parameters_are_the_gradients_of_copies_per_position(compute, dtype):
    model, x = build(compute, dtype), inputs().detach().to(dtype)
    geometry = attach(model, "parameters")
    loss_of(model(x)).backward()
    found, exact = traces_of(geometry), dtype is torch.float64
    close(found, expected(build("loop", dtype).double(), swiglu, x.double()), rtol=1e-10 if exact else 1e-3)


@pytest.mark.parametrize(("compute", "dtype"), DTYPES)
def test_the_tap_gets_every_product_once(compute, dtype):
    experts = build(compute, dtype).blocks[0].experts
    x = inputs(5).detach().reshape(-1, D).to(dtype)
    gates, ids = gating(torch.randn(len(x), E - 1, dtype=dtype))  # nobody chooses the last expert
    calls: list[tuple[Tensor, Tensor, int | Tensor]] = []
    untapped = experts(x, gates, ids)
    experts.fisher_tap = lambda *call: calls.append(call)
    assert torch.equal(experts(x, gates, ids), untapped)
    counts = {name: torch.zeros(E) for name in ("w_gate", "w_up", "w_down")}
    for name, (rows, products, whose) in zip(itertools.cycle(counts), calls, strict=False):
        whose = torch.as_tensor(whose).expand(rows.shape[:-1]).flatten()
        rows, products = rows.flatten(0, -2), products.flatten(0, -2)
        torch.testing.assert_close(products, torch.einsum("nd,ndf->nf", rows, getattr(experts, name)[whose]))
        real = rows.norm(dim=-1) > 0  # ``batched`` pads with rows of 0
        counts[name].index_add_(0, whose[real], torch.ones(int(real.sum())))
    for found in counts.values():
        assert torch.equal(found, torch.bincount(ids.flatten(), minlength=E).float())


def test_nobody_sees_the_tap_in_the_state():
    model = build()
    keys, attributes = list(model.state_dict()), [sorted(vars(m)) for m in model.modules()]
    geometry = attach(model, "parameters")
    assert list(model.state_dict()) == keys
    geometry.detach()
    geometry.detach()
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    loss_of(model(inputs())).backward()
    assert geometry.metrics() == {}


@pytest.mark.parametrize("compute", COMPUTATIONS)
def test_training_is_bit_identical(compute):
    trained = []
    for watched in (False, True):
        model = build(compute, torch.float32)
        geometry = attach(model, "parameters") if watched else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for seed in range(3):
            loss_of(model(inputs(seed=seed).float())).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert geometry is None or geometry.metrics()["geometry/fhs"] > 0
        trained.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*trained, strict=True))


def test_a_language_model_has_the_same_traces_however_it_computes():
    tokens = torch.randint(0, 50, (3, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for compute in COMPUTATIONS:
        torch.manual_seed(0)
        model = LanguageModel(
            50,
            mg.GeometricRouter,
            dim=16,
            layers=2,
            heads=2,
            num_experts=E,
            expert_hidden=16,
            length=16,
            experts=compute,
        )
        geometry = attach(model, "parameters", loss="mean", per_expert=True)
        logits = model(tokens).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        found.append(geometry.metrics())
    assert found[0]["geometry/layer1/trace/0"] > 0
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("sizes", [(6,), (1, 3, 2)])
def test_same_traces_whatever_the_checkpointing_and_the_micro_batches(reentrant, sizes):
    model, x = build("split", reentrant=reentrant), inputs(6)
    geometry = attach(model, "parameters", loss="mean")
    for part in x.split(sizes):
        (loss_of(model(part)) / part[..., 0].numel()).backward()
    close(traces_of(geometry), expected(build("split"), swiglu, x))


class Stacked(nn.Module):
    """Two layers with biases; every expert computes every token, and one number for all rows stands for each expert."""

    fisher_tap = None

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(E, D, HIDDEN)), nn.Parameter(torch.randn(E, HIDDEN))
        self.w2 = nn.Parameter(torch.randn(E, HIDDEN, D))

    def forward(self, x: Tensor, gates: Tensor, ids: Tensor) -> Tensor:
        rows = x.unsqueeze(1).expand(-1, E, -1)
        first = torch.einsum("ted,edf->tef", rows, self.w1) + self.b1
        hidden = first.tanh()
        second = torch.einsum("tef,efd->ted", hidden, self.w2)
        if self.fisher_tap is not None:
            self.fisher_tap(rows, first, torch.arange(E), bias=True)
            self.fisher_tap(hidden, second, torch.arange(E))
        return torch.einsum("te,ted->td", torch.zeros(len(x), E, dtype=x.dtype).scatter(1, ids, gates), second)


def test_any_module_can_take_part():
    model, x = Model(Block(Stacked()), Block(Stacked())).double(), inputs()
    geometry = attach(model, "parameters")
    loss_of(model(x)).backward()
    found = traces_of(geometry)
    close(found, expected(model, lambda p, x: (x @ p["w1"] + p["b1"]).tanh() @ p["w2"], x))


def test_stacked_experts_without_a_tap_are_named():
    with pytest.raises(ValueError, match=r"stacked experts blocks\.0\.experts \(Experts\), which have no fisher_tap"):
        attach(Model(Block(UntappedExperts())), "parameters")


def test_experts_are_watched_once():
    model = build()
    geometry = attach(model, "parameters")
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(ValueError, match=r"router .* is watched already: detach\(\) the other"):
        attach(model, "parameters")
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    geometry.detach()
    attach(model, "parameters")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_not_watched(copied):
    model = build()
    geometry = attach(model, "parameters")
    other = copied(model)
    assert [block.experts.fisher_tap for block in other.blocks] == [None, None]
    loss_of(other(inputs())).backward()
    assert geometry.metrics() == {}
    again = attach(other, "parameters")
    loss_of(other(inputs())).backward()
    close(traces_of(again), expected(model, swiglu, inputs()))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_of_the_tap_never_stops_training(where):
    class Wrong(Stacked):
        def forward(self, x: Tensor, gates: Tensor, ids: Tensor) -> Tensor:
            y = super().forward(x, gates, ids)
            if self.fisher_tap is not None and where == "forward":
                self.fisher_tap(None, y, 0)
            elif self.fisher_tap is not None:
                self.fisher_tap(x, y, torch.arange(len(x) + 1))
            return y

    model, x = Model(Block(Wrong())).double(), inputs()
    geometry = attach(model, "parameters", on_error="warn")
    with pytest.warns(UserWarning, match=r"watching blocks\.0\.router failed and is switched off, training goes on"):
        loss_of(model(x)).backward()
    assert model.blocks[0].experts.fisher_tap is None
    gradient = x.grad.clone()
    x.grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model(x)).backward()
    assert torch.equal(x.grad, gradient)
    assert geometry.metrics() == {}


def test_autocast_has_nearly_the_same_traces():
    model, x = build("split", torch.float32), inputs(8).float().detach()
    found = []
    for enabled in (False, True):
        geometry = attach(model, "parameters")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = model(x)
        loss_of(output.float()).backward()
        found.append(traces_of(geometry))
        geometry.detach()
    close(found[1][:1], found[0][:1], rtol=0.1)
