import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fvq_jax.data import transforms


def rng():
    return np.random.default_rng(0)


def noise(height, width):
    return rng().integers(0, 256, (height, width, 3), dtype=np.uint8)


GREEN_P = Image.new("RGB", (4, 3), (0, 255, 0)).convert("P", palette=Image.Palette.ADAPTIVE)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGB", (4, 3), (10, 20, 30)), (10, 20, 30)),
        (Image.new("L", (4, 3), 77), (77, 77, 77)),
        (Image.new("1", (4, 3), 1), (255, 255, 255)),
        (Image.new("CMYK", (4, 3), (0, 255, 255, 0)), (255, 0, 0)),
        (GREEN_P, (0, 255, 0)),
        (Image.new("RGBA", (4, 3), (200, 0, 0, 255)), (200, 0, 0)),
        (Image.new("RGBA", (4, 3), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("LA", (4, 3), (0, 128)), (127, 127, 127)),
        (Image.fromarray(np.full((3, 4), 65535, np.uint16)), (255, 255, 255)),
        (Image.fromarray(np.full((3, 4), 25700, np.uint16)), (100, 100, 100)),
        (Image.fromarray(np.full((3, 4), 25700, np.int32)), (100, 100, 100)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_to_rgb_converts_every_mode(image, expected):
    pixels = transforms.to_rgb(image)
    assert pixels.shape == (3, 4, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, pixels.shape), atol=1)


def test_to_rgb_shows_white_through_a_transparent_palette_colour():
    image = GREEN_P.copy()
    image.info["transparency"] = image.getpixel((0, 0))
    assert (transforms.to_rgb(image) == 255).all()


def test_to_rgb_applies_the_exif_rotation():
    pixels = noise(3, 5)
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = 6  # shown after a quarter turn clockwise
    np.testing.assert_array_equal(transforms.to_rgb(image), np.rot90(pixels, -1))


@settings(deadline=None, max_examples=40)
@given(height=st.integers(1, 200), width=st.integers(1, 200), side=st.integers(1, 64))
def test_resize_makes_the_shorter_side_exact_and_keeps_the_aspect(height, width, side):
    resized = transforms.resize_shorter_side(np.full((height, width, 3), 90, np.uint8), side)
    assert min(resized.shape[:2]) == side
    assert (height <= width) == (resized.shape[0] <= resized.shape[1]) or side in resized.shape[:2]
    assert (resized == 90).all()


def test_resize_halves_with_a_box_filter_first():
    pixels = noise(64, 96)
    expected = pixels.reshape(16, 4, 24, 4, 3).mean((1, 3))
    np.testing.assert_allclose(transforms.resize_shorter_side(pixels, 16), expected, atol=2)


def test_resize_ends_with_a_bicubic_filter():
    pixels = noise(60, 60)
    expected = Image.fromarray(pixels).resize((40, 40), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(transforms.resize_shorter_side(pixels, 40), np.asarray(expected))


def test_random_resize_draws_every_length_of_the_range(monkeypatch):
    sides = []

    def spy(image, side):
        sides.append(side)
        return np.zeros((side, side + 3, 3), np.uint8)

    monkeypatch.setattr(transforms, "resize_shorter_side", spy)
    generator = rng()
    for _ in range(300):
        crop = transforms.random_resize_crop(noise(40, 50), generator, 16, 18, 24)
        assert crop.shape == (16, 16, 3)
    assert set(sides) == set(range(18, 25))


def test_without_resizing_every_position_of_the_crop_is_drawn():
    rows, columns = np.mgrid[:9, :11].astype(np.uint8)
    image = np.stack([rows, columns, rows], axis=-1)
    generator = rng()
    corners = set()
    for _ in range(500):
        crop = transforms.random_resize_crop(image, generator, 8, 0, 0)
        top, left = int(crop[0, 0, 0]), int(crop[0, 0, 1])
        np.testing.assert_array_equal(crop, image[top : top + 8, left : left + 8])
        corners.add((top, left))
    assert corners == {(top, left) for top in range(2) for left in range(4)}


def test_without_resizing_a_small_picture_is_enlarged_to_the_crop():
    assert transforms.random_resize_crop(noise(5, 9), rng(), 8, 0, 0).shape == (8, 8, 3)


def test_random_flip_mirrors_half_of_the_pictures():
    image, generator = noise(3, 4), rng()
    flips = 0
    for _ in range(400):
        result = transforms.random_flip(image, generator)
        flipped = not np.array_equal(result, image)
        np.testing.assert_array_equal(result, image[:, ::-1] if flipped else image)
        flips += flipped
    assert 160 < flips < 240


def test_center_crop_takes_the_middle():
    image = noise(8, 13)
    np.testing.assert_array_equal(transforms.center_crop(image, 8), image[:, 2:10])
    np.testing.assert_array_equal(transforms.center_crop(image[:, :8], 8), image[:, :8])
    assert transforms.center_crop(noise(50, 31), 16).shape == (16, 16, 3)
