"""The routers of others: against their formulas by hand, and the hashes against what they promise."""

import functools
import math

import pytest
import torch
from torch import nn

import moegeo_router as mg
from moegeo_router.routers import topk_gating
from trainers.models import LanguageModel, VisionModel
from trainers.models.moe import MoELayer
from trainers.models.routers import CosineRouter, FrozenRouter, HashRouter, balanced_hashes
from trainers.optimizers import adamw

SIZES = {"dim": 16, "layers": 2, "heads": 2, "num_experts": 4, "top_k": 2, "expert_hidden": 8}


def hash_of(counts, k=2):
    return lambda dim, experts: HashRouter(dim, experts, top_k=k, id_counts=torch.as_tensor(counts))


# --- cosine -----------------------------------------------------------------------------------------------------------


def test_cosine_scores_by_hand():
    torch.manual_seed(0)
    router = CosineRouter(6, 3, proj_dim=2)
    router.requires_grad_(False)
    x, scale = torch.randn(5, 6), 2.0  # 1 / 0.5
    logits = router(x)
    for t in range(5):
        a = router.projection.weight @ x[t] + router.projection.bias
        for e in range(3):
            b = router.weight[e]
            cosine = sum(float(a[i] * b[i]) for i in range(2)) / math.sqrt(float(a @ a) * float(b @ b))
            assert float(logits[t, e]) == pytest.approx(scale * cosine, abs=1e-5)
    assert float(logits.abs().max()) <= scale


def test_the_length_of_tokens_and_embeddings_has_no_effect_where_there_is_no_bias():
    router = CosineRouter(8, 4, bias=False)
    x = torch.randn(5, 8)
    before = router(x)
    with torch.no_grad():
        router.weight.mul_(torch.tensor([[0.1], [1.0], [7.0], [300.0]]))
    torch.testing.assert_close(router(50 * x), before)


def test_the_scale_is_learnt_and_clamped():
    router = CosineRouter(8, 4)
    router(torch.randn(5, 8)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in router.parameters())
    with torch.no_grad():
        router.log_scale.fill_(50.0)
    largest = router(torch.randn(1000, 8)).detach().abs().max()
    assert 50 < float(largest) <= 100.001
    assert float(CosineRouter(8, 4, init_temperature=0.07).log_scale.detach().exp()) == pytest.approx(1 / 0.07)


@pytest.mark.parametrize(("dim", "wanted"), [(96, 48), (4096, 256), (1, 1)])
def test_the_default_width(dim, wanted):
    assert CosineRouter(dim, 8).projection.out_features == wanted


def test_cosines_are_not_rounded_under_autocast():
    router = CosineRouter(64, 8)
    x = torch.randn(100, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(x), router(x.float()))
        assert router(x).dtype is torch.float32
    assert router(x.bfloat16()).dtype is torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proj_dim": 0}, "proj_dim must be at least 1, got 0"),
        ({"init_temperature": 0.0}, "init_temperature"),
        ({"init_temperature": 0.005}, "init_temperature"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CosineRouter(8, 4, **options)


def test_the_learning_rate_of_routers_is_that_of_the_projection_too():
    model = LanguageModel(11, CosineRouter, **SIZES, length=12)
    groups = adamw(model, lr=1e-3, router_lr=5e-2).param_groups
    (routers,) = [group for group in groups if group["lr"] == 5e-2]
    wanted = {id(p) for m in model.modules() if isinstance(m, CosineRouter) for p in (m.weight, m.projection.weight)}
    assert {id(p) for p in routers["params"]} == wanted


# --- frozen -----------------------------------------------------------------------------------------------------------


def test_a_frozen_router_is_the_linear_one_without_a_gradient_of_its_own():
    torch.manual_seed(0)
    frozen = FrozenRouter(8, 4)
    torch.manual_seed(0)
    assert torch.equal(frozen.weight, nn.Linear(8, 4, bias=False).weight)
    x = torch.randn(5, 8, requires_grad=True)
    frozen(x).square().sum().backward()
    assert frozen.weight.grad is None
    assert bool(x.grad.any())  # what comes before it learns
    assert all(not p.requires_grad for p in FrozenRouter(8, 4, bias=True).parameters())


# --- hash -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("experts", [5, 8])
def test_every_id_has_k_different_experts_and_equal_counts_give_equal_loads(experts, k):
    torch.manual_seed(1)
    chosen = balanced_hashes(torch.ones(257), experts, k)
    assert chosen.shape == (257, k)
    assert all(len(set(row)) == k for row in chosen.tolist())
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    assert int(counts.max() - counts.min()) <= k


def test_the_load_of_a_text_is_as_even_as_its_ids_allow():
    counts = (1e6 / torch.arange(1, 258) ** 1.0).long()  # Zipf's law: the first id has 17%
    counts[200:] = 0
    torch.manual_seed(0)
    for k in (1, 2):
        chosen = balanced_hashes(counts, 8, k)
        load = torch.zeros(8).index_add(0, chosen.flatten(), counts.float().repeat_interleave(k))
        largest = 8 * load.max() / load.sum()
        alone = 8 * float(counts[0] / counts.sum()) / k  # of a fair share: 1.36 where it has one expert
        assert float(largest) == pytest.approx(max(alone, 1.0), abs=0.01)
        # And ids that never came are spread as well.
        assert len(chosen[200:].unique()) >= 6


def test_hashes_are_drawn_anew_and_from_the_seed_alone():
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws += [balanced_hashes(torch.ones(64), 4, 1), balanced_hashes(torch.ones(64), 4, 1)]
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])  # two layers
    assert not torch.equal(draws[0], draws[4])
    # Random, not the same parts under other names: two ids that share an expert need not share it again.
    together = [bool(d[0] == d[1]) for d in (balanced_hashes(torch.ones(64), 4, 1) for _ in range(100))]
    assert 5 < sum(together) < 60


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("k", [2, 4])
def test_the_logits_make_exactly_those_choices_with_equal_gates(scores, renormalize, k):
    router = HashRouter(16, 4, top_k=k, id_counts=torch.ones(11))
    ids = torch.randint(11, (50,))
    logits = router(torch.randn(50, 16), ids)
    gating = topk_gating(logits, k, scores=scores, renormalize=renormalize)
    chosen = (router.weight > -50).T[ids]
    assert torch.equal(torch.zeros(50, 4).scatter(1, gating.ids, 1.0).bool(), chosen)
    torch.testing.assert_close(gating.probs, chosen / k)
    if scores == "softmax" or renormalize:
        torch.testing.assert_close(gating.weights, torch.full((50, k), 1 / k))


