"""Epochs, padding, standardisation and the class prior of images."""

import math
from dataclasses import fields

import pytest
import torch

from trainers.data.base import Batch
from trainers.data.images import ImageData, Images, channel_moments
from trainers.data.vision import digits

SIZE = 23


def images(count, offset=0, classes=3):
    """Images that can be told apart: pixel values are the image's number."""
    number = torch.arange(count)
    pixels = (number + offset)[:, None, None, None].expand(count, 2, 3, 4).clone().float()
    pixels[:, 1] *= 10
    return Images(pixels=pixels, classes=number % classes, domains=number % 2)


def data(**options):
    options = {"domains": ("even", "odd"), "num_classes": 3, "batch_size": 8, "seed": 4, "valid_images": None} | options
    return ImageData("toy", images(SIZE), images(11, offset=100), **options)


def test_every_epoch_shows_every_image_once():
    made = data()
    shown = torch.cat([made.train_batch(step).documents for step in range(SIZE)])  # 8 epochs exactly
    epochs = shown.view(8, SIZE)
    assert torch.equal(epochs.sort(1).values, torch.arange(SIZE).expand(8, SIZE))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 8


def test_a_batch_larger_than_an_epoch():
    made = data(batch_size=2 * SIZE + 5)
    count = torch.bincount(torch.cat([made.train_batch(step).documents for step in range(SIZE)]), minlength=SIZE)
    assert count.tolist() == [2 * SIZE + 5] * SIZE


def test_labels_and_standardised_pixels():
    made = data()
    batch = made.train_batch(3)
    number = batch.documents
    assert batch.mask.all()
    assert torch.equal(batch.targets, number % 3)
    assert torch.equal(batch.domains, number % 2)
    # Uniform on 0..22: mean 11, variance (23² - 1)/12; the second channel is the first times ten.
    expected = (number - 11) / math.sqrt((SIZE**2 - 1) / 12)
    assert batch.inputs.dtype == torch.float32
    assert batch.inputs.shape == (8, 2, 3, 4)
    torch.testing.assert_close(batch.inputs, expected[:, None, None, None].expand(8, 2, 3, 4))


def test_moments_over_blocks_and_of_a_constant_channel():
    source = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (3000, 2, 2, 2), dtype=torch.uint8, generator=source)
    pixels[:, 1] = 7
    mean, std = channel_moments(pixels)
    values = pixels[:, 0].flatten().double()
    assert mean.tolist() == pytest.approx([float(values.mean()), 7])
    assert std.tolist() == pytest.approx([float(values.std(correction=0)), 1])


def test_a_batch_is_a_function_of_seed_and_step():
    made, again = data(), data()
    expected = made.train_batch(5)
    torch.manual_seed(1)
    again.train_batch(0)
    for field in fields(Batch):
        assert torch.equal(getattr(again.train_batch(5), field.name), getattr(expected, field.name))
    assert not torch.equal(data(seed=5).train_batch(5).documents, expected.documents)


def test_valid_in_order_and_padded():
    batches = list(data().valid_batches())
    assert [b.inputs.shape for b in batches] == [(8, 2, 3, 4)] * 2
    assert torch.cat([b.documents[b.mask] for b in batches]).tolist() == list(range(11))
    last = batches[-1]
    assert last.mask.tolist() == [True] * 3 + [False] * 5
    for field in fields(Batch):
        assert not getattr(last, field.name)[~last.mask].any()


def shown(**options):
    return torch.cat([b.documents[b.mask] for b in data(**options).valid_batches()]).tolist()


@pytest.mark.parametrize(("limit", "count"), [(5, 5), (11, 11), (50, 11)])
def test_a_limited_validation_is_a_fixed_draw(limit, count):
    assert len(set(shown(valid_images=limit))) == count
    assert shown(valid_images=limit) == sorted(shown(valid_images=limit)) == shown(valid_images=limit, seed=99)


def test_a_limited_validation_shows_every_class_where_classes_come_in_turn():
    # Ten classes in turn and a fifth of the images: evenly spaced ones would be of two classes only.
    classes = torch.arange(1000) % 10
    pixels = torch.randint(0, 256, (1000, 1, 2, 2)).float()
    split = Images(pixels=pixels, classes=classes, domains=classes)
    options = {"domains": tuple("0123456789"), "num_classes": 10, "batch_size": 50, "seed": 0, "valid_images": 200}
    batches = list(ImageData("turns", split, split, **options).valid_batches())
    counts = torch.bincount(torch.cat([b.targets[b.mask] for b in batches]), minlength=10)
    assert counts.sum() == 200
    assert counts.min() >= 8


def test_the_class_prior_by_hand():
    # Train: 8, 8, 7 of 23; one added to each. Valid: 4, 4, 3 of 11.
    expected = -(8 * math.log(9 / 26) + 3 * math.log(8 / 26)) / 11
    assert data().baseline().loss == pytest.approx(expected)
    limited = data(valid_images=3)
    chosen = torch.cat([b.targets[b.mask] for b in limited.valid_batches()]).tolist()
    by_hand = -sum(math.log((9, 9, 8)[target] / 26) for target in chosen) / 3
    assert limited.baseline().loss == pytest.approx(by_hand)


def test_the_fingerprint_changes_with_content_only():
    base = data()
    changed = images(SIZE)
    changed.pixels[0, 0, 0, 0] += 1
    options = {"domains": ("even", "odd"), "num_classes": 3, "batch_size": 8, "seed": 4, "valid_images": None}
    other = ImageData("toy", changed, images(11, offset=100), **options)
    assert data(seed=1, batch_size=2, valid_images=3).fingerprint == base.fingerprint
    assert other.fingerprint != base.fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
        ({"valid_images": 0}, "valid_images: expected an integer >= 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        data(**options)


def test_an_empty_split_and_a_bad_step():
    with pytest.raises(ValueError, match="toy: expected images in the valid split, got none"):
        ImageData("toy", images(3), images(0), domains=("a",), num_classes=3, batch_size=1, seed=0, valid_images=None)
    with pytest.raises(ValueError, match="step: expected an integer >= 0, got -1"):
        data().train_batch(-1)


def test_digits():
    from sklearn.datasets import load_digits

    made = digits(valid_fraction=0.2, batch_size=32, seed=0)
    assert (made.num_classes, made.image_shape, len(made.domains)) == (10, (1, 8, 8), 10)
    raw = load_digits()
    assert len(made._train) + len(made._valid) == len(raw.target) == 1797
    pixels = torch.cat([made._train.pixels, made._valid.pixels]).double().mean()
    assert float(pixels) == pytest.approx(raw.images.mean())
    labels = torch.cat([made._train.classes, made._valid.classes])
    assert torch.bincount(labels).tolist() == torch.bincount(torch.from_numpy(raw.target)).tolist()
    for batch in made.valid_batches():
        assert torch.equal(batch.domains, batch.targets)
    share = torch.bincount(made._valid.classes) / torch.bincount(labels)
    assert 0.1 < float(share.min()) <= float(share.max()) < 0.3
    # An image and its label stay together: the mean image of each class is that of the set.
    zero = made._train.pixels[made._train.classes == 0].float().mean(0)[0]
    assert (zero - torch.from_numpy(raw.images[raw.target == 0].mean(0))).abs().max() < 1
