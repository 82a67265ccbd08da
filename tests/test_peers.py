"""Bugs that users of other systems met; here each is a test that ours does not have it.

Invariance to ranks, accumulation, padding and checkpointing, where most of them are, is ``test_invariance.py``.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.losses import additive_loss, linearize, load_balance
from moegeo_router.observe import LayerForward, LayerStatistics
from tests.support.moe import Block, D, E, Model, batch, build, token_loss


def pair_collapse(pair: int, tokens: int = 32, experts: int = 8) -> LayerForward:
    """All tokens go to experts 2·pair and 2·pair + 1, in equal parts."""
    logits = torch.full((tokens, experts), -60.0)
    logits[:, 2 * pair : 2 * pair + 2] = 0.0
    return LayerForward(layer=f"layer{pair}", logits=logits, ids=logits.topk(2).indices)


def test_collapse_of_every_layer_on_another_pair_is_not_balance():
    """transformers#28255, #31464: counts pooled over layers read 2.0 (their scale), as if uniform; per layer 8.0."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers = [pair_collapse(pair) for pair in range(4)]
    pooled = load_balancing_loss_func(tuple(seen.logits for seen in layers), num_experts=8, top_k=2)
    assert float(pooled) == pytest.approx(2.0, rel=1e-3)  # the trap: their uniform is 2.0, too
    ours = [float(load_balance(seen, seen.logits.softmax(-1))) for seen in layers]
    assert ours == pytest.approx([4.0] * 4, rel=1e-3)  # 1 would be balanced
    geometry = mg.attach(nn.Linear(1, 1), config=mg.GeometryConfig(hooks=False, fisher=None))
    for seen in layers:
        geometry.record(seen.layer, seen.logits, seen.ids)
    assert geometry.metrics()["geometry/max_violation"] == pytest.approx(3.0)


def test_the_gradient_reaches_the_router():
    """Automodel#1408: an auxiliary loss whose gradient never got there."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    weights = mg.Regularizers(fsi=1.0, balance=1.0, balance_scope="micro_batch")
    geometry = mg.attach(model, optimizer, mg.GeometryConfig(step=None, regularizers=weights))
    for _ in range(2):
        optimizer.zero_grad()
        model(batch())
        geometry.loss().backward()
        optimizer.step()
    assert all(float(block.router.weight.grad.abs().max()) > 1e-6 for block in model.blocks)


class SoftmaxFirstRouter(nn.Module):
    """A router that returns probabilities before its logits, as some versions and families do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = x @ self.weight.T
        probabilities = logits.softmax(-1)
        gates, ids = probabilities.topk(2)
        return probabilities, logits, gates, ids


def test_no_double_softmax():
    """transformers#45111: probabilities taken for logits, so that collapse looked mild."""
    router = SoftmaxFirstRouter()
    model = nn.ModuleDict({"router": router})
    geometry = mg.attach(model, config=mg.GeometryConfig(fisher=None, on_error="raise"))
    x = 3 * torch.randn(64, D)
    logits = router(x)[1].detach()
    found = geometry.metrics()["geometry/fsi_token"]
    assert found == pytest.approx(float(mg.fsi_token(logits.softmax(-1))), abs=1e-6)
    assert abs(found - float(mg.fsi_token(logits.softmax(-1).softmax(-1)))) > 0.1


def test_no_epsilon_in_normalised_sigmoid_scores():
    """Megatron#1545: scores over Σ + 1e-20, which underflows or biases where all scores are tiny."""
    logits = torch.tensor([[-100.0, -101.0, -102.0]])
    gating = mg.topk_gating(logits, 2, scores="sigmoid")
    expected = torch.tensor([[1.0, math.exp(-1)]]) / (1 + math.exp(-1))
    torch.testing.assert_close(gating.weights, expected)
    sums = LayerStatistics.of(logits, gating.ids, scores="sigmoid", gates=gating.weights)
    assert float(sums.p.sum()) == pytest.approx(1.0)


