"""After a revival training goes on: newcomers live, steps and ranks agree, and models of transformers do it too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import moegeo_router as mg
from moegeo_router.control.revive import Revive
from tests.control.revival import (
    BLOCKS,
    OPTIMIZERS,
    E,
    Model,
    StackBlock,
    Watched,
    collapse,
    collapsed,
    dead_of,
    load_of,
    revived,
    same,
    state_of,
    tokens,
    train,
)
from tests.support.ranks import on_two_ranks


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("block", BLOCKS)
def test_training_goes_on_and_so_does_the_schedule(block, optimizer):
    watched = collapsed(BLOCKS[block], optimizer)
    schedule = torch.optim.lr_scheduler.LinearLR(watched.optimizers[0], 0.5, total_iters=10)
    applied = revived(watched, Revive(paused=watched.pause, change_limit=10))
    assert applied.done, applied.detail
    lr = watched.optimizers[0].param_groups[0]["lr"]
    loss = train(watched, 5)
    schedule.step()
    assert loss == loss
    assert watched.optimizers[0].param_groups[0]["lr"] > lr
    assert all(bool(p.isfinite().all()) for p in watched.model.parameters())


@pytest.mark.parametrize("step", ["natural", "riemannian", None])
def test_steps_that_were_taken_over_go_on(step):
    torch.manual_seed(0)
    model = Model(StackBlock(manifold="polar")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = mg.GeometryConfig(top_k=2, step=step, regularizers=mg.Regularizers.none(), on_error="raise")
    geometry = mg.attach(model, optimizer, config)
    watched = Watched(model, [optimizer], geometry._steps)
    collapse(watched)
    watched.probe.on()
    train(watched, 3)
    applied = revived(watched, Revive(paused=geometry.pause, change_limit=10))
    assert applied.done, applied.detail
    row = watched.site.weight.detach().clone()
    train(watched, 2)
    moved = (watched.site.weight.detach() - row).norm(dim=-1)[list(applied.detail["experts"])]
    assert bool((moved > 0).all())
    assert bool(watched.site.weight.isfinite().all())
    geometry.detach()


@pytest.mark.parametrize("mode", ["copy", "fresh"])
@pytest.mark.parametrize("block", BLOCKS)
def test_newcomers_get_their_tokens(block, mode):
    watched = collapsed(BLOCKS[block])
    applied = revived(watched, Revive(mode, paused=watched.pause, change_limit=10))
    share = watched.share(tokens(seed=50)[0], 2)[list(applied.detail["experts"])]  # tokens never seen
    assert bool((share > 0.03).all())
    assert torch.allclose(share, torch.tensor(applied.detail["share"]), atol=0.06)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_collapsed_model_comes_back_to_life(block):
    def run(revive: bool) -> tuple[int, float]:
        watched = collapsed(BLOCKS[block], hidden=4) if block == "stack" else collapsed(BLOCKS[block])
        for turn in range(8):
            load = load_of(watched, 2)
            dead = dead_of(load)
            if revive and dead and turn < 5:
                one = Revive(paused=watched.pause, change_limit=1)
                one.apply(watched.plant, watched.order(dead, load, step=turn))
            train(watched, 40, seed=100 * turn)
        loss = sum(train_loss(watched, seed) for seed in range(1000, 1005)) / 5
        return E - len(dead_of(load_of(watched, 2))), loss

    (left, worse), (live, better) = run(False), run(True)
    assert left <= 5
    assert live >= 7
    assert better < 0.95 * worse


@torch.no_grad()
def train_loss(watched: Watched, seed: int) -> float:
    x, y = tokens(seed=seed)
    return float((watched.model(x) - y).square().mean())


def family(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 31,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "head_dim": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32,
    }
    more = {
        "Mixtral": {"num_local_experts": 8},
        "Qwen3Moe": {"num_experts": 8, "moe_intermediate_size": 24},
    }[name]
    config = getattr(transformers, f"{name}Config")(**sizes, **more)
    return getattr(transformers, f"{name}ForCausalLM")(config).train()


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_transformers(name):
    model = family(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(3, 31, (4, 20), generator=torch.Generator().manual_seed(0))
    watched = Watched(model, [optimizer], number=1)
    watched.probe.on()

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    step()
    mean = watched.probe.look.x.mean(0)
    with torch.no_grad():
        for expert in range(3, 8):
            watched.site.weight[expert] = -mean / mean.norm()
    step()
    look = watched.probe.look
    assert look.hurt is not None
    load = tuple((torch.bincount(look.logits.topk(2).indices.flatten(), minlength=8) / 160).tolist())
    dead = dead_of(load)
    assert dead
    revive = Revive(paused=watched.pause, most=0.2, change_limit=1)
    before = state_of([optimizer], model)
    applied = revive.apply(watched.plant, watched.order(dead, load))
    assert applied.done, applied.detail
    assert applied.detail["output_change"] is not None
    changed = same(before, state_of([optimizer], model))
    assert changed
    assert all("layers.1.mlp" in name for name in changed)
    step()
    chosen = watched.probe.look.logits.topk(2).indices
    assert all(bool((chosen == expert).any()) for expert in applied.detail["experts"])
    revive.undo(watched.plant, watched.layer, applied.memory)
    for expert in applied.detail["experts"]:
        for parameter in watched.plant.experts[watched.layer].container.parameters():
            key = next(n for n, p in model.named_parameters() if p is parameter)
            assert torch.equal(parameter[expert], before[key][expert])


def ranks(rank: int, folder: str) -> None:
    torch.manual_seed(0)
    model = Model(StackBlock(bias=True)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    watched = Watched(model, [optimizer])
    collapse(watched)
    load = load_of(watched, 2)
    watched.probe.on()
    x, y = tokens(seed=rank)  # other tokens on each rank
    (model(x) - y).square().mean().backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    optimizer.step()
    with torch.no_grad():
        before = model(x)
    applied = Revive(paused=watched.pause, change_limit=10).apply(watched.plant, watched.order(dead_of(load), load))
    with torch.no_grad():
        sums = torch.stack([(model(x) - before).square().sum(), before.square().sum()])
    dist.all_reduce(sums)
    assert applied.detail["output_change"] == pytest.approx(float((sums[0] / sums[1]).sqrt()), rel=1e-4)
    torch.save({"state": state_of([optimizer], model), "detail": dict(applied.detail)}, Path(folder) / f"{rank}.pt")


def test_ranks_agree(tmp_path):
    on_two_ranks(ranks, tmp_path, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["detail"] == second["detail"]
    assert same(first["state"], second["state"]) == []
