"""What a tap makes of the many ways in which code bases write an MoE layer."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moegeo_router as mg
from tests.support.moe import Block, D, E, Experts, L, LinearGateBlock, Model, batch, build, padding, token_loss


def watch(model: nn.Module, **options: object) -> mg.Geometry:
    return mg.attach(model, config=mg.GeometryConfig(**{"on_error": "raise"} | options))


def heterogeneity(block: nn.Module, x: Tensor, loss_of) -> float:
    """FHS by definition: gates and the gradient of the block's true output, in plain autograd."""
    _, gates, ids = block.router(x)
    y = x + block.experts(x.reshape(-1, D), ids, gates).view_as(x)
    (gradient,) = torch.autograd.grad(loss_of(y), y)
    squares = torch.zeros(len(ids), E, dtype=gates.dtype).scatter(1, ids, gates).square()
    return float(mg.fhs((squares * gradient.reshape(-1, D).square().sum(-1, keepdim=True)).sum(0).detach()))


class LogitsFirst(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, gates, ids = self.router(x)
        return logits, x + self.experts(x.reshape(-1, D), ids, gates).view_as(x)


class AuxFirst(LogitsFirst):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits, y = super().forward(x)
        return {"aux": logits.sum(), "router_logits": logits, "hidden": y}


@pytest.mark.parametrize(("kind", "of"), [(LogitsFirst, lambda r: r[1]), (AuxFirst, lambda r: r["hidden"])])
def test_the_output_is_the_hidden_state_wherever_it_stands(kind, of):
    torch.manual_seed(0)
    block = kind().double()
    expected = heterogeneity(block, batch(), token_loss)
    geometry = watch(nn.ModuleDict({"mlp": block}))
    token_loss(of(block(batch()))).backward()
    assert geometry.metrics()["geometry/fhs"] == pytest.approx(expected, rel=1e-9)


class Gating(nn.Module):
    """A small gating module around the linear layer, as many tutorials have it."""

    def __init__(self) -> None:
        super().__init__()
        self.wg = nn.Linear(D, E, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gating = mg.topk_gating(self.wg(x.reshape(-1, D)), 2, renormalize=False)
        return gating.weights, gating.ids


class GatingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gating = Gating()
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        gates, ids = self.gating(x)
        return x + self.experts(x.reshape(-1, D), ids, gates).view_as(x)

    def router(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.gating.wg(x.reshape(-1, D))
        gating = mg.topk_gating(logits, 2, renormalize=False)
        return logits, gating.weights, gating.ids


def test_the_block_is_the_one_that_holds_the_experts():
    torch.manual_seed(0)
    block = GatingBlock().double()
    expected = heterogeneity(block, batch(), token_loss)
    geometry = watch(nn.ModuleDict({"mlp": block}))
    token_loss(block(batch())).backward()
    assert geometry.layers == ("mlp.gating.wg",)
    assert geometry.metrics()["geometry/fhs"] == pytest.approx(expected, rel=1e-9)


class ScoresRouter(nn.Module):
    """Returns scores over all experts and never its logits."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = nn.Linear(D, E) if kind == "nested" else None
        if self.layer is None:
            self.weight = nn.Parameter(torch.randn(E, D))

    def forward(self, hidden: Tensor, again: bool = False) -> tuple[Tensor, Tensor]:
        logits = self.layer(hidden) if self.layer is not None else hidden @ self.weight.T
        p = logits.softmax(-1)
        top, ids = p.topk(2)
        if self.kind == "sparse":
            p = torch.zeros_like(p).scatter(-1, ids, top)
        return p, ids


@pytest.mark.parametrize("kind", ["softmax", "sparse", "nested"])
def test_scores_are_not_taken_for_logits(kind):
    torch.manual_seed(0)
    router = ScoresRouter(kind).double()
    geometry = watch(nn.ModuleDict({"router": router}), fisher=None)
    x = 2 * torch.randn(64, D, dtype=torch.float64)
    router(hidden=x)  # by keyword, too
    weight, bias = (router.layer.weight, router.layer.bias) if kind == "nested" else (router.weight, None)
    p = nn.functional.linear(x, weight, bias).detach().softmax(-1)
    assert geometry.metrics()["geometry/fsi_token"] == pytest.approx(float(mg.fsi_token(p)), rel=1e-9)


def test_scaled_logits_and_zero_logits_are_logits():
    class ScaledRouter(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, x: Tensor) -> Tensor:
            return 5 * (x @ self.weight.T)

    for weight in (torch.randn(E, D), torch.zeros(E, D)):
        router = ScaledRouter(weight)
        geometry = watch(nn.ModuleDict({"router": router}), fisher=None, top_k=2)
        x = torch.randn(64, D)
        p = router(x).detach().softmax(-1)
        assert geometry.metrics()["geometry/fsi_token"] == pytest.approx(float(mg.fsi_token(p)), abs=1e-6)


@pytest.mark.parametrize("experts", [1, 2, 4])
def test_all_experts_chosen(experts):
    """k = E and E = 1: the choices are integers (T, E) beside gates of the same shape."""

    class AllRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(experts, D))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = x @ self.weight.T
            gates, ids = logits.softmax(-1).topk(experts)
            return logits, gates, ids

    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = AllRouter()
            self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(experts))

        def forward(self, x: Tensor) -> Tensor:
            _, gates, ids = self.router(x)
            return sum(torch.where(ids == e, gates, 0).sum(-1, keepdim=True) * f(x) for e, f in enumerate(self.experts))

    block = All()
    geometry = watch(nn.ModuleDict({"mlp": block}))
    block(torch.randn(32, D)).square().mean().backward()
    found = geometry.metrics()
    assert (found["geometry/max_violation"], found["geometry/fsi_load"]) == (0, 0)
    assert found["geometry/fhs"] >= 0


class Positional(nn.Module):
    """Called with its mask by position, around a model that has no such argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.lm = model

    def forward(self, inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.lm(inputs)


class Wrapper(nn.Module):
    """Passes everything on, and names nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.lm = model

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.lm(**inputs)


def fsi_of(model: Model, keep: Tensor) -> float:
    x, found = batch(), []
    with torch.no_grad():
        for block in model.blocks:
            found.append(float(mg.fsi(block.router(x)[0].softmax(-1)[keep.flatten().bool()], normalized=True)))
            x = block(x)
    return sum(found) / 2


@pytest.mark.parametrize("way", ["position", "wrapper", "inner"])
def test_masks_are_found_however_they_are_passed(way):
    inner, mask = build(), padding("left")
    expected = fsi_of(inner, mask)
    model = {"position": Positional, "wrapper": Wrapper, "inner": Wrapper}[way](inner)
    geometry = watch(model)
    if way == "position":
        model(batch(), mask)
    elif way == "wrapper":
        model(x=batch(), attention_mask=mask)
    else:
        inner(batch(), attention_mask=mask)
    assert geometry.metrics()["geometry/fsi"] == pytest.approx(expected, abs=1e-9)


class Sides(nn.Module):
    """An encoder and a decoder; the decoder is called without a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Model(), Model()

    def forward(self, x: Tensor, y: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.encoder(x).sum() + self.decoder(y).sum()


@pytest.mark.parametrize("length", [3, L])
def test_the_encoders_mask_says_nothing_of_the_decoder(length):
    torch.manual_seed(0)
    model = Sides().double()
    geometry = watch(model, fisher=None)
    model(batch(), batch(seed=2)[:, :length], attention_mask=padding("right"))
    geometry.metrics()
    counted = geometry.state_dict()
    sums = dict(zip(counted["experts"], counted["sums"].split(len(counted["sums"]) // 4), strict=False))
    assert {int(s[0]) for name, s in sums.items() if name.startswith("encoder")} == {int(padding("right").sum())}
    assert {int(s[0]) for name, s in sums.items() if name.startswith("decoder")} == {8 * length}


def test_forwards_under_no_grad_are_not_counted():
    """Generation or a reference model's pass in train mode: other shapes, no gradient, and no part in training."""
    model = build(reentrant=False)
    geometry = watch(model)
    expected = build(reentrant=False)
    other = watch(expected)
    loss = token_loss(model(batch(), attention_mask=padding("left")))
    with torch.no_grad():  # between a forward and its backward pass
        model(batch(rows=3, seed=5)[:, :2], attention_mask=torch.ones(3, 11))
    loss.backward()
    token_loss(expected(batch(), attention_mask=padding("left"))).backward()
    assert geometry.metrics() == other.metrics()


def test_reentrant_checkpointing_with_an_evaluation_between_forward_and_backward():
    found = []
    for between in (False, True):
        model = build(reentrant=True)
        geometry = watch(model)
        loss = token_loss(model(batch(), attention_mask=padding("left")))
        if between:
            model.eval()
            model(batch(rows=3)[:, :2])
            model.train()
        loss.backward()
        found.append(geometry.metrics())
    assert found[0] == found[1]
    assert "geometry/fhs" in found[0]


def test_gates_that_are_scores_of_another_kind_are_said():
    class SigmoidRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(E, D))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = x @ self.weight.T
            gating = mg.topk_gating(logits, 2, scores="sigmoid")
            return logits, 2.5 * gating.weights, gating.ids  # scaled, as DeepSeek's are

    x = 3 * torch.randn(64, D)
    for scores in ("softmax", "sigmoid"):
        router = SigmoidRouter()
        watch(nn.ModuleDict({"router": router}), fisher=None, scores=scores)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            router(x)
            router(x)
        said = [str(w.message) for w in caught]
        assert len(said) == (scores == "softmax")
        assert all("set GeometryConfig(scores='sigmoid')" in message for message in said)


def test_what_any_layer_does_not_show_is_said():
    model = build()
    model.blocks[1] = LinearGateBlock().double()
    watch(model)
    with pytest.warns(UserWarning, match=r"layer blocks\.1\.gate shows logits, not the experts chosen"):
        model(batch())


def test_a_router_that_is_trained_and_never_seen_is_said():
    class Functional(LinearGateBlock):
        def forward(self, x: Tensor) -> Tensor:
            logits = nn.functional.linear(x, self.gate.weight)
            return x + logits.softmax(-1)[..., :1] * self.experts[0](x)

    model = build()
    model.blocks[1] = Functional().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"step": None, "on_error": "raise"}
    geometry = mg.attach(model, optimizer, mg.GeometryConfig(regularizers=mg.Regularizers.none(), **options))
    token_loss(model(batch())).backward()
    with pytest.warns(UserWarning, match=r"routers blocks\.1\.gate have gradients, but no training forward"):
        optimizer.step()
    token_loss(model(batch())).backward()
    optimizer.step()  # once
    geometry.detach()
    geometry = mg.attach(model, optimizer, mg.GeometryConfig(regularizers=mg.Regularizers(z=1.0), **options))
    (token_loss(model(batch())) + geometry.loss()).backward()
    with pytest.raises(RuntimeError, match=r"reached no router of blocks\.1\.gate: no training forward of theirs"):
        optimizer.step()


def test_a_model_in_eval_mode_with_regularizers_asked_for_is_an_error():
    model = build().eval()  # as from_pretrained returns it
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    geometry = mg.attach(model, optimizer, mg.GeometryConfig(step=None, regularizers=mg.Regularizers(fsi=1.0)))
    (token_loss(model(batch())) + geometry.loss()).backward()
    with pytest.raises(RuntimeError, match="the model in eval mode"):
        optimizer.step()


def test_a_model_that_is_checkpointed_as_a_whole():
    model, plain, mask = build(), build(), padding("left")
    geometry, other = watch(model), watch(plain)
    y = checkpoint(lambda x: model(x, attention_mask=mask), batch(), use_reentrant=False)
    token_loss(y).backward()
    token_loss(plain(batch(), attention_mask=mask)).backward()
    assert geometry.metrics() == pytest.approx(other.metrics())
