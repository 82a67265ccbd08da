"""``geometry.evaluation()``: the routing of held-out data, and nothing of it in the training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from tests.support.moe import Block, LinearGateBlock, batch, build, padding, token_loss
from tests.support.ranks import on_two_ranks

OPTIONS = {"on_error": "raise", "top_k": 2, "per_layer": True, "per_expert": True}
#: Of ``metrics()``, what comes from gradients and steps, which an evaluation has none of.
OF_TRAINING = ("fhs", "starved", "trace", "movement", "limit", "flip", "velocity", "speed", "regularizer")


def without_training(found: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if not any(part in name for part in OF_TRAINING)}


@pytest.mark.parametrize("block", [Block, LinearGateBlock])
def test_it_is_what_training_on_the_same_data_would_show(block):
    """Two batches, one padded, in eval mode; the oracle counts them as micro-batches of a step."""
    model, other = build(block), build(block)
    geometry = mg.attach(model, config=mg.GeometryConfig(num_domains=2, **OPTIONS))
    oracle = mg.attach(other, config=mg.GeometryConfig(num_domains=2, **OPTIONS))
    domains = torch.arange(8) % 2

    def forwards(model: nn.Module, geometry: mg.Geometry) -> None:
        with geometry.tokens(domains=domains):
            model(batch(), padding("left"))
            model(batch(seed=3))

    with geometry.evaluation() as held_out:
        forwards(model.eval(), geometry)
        assert not torch.is_grad_enabled()
    forwards(other, oracle)
    expected = without_training(oracle.metrics())
    found = held_out.metrics()
    assert {"geometry/fsi", "geometry/fsi_domain", "geometry/max_violation", "geometry/dead_fraction"} <= found.keys()
    assert any("load/3" in name for name in found)
    assert found == pytest.approx(expected, rel=1e-12)
    assert geometry.metrics() == {}  # no step was made


def test_the_training_does_not_know_of_it():
    def run(evaluate: bool) -> tuple[list[Tensor], list[dict[str, float]]]:
        model = build()
        mg.geometrize(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        config = mg.GeometryConfig(regularizers=mg.Regularizers(fsi=1.0, z=0.1), controller="act", on_error="raise")
        geometry = mg.attach(model, optimizer, config)
        found = []
        for step in range(6):
            output = model(batch(seed=step))
            if evaluate:  # even between a forward and its loss()
                with geometry.evaluation() as held_out:
                    model.train(step % 2 == 0)(batch(seed=100))
                model.train()
                assert held_out.metrics()
            (token_loss(output) + geometry.loss()).backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(geometry.metrics())
        return [p.detach() for p in model.parameters()], found

    (watched, ours), (alone, theirs) = run(True), run(False)
    assert ours == theirs
    assert all(torch.equal(a, b) for a, b in zip(watched, alone, strict=True))


def test_layers_that_are_recorded():
    geometry = mg.attach(nn.Linear(1, 1), config=mg.GeometryConfig(hooks=False, on_error="raise"))
    logits = torch.randn(40, 6, dtype=torch.float64)
    with geometry.evaluation() as held_out:
        geometry.record("own", logits[:30], ids=logits[:30].topk(2).indices)
        geometry.record("own", logits[30:], ids=logits[30:].topk(2).indices)
    expected = float(mg.fsi(logits.softmax(-1), normalized=True))
    assert held_out.metrics()["geometry/fsi"] == pytest.approx(expected, rel=1e-9)


def test_asked_too_early_left_by_an_error_paused_and_without_data():
    model = build()
    geometry = mg.attach(model, config=mg.GeometryConfig(on_error="raise"))
    kept = []

    def broken() -> None:
        with geometry.evaluation() as held_out:
            kept.append(held_out)
            held_out.metrics()

    with pytest.raises(RuntimeError, match="has not ended: ask for its metrics"):
        broken()
    with pytest.raises(RuntimeError, match="has not ended"):
        kept[0].metrics()
    with geometry.evaluation() as nothing, geometry.pause():
        model(batch())
    assert nothing.metrics() == {}
    model(batch())
    assert geometry.metrics()["geometry/fsi"] > 0  # it counts again


def test_sums_that_lack_a_part_are_no_metrics():
    model = build()
    geometry = mg.attach(model)
    with geometry.evaluation() as held_out:
        model(batch())
        with pytest.warns(UserWarning, match="is switched off"), geometry.tokens(mask=torch.ones(3, 3)):
            model(batch())
    assert held_out.metrics() == {}


def _rank(rank: int, folder: str) -> None:
    model = build()
    geometry = mg.attach(model, config=mg.GeometryConfig(**OPTIONS))
    with geometry.evaluation() as held_out:
        for seed in ((1, 2), (3,))[rank]:
            model.eval()(batch(seed=seed))
    torch.save(held_out.metrics(), f"{folder}/rank{rank}.pt")


def test_ranks_add_up(tmp_path: Path):
    on_two_ranks(_rank, tmp_path, str(tmp_path))
    model = build()
    geometry = mg.attach(model, config=mg.GeometryConfig(**OPTIONS))
    with geometry.evaluation() as held_out:
        for seed in (1, 2, 3):
            model.eval()(batch(seed=seed))
    for rank in (0, 1):
        assert torch.load(tmp_path / f"rank{rank}.pt") == pytest.approx(held_out.metrics(), rel=1e-12)
