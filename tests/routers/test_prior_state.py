"""What a prior is as a module: fp32 whatever happens, saved, no parameter, the same on every rank; and in a router."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moegeo_router import ExpertPrior, GeometricRouter, SignBias, export, find_routers, geometrize, topk_gating
from tests.support.ranks import on_two_ranks

D, E = 16, 8


def moved(prior):
    """A prior that is not uniform."""
    for _ in range(5):
        prior.update(torch.arange(1, prior.num_experts + 1))
    return prior


def learned(num_experts: int = E) -> ExpertPrior:
    prior = ExpertPrior(num_experts, where="logits", rule="natural")
    prior.pi.data.copy_(moved(ExpertPrior(num_experts)).pi)
    return prior


def in_logits(num_experts: int = E) -> ExpertPrior:
    return moved(ExpertPrior(num_experts, where="logits"))


def state(module: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in module.state_dict().values()]


KINDS = {
    "balance": lambda: moved(ExpertPrior(238)),
    "natural": lambda: learned(238),
    "sign": lambda: moved(SignBias(238)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cast", ["bfloat16", "half", "to"])
def test_no_cast_of_the_model_reaches_it(kind, cast):
    prior = KINDS[kind]()
    if kind == "sign":
        prior.bias.copy_(torch.randn(238))
    before = state(prior)[0]
    model = nn.Sequential(nn.Linear(2, 2), prior)
    model = getattr(model, cast)() if cast in ("bfloat16", "half") else model.to("cpu", torch.bfloat16)
    assert model[0].weight.dtype in (torch.bfloat16, torch.float16)
    (after,) = prior.buffers()
    assert after.dtype == torch.float32
    assert torch.equal(after, before)
    assert len(set(after.tolist())) == len(set(before.tolist()))
    assert after.is_leaf
    assert after.requires_grad == (kind == "natural")
    assert prior.double().state_dict().popitem()[1].dtype == torch.float64
    assert torch.equal(state(prior.to(torch.float16))[0], before.double())
    assert torch.equal(state(prior.float())[0], before)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_saved_loaded_copied_and_pickled(kind):
    prior = KINDS[kind]()
    fresh = KINDS[kind]()
    fresh.reset_parameters()
    assert not torch.equal(state(fresh)[0], state(prior)[0])
    file = io.BytesIO()
    torch.save(prior.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assigned = KINDS[kind]()
    assigned.load_state_dict({name: value.bfloat16() for name, value in prior.state_dict().items()}, assign=True)
    torch.testing.assert_close(state(assigned)[0], state(prior)[0], rtol=1e-2, atol=0)
    file = io.BytesIO()
    torch.save(prior, file)
    file.seek(0)
    for other in (fresh, copy.deepcopy(prior), torch.load(file, weights_only=False), assigned):
        (buffer,) = other.buffers()
        assert other is assigned or torch.equal(buffer, state(prior)[0])
        assert (buffer.dtype, buffer.is_leaf) == (torch.float32, True)
        assert buffer.requires_grad == (kind == "natural")


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_anew_where_a_model_is_materialised(kind):
    with torch.device("meta"):
        prior = SignBias(E) if kind == "sign" else ExpertPrior(E, where="logits", rule=kind)
    assert state(prior)[0].is_meta
    prior.to_empty(device="cpu")
    expected = torch.zeros(E) if kind == "sign" else torch.full((E,), 1 / E)
    assert torch.equal(state(prior)[0], expected)
    assert next(prior.buffers()).requires_grad == (kind == "natural")


@pytest.mark.parametrize("kind", ["balance", "sign"])
def test_a_resumed_controller_is_the_unbroken_one_bit_for_bit(kind):
    counts = torch.randint(0, 100, (20, 238))
    unbroken, first = KINDS[kind](), KINDS[kind]()
    for row in counts:
        unbroken.update(row)
    for row in counts[:10]:
        first.update(row)
    resumed = SignBias(238) if kind == "sign" else ExpertPrior(238)
    resumed.load_state_dict(first.state_dict())
    for row in counts[10:]:
        resumed.update(row)
    assert torch.equal(state(resumed)[0], state(unbroken)[0])


def test_no_optimizer_sees_it():
    """AdamW over ``model.parameters()`` would take π off the simplex, by its decay alone."""
    router = GeometricRouter(D, E, bias=False, prior=learned())
    before = router.prior.pi.detach().clone()
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.1, weight_decay=0.5)
    router(torch.randn(5, D)).softmax(-1)[:, 0].sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(router.prior.pi, before)
    router.prior.step(0.1)
    assert not torch.equal(router.prior.pi, before)
    assert float(router.prior.pi.detach().double().sum()) == pytest.approx(1, abs=1e-6)


# --- where it acts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_a_selection_prior_chooses_and_leaves_gates_and_p_alone(scores):
    logits, prior = torch.randn(200, E), moved(ExpertPrior(E))
    assert prior(logits) is logits
    plain = topk_gating(logits, 2, scores=scores, renormalize=False)
    gating = topk_gating(logits, 2, scores=scores, renormalize=False, **prior.selection())
    assert not torch.equal(gating.ids, plain.ids)
    assert torch.equal(gating.probs, plain.probs)
    everything = topk_gating(logits, E, scores=scores, renormalize=False)
    by_expert = torch.zeros(200, E).scatter(-1, everything.ids, everything.weights)
    assert torch.equal(gating.weights, by_expert.gather(-1, gating.ids))
    same = (gating.ids.sort(-1).values == plain.ids.sort(-1).values).all(-1)
    assert 0 < same.sum() < 200
    assert torch.equal(gating.weights[same].sort(-1).values, plain.weights[same].sort(-1).values)


def test_a_prior_in_the_logits_multiplies_p_and_both_choose_alike():
    logits, inside, outside = torch.randn(200, E), in_logits(), moved(ExpertPrior(E))
    gating = topk_gating(inside(logits), 2, **inside.selection())
    expected = inside.pi * logits.softmax(-1)
    torch.testing.assert_close(gating.probs, expected / expected.sum(-1, keepdim=True))
    assert torch.equal(gating.ids, topk_gating(logits, 2, **outside.selection()).ids)


@pytest.mark.parametrize("num_experts", [1, 3, 6, 41, 64])
def test_a_fresh_prior_changes_no_bit(num_experts):
    logits = torch.randn(20, num_experts)
    for where in ("selection", "logits"):
        prior = ExpertPrior(num_experts, where=where)
        assert torch.equal(prior(logits), logits)
        assert torch.equal(prior.log_prior(), torch.zeros(num_experts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_keep_their_dtype_and_are_rounded_once(dtype):
    logits, prior = torch.randn(50, E).to(dtype), in_logits()
    wide = logits.double() + prior.log_prior().double()
    assert prior(logits).dtype == dtype
    torch.testing.assert_close(prior(logits).double(), wide, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("manifold", ["polar", "sphere", "orthonormal", "euclidean"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_router_with_a_prior(manifold, bias):
    torch.manual_seed(3)
    plain = GeometricRouter(D, E, manifold=manifold, bias=bias)
    torch.manual_seed(3)
    router = GeometricRouter(D, E, manifold=manifold, bias=bias, prior=in_logits())
    x = torch.randn(30, D)
    torch.testing.assert_close(router(x), plain(x) + router.prior.log_prior())
    assert set(router.state_dict()) == set(plain.state_dict()) | {"prior.pi"}
    assert plain.prior is None
    assert "prior" not in repr(plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert router(x).dtype == torch.bfloat16
    (site,) = find_routers(nn.ModuleDict({"router": router}))
    assert site.module is router
    half = copy.deepcopy(router).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(half.prior.pi, router.prior.pi)


@pytest.mark.parametrize("manifold", ["polar", "sphere"])
def test_export_folds_the_prior_into_the_bias(manifold):
    router = GeometricRouter(D, E, manifold=manifold, prior=in_logits())
    nn.init.normal_(router.bias)
    model = nn.ModuleDict({"router": router})
    x = torch.randn(30, D)
    x = x * math.sqrt(D) / x.norm(dim=-1, keepdim=True)  # where a cosine router is linear
    expected, bias = router(x), router.bias
    torch.testing.assert_close(router.to_linear(allow_change=True)(x), expected)
    copied = GeometricRouter.from_linear(router, allow_change=True)
    assert copied.prior is None
    torch.testing.assert_close(copied(x), expected)
    export(model, allow_change=manifold == "sphere")
    assert type(router) is nn.Linear
    assert router.bias is bias
    assert set(model.state_dict()) == {"router.weight", "router.bias"}
    torch.testing.assert_close(router(x), expected)


def test_without_a_bias_export_asks_first():
    routers = nn.ModuleDict({"a": GeometricRouter(D, E, bias=False), "b": GeometricRouter(D, E, bias=False)})
    routers["b"].add_prior(in_logits())
    x = torch.randn(30, D)
    expected = routers["b"](x)
    for convert in (lambda: export(routers), routers["b"].to_linear):
        with pytest.raises(
            ValueError, match="has a prior in its logits and no bias to keep it: pass allow_change=True"
        ):
            convert()
    assert all(type(router) is GeometricRouter for router in routers.values())
    export(routers, allow_change=True)
    assert routers["a"].bias is None
    torch.testing.assert_close(routers["b"](x), expected)
    assert routers["b"].bias.requires_grad


def test_a_uniform_prior_goes_without_a_trace():
    model = nn.ModuleDict({"router": GeometricRouter(D, E, bias=False, prior=ExpertPrior(E, where="logits"))})
    export(model)
    assert list(model.state_dict()) == ["router.weight"]
    geometrize(model)
    assert model["router"].weight.manifold is not None


def test_a_bias_that_two_routers_share():
    routers = nn.ModuleDict({name: GeometricRouter(D, E, prior=in_logits()) for name in "ab"})
    routers["b"].bias = routers["a"].bias
    with pytest.raises(ValueError, match="router b shares its bias with a router of another prior"):
        export(routers)
    routers["b"].add_prior(routers["a"].prior)
    expected = routers["a"](torch.ones(1, D)), routers["b"](torch.ones(1, D))
    export(routers)
    torch.testing.assert_close((routers["a"](torch.ones(1, D)), routers["b"](torch.ones(1, D))), expected)


def test_a_router_takes_no_other_prior():
    for prior, message in (
        (ExpertPrior(E), "needs where='logits', got where='selection'"),
        (ExpertPrior(E + 1, where="logits"), "prior must be over 8 experts, got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            GeometricRouter(D, E, prior=prior)


def test_it_compiles_without_graph_breaks():
    router, outside = GeometricRouter(D, E, prior=learned()), moved(ExpertPrior(E))
    x = torch.randn(6, D)

    def gate(x):
        return topk_gating(router(x), 2, **outside.selection()).weights

    torch._dynamo.reset()
    compiled, results = torch.compile(gate, fullgraph=True, backend="aot_eager"), []
    for function in (gate, compiled):
        router.prior.pi.grad = None
        weights = function(x)
        weights[:, 0].sum().backward()
        results.append([weights.detach(), router.prior.pi.grad])
    torch.testing.assert_close(*results)


# --- ranks -----------------------------------------------------------------------------------------------------------


def _same_everywhere(tensor: torch.Tensor) -> bool:
    found = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(found, tensor.detach())
    return torch.equal(*found)


def _rank(rank: int) -> None:
    world = dist.group.WORLD
    counts = torch.tensor([[9, 1, 2, 0], [1, 1, 1, 30]], dtype=torch.float64)
    for rule in (ExpertPrior, SignBias):
        ours, alone = rule(4), rule(4)
        for _ in range(3):
            ours.update(counts[rank], group=world)
            alone.update(counts.sum(0))
        (value,), (expected,) = ours.buffers(), alone.buffers()
        assert torch.equal(value, expected)
        ours.update(torch.tensor([1.0, 1.0, 1.0, math.nan if rank else 5.0]), group=world)  # one rank's NaN
        assert torch.equal(value, expected)
    assert counts[0].tolist() == [9, 1, 2, 0]  # what was passed is not what was summed

    prior, alone = learned(4), learned(4)
    g = torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.0, 3.0, 1.0, -1.0]])
    prior.pi.grad, alone.pi.grad = g[rank].clone(), g.mean(0)
    prior.step(0.3, group=world)
    alone.step(0.3)
    assert torch.equal(prior.pi, alone.pi)
    prior.pi.grad = g[0].clone() if rank == 0 else None  # a rank without a gradient takes part
    prior.step(0.3, group=world)
    assert _same_everywhere(prior.pi)
    assert not torch.equal(prior.pi, alone.pi)

    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(D, D), GeometricRouter(D, 4, prior=learned(4))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(3):
        x = torch.randn(8, D, generator=torch.Generator().manual_seed(10 * step + rank))
        model(x).softmax(-1)[:, 0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.module[1].prior.step(1.0, group=world)
    assert _same_everywhere(model.module[1].prior.pi)
    assert _same_everywhere(model.module[1].weight)
    assert not torch.equal(model.module[1].prior.pi, learned(4).pi)


def test_two_ranks_with_different_loads_have_one_prior(tmp_path):
    on_two_ranks(_rank, tmp_path)
