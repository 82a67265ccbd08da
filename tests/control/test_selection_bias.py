"""Loss-free balancing of the selection biases that transformers' families bring and never update."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import moegeo_router as mg
from moegeo_router.control.selection_bias import selection_bias
from tests.support.moe import Model
from tests.support.ranks import on_two_ranks
from tests.support.tiny_transformers import VOCABULARY, build

transformers = pytest.importorskip("transformers")

WHERE = {
    "DeepseekV3": "model.layers.1.mlp.gate.e_score_correction_bias",
    "MiniMaxM2": "model.layers.0.mlp.e_score_correction_bias",
    "Afmoe": "model.layers.1.mlp.expert_bias",
    "Ernie4_5_Moe": "model.layers.0.mlp.gate.moe_statics.e_score_correction_bias",
}


def batch(seed: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, steps: int = 3, lr: float = 0.0, **options: object) -> mg.Geometry:
    mg.geometrize(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    config = mg.GeometryConfig(inject=True, **options)  # type: ignore[arg-type]
    geometry = mg.attach(model, optimizer, config)
    for step in range(steps):
        for micro in range(2):
            ids = batch(2 * step + micro)
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return geometry


@pytest.mark.parametrize("family", WHERE)
def test_it_is_found_and_moves_against_the_load_of_the_whole_step(family):
    model = build(family)
    site = mg.find_routers(model)[0]
    name, bias = selection_bias(model, site)
    assert name == WHERE[family]
    assert name in model.state_dict()
    before = bias.detach().flatten().clone()
    chosen: list[torch.Tensor] = []
    block = model.get_submodule(site.name.rpartition(".")[0])
    # What the experts are called with, seen by a hook of the test's own.
    handle = block.experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1].detach()))
    train(model, steps=1, bias_speed=0.125).detach()
    counts = torch.cat(chosen).flatten().bincount(minlength=4).float()
    handle.remove()
    expected = before - 0.125 * (counts - counts.mean()).sign()
    assert not torch.equal(expected, before)
    torch.testing.assert_close(selection_bias(model, site)[1].flatten(), expected, rtol=0, atol=0)


def test_it_balances_where_the_routers_do_not_learn():
    model, alone = build("DeepseekV3"), build("DeepseekV3")
    start = torch.tensor([0.5, 0.0, -0.5, 0.0])
    for each in (model, alone):
        selection_bias(each, mg.find_routers(each)[0])[1].copy_(start)
    before = train(alone, 60, step=None).metrics()["geometry/max_violation"]
    after = train(model, 60, step=None, bias_speed=0.02).metrics()["geometry/max_violation"]
    assert before > 0.5
    assert after < 0.5 * before
    assert torch.equal(selection_bias(alone, mg.find_routers(alone)[0])[1], start)


def test_gates_and_probabilities_do_not_see_it():
    model = build("DeepseekV3")
    gate = mg.find_routers(model)[0].module
    x = torch.randn(64, 32)
    logits, gates, ids = gate(x)
    gate.e_score_correction_bias.copy_(torch.tensor([5.0, 5.0, 0.0, 0.0]))
    pushed_logits, pushed_gates, pushed_ids = gate(x)
    assert torch.equal(logits, pushed_logits)
    same = (ids == pushed_ids).all(dim=1)
    assert same.any()
    assert not same.all()
    assert torch.equal(gates[same], pushed_gates[same])


def test_it_rests_in_a_step_that_is_not_taken():
    model = build("DeepseekV3")
    mg.geometrize(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    mg.attach(model, optimizer, mg.GeometryConfig(inject=True, bias_speed=0.125, controller="act"))
    _, bias = selection_bias(model, mg.find_routers(model)[0])
    moved = []
    for broken in (False, True, False):
        before = bias.clone()
        model(input_ids=batch(0), labels=batch(0)).loss.backward()
        if broken:
            next(model.parameters()).grad[0] = torch.nan
        optimizer.step()
        optimizer.zero_grad()
        moved.append(not torch.equal(bias, before))
    assert moved == [True, False, True]


def test_what_it_needs_is_said():
    with pytest.raises(
        ValueError, match=r"bias_speed is for routers with a bias that only selects .* none of blocks\.0"
    ):
        train(Model(), bias_speed=0.001)
    model = build("DeepseekV3")
    with pytest.raises(ValueError, match="without an optimizer attach only watches"):
        mg.attach(model, config=mg.GeometryConfig(bias_speed=0.001))
    with pytest.raises(
        ValueError, match=r"e_score_correction_bias is torch\.bfloat16, in which steps of 0\.001 are lost"
    ):
        train(copy.deepcopy(model).bfloat16(), bias_speed=0.001)
    with pytest.raises(ValueError, match="bias_speed must be at least 0"):
        mg.GeometryConfig(bias_speed=-1.0)


def _one_rank(rank: int, expected: torch.Tensor) -> None:
    """Half of the micro-batches of every step each."""
    model = build("DeepseekV3")
    mg.geometrize(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    geometry = mg.attach(model, optimizer, mg.GeometryConfig(inject=True, bias_speed=0.125, step=None))
    for step in range(3):
        ids = batch(2 * step + rank)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    geometry.detach()
    assert torch.equal(selection_bias(model, mg.find_routers(model)[0])[1], expected)


def test_ranks_move_it_together(tmp_path):
    model = build("DeepseekV3")
    train(model, bias_speed=0.125, step=None).detach()
    expected = selection_bias(model, mg.find_routers(model)[0])[1]
    assert expected.any()
    on_two_ranks(_one_rank, tmp_path, expected)
