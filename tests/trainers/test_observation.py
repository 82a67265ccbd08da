"""What a run reports of its routing, against values derived by hand."""

import functools
import itertools
import math

import pytest
import torch
from sklearn import metrics
from torch import Tensor, nn

from trainers.data.base import Batch
from trainers.data.planted import PlantedImages, PlantedText
from trainers.data.vision import digits
from trainers.evaluation import Evaluation
from trainers.models import VisionModel
from trainers.models.moe import Routing
from trainers.observation import (
    RECOVERY,
    RoutingRecord,
    over_layers,
    recovery_scalars,
    routing_scalars,
    token_values,
)

EYE = torch.eye(4)


def _floats(scalars: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in scalars.items()}


def test_a_collapsed_router():
    scalars = _floats(routing_scalars(EYE[[0] * 8], torch.zeros(8, 1, dtype=torch.long)))
    assert scalars == pytest.approx(
        {
            "fsi": 1,
            "fsi_load": 1,
            "fsi_token": 1,
            "dispersion": 0,
            "routing_information": 0,
            "max_load": 4,
            "dead_experts": 3,
        },
        abs=1e-5,
    )


def test_a_uniform_router_with_balanced_choices():
    ids = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0]])
    scalars = _floats(routing_scalars(torch.full((4, 4), 0.25), ids))
    zero = dict.fromkeys(("fsi", "fsi_load", "fsi_token", "dispersion", "routing_information", "dead_experts"), 0)
    assert scalars == pytest.approx({**zero, "max_load": 1}, abs=1e-5)


def test_a_balanced_decisive_router():
    ids = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    scalars = _floats(routing_scalars(EYE[ids], ids[:, None]))
    one = {"fsi_token": 1, "dispersion": 1, "routing_information": 1, "max_load": 1}
    assert scalars == pytest.approx({"fsi": 0, "fsi_load": 0, "dead_experts": 0, **one}, abs=1e-5)


def test_a_router_between():
    # Half of the tokens to expert 0 for sure, half to expert 1: p̄ = (1/2, 1/2, 0, 0), of two experts of four.
    ids = torch.tensor([0, 1, 0, 1])
    scalars = _floats(routing_scalars(EYE[ids], ids[:, None]))
    largest = 2 * math.pi / 3  # 2 arccos(1/2)
    to_uniform = 2 * math.acos(2 * math.sqrt(0.5 * 0.25))
    to_mean = 2 * math.acos(math.sqrt(0.5))
    assert scalars["fsi"] == pytest.approx(to_uniform / largest, abs=1e-5)
    assert scalars["fsi_load"] == pytest.approx(to_uniform / largest, abs=1e-5)
    assert scalars["dispersion"] == pytest.approx((to_mean / largest) ** 2, abs=1e-5)
    assert scalars["routing_information"] == pytest.approx(0.5, abs=1e-5)  # log 2 of log 4


@pytest.mark.parametrize(("counts", "dead"), [((20, 20, 39, 1), 1), ((20, 20, 37, 3), 0), ((79, 1, 0, 0), 3)])
def test_dead_is_less_than_a_tenth_of_the_fair_share(counts, dead):
    ids = torch.tensor([e for e, count in enumerate(counts) for _ in range(count)]).view(-1, 2)
    scalars = _floats(routing_scalars(torch.full((len(ids), 4), 0.25), ids))
    assert scalars["dead_experts"] == dead
    assert scalars["max_load"] == pytest.approx(max(counts) * 4 / 80)


def test_a_token_has_the_value_of_its_position():
    values = torch.tensor([[3, 1, 4], [1, 5, 9]])
    assert token_values(values, 6).tolist() == [3, 1, 4, 1, 5, 9]


def test_a_token_has_the_value_of_its_image():
    model = VisionModel(
        3,
        (1, 4, 6),
        functools.partial(nn.Linear, bias=False),
        dim=8,
        layers=1,
        heads=2,
        patch=2,
        num_experts=4,
        expert_hidden=8,
    )
    images = torch.randn(3, 1, 4, 6)
    changed = images.clone()
    changed[1] += 1
    before, after = (model(x).routing["layer0"].logits for x in (images, changed))
    of_image = token_values(torch.arange(3), len(before))
    assert torch.equal((before != after).any(dim=-1), of_image == 1)


def test_layers_are_averaged_the_dead_added_and_the_largest_load_kept():
    assert over_layers("dispersion", [1.0, 2.0, 6.0]) == 3.0
    assert over_layers("dead_experts", [2.0, 1.0]) == 3.0
    assert over_layers("max_load", [1.5, 1.25]) == 1.5


def _batch(mask: Tensor, domains: Tensor, documents: Tensor) -> Batch:
    zeros = torch.zeros_like(domains)
    return Batch(inputs=zeros, targets=zeros, mask=mask, domains=domains, documents=documents)


def _routing(p_TE: Tensor) -> Routing:
    ids = p_TE.topk(2).indices
    return Routing(logits=p_TE.log(), probs=p_TE, ids=ids, weights=p_TE.gather(-1, ids))


