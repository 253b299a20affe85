import numpy as np
import pytest
from PIL import Image

from fvq_jax.data import photos
from fvq_jax.data.photos import PhotoSource
from fvq_jax.runtime.errors import InputError


def numbered_pixels(path):
    """The picture at `path` with every pixel replaced by its own position, as a 24-bit number."""
    with Image.open(path) as image:
        width, height = image.size
    number = np.arange(height * width).reshape(height, width)
    return np.stack([number >> 16, number >> 8 & 255, number & 255], axis=-1).astype(np.uint8)


def positions(image):
    return image.astype(np.int64) @ np.array([65536, 256, 1])


@pytest.mark.parametrize(
    ("image_size", "count"), [(16, 10), (32, 10), (128, 10), pytest.param(256, 9, marks=pytest.mark.slow)]
)
def test_no_photo_pixel_is_in_both_splits(monkeypatch, image_size, count):
    monkeypatch.setattr(photos, "read_image", numbered_pixels)
    train, evaluation = PhotoSource(image_size, "train"), PhotoSource(image_size, "eval", 4096)
    seen = {"train": np.zeros((count, 1 << 21), bool), "eval": np.zeros((count, 1 << 21), bool)}
    for split, source in (("train", train), ("eval", evaluation)):
        for index in range(len(source)):
            record = source[index]
            seen[split][record["label"], positions(record["image"]).ravel()] = True
    assert not (seen["train"] & seen["eval"]).any()
    assert seen["train"].any(axis=1).all()
    assert seen["eval"].any(axis=1).all()
    if image_size == 32:
        share = seen["eval"].sum() / (seen["eval"] | seen["train"]).sum()
        assert 0.15 < share < 0.25


def test_photos_train_on_photographs_equally_and_on_tiles_evenly():
    source = PhotoSource(32, "train")
    assert len(source) == 7200
    records = [source[index] for index in range(len(source))]
    assert all(record["image"].shape == (64, 64, 3) for record in records)
    labels = np.array([record["label"] for record in records])
    assert (np.bincount(labels) == len(source) // 10).all()
    for label in range(10):
        tiles = [record["image"].tobytes() for record in records if record["label"] == label]
        counts = [tiles.count(tile) for tile in set(tiles)]
        assert max(counts) - min(counts) <= 1


def test_photo_evaluation_set_is_fixed_and_a_smaller_one_its_beginning():
    source, again, smaller = (PhotoSource(32, "eval", count) for count in (60, 60, 20))
    assert (len(source), len(smaller)) == (60, 20)
    crops = [source[index]["image"] for index in range(60)]
    assert len({crop.tobytes() for crop in crops}) > 50
    for index, crop in enumerate(crops):
        assert crop.shape == (32, 32, 3)
        np.testing.assert_array_equal(crop, again[index]["image"])
        if index < 20:
            np.testing.assert_array_equal(crop, smaller[index]["image"])


def test_photos_are_distinct_colour_photographs():
    source = PhotoSource(32, "train")
    names = [source.name(index) for index in range(10)]
    assert len(set(names)) == 10
    assert "motorcycle_right.png" not in names
    for index in range(10):
        assert source[index]["image"].std(axis=-1).mean() > 0.5


def test_photos_refuse_a_size_that_leaves_nothing():
    assert len(PhotoSource(500, "eval", 3)) == 3
    with pytest.raises(InputError, match=r"data\.image_size=501 .* at most 500 "):
        PhotoSource(501, "train")


def test_photos_name_a_missing_package(monkeypatch):
    monkeypatch.setattr(photos.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install scikit-image"):
        PhotoSource(32, "train")
