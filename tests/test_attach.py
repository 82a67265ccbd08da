"""Watching a model in training: counted once, never changed, right whatever the loop does."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import moegeo_router as mg
from moegeo_router.loggers import JSONLLogger, read_jsonl
from moegeo_router.observe.statistics import LayerStatistics
from tests.support import moe
from tests.support.moe import D, E, K, L, LinearGateBlock, Model
from tests.support.ranks import on_two_ranks


def build(reentrant: bool | None = None) -> Model:
    return moe.build(LinearGateBlock, reentrant)


def inputs(seed: int = 1, rows: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, L, D, generator=generator, dtype=torch.float64).requires_grad_()


def watch(model: nn.Module, **options: object) -> mg.Geometry:
    return mg.attach(model, config=mg.GeometryConfig(**{"top_k": K, "on_error": "raise"} | options))


def step(model: Model, x: Tensor, **kwargs: Tensor) -> None:
    model(x, **kwargs).square().mean().backward()


def steps(model: Model, *batches: Tensor) -> None:
    for x in batches:
        step(model, x)


def expected(x: Tensor) -> dict[str, float]:
    """The metrics of the whole batch by the functions on full p."""
    model, fsi, information, violation = build(), [], [], []
    with torch.no_grad():
        h = x
        for block in model.blocks:
            p = mg.routing_probabilities(block.gate(h))
            counts = torch.bincount(p.topk(K).indices.flatten(), minlength=E).double()
            fsi.append(float(mg.fsi(p, normalized=True)))
            information.append(float(mg.routing_information(p, normalized=True)))
            violation.append(float(counts.max() / counts.mean() - 1))
            h = block(h)
    return {
        "geometry/fsi": sum(fsi) / 2,
        "geometry/routing_information": sum(information) / 2,
        "geometry/max_violation": max(violation),
    }


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_same_numbers_whatever_the_checkpointing_and_the_micro_batches(reentrant, micro_batches):
    model, x = build(reentrant=reentrant), inputs()
    geometry = watch(model)
    for part in x.chunk(micro_batches):
        step(model, part)
    found = geometry.metrics()
    assert {key: found[key] for key in expected(x)} == pytest.approx(expected(x), abs=1e-6)
    assert len(found) <= 20
    assert geometry.metrics() == {}


def test_eval_passes_and_pauses_are_not_counted():
    model, x = build(), inputs()
    geometry = watch(model)
    model.eval()
    model(inputs(seed=2))
    model.train()
    with geometry.pause():
        model(inputs(seed=3))
    step(model, x)
    assert geometry.metrics()["geometry/fsi"] == pytest.approx(expected(x)["geometry/fsi"], abs=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(side):
    model, x = build(), inputs()
    mask = torch.ones(6, 5, dtype=torch.long)
    mask[2:, :2] = 0
    mask = mask if side == "left" else mask.flip(1)
    geometry = watch(model)
    step(model, x, attention_mask=mask)
    real = x[mask.bool()].unsqueeze(0)
    assert geometry.metrics()["geometry/fsi"] == pytest.approx(expected(real)["geometry/fsi"], abs=1e-6)
    step(model, x)  # a mask holds for its own forward only
    assert geometry.metrics()["geometry/fsi"] == pytest.approx(expected(x)["geometry/fsi"], abs=1e-6)


def test_training_is_bit_identical_and_detach_leaves_nothing():
    plain, watched = build(), build()
    hooks = copy.deepcopy([(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in watched.modules()])
    geometry = watch(watched)
    for model in (plain, watched):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for seed in range(5):
            step(model, inputs(seed))
            optimizer.step()
            optimizer.zero_grad()
            geometry.metrics()
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q)
    geometry.detach()
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in watched.modules()]
    last = geometry.metrics()
    step(watched, inputs())
    assert geometry.metrics() == last != {}


def test_layers_apart():
    model, x = build(), inputs()
    geometry = watch(model, per_layer=True)
    step(model, x)
    found = geometry.metrics()
    assert geometry.layers == ("blocks.0.gate", "blocks.1.gate")
    per_layer = [found[f"geometry/layer{i}/fsi"] for i in range(2)]
    assert found["geometry/fsi"] == pytest.approx(sum(per_layer) / 2)


@pytest.mark.parametrize(("scores", "other"), [(None, "sigmoid"), ("sigmoid", "softmax")])
def test_logits_alone_have_no_load_and_that_is_said_once(scores, other):
    model = build()
    geometry = watch(model, top_k=None, scores=scores)
    with pytest.warns(UserWarning, match=r"blocks\.0\.gate shows logits, not the experts chosen") as said:
        steps(model, inputs(), inputs())
    assert len(said) == 1
    assert "GeometryConfig(top_k=...) takes the k largest logits" in str(said[0].message)
    assert f"GeometryConfig(scores={other!r}) otherwise" in str(said[0].message)
    found = geometry.metrics()
    assert "geometry/fsi" in found
    assert "geometry/max_violation" not in found


class TopKRouter(nn.Module):
    """Returns what code bases return, in any order; the normalised scores look like logits, too."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D))
        self.order = order

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        logits = x @ self.weight.T
        weights, ids = logits.softmax(-1).topk(K)
        return tuple((logits, weights, ids, logits.softmax(-1))[i] for i in self.order)


