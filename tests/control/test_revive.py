"""Reviving dead experts: nothing else moves, little changes, all can be taken back, and the newcomers live."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.control.revive import Revive
from tests.control.revival import (
    BLOCKS,
    OPTIMIZERS,
    E,
    ListBlock,
    Watched,
    collapsed,
    dead_of,
    load_of,
    revived,
    same,
    state_of,
    tokens,
    train,
)


def masked(state: dict[str, Tensor], experts: list[int], kind: str) -> dict[str, Tensor]:
    """The state without what belongs to experts."""
    kept = {}
    for name, values in state.items():
        owner = name.split("experts.")[1].split(".")[0] if "experts." in name else ""
        if kind == "list" and owner.isdigit() and int(owner) in experts:
            continue
        stacked = values.ndim and len(values) == E and not owner.isdigit()
        rest = [e for e in range(E) if e not in experts]
        kept[name] = values[rest] if stacked else values
    return kept


@pytest.mark.parametrize("mode", ["copy", "fresh"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("block", BLOCKS)
def test_nobody_else_is_touched_and_undo_restores_every_bit(block, optimizer, mode):
    watched = collapsed(BLOCKS[block], optimizer, bias=True)
    before, groups = state_of(watched.optimizers, watched.model), watched.optimizers[0].state_dict()["param_groups"]
    revive = Revive(mode, change_limit=10, paused=watched.pause)
    applied = revived(watched, revive)
    assert applied.done, applied.detail
    experts = list(applied.detail["experts"])
    assert 1 <= len(experts) <= E // 4
    after = state_of(watched.optimizers, watched.model)
    assert same(masked(before, experts, block), masked(after, experts, block)) == []
    # The experts themselves did change: every weight of theirs.
    assert len(same(before, after)) >= len(experts)
    assert watched.optimizers[0].state_dict()["param_groups"] == groups
    revive.undo(watched.plant, watched.layer, applied.memory)
    assert same(before, state_of(watched.optimizers, watched.model)) == []
    assert watched.plant.steps.calls == [(watched.layer, experts)] * 2
    assert watched.errors == []


def test_undo_after_training_keeps_what_others_learnt():
    watched = collapsed()
    revive = Revive(paused=watched.pause, change_limit=10)
    weights = watched.model.block.layer.experts
    before = weights.w_up.detach().clone()
    applied = revived(watched, revive)
    train(watched, 3)
    learnt = weights.w_up.detach().clone()
    experts = list(applied.detail["experts"])
    assert revive.release(watched.plant, watched.layer, applied.memory) is None
    assert torch.equal(weights.w_up, learnt), "released, it stays what it has become"
    revive.undo(watched.plant, watched.layer, applied.memory)
    rest = [e for e in range(E) if e not in experts]
    assert torch.equal(weights.w_up[experts], before[experts])
    assert torch.equal(weights.w_up[rest], learnt[rest])


def test_what_a_copy_gets():
    watched = collapsed(bias=True)
    applied = revived(watched, Revive(noise=0.0, paused=watched.pause, change_limit=10))
    weights, optimizer = watched.model.block.layer.experts, watched.optimizers[0]
    assert applied.detail["mode"] == "copy"
    for expert, donor in zip(applied.detail["experts"], applied.detail["donors"], strict=True):
        for parameter in weights.parameters():
            state = optimizer.state[parameter]
            assert torch.equal(parameter[expert], parameter[donor])
            assert torch.equal(state["exp_avg_sq"][expert], state["exp_avg_sq"][donor])
            assert not state["exp_avg"][expert].any()
        for parameter in (watched.site.weight, watched.site.projection.bias):
            state = optimizer.state[parameter]
            assert not state["exp_avg"][expert].any()
            assert torch.equal(state["exp_avg_sq"][expert], state["exp_avg_sq"][donor])
            assert not torch.equal(parameter[expert], parameter[donor])


def test_the_noise_is_of_layer_step_and_expert():
    def after(step: int) -> Tensor:
        watched = collapsed()
        load = load_of(watched, 2)
        Revive(paused=watched.pause, change_limit=10).apply(
            watched.plant, watched.order(dead_of(load), load, step=step)
        )
        return watched.model.block.layer.experts.w_up.detach().clone()

    assert torch.equal(after(3), after(3))
    assert not torch.equal(after(3), after(4))
    watched = collapsed()
    applied = revived(watched, Revive(noise=0.1, paused=watched.pause, change_limit=10))
    w = watched.model.block.layer.experts.w_up.detach()
    first = applied.detail["experts"][0]
    donor = applied.detail["donors"][0]
    assert float((w[first] - w[donor]).std() / w[donor].square().mean().sqrt()) == pytest.approx(0.1, rel=0.2)


def test_two_copies_of_one_donor_are_two_experts():
    watched = collapsed()
    order = watched.order((2, 3), (0.9, 0.1, 0.0, 0.0, *[0.0] * 4))
    applied = Revive(paused=watched.pause, change_limit=10, most=0.2).apply(watched.plant, order)
    assert applied.detail["experts"] == [2, 3]
    assert applied.detail["donors"] == [0, 0]
    for parameter in (watched.model.block.layer.experts.w_up, watched.site.weight):
        assert not torch.allclose(parameter[2], parameter[3], rtol=1e-3)


@pytest.mark.filterwarnings("ignore:top-1 gating")
def test_the_layer_changes_only_through_the_gates():
    """An exact copy and one expert a token, whose gate is 1: what newcomers take from donors changes nothing."""
    watched = collapsed(k=1, steps=0)
    x = tokens()[0]
    out, ids = watched.model(x).detach(), watched.site.module(x).argmax(-1)
    applied = revived(watched, Revive(noise=0.0, paused=watched.pause, change_limit=10), k=1)
    now = watched.site.module(x).argmax(-1)
    taken = torch.zeros(len(x), dtype=torch.bool)
    for expert, donor in zip(applied.detail["experts"], applied.detail["donors"], strict=True):
        taken |= (now == expert) & (ids == donor)
    assert int(taken.sum()) > 0
    unchanged = taken | (now == ids)
    assert torch.allclose(watched.model(x)[unchanged], out[unchanged], atol=1e-6)
    assert float((~unchanged).double().mean()) <= 0.05 + 1e-9


@pytest.mark.filterwarnings("ignore:top-1 gating")
@pytest.mark.parametrize("most", [0.01, 0.05, 0.15])
@pytest.mark.parametrize("k", [1, 2])
def test_the_bound_holds_for_all_newcomers_together(k, most):
    watched = collapsed(k=k)
    x = tokens()[0]
    seen = tokens(seed=0)[0]  # the probe's newest forward
    assert torch.equal(watched.probe.look.x, seen)
    before = gates(watched, seen, k)
    applied = revived(watched, Revive(most=most, paused=watched.pause, change_limit=100), k)
    if not applied.done:
        assert "no place within most" in applied.detail["reason"]
        return
    after = gates(watched, x, k)
    for expert, donor in zip(applied.detail["experts"], applied.detail["donors"], strict=True):
        after[:, donor] += after[:, expert]
        after[:, expert] = 0
    # After the step that followed the forward: the logits have moved a little.
    assert float((after - before).abs().sum(-1).mean() / 2) <= most + 0.005
    assert applied.detail["moved"] <= most


def gates(watched: Watched, x: Tensor, k: int) -> Tensor:
    with torch.no_grad():
        gating = mg.topk_gating(watched.site.module(x), k)
    return torch.zeros(len(x), E).scatter(1, gating.ids, gating.weights)


def test_what_changes_too_much_is_tried_again_with_less():
    watched = collapsed()
    first = revived(watched, Revive(paused=watched.pause, change_limit=10))
    assert first.detail["output_change"] > 0.15
    watched = collapsed()
    again = revived(watched, Revive(paused=watched.pause, change_limit=0.9 * first.detail["output_change"]))
    assert again.done
    assert again.detail["moved"] <= 0.05 / 4
    assert again.detail["output_change"] < 0.9 * first.detail["output_change"]


def test_too_large_a_change_is_taken_back():
    watched = collapsed()
    before = state_of(watched.optimizers, watched.model)
    applied = revived(watched, Revive("fresh", change_limit=1e-6, paused=watched.pause))
    assert not applied.done
    assert "changed by" in applied.detail["reason"]
    assert applied.detail["output_change"] > 1e-6
    assert same(before, state_of(watched.optimizers, watched.model)) == []
    assert watched.plant.steps.calls == []


def test_the_output_change_is_that_of_the_layer():
    watched = collapsed()
    x = tokens(seed=0)[0]
    with torch.no_grad():
        before = watched.model(x)
        applied = revived(watched, Revive(paused=watched.pause, noise=0.2, change_limit=100))
        expected = float((watched.model(x) - before).norm() / before.norm())
    assert applied.detail["output_change"] == pytest.approx(expected, rel=1e-4)
    assert expected > 0


def test_detail_and_memory_are_plain():
    watched = collapsed(ListBlock, bias=True)
    applied = revived(watched, Revive(paused=watched.pause, change_limit=10))
    json.dumps(dict(applied.detail), allow_nan=False)
    assert plain(applied.memory)


def plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(plain(item) for item in value)
    return type(value) in (Tensor, int, float, str) and not getattr(value, "requires_grad", False)


def test_the_deadest_come_first_and_no_more_than_a_quarter():
    watched = collapsed()
    load = [0.5, 0.4, 0.02, 0.01, 0.0, 0.03, 0.02, 0.02]
    order = watched.order((2, 3, 4, 5, 6, 7), tuple(load))
    applied = Revive(paused=watched.pause, change_limit=10, most=0.2).apply(watched.plant, order)
    assert sorted([*applied.detail["experts"], *applied.detail["left_dead"]]) == [3, 4]
    assert set(applied.detail["donors"]) <= {0, 1}


def test_without_tokens_a_newcomer_stands_beside_its_donor():
    watched = collapsed(bias=True)
    watched.probe.off()
    applied = revived(watched, Revive(paused=watched.pause))
    assert applied.done
    assert applied.detail["share"] == [None, None]
    assert applied.detail["moved"] is applied.detail["output_change"] is None
    w = watched.site.weight.detach()
    for expert, donor in zip(applied.detail["experts"], applied.detail["donors"], strict=True):
        angle = torch.nn.functional.cosine_similarity(w[expert], w[donor], dim=0).arccos()
        assert float(angle) == pytest.approx(0.1, rel=1e-3)


def test_nothing_to_do():
    watched = collapsed()
    for dead, load, reason in (((), (0.5,) * E, "no expert is dead"), (tuple(range(E)), (0.0,) * E, "no live expert")):
        applied = Revive().apply(watched.plant, watched.order(dead, load))
        assert not applied.done
        assert reason in applied.detail["reason"]


def no_experts(watched: Watched) -> None:
    watched.plant.experts = {watched.layer: None}


def opaque(watched: Watched) -> None:
    watched.model.block.layer.experts.register_parameter("odd", nn.Parameter(torch.zeros(3)))


def frozen_experts(watched: Watched) -> None:
    watched.model.block.layer.experts.requires_grad_(False)


def frozen_router(watched: Watched) -> None:
    watched.site.weight.requires_grad_(False)


def orthonormal(watched: Watched) -> None:
    mg.geometrize(watched.model, "orthonormal", allow_change=True)


def factored(watched: Watched) -> None:
    watched.plant.optimizers = [torch.optim.Adafactor(watched.model.parameters())]
    watched.optimizers[:] = watched.plant.optimizers
    train(watched)


def shared(watched: Watched) -> None:
    watched.model.other = nn.Module()
    watched.model.other.weight = watched.model.block.layer.experts.w_up


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (no_experts, "no experts found"),
        (opaque, "parameter odd"),
        (frozen_experts, "experts of router block.layer.router are frozen"),
        (frozen_router, "router block.layer.router is frozen"),
        (orthonormal, "orthonormal"),
        (factored, "moments cannot be reset"),
        (shared, "share weights with another layer"),
    ],
)
def test_where_it_cannot_be_done(change, reason):
    watched = collapsed()
    assert Revive().unavailable(watched.plant, watched.layer) is None
    assert "no router" in Revive().unavailable(watched.plant, "elsewhere")
    change(watched)
    assert reason in Revive().unavailable(watched.plant, watched.layer)
    applied = Revive().apply(watched.plant, watched.order((5,), (0.2,) * 5 + (0.0,) * 3))
    assert not applied.done
    assert reason in applied.detail["reason"]


@pytest.mark.parametrize("manifold", ["polar", "sphere", "euclidean"])
def test_rows_stay_on_their_manifold(manifold):
    watched = collapsed(manifold=manifold)
    applied = revived(watched, Revive(paused=watched.pause, most=0.2, change_limit=10))
    assert applied.done, applied.detail
    ok, reason = watched.site.weight.manifold.check_point(watched.site.weight, explain=True)
    assert ok, reason


def test_a_prior_is_left_alone_and_reckoned_with():
    watched = collapsed(manifold="polar")
    prior = mg.ExpertPrior(E, where="logits")
    with torch.no_grad():
        prior.pi.copy_(torch.tensor([1.0, 1, 4, 4, 4, 4, 4, 4]) / 26)
    watched.site.module.add_prior(prior)
    train(watched)
    before = prior.pi.clone()
    applied = revived(watched, Revive(paused=watched.pause, change_limit=10, most=0.03))
    assert torch.equal(prior.pi, before)
    assert applied.done
    share = watched.share(tokens()[0], 2)[list(applied.detail["experts"])]
    assert torch.allclose(share, torch.tensor(applied.detail["share"]), atol=0.03)


def test_options_are_checked():
    for options, message in (
        ({"mode": "clone"}, "mode must be 'copy' or 'fresh', got 'clone'"),
        ({"noise": -0.1}, "noise must be at least 0"),
        ({"most": 0}, "most must be above 0"),
        ({"change_limit": 0}, "change_limit must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Revive(**options)
