import numpy as np
import pytest

from moegeo_router.loggers.picture import ANCHORS, PADDING, heatmap_caption, heatmap_picture


def cells(rows):
    """The colour of every cell, after checking that each is of one colour and large enough to be seen."""
    picture = heatmap_picture(rows)
    shape = len(rows), max(len(row) for row in rows)
    height, width = picture.shape[0] // shape[0], picture.shape[1] // shape[1]
    assert picture.dtype == np.uint8
    assert picture.shape == (shape[0] * height, shape[1] * width, 3)
    assert min(height, width) >= 8
    assert min(picture.shape[:2]) >= 64
    blocks = picture.reshape(shape[0], height, shape[1], width, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    return blocks[:, 0, :, 0]


def luminance(colours):
    return colours.astype(float) @ (0.2126, 0.7152, 0.0722)


@pytest.mark.parametrize("scale", [1.0, 1e-300, 1e300, np.float32(3)])
def test_zero_has_the_first_colour_the_maximum_the_last_and_their_middle_the_middle_one(scale):
    painted = cells([[0.0, 4 * scale, 2 * scale], [scale, 3 * scale, 0.0]])
    expected = [[ANCHORS[0], ANCHORS[4], ANCHORS[2]], [ANCHORS[1], ANCHORS[3], ANCHORS[0]]]
    np.testing.assert_array_equal(painted, expected)


def test_the_scale_starts_at_zero_and_not_at_the_minimum():
    painted = cells([[0.5, 1.0]])
    np.testing.assert_array_equal(painted[0], [ANCHORS[2], ANCHORS[4]])


def test_a_shorter_row_ends_in_grey_that_is_no_value():
    painted = cells([[1.0], [0.0, 1.0, 1.0], []])
    np.testing.assert_array_equal(painted[0], [ANCHORS[4], PADDING, PADDING])
    np.testing.assert_array_equal(painted[2], [PADDING] * 3)
    ramp = cells([[i / 999 for i in range(1000)]])[0].astype(float)
    assert np.abs(ramp - PADDING).max(axis=1).min() > 40


def test_a_larger_value_is_lighter():
    light = luminance(cells([[i / 63 for i in range(64)]])[0])
    assert (np.diff(light) > 0).all()
    assert light[-1] - light[0] > 150


def test_a_matrix_of_zeros_has_the_first_colour():
    np.testing.assert_array_equal(cells([[0.0, 0], [0.0, 0.0]]), np.broadcast_to(ANCHORS[0], (2, 2, 3)))


@pytest.mark.parametrize(("layers", "experts", "shape"), [(1, 1, (64, 64)), (3, 2, (66, 64)), (48, 256, (384, 2048))])
def test_pictures_are_large_enough_to_see_and_no_larger(layers, experts, shape):
    assert heatmap_picture(np.ones((layers, experts))).shape == (*shape, 3)
    cells(np.ones((layers, experts)))


def test_the_caption_names_the_rows_and_the_values_of_the_colours():
    caption = heatmap_caption([[0.125, 0.25], [0.5]], ["layer0", "layer3"])
    assert caption == "from top: layer0, layer3; values 0.125 to 0.5, dark is 0, light is 0.5"