def test_no_nan_at_perfect_balance():
    """vmoe#218: the gradient of a coefficient of variation is NaN where it is 0."""
    logits = torch.zeros(8, 4, requires_grad=True)
    seen = LayerForward(layer="a", logits=logits, ids=torch.arange(4).repeat(2).reshape(8, 1))
    weights = mg.Regularizers(fsi=1.0, dispersion=1.0, information=1.0, balance=1.0)
    reference = linearize(weights, LayerStatistics.of(logits.detach(), seen.ids))
    additive_loss(seen, weights, reference).backward()
    assert bool(logits.grad.isfinite().all())


def test_micro_batches_may_specialize_while_the_global_batch_is_balanced():
    """Megatron#1498, torchtitan#4772: balance of micro-batches fights specialization on domains."""
    halves = [torch.full((16, 4), -9.0), torch.full((16, 4), -9.0)]
    halves[0][:, :2], halves[1][:, 2:] = 0.0, 0.0
    halves[0][::2, 0], halves[1][::2, 2] = 1.0, 1.0
    parts = [
        LayerForward(layer="a", logits=h.requires_grad_(), ids=(2 * i + torch.arange(2)).expand(16, 2))
        for i, h in enumerate(halves)
    ]
    sums = [LayerStatistics.of(seen.logits.detach(), seen.ids) for seen in parts]

    def gradient(scope: str) -> float:
        weights = mg.Regularizers(fsi=0.0, balance=1.0, balance_scope=scope)
        loss = additive_loss(parts[0], weights, linearize(weights, sums[0] + sums[1]))
        return float(torch.autograd.grad(loss, parts[0].logits)[0].abs().max())

    assert gradient("global") < 1e-7  # each expert has a quarter of the global batch
    assert gradient("micro_batch") > 1e-6


def test_packed_sequences_and_their_padding():
    """Megatron#2121: packed sequences polluted the counts; a sequence loss must know where each begins."""
    model = build()
    segments = torch.tensor([[1, 1, 2, 2, 0]] * 4 + [[1, 2, 2, 3, 3]] * 4)

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, segment_ids: Tensor | None = None) -> Tensor:
            return self.model(x)

    packed = Packed()
    weights = mg.Regularizers(fsi=0.0, balance=1.0, balance_scope="sequence")
    geometry = mg.attach(packed, config=mg.GeometryConfig(regularizers=weights, on_error="raise"))
    packed(batch(), segment_ids=segments)
    loss, expected = geometry.loss(), 0.0
    loss.backward()
    metrics = geometry.metrics()
    x, fsi = batch(), 0.0
    numbers = torch.arange(8)[:, None] * 10 + segments
    with torch.no_grad(), geometry.pause():
        for block in model.blocks:
            logits, _, ids = block.router(x)
            p, of = logits.softmax(-1), numbers.flatten()
            losses = [
                E
                * (
                    torch.bincount(ids[of == n].flatten(), minlength=E) / ids[of == n].numel() * p[of == n].mean(0)
                ).sum()
                for n in of[segments.flatten() > 0].unique()
            ]
            expected += float(torch.stack(losses).mean())
            fsi += float(mg.fsi(p[segments.flatten() > 0], normalized=True)) / 2
            x = block(x)
    assert float(loss.detach()) == pytest.approx(expected)
    assert metrics["geometry/fsi"] == pytest.approx(fsi, abs=1e-6)


def test_evaluation_in_between_is_not_counted():
    """torchtitan#4148: tokens of a validation leaked into the counters of the training."""
    model = build()
    geometry = mg.attach(model, config=mg.GeometryConfig(on_error="raise"))
    model(batch())
    model.eval()
    model(batch(seed=9))
    model.train()
    with geometry.pause():
        model(batch(seed=9))
    after = geometry.metrics()
    model(batch())
    assert geometry.metrics()["geometry/fsi"] == pytest.approx(after["geometry/fsi"])


def test_the_routing_of_a_recomputed_forward_is_that_of_the_first():
    """Automodel#3247: activation checkpointing routed other experts on recompute. Watching must not be why."""
    seen: list[Tensor] = []

    class Spy(Block):
        def forward(self, x: Tensor) -> Tensor:
            _, gates, ids = self.router(x)
            seen.append(ids)
            return x + self.experts(x.reshape(-1, D), ids, gates).view_as(x)

    model = build(Spy, reentrant=False)
    mg.attach(model, config=mg.GeometryConfig(on_error="raise"))
    token_loss(model(batch())).backward()
    first, second, *again = seen
    assert len(again) == 2
    assert torch.equal(again[0], second)  # the backward pass begins with the last block
    assert torch.equal(again[1], first)


