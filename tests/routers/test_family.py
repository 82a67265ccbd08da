"""Router families: what a module does not show is said once, and reaches everything that needs it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.integrations.families import FAMILIES, known_family
from moegeo_router.routers.family import Routing, common_routing

D, E, K = 8, 4, 2


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out, self.other = nn.Linear(D, E), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


class Odd(nn.Module):
    """Returns a mask (T, E) of integers and gates of the same shape, as NLLB's router does, beside its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.chosen, self.kind = Inner(), K, "sigmoid"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.inner(x)
        gates = logits.sigmoid()
        mask = torch.zeros_like(logits).scatter(-1, logits.topk(self.chosen).indices, 1.0)
        return mask.long(), gates * mask, logits


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd = Odd()
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        _, gates, _ = self.odd(x)
        return x + torch.stack([e(x) for e in self.experts], dim=-1).mul(gates[:, None]).sum(-1)


FAMILY = mg.RouterFamily(router=Odd, projection="inner.out", scores="sigmoid", top_k="chosen", renormalize=False)


def seen_by(model: nn.Module, x: Tensor, **options: object) -> dict[str, float]:
    geometry = mg.attach(model, config=mg.GeometryConfig(**options))  # type: ignore[arg-type]
    model(x).square().mean().backward()
    found = geometry.metrics()
    geometry.detach()
    return found


def test_a_family_of_ones_own_says_where_and_how():
    torch.manual_seed(0)
    model, x = Block(), torch.randn(32, D)
    (site,) = mg.geometrize(model, select=FAMILY)
    assert site.projection is model.odd.inner.out
    assert site.routing == Routing("sigmoid", "output", K, False)
    logits = model.odd.inner.out(x).detach()
    p = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    load = logits.topk(K).indices.flatten().bincount(minlength=E) / (K * len(x))
    found = seen_by(model, x, select=FAMILY)
    assert found["geometry/fsi"] == pytest.approx(float(mg.fsi(p.mean(0))) / mg.fsi_max(E), rel=1e-4)
    most = 2 * math.acos(math.sqrt(K / E))
    assert found["geometry/fsi_load"] == pytest.approx(float(mg.fsi(load)) / most, rel=1e-4)
    assert found["geometry/fhs"] > 0


def test_natural_steps_are_made_with_the_score_function_of_the_family():
    def stepped(scores: str | None, select: object) -> Tensor:
        torch.manual_seed(0)
        model, x = Block(), torch.randn(64, D)
        mg.geometrize(model, select=FAMILY)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        config = mg.GeometryConfig(select=select, scores=scores, regularizers=mg.Regularizers.none())  # type: ignore[arg-type]
        geometry = mg.attach(model, optimizer, config)
        for _ in range(3):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        geometry.detach()
        return model.odd.inner.out.weight.detach()

    known = stepped(None, FAMILY)
    assert torch.equal(known, stepped("sigmoid", FAMILY))
    assert not torch.allclose(known, stepped("softmax", FAMILY))


def test_the_optimizer_of_ones_own_knows_it_too():
    model, x = Block(), torch.randn(64, D)
    mg.geometrize(model, select=FAMILY)
    optimizer = mg.NaturalGradient(model, select=FAMILY)
    model(x).square().mean().backward()
    (stack,) = optimizer._stacks
    assert stack.rule._scores == "sigmoid"


def test_what_the_configuration_says_outranks_the_family():
    model = Block()
    geometry = mg.attach(model, config=mg.GeometryConfig(select=FAMILY, scores="softmax", gates="input", top_k=1))
    assert geometry.config.routing == Routing("softmax", "input", 1, False)
    geometry.detach()
    assert mg.GeometryConfig().routing == Routing()


def test_scores_may_be_told_from_the_module():
    family = mg.RouterFamily(router="Odd", projection="inner.out", scores=lambda router: router.kind)
    model = Block()
    assert mg.find_routers(model, family)[0].routing.scores == "sigmoid"
    model.odd.kind = "relu"
    with pytest.raises(ValueError, match=r"router odd \(Odd\) cannot be served: its scores are relu, neither"):
        mg.find_routers(model, family)


def test_what_does_not_fit_is_said():
    model = Block()
    with pytest.raises(ValueError, match=r"router odd \(Odd\) has no layer 'inner\.nothing'"):
        mg.find_routers(model, mg.RouterFamily(router=Odd, projection="inner.nothing"))
    with pytest.raises(ValueError, match="has no whole number 'many' for top_k"):
        mg.find_routers(model, mg.RouterFamily(router=Odd, projection="inner.out", top_k="many"))
    with pytest.raises(ValueError, match=r"router odd \(Odd\) cannot be served: it is odd"):
        mg.geometrize(model, select=mg.RouterFamily(router=Odd, refused="it is odd"))
    with pytest.raises(ValueError, match=r"select=RouterFamily\(.*selects no router"):
        mg.find_routers(model, [FAMILY, mg.RouterFamily(router="Other")])
    with pytest.raises(ValueError, match="scores must be 'softmax' or 'sigmoid'"):
        mg.RouterFamily(router=Odd, scores="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gates must be 'output' or 'input'"):
        mg.RouterFamily(router=Odd, gates="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="router must be a module class or its name"):
        mg.RouterFamily(router=Odd())  # type: ignore[arg-type]


def test_routers_that_differ_need_a_word():
    soft, sigmoid = Routing(), Routing(scores="sigmoid")
    assert common_routing([("a", soft), ("b", soft)]) == soft
    with pytest.raises(ValueError, match="router a has scores='softmax', router b scores='sigmoid': select routers"):
        common_routing([("a", soft), ("b", sigmoid)])
    model = nn.ModuleDict({"one": Block(), "two": nn.ModuleDict({"router": nn.Linear(D, E)})})
    select = [FAMILY, "two.router"]
    with pytest.raises(ValueError, match=r"router one\.odd has .*, router two\.router"):
        mg.attach(model, config=mg.GeometryConfig(select=select))
    geometry = mg.attach(model, config=mg.GeometryConfig(select=select, scores="sigmoid", top_k=K, renormalize=False))
    geometry.detach()


def test_the_table_of_known_families_has_each_once():
    names = [family.router for family in FAMILIES]
    assert len(names) == len(set(names))
    assert known_family(nn.Linear(D, E)) is None
    derived = type("Derived", (type("Llama4Router", (nn.Linear,), {}),), {})(D, E)
    assert known_family(derived).gates == "input"
