"""Planted data against its ground truth."""

import math

import pytest
import torch

from trainers.data.planted import PlantedImages, PlantedText, draw_transitions, stationary

TINY = {"sources": 3, "alphabet": 5, "documents": 300, "document_length": 40, "length": 16, "batch_size": 4}


def test_a_binary_source_by_hand():
    a, b = 0.2, 0.6  # probabilities to leave symbols 0 and 1
    chain = torch.tensor([[[1 - a, a], [b, 1 - b]]], dtype=torch.double)
    torch.testing.assert_close(stationary(chain), torch.tensor([[b / (a + b), a / (a + b)]], dtype=torch.double))

    def h(p):
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    data = PlantedText(**TINY)
    data.transitions_SAA, data.stationary_SA = chain, stationary(chain)
    assert data.entropy() == pytest.approx((b * h(a) + a * h(b)) / (a + b), rel=1e-12)


def test_entropy_is_the_mean_over_sources():
    data = PlantedText(**TINY)
    rates = []
    for chain in data.transitions_SAA:
        pi = torch.linalg.matrix_power(chain, 10_000)[0]
        rates.append(float(-(pi[:, None] * chain * chain.log()).sum()))
    assert data.entropy() == pytest.approx(sum(rates) / 3, rel=1e-9)


def test_uniform_sources_at_large_concentration():
    assert PlantedText(**TINY | {"concentration": 1e7}).entropy() == pytest.approx(math.log(5), abs=1e-5)


def test_dirichlet_rows():
    rows = draw_transitions(4, 50, 0.2, seed=0)
    torch.testing.assert_close(rows.sum(-1), torch.ones(4, 50, dtype=torch.double))
    assert rows.min() > 0
    # Σ_b E p_b² = (c + 1) / (A c + 1) for a symmetric Dirichlet of concentration c on A symbols.
    assert float(rows.square().sum(-1).mean()) == pytest.approx(1.2 / 11, rel=0.1)
    assert not torch.equal(rows, draw_transitions(4, 50, 0.2, seed=1))


def test_documents_follow_their_source():
    """The transitions counted in the train stream are those of the source that ``domains`` names."""
    data = PlantedText(**TINY | {"documents": 3000, "concentration": 1.0})
    stream = data._train
    counts = torch.zeros(3, 6, 6)
    position = torch.arange(len(stream) - 1)
    domain = stream.domains[torch.searchsorted(stream.starts, position, right=True) - 1]
    counts.index_put_(
        (domain, stream.tokens[:-1].long(), stream.tokens[1:].long()), torch.ones(len(position)), accumulate=True
    )
    symbols = counts[:, 1:, 1:].double()
    torch.testing.assert_close(symbols / symbols.sum(-1, keepdim=True), data.transitions_SAA, atol=0.02, rtol=0)
    firsts = counts[:, 0, 1:].sum() + 1
    assert firsts == len(stream.starts)


def test_documents_have_the_length_and_the_sources_alternate_at_random():
    data = PlantedText(**TINY)
    assert torch.equal(data._train.starts, torch.arange(len(data._train.starts)) * 40)
    assert set(data._train.tokens[39::40].tolist()) == {0}
    assert set(data._train.tokens.tolist()) == {0, 1, 2, 3, 4, 5}
    assert data.vocab_size == 6
    order = data._train.domains
    assert 0.2 < float((order[1:] == (order[:-1] + 1) % 3).float().mean()) < 0.5
    assert len(data._train.starts) + len(data._valid.starts) == 300


def test_valid_covers_every_source_and_all_is_seeded():
    data, again, other = PlantedText(**TINY), PlantedText(**TINY), PlantedText(**TINY, seed=1)
    seen = torch.cat([b.domains[b.mask] for b in data.valid_batches()]).unique()
    assert seen.tolist() == [0, 1, 2]
    assert data.domains == ("source0", "source1", "source2")
    assert data.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(data.train_batch(3).inputs, again.train_batch(3).inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": 0}, "sources: expected an integer >= 1, got 0"),
        ({"alphabet": 1}, "alphabet: expected an integer >= 2, got 1"),
        ({"documents": 5}, "documents: expected an integer >= 6, got 5"),
        ({"document_length": 1}, "document_length: expected an integer >= 2, got 1"),
        ({"concentration": 0.0}, r"concentration: expected a finite number > 0, got 0\.0"),
        ({"concentration": float("nan")}, "concentration: expected a finite number > 0, got nan"),
        ({"valid_fraction": 0}, "valid_fraction: expected a number in the open interval"),
        ({"length": 20_000}, "length: expected less than"),
    ],
)
def test_bad_text_options(options, message):
    with pytest.raises(ValueError, match=message):
        PlantedText(**TINY | options)


def decode(data, batch, backgrounds):
    """The nearest background + pattern of each image: (background, pattern) as the ground truth has them."""
    pixels = batch.inputs * data._std_C[:, None, None] + data._mean_C[:, None, None]
    centres = backgrounds[:, None] + data.patterns[None]
    distance = (pixels[:, None, None] - centres).square().sum((3, 4, 5)).flatten(1)
    return distance.argmin(1) // len(data.patterns), distance.argmin(1) % len(data.patterns)


def test_images_are_decoded_by_their_ground_truth():
    data = PlantedImages(images=2000)
    batch = data.train_batch(0)
    cluster, pattern = decode(data, batch, data.backgrounds)
    assert (cluster == batch.domains).float().mean() > 0.99
    assert ((pattern - cluster) % 4 == batch.targets).float().mean() > 0.99


def test_without_the_cluster_the_class_cannot_be_told():
    """Pattern and class are independent when the cluster is unknown: every pair is as frequent."""
    data = PlantedImages(images=1600)
    images = [data._train, data._valid]
    classes, domains = (torch.cat([getattr(side, name) for side in images]) for name in ("classes", "domains"))
    pattern = (classes + domains) % 4
    assert torch.bincount(pattern * 4 + classes).tolist() == [100] * 16


def test_noise_is_the_residual():
    data = PlantedImages(images=2000, noise=0.3)
    train = data._train
    centre = data.backgrounds[train.domains] + data.patterns[(train.classes + train.domains) % 4]
    assert float((train.pixels - centre).std()) == pytest.approx(0.3, rel=0.02)
    assert data.image_shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 0}, "clusters: expected an integer >= 1, got 0"),
        ({"classes": 1}, "classes: expected an integer >= 2, got 1"),
        ({"size": 0}, "size: expected an integer >= 1, got 0"),
        ({"images": 31}, "images: expected an integer >= 32, got 31"),
        ({"noise": -1.0}, r"noise: expected a finite number > 0, got -1\.0"),
    ],
)
def test_bad_image_options(options, message):
    with pytest.raises(ValueError, match=message):
        PlantedImages(**options)
