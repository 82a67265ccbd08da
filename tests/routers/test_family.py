"""Router families: what a module does not show is said once, and reaches everything that needs it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.integrations.families import BLOCKS, FAMILIES, known_block, known_family
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


class PlainBlock(nn.Module):
    """A plain gate, as in transformers 4: what it does is said by the block. Beside it the gate of a shared expert."""

    def __init__(self, k: object = K) -> None:
        super().__init__()
        self.config = type("Config", (), {"chosen": k})()
        self.norm = False
        self.gate, self.shared_expert_gate = nn.Linear(D, E), nn.Linear(D, 1)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        gates, ids = self.gate(x).softmax(-1).topk(self.config.chosen)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return x + (gates[..., None] * outputs.gather(1, ids[..., None].expand(*ids.shape, D))).sum(1)


BY_BLOCK = mg.RouterFamily(router="Linear", block=PlainBlock, top_k="config.chosen", renormalize="norm")


def test_a_block_says_what_its_plain_gate_does():
    model, x = nn.Sequential(PlainBlock()), torch.randn(32, D)
    (site,) = mg.find_routers(model, ["*.gate"])
    assert site.routing == Routing()
    select = ["0.gate", BY_BLOCK]
    site = mg.find_routers(model, select)[0]
    assert (site.name, site.routing) == ("0.gate", Routing("softmax", "output", K, False))
    model[0].norm = True
    assert mg.find_routers(model, select)[0].routing.renormalize is True
    ids = model[0].gate(x).topk(K).indices
    load = ids.flatten().bincount(minlength=E) / ids.numel()
    config = mg.GeometryConfig(top_k=mg.find_routers(model, select)[0].routing.top_k, per_expert=True)
    geometry = mg.attach(model, config=config)
    model(x).square().mean().backward()
    found = geometry.metrics()
    assert [found[f"geometry/layer0/load/{e}"] for e in range(E)] == pytest.approx(load.tolist())


def test_a_family_by_block_is_of_that_block_alone():
    linear, block = nn.Linear(D, E), PlainBlock()
    assert BY_BLOCK.matches(linear, block)
    assert not BY_BLOCK.matches(linear, Block())
    assert not BY_BLOCK.matches(linear)
    assert not BY_BLOCK.matches(nn.Identity(), block)
    assert mg.RouterFamily(router=nn.Linear, block="PlainBlock").matches(linear, block)
    with pytest.raises(ValueError, match="block must be a module class or its name, got 3"):
        mg.RouterFamily(router="Linear", block=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"router 0\.gate \(Linear\) cannot be served: it has no whole number 'config"):
        mg.find_routers(nn.Sequential(PlainBlock("two")), ["0.gate", BY_BLOCK])
    wrong = mg.RouterFamily(router="Linear", block=PlainBlock, renormalize="config.chosen")
    with pytest.raises(ValueError, match=r"it has no flag 'config\.chosen' for renormalize"):
        mg.find_routers(nn.Sequential(PlainBlock()), ["0.gate", wrong])


def test_known_blocks_speak_for_their_router_and_not_for_other_gates():
    kind = type("MixtralSparseMoeBlock", (PlainBlock,), {})
    block = kind()
    block.top_k = 3
    model = nn.Sequential(block)
    assert mg.find_routers(model)[0].routing.top_k == 3
    assert [site.name for site in mg.find_routers(model)] == ["0.gate"]
    shared, gate = mg.find_routers(model, ["0.shared_expert_gate", "0.gate"])[::-1]
    assert (shared.name, shared.routing.top_k, gate.routing.top_k) == ("0.shared_expert_gate", None, 3)
    assert known_block(nn.Identity(), block) is None
    assert len({family.block for family in BLOCKS}) == len(BLOCKS)
