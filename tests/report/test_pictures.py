import base64
import io

import numpy as np
import pytest
import skimage.data
from PIL import Image

from fvq_jax.report.pictures import data_uri, reconstruction_grid, sample_grid


def pictures(count, height=32, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def test_grid_puts_each_reconstruction_below_its_original():
    originals, reconstructions = pictures(3), pictures(3, seed=1)
    grid = reconstruction_grid(originals, reconstructions, columns=2)
    side, pair_gap, column_gap, row_gap = 4 * 32, 2, 6, 14
    assert grid.shape == (2 * (2 * side + pair_gap) + row_gap, 2 * side + column_gap, 3)
    for index, (row, column) in enumerate([(0, 0), (0, 1), (1, 0)]):
        top, left = row * (2 * side + pair_gap + row_gap), column * (side + column_gap)
        pair = grid[top : top + 2 * side + pair_gap, left : left + side]
        np.testing.assert_array_equal(pair[:side:4, ::4], originals[index])
        np.testing.assert_array_equal(pair[3:side:4, 3::4], originals[index])  # enlarged pixels are blocks
        np.testing.assert_array_equal(pair[side + pair_gap :: 4, ::4], reconstructions[index])
        assert (pair[side : side + pair_gap] == 255).all()
    assert (grid[:, side : side + column_gap] == 255).all()
    assert (grid[2 * side + pair_gap + row_gap :, side:] == 255).all()  # no fourth pair


@pytest.mark.parametrize(("height", "width", "scale"), [(32, 40, 4), (100, 200, 2), (128, 128, 1), (256, 192, 1)])
def test_only_small_pictures_are_enlarged(height, width, scale):
    grid = reconstruction_grid(pictures(1, height, width), pictures(1, height, width))
    assert grid.shape == (2 * height * scale + 2, width * scale, 3)


def test_grid_needs_as_many_reconstructions_as_originals():
    with pytest.raises(ValueError, match="as many"):
        reconstruction_grid(pictures(2)[:0], pictures(2)[:0])


@pytest.mark.parametrize(("size", "error"), [(32, 0), (256, 4)])
def test_small_pictures_keep_every_pixel_and_large_ones_nearly(size, error):
    image = skimage.data.chelsea()[:size, :size]
    uri = data_uri(image)
    assert uri.startswith("data:image/webp;base64,")
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as again:
        difference = np.abs(np.asarray(again).astype(int) - image)
    assert difference.mean() <= error
    assert len(uri) < image.size


def test_samples_stand_in_rows_on_white():
    images = np.arange(3 * 64 * 64 * 3).reshape(3, 64, 64, 3).astype(np.uint8)
    grid = sample_grid(images, columns=2)
    assert grid.shape == (2 * 128 + 2, 2 * 128 + 2, 3)
    np.testing.assert_array_equal(grid[130:258:2, 0:128:2], images[2])
    assert (grid[130:, 130:] == 255).all()
    with pytest.raises(ValueError, match="at least one picture"):
        sample_grid(images[:0], columns=2)
