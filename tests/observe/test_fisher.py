"""The three estimators of the experts' Fisher traces against autograd, for experts that are modules."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moegeo_router as mg
from tests.observe.fisher_oracle import (
    KINDS,
    Block,
    D,
    E,
    K,
    Model,
    attach,
    build,
    close,
    gating,
    inputs,
    loss_of,
    traces_by_copies,
    traces_of,
)


def linear(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return p["weight"] @ x + p.get("bias", 0)


def mlp(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return p["2.weight"] @ (p["0.weight"] @ x + p["0.bias"]).tanh()


def swiglu(p: dict[str, Tensor], x: Tensor) -> Tensor:
    gate = p["gate.weight"] @ x
    return p["down.weight"] @ (gate / (1 + torch.exp(-gate)) * (p["up.weight"] @ x))


FORMULAS = {"linear": linear, "no bias": linear, "mlp": mlp, "swiglu": swiglu}


def stacked(model: Model, layer: int) -> dict[str, Tensor]:
    """The parameters of a block's experts, (E, …) each."""
    each = [dict(expert.named_parameters()) for expert in model.blocks[layer].experts]
    return {name: torch.stack([p[name] for p in each]) for name in each[0]}


def expected(model: Model, kind: str, layer: int, x: Tensor) -> Tensor:
    def loss(y: Tensor) -> Tensor:
        return loss_of(model.after(layer, x_in, y))

    x_in = model.before(layer, x)
    return traces_by_copies(FORMULAS[kind], stacked(model, layer), x_in, model.blocks[layer].router.weight, loss)


def expected_outputs(model: Model, layer: int, x: Tensor, gates: str = "output") -> Tensor:
    """The traces of a bias on the experts' outputs: one leaf (D,) for each token and expert."""
    x_in, weight = model.before(layer, x), model.blocks[layer].router.weight.detach()
    gates_TK, ids_TK = gating(x_in.reshape(-1, D) @ weight.T)
    chosen_TE = torch.zeros(len(ids_TK), E, dtype=torch.float64).scatter(
        1, ids_TK, gates_TK if gates == "output" else torch.ones_like(gates_TK)
    )
    bias_TED = torch.zeros(len(ids_TK), E, D, dtype=torch.float64, requires_grad=True)
    y = model.blocks[layer](x_in) + torch.einsum("te,ted->td", chosen_TE, bias_TED).view_as(x_in)
    (gradient,) = torch.autograd.grad(loss_of(model.after(layer, x_in, y)), bias_TED)
    return gradient.square().sum(-1).sum(0)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_the_gradients_of_copies_per_position(kind):
    model, x = build(kind), inputs()
    geometry = attach(model, "parameters")
    loss_of(model(x)).backward()
    close(traces_of(geometry), [expected(model, kind, layer, x) for layer in range(2)])


@pytest.mark.parametrize("gates", ["output", "input"])
def test_outputs_are_the_gradients_of_a_bias_per_position(gates):
    model, x = build(), inputs()
    geometry = attach(model, "outputs", gates=gates)
    loss_of(model(x)).backward()
    close(traces_of(geometry), [expected_outputs(model, layer, x, gates) for layer in range(2)])


class Dense(nn.Module):
    """Every expert sees every token, with weight 0 where it is not chosen: nothing depends on the data's order."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        gates, ids = gating(self.gate(x))
        weights = torch.stack([torch.where(ids == e, gates, 0).sum(-1) for e in range(E)], dim=-1)
        return torch.stack([weights[..., e, None] * expert(x) for e, expert in enumerate(self.experts)]).sum(0)


def test_the_last_block_has_the_norms_of_per_sample_gradients():
    model, x = Model(Dense(), Dense(), mix=False).double(), inputs(rows=9, length=1)
    geometry = attach(model, "parameters", select="*.gate", top_k=K, renormalize=False)
    loss_of(model(x)).backward()
    last = {n: p.detach() for n, p in model.named_parameters() if n.startswith("blocks.1.experts")}

    def sample_loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(model, parameters, (row.unsqueeze(0),)))

    with geometry.pause():
        samples = torch.vmap(torch.func.grad(sample_loss), in_dims=(None, 0))(last, x.detach())
    wanted = torch.zeros(E, dtype=torch.float64)
    for name, gradient in samples.items():
        wanted[int(name.split(".")[3])] += gradient.square().sum()
    close(traces_of(geometry)[1:], [wanted])


def minibatch(model: nn.Module) -> tuple[mg.Geometry, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    quiet = {"step": None, "regularizers": mg.Regularizers.none(), "on_error": "raise"}
    config = mg.GeometryConfig(fisher="minibatch", top_k=K, renormalize=False, **quiet)
    return mg.attach(model, optimizer, config), optimizer


def test_minibatch_is_the_accumulated_gradient():
    model, x = build(), inputs(4)
    geometry, optimizer = minibatch(model)
    wanted = []
    for layer in range(2):
        each = [torch.autograd.grad(loss_of(model(x)), list(e.parameters())) for e in model.blocks[layer].experts]
        wanted.append(torch.stack([sum(g.square().sum() for g in gradients) for gradients in each]))
    for part in x.chunk(2):
        loss_of(model(part)).backward()
    optimizer.step()
    close(traces_of(geometry), wanted)


def test_minibatch_leaves_gradients_out_that_are_not_finite():
    model, x = build(), inputs()
    geometry, optimizer = minibatch(model)
    before = [p.detach().clone() for p in model.parameters()]
    for factor in (float("inf"), 1.0):
        (factor * loss_of(model(x))).backward()
        optimizer.step()
        found = geometry.metrics()
        with torch.no_grad():
            for p, q in zip(model.parameters(), before, strict=True):
                p.copy_(q)
        optimizer.zero_grad()
        assert ("geometry/fhs" in found) == (factor == 1)


class Whole(nn.Module):
    """A block that holds stacked weights itself, beside a router whose weight is (E, D), too."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.w = nn.Parameter(torch.randn(E, D, D))
        self.b = nn.Parameter(torch.randn(E, D))
        self.scale = nn.Parameter(torch.randn(E))  # not of one expert: indistinguishable from a bias of the router

    def forward(self, x: Tensor) -> Tensor:
        gates, ids = gating(self.gate(x))
        dense = torch.zeros(*ids.shape[:-1], E, dtype=x.dtype).scatter(-1, ids, gates * self.scale[ids])
        return torch.einsum("...e,...ed->...d", dense, torch.einsum("...d,edf->...ef", x, self.w) + self.b)


