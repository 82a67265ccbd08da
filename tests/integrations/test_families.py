"""Every family of transformers that has a router: converted, stepped and measured.

What is expected comes from hooks and mathematics of the tests' own (``tests.support.witness``).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.optim.takeover import RouterSteps
from tests.support import tiny_transformers as tiny
from tests.support.families import (
    LR,
    attach,
    blind,
    close,
    families,
    four,
    known_warnings,
    names_of,
    router_gradients,
    routing,
    same,
)
from tests.support.tiny_families import FAMILIES
from tests.support.tiny_transformers import backward, batch, gradients, run
from tests.support.witness import Call, fsi_of, hooks_of, logits_of, mask_of, p_of, router_names, traces_of, witness

pytest.importorskip("transformers")


@families
def test_conversion_changes_nothing_and_is_undone(stock, family):
    model, before = stock(family).copy(), stock(family)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [(type(p), sorted(vars(p))) for p in model.parameters()]
    sites = mg.geometrize(model)
    assert [site.name for site in sites] == list(router_names(model))
    assert all(mg.routers.manifold_of(site.weight) is not None for site in sites)
    assert torch.equal(backward(model), before.output)
    assert same(gradients(model), before.gradients)
    assert any(g.any() for g in router_gradients(model).values())
    assert same(model.state_dict(), values)
    mg.export(model)
    assert [(type(p), sorted(vars(p))) for p in model.parameters()] == kinds
    assert torch.equal(backward(model), before.output)


def polar_step(weight: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """Return where the first Riemannian Adam step of polar rows leads, by hand: the exponential map of a unit step."""
    w, g = weight.double(), gradient.double()
    r = w.norm(dim=-1, keepdim=True)
    natural = r.square() * g
    u = -lr * math.sqrt(w.shape[-1]) * natural / (natural.norm(dim=-1, keepdim=True) / r + 1e-8)
    mu = w / r
    along = (mu * u).sum(dim=-1, keepdim=True) / r
    across = u / r - along * mu
    angle = across.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return (r * along.exp() * (angle.cos() * mu + angle.sin() / angle * across)).float()


@families
def test_a_step_moves_the_routers_by_geometry_alone_and_the_rest_as_before(stock, family):
    twin, model, still = (stock(family).copy() for _ in range(3))
    plain = torch.optim.AdamW(twin.parameters(), lr=LR)
    backward(twin)
    plain.step()
    mg.geometrize(model)
    mg.geometrize(still)
    for stepped, factor in ((model, 1.0), (still, 0.0)):
        optimizer = torch.optim.AdamW(stepped.parameters(), lr=LR)
        with known_warnings(family):
            geometry = attach(stepped, optimizer, step="riemannian", router_lr=factor)
            backward(stepped)
            optimizer.step()
        geometry.detach()
    start, theirs, routers = stock(family).model.state_dict(), twin.state_dict(), set(router_names(model).values())
    moved = 0
    for name, value in model.state_dict().items():
        if name not in routers:
            assert torch.equal(value, theirs[name]), name
            continue
        gradient = stock(family).gradients.get(name)
        assert torch.equal(still.state_dict()[name], start[name])
        if gradient is None or not gradient.any():
            assert torch.equal(value, start[name])
            continue
        moved += 1
        assert not torch.allclose(value, theirs[name], rtol=0, atol=LR / 10)
        torch.testing.assert_close(value, polar_step(start[name], gradient, LR), rtol=1e-4, atol=2e-5)
    assert moved


@families
def test_a_natural_step_moves_the_routing_within_its_limit_or_falls_back(stock, family):
    limit, model = 0.02, stock(family).copy()
    mg.geometrize(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    with known_warnings(family):
        geometry = attach(model, optimizer, natural=mg.NaturalConfig(limit=limit), per_layer=True)
        with witness(model) as calls:
            backward(model)
        before = {name: routing(model, name, call, family) for name, call in calls.items()}
        optimizer.step()
    steps = geometry._steps
    assert isinstance(steps, RouterSteps)
    assert {steps.is_natural(name) for name in steps.names} == {not falls_back(family)}
    if falls_back(family):
        return
    moved = []
    for name, call in calls.items():
        after = routing(model, name, call, family)
        kl = (before[name] * (before[name] / after).log()).sum(dim=-1)[mask_of(batch(model), name)].mean()
        assert float(kl) <= limit**2 / 2 * 1.02
        moved.append(math.sqrt(max(2 * float(kl), 0.0)))
    assert max(moved) > limit / 100
    close({"movement": geometry.metrics()["geometry/movement"]}, {"movement": sum(moved) / len(moved)}, rel=0.02)


def falls_back(family: str) -> bool:
    return any("x Wᵀ" in message for message in FAMILIES[family].warns)


@families
def test_metrics_are_those_of_the_experts_that_were_called(stock, family):
    model = stock(family).copy()
    with known_warnings(family):
        geometry = attach(model, per_layer=True, per_expert=True)
        assert geometry.config.scores == FAMILIES[family].scores
        for masked in (False, True):
            with witness(model) as calls:
                backward(model, masked)
            found = geometry.metrics()
            assert len(calls) == len({key.split("/")[1] for key in found if key.endswith("/p/0")})
            for name, call in calls.items():
                check_layer(found, model, name, call, family, masked)


def check_layer(found: dict[str, float], model: nn.Module, name: str, call: Call, family: str, masked: bool) -> None:
    short = next(s for n, s in names_of(model, found).items() if n == name)
    kept = mask_of(batch(model, masked), name)
    p = routing(model, name, call, family)[kept].mean(dim=0)
    close({key: found[f"geometry/{short}/p/{key}"] for key in range(len(p))}, dict(enumerate(p.tolist())))
    close({"fsi": found[f"geometry/{short}/fsi"]}, {"fsi": fsi_of(p)}, rel=1e-3)
    counts = call.counts
    if masked:
        counts = None if call.ids is None else torch.bincount(call.ids[kept].flatten(), minlength=len(p)).float()
    else:
        assert counts is not None
        assert counts.sum() == len(call.x) * FAMILIES[family].top_k
    if blind(family):
        assert f"geometry/{short}/load/0" not in found
    elif counts is not None:
        load = counts / counts.sum()
        close({key: found[f"geometry/{short}/load/{key}"] for key in range(len(p))}, dict(enumerate(load.tolist())))

    traces = traces_of(call, kept)
    assert traces is not None or family in _NO_GATES or four()
    if traces is not None:
        share = traces / traces.sum()
        close({e: found[f"geometry/{short}/trace/{e}"] for e in range(len(p))}, dict(enumerate(share.tolist())))


@pytest.mark.parametrize("family", ["SwitchTransformers", "NllbMoe"])
def test_encoder_and_decoder_are_apart(stock, family):
    model = stock(family).copy()
    geometry = attach(model, per_layer=True, per_expert=True)
    backward(model)
    names = names_of(model, geometry.metrics())
    assert len(names) == len(router_names(model))
    for name, short in names.items():
        assert short.split(".")[0] == next(side for side in ("encoder", "decoder") if side in name)


@families
def test_gates_say_which_scores_they_are(stock, family):
    """A wrong word in the table of families would not fit the gates that the modules themselves return."""
    model = stock(family).copy()
    config = mg.GeometryConfig().for_routers(mg.find_routers(model))
    with witness(model) as calls:
        run(model, masked=False)
    for name, call in calls.items():
        z = logits_of(model, name, call, FAMILIES[family])
        fitting = [s for s in ("softmax", "sigmoid") if gates_fit(call, z, s)]
        assert fitting == ([config.scores] if family != "Phimoe" else []) or call.gates is None
        assert call.gates is not None or (family in _NO_GATES or four())
        if family == "Llama4Text":
            weights = next(t for t in call.outputs if float(t.double().reshape(z.shape).sub(z).abs().max()) > 0.1)
            torch.testing.assert_close(weights.amax(dim=-1).double(), z.amax(dim=-1).sigmoid(), rtol=1e-5, atol=1e-6)
            assert config.gates == "input"


@pytest.mark.skipif(four(), reason="its routers return other things")
@pytest.mark.parametrize(("family", "output"), [("SwitchTransformers", 1), ("NllbMoe", 1), ("Llama4Text", 0)])
def test_gates_that_are_computed_sum_to_what_those_of_the_model_do(family, output):
    model = tiny.build(family)
    site, sums = mg.find_routers(model)[0], []
    site.module.register_forward_hook(lambda module, args, found: sums.append(found[output].sum(dim=-1).flatten()))
    run(model, masked=False)
    assert torch.allclose(sums[0], torch.ones(()), atol=1e-5) == site.routing.renormalize


# Their experts are not called with the choices and their weights.
_NO_GATES = ("JetMoe", "Llama4Text", "NllbMoe", "SwitchTransformers")


def gates_fit(call: Call, z: Tensor, scores: str) -> bool:
    if call.gates is None or call.ids is None:
        return False
    chosen = p_of(z, scores).gather(-1, call.ids)
    share = call.gates.double() / call.gates.double().sum(dim=-1, keepdim=True)
    return torch.allclose(chosen / chosen.sum(dim=-1, keepdim=True), share, rtol=0, atol=1e-4)


@families
def test_half_precision_is_measured_as_if_in_full(stock, family, tmp_path):
    stock(family).model.save_pretrained(tmp_path)
    model = type(stock(family).model).from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    with known_warnings(family):
        geometry = attach(model, per_layer=True, per_expert=True)
        with witness(model) as calls:
            backward(model)
    found = geometry.metrics()
    short = names_of(model, found)
    for name, call in calls.items():
        p = routing(model, name, call, family)[mask_of(batch(model), name)].mean(dim=0)
        ours = torch.tensor([found[f"geometry/{short[name]}/p/{e}"] for e in range(len(p))], dtype=torch.float64)
        # Logits of half precision are off by up to 2⁻⁹ of their size.
        torch.testing.assert_close(ours, p, rtol=0, atol=4e-3)
        close({"fsi": found[f"geometry/{short[name]}/fsi"]}, {"fsi": fsi_of(ours)}, rel=1e-3)


@pytest.mark.skipif(four(), reason="transformers 5 has them")
@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (
            "Zaya",
            r"router model\.layers\.0\.mlp\.gate \(ZayaRouter\) cannot be served: it is an MLP that hands a state",
        ),
        ("Doge", r"router model\.layers\.0\.mlp \(DogeCDMoE\) cannot be served: it looks experts up by product keys"),
        ("InklingText", r"mlp\.gate \(InklingTopkRouter\) cannot be served: its weight has rows for shared experts"),
        ("Inkling2Text", r"mlp\.gate \(Inkling2TopKRouter\) cannot be served: its scores are sqrtsoftplus, neither"),
        ("DeepseekV4", r"mlp\.gate \(DeepseekV4HashRouter\) cannot be served: its scores are sqrtsoftplus, neither"),
    ],
)
def test_families_that_cannot_be_served_are_refused_and_left_alone(family, reason):
    model = tiny.build(family, **({"scoring_func": "sqrtsoftplus"} if family == "Inkling2Text" else {}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks, kinds = hooks_of(model), [type(p) for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for refused in (mg.geometrize, mg.attach, lambda m: mg.attach(m, optimizer), mg.NaturalGradient):
        with pytest.raises(ValueError, match=reason):
            refused(model)
        assert same(model.state_dict(), before)
        assert hooks_of(model) == hooks
        assert [type(p) for p in model.parameters()] == kinds
        assert not optimizer._optimizer_step_pre_hooks
