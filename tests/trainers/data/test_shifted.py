"""Shifts of images against scipy, direct sums and exact quarter turns."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from scipy import ndimage

from trainers.data.base import Batch
from trainers.data.planted import PlantedImages, PlantedText
from trainers.data.shifted import SHIFTS, Shifted, blur, contrast, noise, rotation
from trainers.data.vision import digits

NUMBERS = torch.arange(3)
LIMITS = (0.0, 255.0)


def pictures(height=9, width=9, channels=2, count=3):
    return 255 * torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("strength", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("size", [(9, 9), (4, 7)])
def test_blur_is_scipys_gaussian_filter(strength, size):
    x = pictures(*size)
    radius = math.ceil(3 * strength)
    for image, found in zip(x, blur(x, strength, NUMBERS, LIMITS), strict=True):
        for channel, mine in zip(image.double().numpy(), found.numpy(), strict=True):
            np.testing.assert_allclose(
                mine, ndimage.gaussian_filter(channel, strength, mode="nearest", radius=radius), rtol=1e-4
            )


def test_blur_is_a_direct_sum():
    x = pictures(channels=1, count=1)[0, 0].double()
    weights = [[math.exp(-0.5 * (i * i + j * j)) for j in range(-3, 4)] for i in range(-3, 4)]
    total = sum(map(sum, weights))
    expected = sum(
        weights[i + 3][j + 3] * float(x[min(max(2 + i, 0), 8), min(max(4 + j, 0), 8)])
        for i in range(-3, 4)
        for j in range(-3, 4)
    )
    found = blur(x[None, None].float(), 1.0, NUMBERS, LIMITS)[0, 0, 2, 4]
    assert float(found) == pytest.approx(expected / total, rel=1e-5)


@pytest.mark.parametrize("turns", [1, 2, 3, -1])
def test_rotation_by_quarter_turns_is_rot90(turns):
    x = pictures()
    torch.testing.assert_close(
        rotation(x, 90.0 * turns, NUMBERS, LIMITS), x.rot90(turns, (-2, -1)), rtol=1e-3, atol=2e-3
    )


def test_rotation_of_a_plane_turns_its_gradient_and_keeps_the_centre():
    y, x = torch.meshgrid(torch.arange(11.0) - 5, torch.arange(11.0) - 5, indexing="ij")
    angle = math.radians(15)
    found = rotation((x + 20)[None, None], 15.0, NUMBERS, LIMITS)[0, 0]
    # Counterclockwise, with y down: what points right before points right and up after.
    expected = 20 + math.cos(angle) * x - math.sin(angle) * y
    inner = (x.square() + y.square()).sqrt() <= 4.5  # from where nothing is outside of the image
    torch.testing.assert_close(found[inner], expected[inner], rtol=1e-5, atol=1e-4)
    assert float(found[5, 5]) == pytest.approx(20, abs=1e-4)


def test_rotation_of_an_oblong_image_by_half_a_turn():
    x = pictures(4, 7)
    torch.testing.assert_close(rotation(x, 180.0, NUMBERS, LIMITS), x.flip(-1, -2), rtol=1e-3, atol=2e-3)


def test_contrast_is_the_formula_and_keeps_the_mean():
    x = pictures()
    found = contrast(x, 0.5, NUMBERS, LIMITS)
    for b in range(3):
        for c in range(2):
            mean = sum(x[b, c].flatten().tolist()) / 81
            expected = [[0.5 * float(v) + 0.5 * mean for v in row] for row in x[b, c]]
            torch.testing.assert_close(found[b, c], torch.tensor(expected), rtol=1e-4, atol=1e-3)
    assert float(contrast(x, 3.0, NUMBERS, LIMITS).max()) == 255.0  # cut at the range


def test_noise_has_the_strength_is_cut_and_belongs_to_the_image():
    x = torch.full((3, 2, 64, 64), 127.5)
    found = noise(x, 0.1, NUMBERS, LIMITS) - x
    assert float(found.std()) == pytest.approx(25.5, rel=0.02)
    assert float(found.mean()) == pytest.approx(0, abs=0.5)
    assert abs(float(torch.corrcoef(found.flatten(1))[0, 1])) < 0.03
    again = noise(x[:2], 0.1, torch.tensor([2, 0]), LIMITS) - x[:2]
    torch.testing.assert_close(again, found[[2, 0]])
    dark = noise(torch.zeros(3, 1, 32, 32), 0.2, NUMBERS, LIMITS)
    assert float(dark.min()) == 0
    assert float((dark == 0).float().mean()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("kind", SHIFTS)
def test_the_batches_are_those_of_the_data_and_always_the_same(kind):
    data = digits(batch_size=50)
    shifted = Shifted(data, kind, 15.0 if kind == "rotation" else 0.5)
    torch.manual_seed(3)
    for clean, first, second in zip(
        data.valid_batches(), shifted.valid_batches(), shifted.valid_batches(), strict=True
    ):
        for field in fields(Batch):
            assert torch.equal(getattr(first, field.name), getattr(second, field.name))
            if field.name != "inputs":
                assert torch.equal(getattr(first, field.name), getattr(clean, field.name))
        assert first.inputs.shape == clean.inputs.shape
        assert not torch.equal(first.inputs, clean.inputs)
        assert not bool(first.inputs[~first.mask].any())
    assert not bool(clean.mask.all()), "no padding: the test tests less"
    assert shifted.baseline() == data.baseline()
    assert kind in shifted.describe()
    with pytest.raises(ValueError, match="evaluate on only"):
        shifted.train_batch(0)


def test_images_are_standardised_after_the_shift_and_not_before():
    data = digits(batch_size=50)
    assert data.pixel_range == (0.0, 16.0)
    batch = next(data.valid_batches())
    torch.testing.assert_close(data.pixels(batch.inputs), data._valid.pixels[batch.documents].float())
    half = next(Shifted(data, "contrast", 0.5).valid_batches())
    mean = data._valid.pixels[batch.documents].float().mean((-2, -1), keepdim=True)
    expected = (0.5 * (data._valid.pixels[batch.documents] + mean) - data._mean_C) / data._std_C
    torch.testing.assert_close(half.inputs, expected)


def test_the_noise_does_not_depend_on_the_size_of_batches():
    parts = []
    for size in (50, 17):
        batches = Shifted(PlantedImages(images=400, batch_size=size), "noise", 0.2).valid_batches()
        parts.append(torch.cat([batch.inputs[batch.mask] for batch in batches]))
    torch.testing.assert_close(*parts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("fog", 1.0), "kind: expected one of noise, blur"),
        (("blur", 0.0), "strength"),
        (("blur", math.inf), "strength"),
    ],
)
def test_what_cannot_be_shifted_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Shifted(PlantedImages(images=100), *options)
    with pytest.raises(ValueError, match="planted has none"):
        Shifted(PlantedText(documents=40, length=32), "blur", 1.0)
