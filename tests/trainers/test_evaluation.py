"""Evaluation against a loop over single tokens, and fsi_domain on routers whose answer is known."""

import functools
import math
from collections import defaultdict

import pytest
import torch
from torch import nn

import moegeo_router as mg
from trainers.data.base import Batch
from trainers.data.planted import PlantedImages, PlantedText
from trainers.evaluation import Evaluation, autocast, evaluate, target_losses
from trainers.models import LanguageModel, VisionModel
from trainers.models.moe import ModelOutput, Routing

CPU = torch.device("cpu")
SIZES = {"dim": 16, "layers": 2, "heads": 2, "num_experts": 4, "expert_hidden": 8}


def _text(**options: object) -> PlantedText:
    return PlantedText(
        **{"alphabet": 7, "documents": 40, "document_length": 21, "length": 16, "batch_size": 4} | options
    )


def _language(data: PlantedText) -> LanguageModel:
    model = LanguageModel(data.vocab_size, functools.partial(mg.GeometricRouter, bias=False), **SIZES, length=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # far from the uniform start
    return model


def test_loss_accuracy_and_domains_are_those_of_a_loop_over_tokens():
    data = _text()
    model = _language(data)
    losses, hits = defaultdict(list), []
    with torch.no_grad():
        for batch in data.valid_batches():
            for row in range(len(batch.inputs)):
                logits = model(batch.inputs[row : row + 1]).logits[0].double()
                for position in range(data.length):
                    if batch.mask[row, position]:
                        target = int(batch.targets[row, position])
                        log_sum = math.log(sum(math.exp(z) for z in logits[position].tolist()))
                        domain = data.domains[int(batch.domains[row, position])]
                        losses[domain].append(log_sum - float(logits[position, target]))
                        hits.append(max(range(data.vocab_size), key=logits[position].tolist().__getitem__) == target)
    found = evaluate(model, data, CPU)
    every = [loss for part in losses.values() for loss in part]
    assert any(not bool(batch.mask.all()) for batch in data.valid_batches()), "no padding: the test tests less"
    assert found.loss == pytest.approx(sum(every) / len(every), abs=1e-5)
    assert found.accuracy == pytest.approx(sum(hits) / len(hits))
    assert found.domain_loss == pytest.approx({d: sum(part) / len(part) for d, part in losses.items()}, abs=1e-5)
    weighted = sum(found.domain_loss[domain] * len(part) for domain, part in losses.items()) / len(every)
    assert weighted == pytest.approx(found.loss, abs=1e-6)
    assert list(found.layers) == ["layer0", "layer1"]


def test_nothing_depends_on_the_batch_size():
    found = [evaluate(_seeded(_language, data), data, CPU) for data in (_text(batch_size=3), _text(batch_size=8))]
    assert found[0].loss == pytest.approx(found[1].loss, abs=1e-6)
    assert found[0].accuracy == found[1].accuracy
    assert found[0].domain_loss == pytest.approx(found[1].domain_loss, abs=1e-5)
    for layer, scalars in found[0].layers.items():
        assert scalars == pytest.approx(found[1].layers[layer], abs=1e-4)


def _seeded(make, data):
    torch.manual_seed(3)
    return make(data)


def test_bits_per_byte():
    data = _text()
    model = _language(data)
    data.bytes_per_token = 3.5
    found = evaluate(model, data, CPU)
    assert found.bits_per_byte == pytest.approx(found.loss / (0.6931471805599453 * 3.5))


def test_images_have_a_loss_and_no_bits_per_byte():
    data = PlantedImages(images=96, size=4, batch_size=5)
    model = VisionModel(data.num_classes, data.image_shape, nn.Linear, **SIZES, patch=2)
    found = evaluate(model, data, CPU)
    losses, total = 0.0, 0
    with torch.no_grad():
        for batch in data.valid_batches():
            for image, target, real in zip(batch.inputs, batch.targets, batch.mask, strict=True):
                if real:
                    losses -= float(model(image[None]).logits[0].double().log_softmax(-1)[target])
                    total += 1
    assert found.loss == pytest.approx(losses / total, abs=1e-5)
    assert found.bits_per_byte is None
    assert "valid/bits_per_byte" not in found.scalars()


class _Stub(nn.Module):
    """Routes each valid batch as ``route(batch)`` says, in the order of evaluation."""

    def __init__(self, data, route) -> None:
        super().__init__()
        self._batches, self._route, self._vocabulary = data.valid_batches(), route, data.vocab_size

    def forward(self, inputs: torch.Tensor) -> ModelOutput:
        p_TE = self._route(next(self._batches)).flatten(0, -2)
        ids = p_TE.topk(1).indices
        routing = Routing(logits=p_TE.log(), probs=p_TE, ids=ids, weights=p_TE.gather(-1, ids))
        return ModelOutput(logits=torch.zeros(*inputs.shape, self._vocabulary), routing={"layer0": routing})


def _documents(seed: int) -> PlantedText:
    return PlantedText(
        alphabet=7, documents=400, document_length=9, length=16, batch_size=8, valid_fraction=0.2, seed=seed
    )


def test_a_router_that_knows_the_source_has_the_fsi_domain_derived_by_hand():
    data = _documents(0)
    found = evaluate(_Stub(data, lambda batch: torch.eye(4)[batch.domains]), data, CPU)
    counts = sum(torch.bincount(batch.domains[batch.mask], minlength=4) for batch in data.valid_batches())
    shares = [int(count) / int(counts.sum()) for count in counts]
    # The mean of source d is one-hot, p̄ is the shares: d(e_d, p̄) = 2 arccos √w_d (2π/3 where all are 1/4).
    by_hand = sum(w * 2 * math.acos(math.sqrt(w)) for w in shares)
    scalars = found.layers["layer0"]
    assert by_hand == pytest.approx(2 * math.pi / 3, abs=0.05)
    assert scalars["fsi_domain"] == pytest.approx(by_hand, abs=1e-4)
    assert scalars["fsi_domain_null"] < 0.5 * by_hand
    assert scalars["dispersion"] == pytest.approx(1, abs=0.05)
    assert found.loss == pytest.approx(math.log(8))


def test_a_router_that_knows_only_the_document_is_within_the_null():
    above = []
    for seed in range(10):
        data = _documents(seed)
        expert_N = torch.randint(0, 4, (1000,), generator=torch.Generator().manual_seed(seed))
        scalars = evaluate(_Stub(data, lambda b, e=expert_N: torch.eye(4)[e[b.documents]]), data, CPU).layers["layer0"]
        assert scalars["fsi_domain"] > 0.1  # not small: it is the shuffling by document that puts it in its place
        assert scalars["fsi_domain"] < 1.3 * scalars["fsi_domain_null"]
        above.append(scalars["fsi_domain"] > scalars["fsi_domain_null"])
    assert sum(above) <= 2  # 5% are expected


def test_a_router_that_treats_all_alike_has_no_fsi_domain():
    data = _documents(0)
    blind = torch.tensor([0.1, 0.2, 0.3, 0.4])
    scalars = evaluate(_Stub(data, lambda b: blind.expand(*b.domains.shape, 4)), data, CPU).layers["layer0"]
    assert scalars["fsi_domain"] == pytest.approx(0, abs=1e-3)


def test_masked_tokens_are_not_routed_for_the_record():
    data = _documents(0)

    def route(batch: Batch) -> torch.Tensor:
        p = torch.eye(4)[batch.domains]
        p[~batch.mask] = torch.tensor([0.0, 0.0, 0.0, 1.0])
        return p

    plain = evaluate(_Stub(data, lambda batch: torch.eye(4)[batch.domains]), data, CPU)
    assert any(not bool(batch.mask.all()) for batch in data.valid_batches())
    assert evaluate(_Stub(data, route), data, CPU) == plain


def test_the_mode_of_the_model_is_restored_and_no_graph_is_kept():
    data = _text()
    model = _language(data)
    for training in (True, False):
        model.train(training)
        evaluate(model, data, CPU)
        assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_targets_is_an_error():
    data = _text()
    data.valid_batches = lambda: iter(())
    with pytest.raises(ValueError, match="the held-out split of planted has no targets"):
        evaluate(_language(data), data, CPU)


def test_losses_are_of_full_precision_whatever_the_logits():
    logits = torch.randn(2, 3, 5)
    targets = torch.tensor([[0, 1, 2], [3, 4, 0]])
    batch = Batch(inputs=targets, targets=targets, mask=targets >= 0, domains=targets, documents=targets)
    found = target_losses(ModelOutput(logits=logits.bfloat16(), routing={}), batch)
    exact = -logits.bfloat16().double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_autocast(precision, dtype):
    with autocast(precision, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_scalars_by_name():
    layers = {
        "layer0": {"fsi": 0.25, "dead_experts": 1.0, "max_load": 2.0, "fsi_domain": 0.5},
        "layer1": {"fsi": 0.75, "dead_experts": 2.0, "max_load": 3.0, "fsi_domain": 1.5},
    }
    evaluation = Evaluation(loss=1.0, bits_per_byte=2.0, accuracy=0.5, domain_loss={"go": 1.25}, layers=layers)
    flat = {
        "valid/loss": 1.0,
        "valid/accuracy": 0.5,
        "valid/bits_per_byte": 2.0,
        "valid/geometry/fsi": 0.5,
        "valid/geometry/dead_experts": 3.0,
        "valid/geometry/max_load": 3.0,
        "valid/geometry/fsi_domain": 1.0,
    }
    assert evaluation.scalars() == flat
    every = evaluation.scalars(per_layer=True)
    assert flat.items() <= every.items()
    assert every["valid/domain/go/loss"] == 1.25
    assert every["valid/geometry/layer1/dead_experts"] == 2.0
    assert len(every) == len(flat) + 1 + 8


def test_mode_is_restored_even_if_the_data_fail():
    data = _text()
    model = _language(data)

    def broken():
        raise OSError("the disk is gone")
        yield

    data.valid_batches = broken
    with pytest.raises(OSError, match="the disk is gone"):
        evaluate(model, data, CPU)
    assert model.training