@pytest.mark.filterwarnings("ignore:layer router .* no FHS by outputs:UserWarning")
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (3, 0, 2), (1, 3, 2, 0)])
def test_outputs_are_told_apart_by_what_they_are(order):
    router, x = TopKRouter(order).double(), inputs()
    geometry = watch(nn.ModuleDict({"router": router}), top_k=None)
    router(x)
    logits = (x @ router.weight.T).detach()
    found = geometry.metrics()
    assert found["geometry/fsi"] == pytest.approx(float(mg.fsi(logits.softmax(-1), normalized=True)), abs=1e-6)
    counts = torch.bincount(logits.topk(K).indices.flatten(), minlength=E).double()
    assert found["geometry/max_violation"] == pytest.approx(float(counts.max() / counts.mean() - 1))


def test_record_without_hooks():
    geometry = watch(nn.Linear(3, 3), hooks=False, top_k=None)
    logits = torch.randn(4, 5, E)
    ids, mask = logits.topk(K).indices, torch.rand(4, 5) < 0.5
    with pytest.warns(UserWarning, match="layer mine shows the experts chosen, not their gates: no FHS"):
        geometry.record("mine", logits, ids, mask)
    p = logits[mask].softmax(-1)
    assert geometry.metrics()["geometry/fsi"] == pytest.approx(float(mg.fsi(p, normalized=True)), abs=1e-6)
    with pytest.raises(ValueError, match="layer mine has 4 experts, got logits of 3"):
        geometry.record("mine", logits[..., :3], ids)


def test_a_failure_switches_the_watching_off_and_not_the_run():
    model, x = build(), inputs()
    geometry = watch(model, on_error="warn")
    wrong = torch.ones(6, 4, dtype=torch.long)
    with pytest.warns(UserWarning, match="switched off, training goes on: attention_mask") as said:
        step(model, x, attention_mask=wrong)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, x)
    assert geometry.metrics() == {}
    fresh = build()
    watch(fresh)
    with pytest.raises(ValueError, match=r"attention_mask \(6, 4\) does not fit the 30 tokens"):
        step(fresh, x, attention_mask=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": "relu"}, "scores must be 'softmax', 'sigmoid' or None"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        ({"top_k": 5}, r"top_k=5: router blocks\.0\.gate has 4 experts"),
        ({"on_error": "ignore"}, "on_error must be 'warn' or 'raise'"),
        ({"select": "nothing"}, "no router found"),
    ],
)
def test_bad_configuration(options, message):
    with pytest.raises(ValueError, match=message):
        watch(build(), **options)


# The compiler itself reads .grad of intermediate tensors where it breaks the graph at a hook.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_models_give_the_same_numbers():
    model, x = build(), inputs()
    geometry = watch(model)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        compiled(x).square().mean().backward()
        found = geometry.metrics()
        assert {key: found[key] for key in expected(x)} == pytest.approx(expected(x), abs=1e-6)