def test_a_record_of_batches_is_that_of_their_unmasked_tokens():
    p = torch.rand(2, 3, 4, 5).softmax(-1)  # batches, rows, positions, experts
    mask = torch.tensor([[[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], [[1, 1, 1, 0]] * 3]).bool()
    domains = torch.randint(0, 3, (2, 3, 4)) * mask
    documents = domains * 10 + torch.randint(0, 4, (2, 3, 4)) * mask
    record = RoutingRecord()
    for i in range(2):
        record.add({"layer0": _routing(p[i].flatten(0, 1))}, _batch(mask[i], domains[i], documents[i]))
    found = record.layers(3)["layer0"]

    kept = p[mask]
    mean = kept.mean(0)
    assert found["fsi"] == pytest.approx(
        math.acos(float((mean / 5).sqrt().sum())) / math.acos(math.sqrt(1 / 5)), abs=1e-5
    )
    load = torch.zeros(5)
    for token in kept:
        load[token.topk(2).indices] += 1
    assert found["max_load"] == pytest.approx(float(load.max()) * 5 / float(load.sum()))
    expected = 0.0
    for domain in range(3):
        of_domain = kept[domains[mask] == domain]
        overlap = float((of_domain.mean(0).double() * mean.double()).sqrt().sum())
        expected += len(of_domain) / len(kept) * 2 * math.acos(overlap)
    assert found["fsi_domain"] == pytest.approx(expected, rel=1e-3)


# --- planted sources --------------------------------------------------------------------------------------------------


def _best_map(experts: list[int], sources: list[int]) -> float:
    """By trying every map of experts to sources."""
    names = range(max(sources) + 1)
    maps = itertools.product(names, repeat=max(experts) + 1)
    return max(sum(m[e] == s for e, s in zip(experts, sources, strict=True)) for m in maps) / len(experts)


@pytest.mark.parametrize("experts", [2, 4, 6])
def test_recovery_is_the_best_map_of_experts_to_sources(experts):
    source = torch.Generator().manual_seed(experts)
    e, s = torch.randint(experts, (60,), generator=source), torch.randint(3, (60,), generator=source)
    found = recovery_scalars(e, s)
    assert found["recovery"] == pytest.approx(_best_map(e.tolist(), s.tolist()))
    assert found["recovery_ami"] == pytest.approx(metrics.adjusted_mutual_info_score(s, e))


def test_what_recovery_reads_where_the_answer_is_known():
    sources = torch.arange(4).repeat_interleave(100)
    renamed = torch.tensor([2, 3, 0, 1])[sources]
    assert recovery_scalars(renamed, sources) == pytest.approx({"recovery": 1, "recovery_ami": 1})
    two_each = 2 * sources + torch.arange(400) % 2  # one to one would be half of it
    found = recovery_scalars(two_each, sources)
    assert found["recovery"] == 1
    assert 0.6 < found["recovery_ami"] < 0.9
    collapsed = recovery_scalars(torch.full((400,), 5), sources)
    assert collapsed == pytest.approx({"recovery": 0.25, "recovery_ami": 0}, abs=1e-9)
    chance = recovery_scalars(torch.arange(400) % 8, sources)  # every expert sees every source alike
    assert chance["recovery"] == pytest.approx(0.25, abs=0.01)
    assert abs(chance["recovery_ami"]) < 0.02
    two_of_four = recovery_scalars(sources // 2, sources)  # fewer experts than sources
    assert two_of_four["recovery"] == 0.5


def test_recovery_is_measured_where_domains_are_planted_alone():
    routing = Routing(
        logits=EYE.repeat(2, 1).log(),
        probs=EYE.repeat(2, 1),
        ids=torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2]] * 2),
        weights=torch.ones(8, 2),
    )
    zeros = torch.zeros(2, 4, dtype=torch.long)
    batch = Batch(
        inputs=zeros,
        targets=zeros,
        mask=torch.tensor([[True] * 4, [False] * 4]),
        domains=torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]]),
        documents=zeros,
    )
    record = RoutingRecord()
    record.add({"layer0": routing}, batch)
    assert not set(RECOVERY) & set(record.layers(2)["layer0"])
    planted = record.layers(2, planted=True)["layer0"]
    assert planted["recovery"] == 1  # of the four tokens that count, by their first choices


def test_results_have_the_recovery_of_planted_data_under_keys_of_their_own():
    found = Evaluation(
        loss=1.0,
        bits_per_byte=None,
        accuracy=0.5,
        domain_loss={},
        layers={"layer0": {"fsi": 0.5, "recovery": 0.25}, "layer1": {"fsi": 0.5, "recovery": 0.75}},
    ).scalars(per_layer=True)
    assert found["valid/recovery"] == 0.5
    assert found["valid/geometry/layer1/recovery"] == 0.75
    assert "valid/geometry/recovery" not in found


@pytest.mark.parametrize("data", [PlantedText(documents=40, length=32), PlantedImages(images=100), digits()])
def test_which_domains_are_the_truth(data):
    assert getattr(data, "planted", False) == (data.name != "digits")
