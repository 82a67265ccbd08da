"""The vision transformer: shapes, patches, symmetry, errors."""

import functools

import pytest
import torch
from torch import nn

from trainers.models import VisionModel

torch.set_num_threads(1)

linear = functools.partial(nn.Linear, bias=False)
SMALL = {"dim": 16, "layers": 2, "heads": 2, "patch": 2, "num_experts": 4, "top_k": 2, "expert_hidden": 8}


def _model(shape: tuple[int, int, int] = (3, 4, 6), **options) -> VisionModel:
    torch.manual_seed(0)
    return VisionModel(5, shape, linear, **{**SMALL, **options})


def test_shapes_and_routing():
    model = _model()
    output = model(torch.randn(7, 3, 4, 6))
    assert model.tokens_per_image == 2 * 3
    assert output.logits.shape == (7, 5)
    assert list(output.routing) == ["layer0", "layer1"]
    assert output.routing["layer1"].logits.shape == (7 * 6, 4)


def test_a_patch_is_a_square_of_pixels_in_raster_order():
    model = _model()
    seen = []
    model.patch_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    image = torch.arange(3 * 4 * 6, dtype=torch.float32).view(1, 3, 4, 6)
    model(image)
    # token 4 is the second of the second row: rows 2-3, columns 2-3 of every channel
    assert torch.equal(seen[0][0, 4], image[0, :, 2:4, 2:4].reshape(-1))


def test_positions_matter_and_attention_is_bidirectional():
    model = _model().double()
    image = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    swapped = image.clone()
    swapped[..., 0:2], swapped[..., 4:6] = image[..., 4:6], image[..., 0:2]
    assert (model(image).logits - model(swapped).logits).abs().max() > 1e-6
    nn.init.zeros_(model.positions_ND)  # without positions, an order of patches is as good as another
    torch.testing.assert_close(model(image).logits, model(swapped).logits)


def test_last_patch_reaches_the_first_token():
    model = _model(layers=1).double()
    image = torch.randn(1, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    model(image).routing["layer0"].logits[0].square().sum().backward()
    assert image.grad[..., -1, -1].abs().sum() > 0


def test_images_do_not_mix():
    model = _model().double()
    images = torch.randn(4, 3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(model(images).logits[2:3], model(images[2:3]).logits)


def test_gradients_reach_every_parameter():
    model = _model()
    nn.functional.cross_entropy(model(torch.randn(30, 3, 4, 6)).logits, torch.randint(0, 5, (30,))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 0, name


def test_parameter_count():
    expert = 3 * 16 * 8
    block = 4 * 16 * 16 + 2 * 16 + 4 * 16 + 4 * expert
    embedding, positions, head = 12 * 16 + 16, 6 * 16, 16 * 5 + 5
    assert sum(p.numel() for p in _model().parameters()) == embedding + positions + 2 * block + 16 + head


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 4}, r"patch must divide height and width of image_shape \(3, 4, 6\), got 4"),
        ({"patch": 0}, "patch must be at least 1, got 0"),
        ({"heads": 3}, "heads must divide dim = 16, got 3"),
        ({"heads": 0}, "heads must divide dim = 16, got 0"),
        ({"top_k": 5}, r"top_k must lie in \[1, num_experts = 4\], got 5"),
    ],
)
def test_bad_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        _model(**options)


def test_bad_classes_and_images_are_named():
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        VisionModel(0, (3, 4, 6), linear, **SMALL)
    with pytest.raises(ValueError, match=r"images must be .*\(3, 4, 6\)\), got \(7, 3, 6, 4\)"):
        _model()(torch.zeros(7, 3, 6, 4))