def _train_on_a_rank(rank: int) -> None:
    model, x = DistributedDataParallel(build()), inputs()
    geometry = watch(model)
    model(x[4 * rank : 4 * rank + 4]).square().mean().backward()  # four rows, then two
    found = geometry.metrics()
    assert {key: found[key] for key in expected(x)} == pytest.approx(expected(x), abs=1e-6)


def test_two_ranks_report_the_global_batch(tmp_path):
    on_two_ranks(_train_on_a_rank, tmp_path)


def test_no_pictures_by_default(tmp_path):
    model = build()
    geometry, logger = watch(model), JSONLLogger(tmp_path / "log")
    step(model, inputs())
    geometry.metrics()
    geometry.log_pictures(logger, 0)
    logger.close()
    assert read_jsonl(tmp_path / "log") == []


def test_pictures_of_the_load_every_so_many_steps(tmp_path):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    weights = mg.Regularizers.none()
    config = mg.GeometryConfig(top_k=K, step=None, regularizers=weights, pictures_every=2, on_error="raise")
    geometry, logger = mg.attach(model, optimizer, config), JSONLLogger(tmp_path / "log")
    for number in range(1, 5):
        step(model, inputs())
        optimizer.step()
        geometry.log_pictures(logger, number)
    logger.close()
    rows = read_jsonl(tmp_path / "log")
    heatmaps = [row for row in rows if row.get("heatmap") == "geometry/load"]
    assert [row["step"] for row in heatmaps] == [2, 4]
    with torch.no_grad():
        h, loads = inputs(), []
        for block in build().blocks:
            loads.append(torch.bincount(block.gate(h).topk(K).indices.flatten(), minlength=E) * E / (6 * L * K))
            h = block(h)
    assert heatmaps[0]["labels"] == ["layer0", "layer1"]
    assert heatmaps[0]["rows"] == [pytest.approx(load.tolist()) for load in loads]
    assert {row["histogram"] for row in rows if "histogram" in row} == {
        "geometry/load_shares",
        "geometry/fisher_shares",
    }
    assert sum(next(row["counts"] for row in rows if "histogram" in row)) == 2 * E


def test_no_pictures_of_steps_that_were_not_seen(tmp_path, monkeypatch):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = mg.GeometryConfig(top_k=K, step=None, regularizers=mg.Regularizers.none(), pictures_every=1)
    geometry, logger = mg.attach(model, optimizer, config), JSONLLogger(tmp_path / "log")
    for number in range(1, 5):
        if number == 3:
            monkeypatch.setattr(LayerStatistics, "of", lambda *_, **__: 1 / 0)
            with pytest.warns(UserWarning, match="watching .* failed and is switched off"):
                step(model, inputs())
        else:
            step(model, inputs())
        optimizer.step()
        geometry.log_pictures(logger, number)
    logger.close()
    assert {row["step"] for row in read_jsonl(tmp_path / "log")} == {1, 2}


def test_the_velocity_is_from_step_to_step_and_state_is_of_the_last():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = mg.GeometryConfig(top_k=K, step=None, regularizers=mg.Regularizers.none(), on_error="raise")
    geometry, found = mg.attach(model, optimizer, config), []
    for seed in (1, 2, 2):
        step(model, inputs(seed))
        optimizer.step()
        found.append(geometry.metrics())
    assert "geometry/fsi_velocity" not in found[0]
    assert found[1]["geometry/fsi_velocity"] > 1e-3
    assert found[2]["geometry/fsi_velocity"] == pytest.approx(0, abs=1e-6)
    assert geometry.metrics() == found[2]  # asked for again, the same
    assert float(geometry.state_dict()["sums"][0]) == 6 * L
    resumed = build()
    resumed_geometry = mg.attach(resumed, torch.optim.SGD(resumed.parameters(), lr=0.0), config)
    resumed_geometry.load_state_dict(geometry.state_dict())
    assert resumed_geometry.metrics() == found[2], "the velocity, too"
    for other in (None, [geometry.state_dict()]):
        with pytest.raises(ValueError, match=r"what state_dict\(\) returned, got"):
            resumed_geometry.load_state_dict(other)  # type: ignore[arg-type]