def test_a_layer_needs_the_ids_and_says_so():
    layer = MoELayer(16, 8, 4, 2, hash_of(torch.ones(11)))
    y, routing = layer(torch.randn(2, 3, 16), torch.randint(11, (2, 3)))
    assert y.shape == (2, 3, 16)
    assert routing.logits.shape == (6, 4)
    for ids in (None, torch.zeros(5, dtype=torch.long)):
        with pytest.raises(ValueError, match="HashRouter needs the ids of the 6 tokens"):
            layer(torch.randn(2, 3, 16), ids)


def test_a_language_model_looks_up_its_tokens_and_a_vision_model_its_positions():
    tokens = torch.randint(11, (3, 12))
    model = LanguageModel(11, hash_of(torch.ones(11)), **SIZES, length=12)
    for block, routing in zip(model.trunk.blocks, model(tokens).routing.values(), strict=True):
        assert torch.equal(routing.logits, block.ffn.router.weight.T[tokens.flatten()])
    images = VisionModel(5, (1, 8, 8), hash_of(torch.ones(16)), **SIZES, patch=2)
    for block, routing in zip(images.trunk.blocks, images(torch.randn(3, 1, 8, 8)).routing.values(), strict=True):
        assert torch.equal(routing.logits, block.ffn.router.weight.T.repeat(3, 1))
        assert routing.ids.shape == (3 * 16, 2)


def test_nothing_of_it_is_trained_and_it_is_found_as_a_router():
    model = LanguageModel(11, hash_of(torch.ones(11)), **SIZES, length=12)
    sites = mg.find_routers(model)
    assert [site.num_experts for site in sites] == [4, 4]
    model(torch.randint(11, (3, 12))).logits.sum().backward()
    assert all(site.weight.grad is None and not site.weight.requires_grad for site in sites)
    other = LanguageModel(11, hash_of(torch.ones(11)), **SIZES, length=12)
    other.load_state_dict(model.state_dict())  # the table travels with the model
    assert torch.equal(mg.find_routers(other)[1].weight, sites[1].weight)


@pytest.mark.parametrize(
    ("k", "counts", "message"),
    [(5, torch.ones(3), "top_k must lie in"), (1, torch.ones(0), "id_counts"), (1, torch.tensor([-1.0]), "id_counts")],
)
def test_bad_hashes_are_named(k, counts, message):
    with pytest.raises(ValueError, match=message):
        HashRouter(8, 4, top_k=k, id_counts=counts)


@pytest.mark.parametrize(
    "router",
    [
        CosineRouter,
        FrozenRouter,
        hash_of([3, 2, 1, 1, 0, 5]),
        nn.Linear,  # with a bias
        lambda dim, experts: mg.GeometricRouter(dim, experts, manifold="orthonormal"),
    ],
)
def test_models_that_differ_in_the_router_alone_begin_alike(router):
    def weights(factory):
        torch.manual_seed(3)
        model = LanguageModel(6, factory, length=8, **SIZES)
        after = torch.rand(1)
        return {n: p for n, p in model.named_parameters() if ".router." not in n}, after

    (ours, after), (theirs, expected) = weights(router), weights(functools.partial(nn.Linear, bias=False))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(after, expected)


def test_routers_of_one_model_differ():
    torch.manual_seed(0)
    model = LanguageModel(6, CosineRouter, length=8, **SIZES)
    first, second = (block.ffn.router.weight for block in model.trunk.blocks)
    assert not torch.equal(first, second)
