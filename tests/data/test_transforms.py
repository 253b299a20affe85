import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from skimage import data

from fvq_jax.data import transforms
from fvq_jax.tasks import default_config


def rng():
    return np.random.default_rng(0)


def noise(height, width):
    return Image.fromarray(rng().integers(0, 256, (height, width, 3), dtype=np.uint8))


def positions(height, width, step=1):
    """A picture whose first two channels are row and column of the pixel, times `step`."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return Image.fromarray(np.stack([step * rows, step * columns, 0 * rows], axis=-1).astype(np.uint8))


def resized(image, side):
    """The published recipe, the whole picture: halves by a box filter while that leaves enough, then a bicubic one."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def assert_nearly_same(crop, expected):
    """A crop of the resized picture, resized alone: Pillow's arithmetic of 8 bits differs in single pixels."""
    difference = np.abs(crop.astype(int) - expected)
    assert difference.max() <= 3
    assert np.mean(difference > 0) < 0.01


def test_augmentation_has_the_published_distribution():
    """Every crop is one of those that the recipe can give, each as often as it says.

    The shorter side is uniform from 8 to 10 (0.8 to 1 of it is kept, as from 256 to 320), only for 8 is the picture
    halved first; the corner is uniform over those that fit; one half is mirrored.
    """
    picture, low, high, size, count = positions(17, 20, step=12), 8, 10, 8, 4000
    templates, expected = [], []
    for side in range(low, high + 1):
        whole = resized(picture, side)
        corners = list(itertools.product(*(range(length - size + 1) for length in whole.shape[:2])))
        for top, left in corners:
            crop = whole[top : top + size, left : left + size]
            templates += [crop, crop[:, ::-1]]
            expected += [count / (high - low + 1) / len(corners) / 2] * 2
    templates = np.stack(templates).reshape(len(templates), -1).astype(np.int16)
    generator, found = rng(), collections.Counter()
    for _ in range(count):
        crop = transforms.random_resize_crop(picture, generator, size, low, high)
        crop = transforms.random_flip(crop, generator)
        distance = np.abs(templates - crop.reshape(1, -1)).max(axis=1)
        assert distance.min() <= 1
        found[int(distance.argmin())] += 1
    counts = [found[index] for index in range(len(templates))]
    assert stats.chisquare(counts, expected).pvalue > 0.01


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea"])
def test_augmentation_at_the_paper_s_sizes(name):
    """512 x 512 is halved for a side of 256 only, 400 x 600 and 300 x 451 never."""
    fields = default_config().data
    assert (fields.image_size, fields.resize_min, fields.resize_max, fields.flip) == (256, 256, 320, True)
    image = Image.fromarray(getattr(data, name)())
    for seed in range(3):
        draw = np.random.default_rng(seed)
        whole = resized(image, int(draw.integers(256, 321)))
        top, left = (int(draw.integers(length - 256 + 1)) for length in whole.shape[:2])
        crop = transforms.random_resize_crop(image, np.random.default_rng(seed), 256, 256, 320)
        assert_nearly_same(crop, whole[top : top + 256, left : left + 256])


def test_without_resizing_every_position_of_the_crop_is_drawn():
    image, generator = positions(9, 11), rng()
    corners = set()
    for _ in range(500):
        crop = transforms.random_resize_crop(image, generator, 8, 0, 0)
        top, left = int(crop[0, 0, 0]), int(crop[0, 0, 1])
        np.testing.assert_array_equal(crop, np.asarray(image)[top : top + 8, left : left + 8])
        corners.add((top, left))
    assert corners == {(top, left) for top in range(2) for left in range(4)}


def test_without_resizing_a_small_picture_is_enlarged_to_the_crop():
    assert transforms.random_resize_crop(noise(5, 9), rng(), 8, 0, 0).shape == (8, 8, 3)


def test_random_flip_mirrors_half_of_the_pictures():
    image, generator = np.asarray(noise(3, 4)), rng()
    flips = 0
    for _ in range(400):
        result = transforms.random_flip(image, generator)
        flipped = not np.array_equal(result, image)
        np.testing.assert_array_equal(result, image[:, ::-1] if flipped else image)
        flips += flipped
    assert 160 < flips < 240


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "retina"])
@pytest.mark.parametrize("size", [64, 256])
def test_resize_center_is_the_middle_of_the_resized_picture(name, size):
    """1411 x 1411 pixels are halved twice and four times."""
    image = Image.fromarray(getattr(data, name)())
    whole = resized(image, size)
    top, left = ((length - size) // 2 for length in whole.shape[:2])
    assert_nearly_same(transforms.resize_center(image, size), whole[top : top + size, left : left + size])


def test_resize_center_halves_with_a_box_filter_first():
    image = noise(64, 96)
    expected = np.asarray(image).reshape(16, 4, 24, 4, 3).mean((1, 3))[:, 4:20]
    np.testing.assert_allclose(transforms.resize_center(image, 16), expected, atol=2)


def test_resize_center_takes_the_middle_of_a_picture_of_that_size():
    image = noise(8, 13)
    np.testing.assert_array_equal(transforms.resize_center(image, 8), np.asarray(image)[:, 2:10])


@settings(deadline=None, max_examples=60)
@given(height=st.integers(1, 200), width=st.integers(1, 200), size=st.integers(1, 64))
def test_every_crop_of_any_picture_has_its_size(height, width, size):
    grey = Image.new("RGB", (width, height), (90, 90, 90))
    for crop in (
        transforms.resize_center(grey, size),
        transforms.random_resize_crop(grey, rng(), size, size, 2 * size),
        transforms.random_resize_crop(grey, rng(), size, 0, 0),
    ):
        assert crop.shape == (size, size, 3)
        assert crop.dtype == np.uint8
        assert (crop == 90).all()
    assert transforms.center_no_resize(grey, size).shape == (size, size, 3)


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (3, 5_000_000)])
def test_extreme_shapes_are_cropped_without_making_the_rest(shape):
    """Resized whole, the first would have 5,120,000 x 256 pixels and the last a hundred times as many."""
    image = Image.new("RGB", shape[::-1], (90, 90, 90))
    for crop in (
        transforms.resize_center(image, 256),
        transforms.random_resize_crop(image, rng(), 256, 256, 320),
        transforms.random_resize_crop(image, rng(), 256, 0, 0),
    ):
        assert crop.shape == (256, 256, 3)
        assert (crop == 90).all()
    crop = transforms.center_no_resize(image, 256)
    assert crop.shape == (256, 256, 3)
    assert (crop == 90).sum() == 3 * min(shape) * 256


@pytest.mark.parametrize(
    ("height", "width", "top", "left"),  # of the first pixel that is kept; -1: one black pixel before it
    [(8, 8, 2, 2), (9, 7, 2, 2), (11, 4, 4, 0), (4, 4, 0, 0), (3, 2, 0, -1)],
)
def test_center_no_resize_keeps_the_middle_as_it_is(height, width, top, left):
    """torchvision's rounding: half a pixel goes to the even side, and a missing odd pixel behind the picture."""
    pixels = 1 + np.asarray(positions(height, width))
    crop = transforms.center_no_resize(Image.fromarray(pixels), 4)
    expected = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))[4 + top : 8 + top, 4 + left : 8 + left]
    np.testing.assert_array_equal(crop, expected)
