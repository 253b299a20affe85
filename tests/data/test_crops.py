import dataclasses

import numpy as np
import pytest
from PIL import Image

from fvq_jax.data.crops import RandomCrops
from fvq_jax.data.folder import FolderSource
from fvq_jax.data.pipeline import eval_batches
from tests.helpers.pictures import damage


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return FolderSource(tmp_path)


def pixels(source, index):
    return np.asarray(source[index]["image"])


def test_a_crop_is_a_part_of_its_picture_and_always_the_same(pictures):
    crops = RandomCrops(pictures, 7, 16)
    assert len(crops) == 7
    for index in range(7):
        crop = pixels(crops, index)
        assert crop.shape == (16, 16, 3)
        np.testing.assert_array_equal(crop, pixels(crops, index))
        assert crops.name(index) == pictures.name(index % 3)
        whole = np.asarray(Image.open(pictures.name(index % 3)))
        windows = np.lib.stride_tricks.sliding_window_view(whole, (16, 16, 3))[:, :, 0]
        assert (windows == crop).all(axis=(2, 3, 4)).any()
    assert not np.array_equal(pixels(crops, 0), pixels(crops, 3))  # of the same picture


def test_fewer_crops_than_pictures_are_of_pictures_from_everywhere(tmp_path):
    for shade in range(20):
        Image.new("RGB", (16, 16), (shade, 0, 0)).save(tmp_path / f"{shade:02}.png")
    crops = RandomCrops(FolderSource(tmp_path), 5, 16)
    assert [pixels(crops, index)[0, 0, 0] for index in range(5)] == [0, 4, 8, 12, 16]
    assert [crops.name(index) for index in range(5)] == [crops.source.name(4 * index) for index in range(5)]


@pytest.mark.parametrize("change", [{"seed": 1}, {"resize_min": 20, "resize_max": 24}, {"size": 12}, {"count": 9}])
def test_every_option_changes_the_crops_or_their_number_and_the_fingerprint(pictures, change):
    before = RandomCrops(pictures, 7, 16)
    after = dataclasses.replace(before, **change)
    assert after.fingerprint() != before.fingerprint()
    assert len(after) != len(before) or not np.array_equal(pixels(after, 5), pixels(before, 5))


def test_without_resizing_a_photograph_is_not_decoded_smaller(tmp_path):
    """Resizing to a most of 320 allows JPEG files to be decoded at a half or a quarter of their size."""
    noise = np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.jpg", quality=95)
    source = FolderSource(tmp_path)
    whole = np.asarray(Image.open(tmp_path / "large.jpg"))
    crop = pixels(RandomCrops(source, 1, 16, resize_min=0, resize_max=320), 0)
    np.testing.assert_array_equal(crop, pixels(RandomCrops(source, 1, 16), 0))
    assert abs(crop.std() - whole.std()) < 10


def test_the_pipeline_takes_them_as_they_are_and_counts_damage(pictures, tmp_path):
    damage(tmp_path / "1.png")
    crops = RandomCrops(pictures, 300, 16)
    batches = eval_batches(crops, image_size=16, batch_size=300)
    batch = next(batches)
    assert batch["mask"].tolist() == [True, False, True] * 100
    assert batches.skipped == {pictures.name(1): 100}
    np.testing.assert_array_equal(batch["image"][2], pixels(crops, 2))
