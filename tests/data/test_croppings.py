import numpy as np
import pytest
from PIL import Image, ImageOps

from fvq_jax.data.croppings import Cropping
from fvq_jax.runtime.errors import InputError


def picture(width, height, seed=0):
    """Smooth, so that an error of one pixel in a position is seen and one of rounding is not taken for it."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def square_of_adm(image, side):
    """ADM's central square, by its published recipe: the whole picture is resized, then cut."""
    while min(image.size) >= 2 * side:
        image = image.resize(tuple(length // 2 for length in image.size), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize(tuple(round(length * scale) for length in image.size), Image.Resampling.BICUBIC)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))


def five_crops(square, size):
    """As torchvision names them: top left, top right, bottom left, bottom right, centre."""
    side = square.size[0]
    centre = round((side - size) / 2.0)
    boxes = {
        "top left": (0, 0, size, size),
        "top right": (side - size, 0, side, size),
        "bottom left": (0, side - size, size, side),
        "bottom right": (side - size, side - size, side, side),
        "centre": (centre, centre, centre + size, centre + size),
    }
    return [np.asarray(square.crop(box)) for box in boxes.values()]


@pytest.mark.parametrize(("width", "height"), [(50, 41), (33, 90), (200, 130)])
def test_ten_crops_are_those_of_an_independent_program_in_its_order(width, height):
    """Size 30 makes squares of 33 and 31 pixels, whose centres lie between two pixels."""
    image = picture(width, height)
    ours = Cropping.parse("ten", "1.1,1.05", 30).cut(image, 0)
    assert ours.shape == (2, 10, 30, 30, 3)
    assert ours.dtype == np.uint8
    for scale, side in enumerate((33, 31)):
        square = square_of_adm(image, side)
        theirs = five_crops(square, 30) + five_crops(ImageOps.mirror(square), 30)
        difference = np.abs(ours[scale].astype(int) - np.stack(theirs))
        assert difference.max() <= 3  # Pillow rounds in another order when it makes a part alone
        assert difference.mean() < 0.02
    assert (np.abs(ours[0, 0].astype(int) - ours[0, 4]) > 1).any()  # else the order would not show


def test_the_sides_of_256_and_384_pixels_are_the_published_ones():
    for size, sides in ((256, (281, 268)), (384, (422, 403))):
        cropping = Cropping.parse("ten", None, size)
        assert cropping.scales == (1.1, 1.05)
        ramp = np.zeros((sides[0], sides[0], 3), np.uint8)
        ramp[..., 0], ramp[..., 1] = np.arange(sides[0]) % 256, np.arange(sides[0])[:, None] % 256
        crops = cropping.cut(Image.fromarray(ramp), 0)[0]
        middle = round((sides[0] - size) / 2)
        assert crops[4, 0, 0].tolist() == [middle, middle, 0]
        assert crops[3, 0, 0].tolist() == [sides[0] - size, sides[0] - size, 0]
        np.testing.assert_array_equal(crops[5], ramp[:size, ::-1][:, :size])
        assert Image.fromarray(crops[0]).size == (size, size)
        second = square_of_adm(Image.fromarray(ramp), sides[1])
        np.testing.assert_allclose(
            cropping.cut(Image.fromarray(ramp), 0)[1, 0].astype(int),
            np.asarray(second.crop((0, 0, size, size))).astype(int),
            atol=1,
        )


def test_the_centre_is_that_of_an_evaluation_or_of_a_larger_square():
    image = picture(50, 41)
    np.testing.assert_allclose(
        Cropping.parse("center", None, 30).cut(image, 0)[0, 0].astype(int),
        np.asarray(square_of_adm(image, 30)).astype(int),
        atol=1,
    )
    larger = Cropping.parse("center", "1.2", 30).cut(image, 0)
    assert larger.shape == (1, 1, 30, 30, 3)
    expected = np.asarray(square_of_adm(image, 36).crop((3, 3, 33, 33)))
    np.testing.assert_allclose(larger[0, 0].astype(int), expected.astype(int), atol=1)


def positions(crops, pixels):
    """(top, left, mirrored) of every crop of a picture without repeats."""
    size = crops.shape[1]
    found = []
    for crop in crops:
        for mirrored, looked_for in enumerate((crop, crop[:, ::-1])):
            rows, columns = np.where((pixels == looked_for[0, 0]).all(-1))
            for top, left in zip(rows, columns, strict=True):
                if np.array_equal(pixels[top : top + size, left : left + size], looked_for):
                    found.append((int(top), int(left), mirrored))
    return found


def test_random_crops_are_cut_anywhere_and_half_of_them_mirrored():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    crops = Cropping.parse("random:300", None, 8).cut(Image.fromarray(pixels), 3)
    assert crops.shape == (1, 300, 8, 8, 3)
    found = positions(crops[0], pixels)
    assert len(found) == 300
    assert {top for top, _, _ in found} == set(range(5))
    assert {left for _, left, _ in found} == set(range(9))
    assert 110 < sum(mirrored for _, _, mirrored in found) < 190


def test_a_random_crop_depends_on_seed_picture_and_number_alone():
    image = picture(40, 30)
    few, many = (Cropping.parse(f"random:{count}", None, 8) for count in (2, 5))
    np.testing.assert_array_equal(few.cut(image, 7)[0], many.cut(image, 7)[0, :2])
    for other in (few.cut(image, 8), Cropping.parse("random:2", None, 8, 1).cut(image, 7)):
        assert not np.array_equal(other, few.cut(image, 7))
    assert len({crop.tobytes() for crop in many.cut(image, 7)[0]}) == 5


def test_random_crops_of_resized_pictures():
    cropping = Cropping.parse("random:3", "1,2", 16)
    crops = cropping.cut(picture(64, 48), 0)
    assert crops.shape == cropping.shape == (2, 3, 16, 16, 3)
    assert cropping.min_side == 32
    assert Cropping.parse("random:3", None, 16).min_side == Cropping.parse("ten", None, 16).min_side == 0
    whole = np.asarray(picture(64, 48).resize((21, 16), Image.Resampling.BICUBIC)).astype(int)
    columns = [np.abs(whole[:, left : left + 16] - crop).max() for crop in crops[0] for left in range(6)]
    flipped = [np.abs(whole[:, left : left + 16] - crop[:, ::-1]).max() for crop in crops[0] for left in range(6)]
    assert sum(min(a, b) < 40 for a, b in zip(columns, flipped, strict=True)) >= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eleven", None, 8), "--crops=eleven cannot be"),
        (("random:0", None, 8), "--crops=random:0 cannot be"),
        (("random", None, 8), "--crops=random cannot be"),
        (("ten", "1.1,x", 8), "--scales=1.1,x cannot be: give numbers"),
        (("ten", "0.9", 8), "--scales=0.9 cannot be: a scale is 1 to 16"),
        (("ten", "nan", 8), "--scales=nan cannot be"),
        (("center", "17", 8), "--scales=17 cannot be"),
        (("center", None, 0), "--size 0 cannot be"),
        (("center", None, 8, -1), "--seed=-1 cannot be"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments, message):
    with pytest.raises(InputError) as caught:
        Cropping.parse(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_seed_counts_for_random_crops_only():
    assert Cropping.parse("ten", None, 8, 5) == Cropping.parse("ten", None, 8)
    assert Cropping.parse("random:1", None, 8, 5) != Cropping.parse("random:1", None, 8)
