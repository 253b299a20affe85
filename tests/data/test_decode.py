import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import ExifTags, Image
from skimage import data

from fvq_jax.data import transforms
from fvq_jax.data.decode import MAX_PIXELS, UnreadableImageError, decode_image, open_image, read_image
from tests.helpers import odd_pictures
from tests.helpers.odd_pictures import encode

READABLE, UNREADABLE = odd_pictures.readable(), odd_pictures.unreadable()


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", READABLE)
def test_every_kind_of_file_becomes_rgb(name, tmp_path):
    (tmp_path / name).write_bytes(READABLE[name])
    pixels = read_image(tmp_path / name)
    assert pixels.dtype == np.uint8
    colour = odd_pictures.COLOURS.get(name, odd_pictures.GREY)
    np.testing.assert_allclose(pixels, np.broadcast_to(colour, (*pixels.shape[:2], 3)), atol=2)
    np.testing.assert_array_equal(pixels, decode_image(READABLE[name]))
    if name == "sideways.jpg":
        assert pixels.shape[:2] == odd_pictures.SIZE


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_used_is_one_kind_of_error(name, tmp_path):
    (tmp_path / name).write_bytes(UNREADABLE[name])
    with pytest.raises(UnreadableImageError, match=r"\w"):
        decode_image(UNREADABLE[name])
    with pytest.raises(UnreadableImageError, match=r"\w"):
        read_image(tmp_path / name)


def test_a_file_that_is_not_there_cannot_be_used(tmp_path):
    with pytest.raises(UnreadableImageError, match="No such file"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (0, 128), (127, 127, 127)),
        ("I;16", 65_535, (255, 255, 255)),
    ],
)
def test_colours_of_other_modes(mode, pixel, expected):
    pixels = decode_image(encode(Image.new(mode, (4, 3), pixel), "PNG"))
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, (3, 4, 3)), atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation):
    """Stored as the EXIF standard defines the orientation, by where row 0 and column 0 are to be seen."""
    upright = noise(16, 24)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[::-1],
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    image = Image.fromarray(stored)
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = orientation
    np.testing.assert_array_equal(decode_image(encode(image, "PNG", exif=exif)), upright)


# Runs in a process whose memory is limited: 1 GiB beyond what the imports take.
BOMBS = """
import pathlib, re, resource, sys
from fvq_jax.data.decode import UnreadableImageError, read_image
used = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for path in sys.argv[1:]:
    try:
        read_image(path)
    except UnreadableImageError as error:
        print(error)
"""


def test_bombs_are_refused_before_they_take_memory_and_without_warnings(tmp_path):
    names = ("bomb.png", "small_bomb.png")
    for name in names:
        (tmp_path / name).write_bytes(UNREADABLE[name])
    assert len(UNREADABLE["bomb.png"]) < 10**6
    result = subprocess.run(
        [sys.executable, "-W", "always", "-c", BOMBS, *(str(tmp_path / name) for name in names)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        timeout=300,
    )
    assert result.stderr == ""
    first, second = result.stdout.splitlines()
    assert "900000000 pixels" in first  # Pillow's own error
    assert second == f"10000 x 9000 pixels are over the limit of {MAX_PIXELS:,}"


def test_a_jpeg_is_decoded_as_small_as_is_asked_for():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = Image.fromarray(noise(800, 1300))
    jpeg, turned, other = encode(image, "JPEG"), encode(image, "JPEG", exif=exif), encode(image, "PNG")
    for min_side, size in ((0, (1300, 800)), (401, (1300, 800)), (400, (650, 400)), (100, (163, 100)), (1, (163, 100))):
        assert open_image(jpeg, min_side).size == size
        assert open_image(turned, min_side).size == size[::-1]
        assert open_image(other, min_side).size == (1300, 800)


def detail(pixels):
    """Mean square of the Laplacian: the energy of the highest frequencies."""
    x = pixels.astype(np.float64)
    return np.mean((4 * x[1:-1, 1:-1] - x[:-2, 1:-1] - x[2:, 1:-1] - x[1:-1, :-2] - x[1:-1, 2:]) ** 2)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "retina"])
@pytest.mark.parametrize(("shorter", "subsampling"), [(700, "4:4:4"), (1500, "4:2:0")])
def test_scaled_decoding_keeps_the_distribution_of_the_crops(name, shorter, subsampling):
    """Crops of 256 from photographs with the grain of a sensor, decoded smaller and whole.

    The allowance: 1.5 of 256 levels between the means (the box filter rounds every half up, which the decoder does
    not), 1 % between the standard deviations, 8 % between the energies of the finest detail, 5 levels of mean
    absolute difference between the pixels, which may also lie up to a pixel apart (odd sides are halved up, not down).
    """
    image = Image.fromarray(getattr(data, name)())
    scale = shorter / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(0).normal(0, 8, (image.height, image.width, 1))
    image = Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
    jpeg = encode(image, "JPEG", quality=90, subsampling=subsampling)
    whole, scaled = open_image(jpeg), open_image(jpeg, min_side=320)
    assert min(scaled.size) == {700: 350, 1500: 375}[shorter]
    for seed in range(3):
        expected, crop = (
            transforms.random_resize_crop(picture, np.random.default_rng(seed), 256, 256, 320)
            for picture in (whole, scaled)
        )
        assert abs(crop.mean() - expected.mean()) < 1.5
        assert crop.std() == pytest.approx(expected.std(), rel=0.01)
        assert detail(crop) == pytest.approx(detail(expected), rel=0.08)
        assert np.abs(crop.astype(int) - expected).mean() < 5
