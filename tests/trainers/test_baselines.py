"""What geometric routing is compared with: every baseline is a few overrides, trains with all numbers finite, and its
losses have the published gradients."""

import functools
import math

import pytest
import torch

import moegeo_router as mg
from tests.support.runs import TINY, configuration, tiny
from trainers import build, checkpoint
from trainers.data.planted import PlantedText
from trainers.evaluation import target_losses
from trainers.models import VisionModel
from trainers.priors import update_priors
from trainers.studies.runs import DataCache, Run, configurations, train_run
from trainers.train import train

torch.set_num_threads(1)

PLAIN = ("optimizer=adamw", "geometry.regularizers.fsi=0.0")
ARMS = {
    "balance": ("router=linear", "geometry.regularizers.balance=0.01"),
    "z": ("router=linear", "geometry.regularizers.balance=0.01", "geometry.regularizers.z=0.001"),
    "loss-free": ("router=linear", "prior=sign"),
    "cosine": ("router=cosine", "geometry.regularizers.balance=0.01"),
    "hash": ("router=hash",),
    "frozen": ("router=frozen",),
    "soft": ("router=linear", "model.top_k=4"),
    "dense": ("router=linear", "model.num_experts=1", "model.top_k=1", "model.expert_hidden=32"),
    "top-1 hash": ("router=hash", "model.top_k=1"),
}


@pytest.mark.parametrize("task", ["language", "vision"])
@pytest.mark.parametrize("arm", ARMS)
def test_a_run_has_every_number(arm, task, tmp_path):
    run = Run(arm, [*TINY[task], "loop.steps=12", "loop.warmup=2", *PLAIN, *ARMS[arm]], {})
    found = train_run(configurations([run])[0], tmp_path, DataCache())
    assert (found["status"], found["reason"]) == ("done", None)
    constant = [line for line in found["warnings"] if "top-1 gat" in line]  # no news where nothing is to be learnt
    assert len(found["warnings"]) == len(constant)
    assert bool(constant) == (arm == "top-1 hash")
    assert [name for name, value in found["results"].items() if value is None] == []
    for name in ("fsi", "dispersion", "max_load", "dead_experts", "fsi_domain", "routing_information"):
        assert f"valid/geometry/{name}" in found["results"]
    assert "train/dead_share" in found["results"]
    results = found["results"]
    if arm == "dense":
        assert results["valid/geometry/max_load"] == 1
        assert results["valid/geometry/dispersion"] == results["valid/geometry/fsi"] == 0
    if arm == "soft":
        assert (results["valid/geometry/max_load"], results["valid/geometry/dead_experts"]) == (1, 0)
    if arm == "top-1 hash":
        assert results["valid/geometry/fsi_token"] == pytest.approx(1, abs=1e-4)  # every token is decided


def parameters(*overrides: str) -> tuple[int, int]:
    """All parameters, and the active ones: of the experts a token visits, and everything else."""
    config = configuration(*TINY["language"], "router=linear", *overrides)
    model = build.build_model(config, build.build(config, "data"))
    of_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    routers = sum(site.weight.numel() for site in mg.find_routers(model))
    rest = sum(p.numel() for p in model.parameters()) - of_experts - routers
    return rest + of_experts, rest + of_experts * config.model.top_k // config.model.num_experts


def test_the_dense_model_has_the_active_parameters_of_the_mixture():
    mixture, dense = parameters("model.top_k=2"), parameters(*ARMS["dense"][1:])
    assert dense[1] == mixture[1]
    assert dense[0] == dense[1] < mixture[0]


def test_the_only_expert_gets_the_gate_one_and_its_router_no_gradient():
    config = configuration(*TINY["language"], *ARMS["dense"])
    data = build.build(config, "data")
    model = build.build_model(config, data)
    batch = data.train_batch(0)
    output = model(batch.inputs)
    target_losses(output, batch).mean().backward()
    assert all(bool((routing.weights == 1).all()) for routing in output.routing.values())
    assert all(not bool(site.weight.grad.any()) for site in mg.find_routers(model))


def test_soft_gates_are_the_softmax_over_all_experts():
    config = configuration(*TINY["language"], *ARMS["soft"])
    data = build.build(config, "data")
    routing = build.build_model(config, data)(data.train_batch(0).inputs).routing
    for record in routing.values():
        torch.testing.assert_close(record.weights, record.logits.softmax(-1).gather(1, record.ids))


@pytest.mark.parametrize("router", ["hash", "frozen"])
def test_a_router_that_does_not_learn_stays_as_it_is(router, tmp_path):
    config = tiny(tmp_path / "run", f"router={router}", "controller=off", *PLAIN)
    torch.manual_seed(config.seed)
    first = [site.weight.clone() for site in mg.find_routers(build.build_model(config, build.build(config, "data")))]
    train(config)
    last, _ = checkpoint.latest(tmp_path / "run" / "checkpoints")
    kept = [value for name, value in last.model.items() if name.endswith("router.weight")]
    assert len(kept) == len(first) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


