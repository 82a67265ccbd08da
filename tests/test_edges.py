"""Loops and mistakes at the edges: nothing grows, nothing is silently ignored, every mistake is one clear error."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import nn

import moegeo_router as mg
from moegeo_router.losses import additive_loss, linearize
from moegeo_router.observe import LayerForward, LayerStatistics
from tests.support.moe import D, E, LinearGateBlock, Model, batch, build, padding, token_loss
from tests.support.ranks import on_two_ranks

Z = mg.Regularizers(fsi=0.0, z=1.0)


def attached(model: nn.Module, **options: object) -> tuple[torch.optim.Optimizer, mg.Geometry]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = {"step": None, "on_error": "raise", "fisher": None, "regularizers": mg.Regularizers.none()} | options
    return optimizer, mg.attach(model, optimizer, mg.GeometryConfig(**config))


def recorder(**options: object) -> mg.Geometry:
    return mg.attach(
        nn.Linear(1, 1), config=mg.GeometryConfig(hooks=False, fisher=None, top_k=2, on_error="raise", **options)
    )


@pytest.mark.filterwarnings("ignore:the regularizers .* reached no router:UserWarning")
@pytest.mark.parametrize("way", ["record", "part of the model", "no_grad"])
def test_nothing_grows_when_the_loss_is_never_asked_for(way):
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    model = build()
    optimizer, geometry = attached(model, regularizers=None, hooks=way != "record")
    counts = []
    for _ in range(6):
        for block in model.blocks:
            if way == "record":
                logits, _, ids = block.router(batch())
                geometry.record(f"layer{len(counts) % 2}", logits, ids)
                logits.sum().backward()
            elif way == "part of the model":
                block(batch()).sum().backward()
            else:
                with torch.no_grad():
                    model(batch())
        optimizer.step()
        optimizer.zero_grad()
        counts.append(tensors())
    assert counts[-1] <= counts[2] + 2


def test_a_detached_model_is_not_kept_alive():
    model = build()
    optimizer, geometry = attached(model, regularizers=Z, fisher="outputs")
    (token_loss(model(batch())) + geometry.loss()).backward()
    optimizer.step()
    geometry.detach()
    alive = weakref.ref(model.blocks[0])
    del model, geometry, optimizer
    gc.collect()
    assert alive() is None


def test_a_layer_whose_every_token_is_broken_is_seen():
    geometry = recorder()
    geometry.record("a", torch.full((4, E), math.nan))
    geometry.record("b", torch.randn(4, E))
    assert geometry.metrics()["geometry/non_finite"] == 1.0


def test_a_step_that_the_scaler_skips_does_not_weigh_more_than_the_next():
    """The traces of both have another scale; divided out, they add up like those of two micro-batches."""

    def run(overflow: bool) -> dict[str, float]:
        model = build(LinearGateBlock).float()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=overflow)
        config = mg.GeometryConfig(
            top_k=2, step=None, regularizers=mg.Regularizers.none(), grad_scaler=scaler if overflow else None
        )
        geometry = mg.attach(model, optimizer, config)
        for seed in (1, 2):
            loss = scaler.scale(token_loss(model(batch(seed=seed).float())))
            loss.backward()
            if overflow and seed == 1:
                model.head.weight.grad.fill_(math.inf)
            if overflow or seed == 2:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        return geometry.metrics()

    found, expected = run(True), run(False)
    assert found["geometry/fhs"] == pytest.approx(expected["geometry/fhs"], rel=1e-4)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (mg.Regularizers(fsi=0.0, balance=1.0), "does not show the experts chosen, which balance needs"),
        (mg.Regularizers(fsi=0.0, fhs=1.0), "does not show its gates, which fhs needs"),
        (mg.Regularizers(balance=1.0, balance_scope="sequence"), "does not show the experts chosen"),
    ],
)
@pytest.mark.parametrize("on_error", ["warn", "raise"])
@pytest.mark.filterwarnings("ignore:layer .* shows logits:UserWarning")
def test_what_a_regularizer_needs_and_does_not_get_is_an_error(weights, message, on_error):
    model = build(LinearGateBlock)
    _, geometry = attached(model, regularizers=weights, fisher="outputs", on_error=on_error)
    model(batch())
    with pytest.raises(RuntimeError, match=message):
        geometry.loss()
    geometry.detach()
    attached(model, regularizers=weights, fisher="outputs", on_error=on_error, inject=True)
    with pytest.raises(RuntimeError, match=message):
        model(batch())


def test_masks_of_whole_numbers():
    model = build()
    _, geometry = attached(model)
    found = []
    for mask in (padding("left"), padding("left").bool(), padding("left").float()):
        with geometry.tokens(mask):
            model(batch())
        geometry.step()
        geometry._after_step()
        found.append(geometry.metrics()["geometry/fsi"])
    assert found[0] == found[1] == found[2]
    recorded = recorder()
    logits = torch.randn(4, 3, E)
    for mask in (torch.tensor([[1, 0, 1]] * 4), torch.tensor([[True, False, True]] * 4)):
        recorded.record("a", logits, mask=mask)
        assert recorded.metrics()["geometry/fsi"] == pytest.approx(
            float(mg.fsi(logits[:, ::2].softmax(-1), normalized=True)), abs=1e-6
        )


def test_a_broken_token_does_not_break_the_loss():
    logits = torch.randn(6, E, dtype=torch.float64)
    logits[0], logits[1] = -math.inf, math.nan
    logits[2, 0] = -math.inf  # an expert that cannot be chosen is no broken token
    logits.requires_grad_()
    weights = mg.Regularizers(fsi=1.0, dispersion=1.0, information=1.0, z=1.0)
    reference = linearize(weights, LayerStatistics.of(torch.randn(9, E, dtype=torch.float64)))
    loss = additive_loss(LayerForward(layer="a", logits=logits), weights, reference)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert bool(loss.isfinite())
    assert bool(gradient.isfinite().all())
    assert not bool(gradient[:2].any())


def test_routers_that_are_unfrozen_and_frozen_on_the_way():
    model = build(LinearGateBlock)
    mg.geometrize(model)
    first, second = (block.gate.weight for block in model.blocks)
    first.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    geometry = mg.attach(model, optimizer, mg.GeometryConfig(top_k=2, step="riemannian", on_error="raise"))

    def step() -> list[float]:
        before = [w.detach().clone() for w in (first, second)]
        (token_loss(model(batch())) + geometry.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return [float(mg.PolarRows().dist(a, b.detach()).max()) for a, b in zip(before, (first, second), strict=True)]

    moved = step()
    assert moved[0] == 0
    assert moved[1] == pytest.approx(0.01 * math.sqrt(D))
    first.requires_grad_(True)
    second.requires_grad_(False)
    moved = step()
    assert 0 < moved[0] <= 0.011 * math.sqrt(D)  # geometry's step, no SGD's
    assert moved[1] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, o: mg.attach(m, mg.GeometryConfig()), "optimizer must be a torch.optim.Optimizer or a list of them"),
        (lambda m, o: mg.attach(m, o, {"top_k": 2}), "config must be a GeometryConfig, got dict"),
        (lambda m, o: mg.attach(m, [o, o]), "one of them is given twice"),
        (lambda m, o: mg.attach(m, torch.optim.lr_scheduler.StepLR(o, 1)), "optimizer must be a torch.optim.Optimizer"),
        (lambda m, o: mg.GeometryConfig(top_k=2.0), r"top_k must be a whole number of at least 1, got 2\.0"),
        (
            lambda m, o: mg.GeometryConfig(regularizers=mg.Regularizers),
            r"regularizers must be a Regularizers\(\.\.\.\)",
        ),
        (lambda m, o: mg.GeometryConfig(regularizers={"fsi": 1}), r"regularizers must be a Regularizers\(\.\.\.\) or"),
        (lambda m, o: mg.GeometryConfig(accumulation=4), r"accumulation is for injected gradients"),
        (lambda m, o: mg.GeometryConfig(accumulation=lambda: 4), r"accumulation is for injected gradients"),
        (lambda m, o: mg.GeometryConfig(grad_scaler=2.0), r"grad_scaler must be a torch\.amp\.GradScaler, got float"),
        (lambda m, o: mg.GeometryConfig(fisher=None, regularizers=mg.Regularizers(fhs=1.0)), "needs fisher='outputs'"),
        (lambda m, o: mg.GeometryConfig(router_lr=-1.0), "router_lr must be a factor of at least 0"),
    ],
)
def test_mistakes_in_the_configuration(call, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        call(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not any(m._forward_hooks for m in model.modules())


def test_nothing_that_is_given_is_ignored():
    model = build()
    _, geometry = attached(model)
    with pytest.raises(ValueError, match=r"set GeometryConfig\(num_domains"), geometry.tokens(domains=torch.zeros(8)):
        pass
    with pytest.raises(ValueError, match=r"layer blocks\.0\.router is tapped, recording it would count it twice"):
        geometry.record("blocks.0.router", torch.randn(3, E))
    with pytest.raises(ValueError, match=r"is watched already: detach\(\) the other attach first"):
        attached(model)
    with pytest.raises(ValueError, match=r"set GeometryConfig\(num_domains"):
        recorder().record("a", torch.randn(3, E), domains=torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("fisher", ["parameters", "minibatch"])
def test_traces_that_a_recorded_layer_cannot_have_are_said(fisher):
    model = nn.Linear(D, E)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = mg.GeometryConfig(hooks=False, fisher=fisher, step=None, regularizers=mg.Regularizers.none())
    geometry = mg.attach(model, optimizer, config)
    with pytest.warns(UserWarning, match=f"layer a is recorded: no FHS by {fisher}"):
        geometry.record("a", torch.randn(3, E), torch.zeros(3, 1, dtype=torch.long))


@pytest.mark.parametrize("way", ["view", "copy", "detached"])
def test_a_recorded_output_that_no_gradient_reaches_is_said_once(way):
    """What is recorded looks like the output, but the loss is computed from another tensor."""
    model, x = build(), batch()
    geometry = mg.attach(model, config=mg.GeometryConfig(hooks=False, on_error="raise"))

    def backward(recorded) -> dict[str, float]:
        for i, block in enumerate(model.blocks):
            logits, gates, ids = block.router(x)
            y = x + block.experts(x.reshape(-1, D), ids, gates).view_as(x)
            geometry.record(f"layer{i}", logits, ids, gates=gates, output=recorded(y))
            y.square().mean().backward()
        return geometry.metrics()

    wrong = {"view": lambda y: y.view(-1, D), "copy": torch.clone, "detached": torch.detach}[way]
    with pytest.warns(UserWarning, match=r"layer layer0: gradients reach its logits, but not the output") as caught:
        assert "geometry/fhs" not in backward(wrong)
    assert len(caught) == 1
    assert "geometry/fhs" not in backward(wrong)  # a second warning would be an error
    assert backward(lambda y: y)["geometry/fhs"] > 0


def test_a_recorded_output_is_not_missed_where_nothing_is_trained():
    model, x = build(), batch()
    geometry = mg.attach(model, config=mg.GeometryConfig(hooks=False, on_error="raise"))
    for with_graph in (True, False):
        with torch.set_grad_enabled(with_graph):
            logits, gates, ids = model.blocks[0].router(x)
            y = x + model.blocks[0].experts(x.reshape(-1, D), ids, gates).view_as(x)
        geometry.record("layer0", logits, ids, gates=gates, output=y)
        assert geometry.metrics()["geometry/fsi"] > 0


def test_states_that_do_not_fit():
    def stepped() -> tuple[Model, mg.Geometry]:
        model = build(LinearGateBlock)
        mg.geometrize(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        geometry = mg.attach(model, optimizer, mg.GeometryConfig(top_k=2))
        (token_loss(model(batch())) + geometry.loss()).backward()
        optimizer.step()
        return model, geometry

    _, geometry = stepped()
    state = geometry.state_dict()
    for change, message in (
        ({"format": 0}, "state has format 0, expected 2"),
        ({"experts": {"other": 4}}, "state is of layers"),
        ({"routers": {}}, "the state is of routers"),
        ({"sums": state["sums"][:-3]}, "another num_domains"),
        ({"sums": "text"}, "sums must be a Tensor or None, got str"),
        ({"experts": [4]}, "experts must be a Mapping, got list"),
        ({"routers": dict.fromkeys(state["routers"])}, r"routers\['block.*'\] must be a Mapping, got NoneType"),
        ({"numbers": {"margin": 1.0}}, r"numbers\['margin'\] must be a Tensor, got float"),
        ({"control": 3}, "control must be a Mapping or None, got int"),
    ):
        with pytest.raises(ValueError, match=message):
            stepped()[1].load_state_dict(state | change)
    with pytest.raises(ValueError, match="state lacks sums, sensitivities, routers"):
        stepped()[1].load_state_dict({"format": 2, "experts": {}})
    model = build(LinearGateBlock)
    watcher = mg.attach(model, config=mg.GeometryConfig(top_k=2))
    with pytest.raises(ValueError, match="holds the routers' steps: give attach the optimizer"):
        watcher.load_state_dict(state)


def test_an_auxiliary_loss_that_the_call_asks_for():
    class WithConfig(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = build()
            self.config = type("Config", (), {"output_router_logits": False, "aux_loss_coef": 0.02})()

        def forward(self, x: torch.Tensor, output_router_logits: bool | None = None) -> torch.Tensor:
            return self.model(x)

    model = WithConfig()
    model.config.text_config = type("Config", (), {"router_aux_loss_coef": 0.0})()
    model.config.output_router_logits = True
    model.config.aux_loss_coef = 0.0
    attached(model, regularizers=Z)[1].detach()  # a weight of 0 is none
    model.config.text_config.router_aux_loss_coef = 0.5
    with pytest.warns(UserWarning, match=r"router_aux_loss_coef=0\.5"):
        attached(model, regularizers=Z)[1].detach()
    model = WithConfig()
    attached(model, regularizers=Z)
    model(batch())
    model(batch(), output_router_logits=False)
    with pytest.warns(UserWarning, match=r"an auxiliary loss of its own.*aux_loss_coef=0\.02"):
        model(batch(), output_router_logits=True)
    model(batch(), output_router_logits=True)  # once


def _record(rank: int) -> None:
    logits = {name: torch.randn(8, E, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("ab")}
    geometry = recorder(per_layer=True)
    for name in ("ab", "ba")[rank]:
        geometry.record(name, logits[name])
    found = geometry.metrics()
    for name in "ab":
        expected = float(mg.fsi(logits[name].softmax(-1), normalized=True))
        assert found[f"geometry/{name}/fsi"] == pytest.approx(expected, abs=1e-6)


def test_ranks_may_record_their_layers_in_any_order(tmp_path):
    on_two_ranks(_record, tmp_path)
