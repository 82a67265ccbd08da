"""Sums against the metrics of whole batches, token loops, and a real process group."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import moegeo_router as mg
from moegeo_router.metrics.summary import layer_scalars
from moegeo_router.observe import LayerStatistics, RoutingStatistics
from moegeo_router.observe.window import Window
from tests.support.ranks import on_two_ranks

E = 6


def batch(tokens: int = 40, seed: int = 0, k: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(tokens, E, generator=generator, dtype=torch.float64)
    return logits, logits.topk(k).indices


def test_every_sum_by_a_loop_over_tokens():
    logits, ids = batch(tokens=7)
    sums = LayerStatistics.of(logits, ids)
    p = [[math.exp(z) / sum(map(math.exp, row)) for z in row] for row in logits.tolist()]
    u = 1 / E
    expected = {
        "tokens": 7,
        "entropy": sum(-x * math.log(x) for row in p for x in row),
        "distance": sum(2 * math.acos(sum(math.sqrt(x * u) for x in row)) for row in p),
        "margin": sum(sorted(row)[-1] - sorted(row)[-2] for row in p),
        "z_squared": sum(math.log(sum(map(math.exp, row))) ** 2 for row in logits.tolist()),
        "choices": 14,
        "k_tokens": 7,
    }
    assert {name: float(getattr(sums, name)) for name in expected} == pytest.approx(expected)
    assert sums.p.tolist() == pytest.approx([sum(row[e] for row in p) for e in range(E)])
    assert sums.root_p.tolist() == pytest.approx([sum(math.sqrt(row[e]) for row in p) for e in range(E)])
    assert sums.counts.tolist() == [sum(e in row for row in ids.tolist()) for e in range(E)]


def test_scalars_of_sums_are_the_metrics_of_the_whole_batch():
    logits, ids = batch()
    p = mg.routing_probabilities(logits)
    scalars = layer_scalars(LayerStatistics.of(logits, ids))
    assert scalars["fsi"] == pytest.approx(float(mg.fsi(p, normalized=True)))
    assert scalars["fsi_token"] == pytest.approx(float(mg.fsi_token(p)))
    assert scalars["routing_information"] == pytest.approx(float(mg.routing_information(p, normalized=True)))
    counts = torch.bincount(ids.flatten(), minlength=E).double()
    assert scalars["fsi_load"] == pytest.approx(float(mg.fsi_load(counts, 2, normalized=True)))
    assert scalars["max_violation"] == pytest.approx(float(counts.max() / counts.mean() - 1))
    two_pass = float(mg.dispersion(p))
    assert 8 / math.pi**2 * two_pass <= scalars["dispersion_1"] <= two_pass


def test_parts_add_up_to_the_whole_and_are_not_their_mean():
    logits, ids = batch()
    whole = LayerStatistics.of(logits, ids).flat()
    parts = [LayerStatistics.of(logits[part], ids[part]) for part in (slice(0, 10), slice(10, 40))]
    torch.testing.assert_close((parts[0] + parts[1]).flat(), whole, rtol=1e-12, atol=1e-12)
    mean = sum(layer_scalars(part)["fsi"] for part in parts) / 2
    assert mean > 1.05 * layer_scalars(parts[0] + parts[1])["fsi"]


def test_masked_tokens_do_not_count_whatever_they_hold():
    logits, ids = batch()
    mask = torch.arange(40) % 3 != 0
    kept = LayerStatistics.of(logits[mask], ids[mask]).flat()
    logits[~mask] = math.nan
    masked = LayerStatistics.of(logits.view(8, 5, E), ids.view(8, 5, 2), mask.view(8, 5)).flat()
    torch.testing.assert_close(masked, kept, rtol=1e-12, atol=1e-12)


def test_an_expert_that_cannot_be_chosen_breaks_no_token():
    logits, _ = batch()
    logits[::2, 0] = -math.inf
    sums = LayerStatistics.of(logits)
    p = logits.softmax(-1)
    assert (float(sums.tokens), float(sums.non_finite)) == (40, 0)
    torch.testing.assert_close(sums.p, p.sum(0))
    assert float(sums.entropy) == pytest.approx(float(torch.special.entr(p).sum()))
    logits[3], logits[5, 1], logits[7, 2] = -math.inf, math.nan, math.inf
    assert float(LayerStatistics.of(logits).non_finite) == 3


def test_sigmoid_scores():
    logits, _ = batch()
    squares = LayerStatistics.of(logits, scores="sigmoid").z_squared
    assert float(squares) == pytest.approx(float(logits.logsumexp(-1).square().sum()))
    p = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    torch.testing.assert_close(LayerStatistics.of(logits, scores="sigmoid").p, p.sum(0))


def test_without_choices_or_tokens_there_are_no_such_scalars():
    logits, _ = batch()
    assert not {"fsi_load", "max_violation", "dead_fraction"} & layer_scalars(LayerStatistics.of(logits)).keys()
    assert layer_scalars(LayerStatistics.of(logits[:0])) == {}
    assert layer_scalars(LayerStatistics.zeros(E)) == {}


def test_one_expert_and_all_experts_chosen():
    one = layer_scalars(LayerStatistics.of(torch.randn(5, 1), torch.zeros(5, 1, dtype=torch.long)))
    assert {one[name] for name in ("fsi", "fsi_token", "dispersion_1", "fsi_load", "max_violation")} == {0}
    everyone = layer_scalars(LayerStatistics.of(torch.randn(5, E), torch.arange(E).expand(5, E)))
    assert (everyone["fsi_load"], everyone["max_violation"], everyone["dead_fraction"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(39, 2, dtype=torch.long), None, r"ids must be \(40, 'K'\) integers, got torch.int64 \(39, 2\)"),
        (torch.zeros(40, 2), None, "ids must be .* got torch.float32"),
        (None, torch.ones(39), r"mask must be \(40,\), got \(39,\)"),
    ],
)
def test_bad_input(ids, mask, message):
    with pytest.raises(ValueError, match=message):
        LayerStatistics.of(batch()[0], ids, mask)


def test_a_window_has_every_layer_and_begins_anew():
    window, sums = Window(0, None), LayerStatistics.of(*batch())
    window.experts = {"b": 3, "a": E}
    window.add("a", sums)
    window.add("a", sums)
    closed = window.close(failed=True)
    assert list(closed.layers) == ["a", "b"]
    assert torch.equal(closed.layers["a"].flat(), 2 * sums.flat())
    assert torch.equal(closed.layers["b"].flat(), LayerStatistics.zeros(3).flat())
    assert float(closed.failures) == 1
    assert not window.close(failed=False).flat().any()
    window.add("a", LayerStatistics.zeros(4))
    with pytest.raises(ValueError, match="layer a has 6 experts, got sums over 4"):
        window.close(failed=False)


def test_what_is_posted_arrives_as_it_was_and_the_step_before_stays():
    window, numbers = Window(0, None), {"moved": torch.tensor([0.5, math.nan]), "loss": torch.ones(1)}
    posted = [RoutingStatistics({"a": LayerStatistics.of(*batch(seed=seed))}) for seed in range(2)]
    assert window.newest(wait=True) is None
    for reduced in posted:
        window.post(reduced, numbers)
    sums, others = window.newest(wait=True)
    assert torch.equal(sums.flat(), posted[1].flat())
    assert torch.equal(window.previous.flat(), posted[0].flat())
    assert {name: values.dtype for name, values in others.items()} == dict.fromkeys(numbers, torch.float64)
    torch.testing.assert_close(others, {n: v.double() for n, v in numbers.items()}, equal_nan=True)
    assert torch.equal(posted[0].unflat(posted[0].flat()).flat(), posted[0].flat())


def test_stacked_layers_are_the_layers():
    layers = [LayerStatistics.of(*batch(seed=seed)) for seed in range(3)]
    stacked = LayerStatistics.stack(layers)
    assert stacked.num_experts == E
    for index, layer in enumerate(layers):
        for ours, theirs in zip(stacked.parts, layer.parts, strict=True):
            assert torch.equal(ours[index], theirs)


def _of_rank(rank: int) -> RoutingStatistics:
    first, second = LayerStatistics.of(*batch(seed=rank)), LayerStatistics.of(batch(seed=rank + 10)[0][:, :3])
    return RoutingStatistics({"a": first, "b": second})


def _reduce(rank: int) -> None:
    reduced = _of_rank(rank).all_reduce()
    for name in ("a", "b"):
        expected = _of_rank(0).layers[name] + _of_rank(1).layers[name]
        torch.testing.assert_close(reduced.layers[name].flat(), expected.flat(), rtol=1e-12, atol=1e-12)


def test_two_ranks_get_the_sums_of_both(tmp_path):
    on_two_ranks(_reduce, tmp_path)