@pytest.mark.parametrize("router", ["hash", "frozen"])
def test_regularizers_for_a_router_that_cannot_learn_are_refused(router):
    config = configuration(*TINY["language"], f"router={router}", "optimizer=adamw")
    model = build.build_model(config, build.build(config, "data"))
    with pytest.raises(ValueError, match="are frozen"):
        mg.attach(model, build.build_optimizer(config, model), build.build(config, "geometry"))


def test_the_hash_is_balanced_over_the_text_it_will_see():
    data = PlantedText(documents=40, alphabet=8, document_length=33, length=32)
    assert data.token_counts().tolist() == [
        int((data._train.tokens == token).sum()) for token in range(data.vocab_size)
    ]


# --- published losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "scope"),
    [((0.02, 0.0), "micro_batch"), ((0.0, 0.003), "global"), ((0.02, 0.003), "micro_batch")],
)
def test_the_gradient_is_that_of_the_published_losses(weights, scope):
    """Switch (2101.03961, Eq. 4) for top-k, ``α E Σ_e f_e P_e``; ST-MoE (2202.08906, Eq. 5), ``mean (log Σ exp z)²``.

    A loss a layer, and their sum.
    """
    balance, z = weights
    config = configuration(
        *TINY["language"],
        "router=linear",
        *PLAIN,
        f"geometry.regularizers.balance={balance}",
        f"geometry.regularizers.balance_scope={scope}",
        f"geometry.regularizers.z={z}",
    )
    data = build.build(config, "data")
    batch = data.train_batch(0)

    def gradients(ours: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = build.build_model(config, data)
        if ours:
            geometry = mg.attach(model, build.build_optimizer(config, model), build.build(config, "geometry"))
        output = model(batch.inputs)
        loss = target_losses(output, batch).mean()
        if ours:
            loss = loss + geometry.loss()
        else:
            for record in output.routing.values():
                tokens, experts = record.logits.shape
                p = record.logits.exp() / record.logits.exp().sum(1, keepdim=True)
                switch = 0.0
                for e in range(experts):
                    chosen = sum(int((record.ids[t] == e).sum()) for t in range(tokens))
                    switch = switch + experts * chosen / record.ids.numel() * p[:, e].sum() / tokens
                loss = loss + balance * switch + z * record.logits.exp().sum(1).log().square().sum() / tokens
        loss.backward()
        return [p.grad for p in model.parameters()]

    for mine, wanted in zip(gradients(ours=True), gradients(ours=False), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-7)


def test_the_sign_rule_is_the_published_one():
    """Loss-free balancing (2408.15664): b_e += u · sign(mean count - count_e), once a step; gates do not see b."""
    config = configuration(*TINY["language"], "router=linear", *PLAIN, "prior=sign")
    data = build.build(config, "data")
    model = build.build_model(config, data)
    routing = model(data.train_batch(0).inputs).routing
    update_priors(model, routing)
    for block, record in zip(model.trunk.blocks, routing.values(), strict=True):
        counts = [int((record.ids == e).sum()) for e in range(4)]
        mean = sum(counts) / 4
        expected = [0.001 * math.copysign(1, mean - c) if c != mean else 0.0 for c in counts]
        assert block.ffn.prior.bias.tolist() == pytest.approx(expected)
    changed = model(data.train_batch(1).inputs).routing
    for record in changed.values():
        chosen = record.probs.gather(1, record.ids)
        torch.testing.assert_close(record.weights, chosen / chosen.sum(1, keepdim=True))


# --- watched ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [16, 9])  # 9 is also the number of patches: a hash's table is then as wide as a token
@pytest.mark.parametrize("router", ["cosine", "hash", "frozen"])
def test_what_attach_sees_is_what_the_router_does(router, dim):
    config = configuration(*TINY["vision"], f"router={router}", "controller=off", *PLAIN)
    factory = build.build(config, "router")
    if router == "hash":
        factory = functools.partial(factory, id_counts=torch.ones(9))
    torch.manual_seed(0)
    model = VisionModel(3, (1, 3, 3), factory, dim=dim, layers=2, heads=1, patch=1, num_experts=4)
    optimizer = build.build_optimizer(config, model)
    geometry = mg.attach(model, optimizer, build.build(config, "geometry"))
    output = model(torch.randn(20, *model.image_shape))
    (output.logits.square().mean() + geometry.loss()).backward()
    optimizer.step()
    metrics = geometry.metrics()
    p = torch.stack([record.probs for record in output.routing.values()])
    wanted = [float(mg.fsi(layer.mean(0, keepdim=True), normalized=True)) for layer in p.detach()]
    assert metrics["geometry/fsi"] == pytest.approx(sum(wanted) / 2, abs=1e-4)
    loads = [torch.bincount(record.ids.flatten(), minlength=4) for record in output.routing.values()]
    assert metrics["geometry/max_violation"] == pytest.approx(
        max(float(4 * load.max() / load.sum()) for load in loads) - 1, abs=1e-4
    )
    assert all(math.isfinite(value) for value in metrics.values())