def test_minibatch_of_stacked_weights_leaves_the_router_out():
    model, x = Model(Whole()).double(), inputs()
    geometry, optimizer = minibatch(model)
    loss_of(model(x)).backward()
    weights, biases = model.blocks[0].w.grad.clone(), model.blocks[0].b.grad.clone()
    optimizer.step()
    close(traces_of(geometry), [weights.flatten(1).square().sum(-1) + biases.square().sum(-1)])


def test_minibatch_needs_the_optimizer():
    with pytest.raises(ValueError, match="fisher='minibatch' reads gradients when the optimizer steps"):
        attach(build(), "minibatch")


@pytest.mark.parametrize("fisher", ["parameters", "outputs"])
def test_metrics_are_of_these_traces(fisher):
    model, x = build(), inputs()
    wanted = [
        expected(model, "swiglu", i, x) if fisher == "parameters" else expected_outputs(model, i, x) for i in (0, 1)
    ]
    geometry = attach(model, fisher, per_layer=True, per_expert=True)
    loss_of(model(x)).backward()
    found = geometry.metrics()
    for layer, traces in enumerate(wanted):
        shares = [found[f"geometry/layer{layer}/trace/{e}"] for e in range(E)]
        assert shares == pytest.approx((traces / traces.sum()).tolist(), rel=1e-9)
        assert found[f"geometry/layer{layer}/fhs"] == pytest.approx(float(traces.std(correction=0) / traces.mean()))
    assert found["geometry/fhs"] == max(found["geometry/layer0/fhs"], found["geometry/layer1/fhs"])


@pytest.mark.parametrize("reason", ["parameter", "norm", "no parameters"])
def test_experts_that_are_not_linear_maps_are_refused_and_left_alone(reason):
    model = build("linear")
    odd = model.blocks[1].experts[2] = nn.Sequential(nn.Linear(D, D), nn.Identity())
    if reason == "parameter":
        odd.scale = nn.Parameter(torch.ones(D))
    elif reason == "norm":
        odd.append(nn.LayerNorm(D))
    else:
        model.blocks[1].experts[2] = nn.Identity()
    names = {"parameter": "scale", "norm": r"2\.weight, 2\.bias", "no parameters": "none"}[reason]
    with pytest.raises(ValueError, match=rf"those of blocks\.1\.experts have {names}: take fisher='outputs'"):
        attach(model, "parameters")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("fisher", ["parameters", "minibatch"])
def test_a_router_without_experts_is_named(fisher):
    model = nn.ModuleDict({"router": nn.Linear(D, E)})
    with pytest.raises(ValueError, match=f"fisher='{fisher}': no experts found beside router router: take fisher='out"):
        mg.attach(model, torch.optim.SGD(model.parameters()), mg.GeometryConfig(fisher=fisher, step=None))


def test_experts_that_run_without_their_modules_are_said_once():
    class Unseen(Block):
        def forward(self, x: Tensor) -> Tensor:
            gates, ids = self.router(x.reshape(-1, D))[1:]
            y = torch.stack([F.linear(x.reshape(-1, D), e.weight) for e in self.experts], dim=1)
            return (gates[..., None] * y.gather(1, ids[..., None].expand(-1, -1, D))).sum(1).view_as(x)

    model = Model(Unseen(nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(E)))).double()
    geometry = attach(model, "parameters")
    with pytest.warns(UserWarning, match=r"layer blocks\.0\.router ran without their linear layers .* no FHS"):
        loss_of(model(inputs())).backward()
    loss_of(model(inputs())).backward()  # warnings are errors here
    assert "geometry/fhs" not in geometry.metrics()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_not_watched(copied):
    model = build()
    geometry = attach(model, "parameters")
    loss_of(copied(model)(inputs())).backward()
    assert geometry.metrics() == {}