def test_top_1_with_renormalised_gates_is_said():
    """Megatron#894, minimind#858: the router gets no gradient and nothing says so."""

    class Top1Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(E, D))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = x @ self.weight.T
            gates, ids = logits.softmax(-1).topk(1)
            return logits, gates / gates.sum(-1, keepdim=True), ids

    model = nn.ModuleDict({"router": Top1Router()})
    mg.attach(model, config=mg.GeometryConfig(fisher=None, on_error="raise"))
    with pytest.warns(UserWarning, match="layer router: top-1 gates that are renormalised are exactly 1"):
        model["router"](torch.randn(3, D))


def test_no_graph_break_in_the_router():
    """prime-rl#996, pytorch#117628. (Of statistics and losses: ``test_losses.py``.)"""
    router = mg.GeometricRouter(D, E)

    def step(x: Tensor) -> Tensor:
        gating = mg.topk_gating(router(x), 2)
        return (gating.weights * gating.ids).sum() + gating.probs.square().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, D)
    torch.testing.assert_close(compiled(x), step(x))
    torch.compiler.reset()


def test_few_keys_by_default_and_the_rest_behind_flags():
    """Automodel#1418: per-expert logging flooded the dashboards."""

    def keys(**options: object) -> set[str]:
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        config = mg.GeometryConfig(step=None, num_domains=2, on_error="raise", **options)
        geometry = mg.attach(model, optimizer, config)
        for _ in range(2):
            with geometry.tokens(domains=torch.arange(8) % 2):
                output = model(batch())
            (token_loss(output) + geometry.loss()).backward()
            optimizer.step()
        return set(geometry.metrics())

    plain = keys()
    assert len(plain) <= 20
    assert {"geometry/fsi", "geometry/fhs", "geometry/fsi_domain", "geometry/regularizer"} <= plain
    layers = keys(per_layer=True)
    assert {"geometry/layer0/fhs", "geometry/layer1/fsi"} <= layers
    experts = keys(per_expert=True)
    assert experts - plain == {
        f"geometry/layer{i}/{n}/{e}" for i in range(2) for n in ("load", "p", "trace") for e in range(E)
    }


def test_all_k_choices_count():
    """moewatch 0.1.0: first choices only, a max/mean of 7.1 where E/k = 4 is the maximum."""
    seen = pair_collapse(0)
    geometry = mg.attach(nn.Linear(1, 1), config=mg.GeometryConfig(hooks=False, fisher=None))
    geometry.record("a", seen.logits, seen.ids)
    assert geometry.metrics()["geometry/max_violation"] == pytest.approx(8 / 2 - 1)


def test_everything_can_be_switched_off():
    """NeMo-RL#3169: auxiliary losses can hurt; without them training is bit-identical to no geometry at all."""

    def run(watched: bool) -> Model:
        model = build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if watched:
            mg.attach(model, optimizer, mg.GeometryConfig(step=None, regularizers=mg.Regularizers.none()))
        for seed in range(3):
            token_loss(model(batch(seed=seed))).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    for p, q in zip(run(True).parameters(), run(False).parameters(), strict=True):
        assert torch.equal(p, q)


def test_statistics_are_fp32_or_better_whatever_the_model_is():
    """Router precision: of bf16 logits nothing more is lost than their own rounding."""
    logits = 3 * torch.randn(512, 16)
    low = logits.bfloat16()
    exact, rounded = LayerStatistics.of(low.double()), LayerStatistics.of(low)
    torch.testing.assert_close(rounded.flat(), exact.flat(), rtol=1e-5, atol=1e-4)
    half = LayerStatistics.of(logits)
    for name in ("p", "root_p", "entropy"):
        torch.testing.assert_close(getattr(rounded, name), getattr(half, name), rtol=2e-2, atol=0.5)
