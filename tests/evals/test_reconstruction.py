import tracemalloc

import numpy as np
import pytest
from PIL import Image

from fvq_jax.data.crops import RandomCrops
from fvq_jax.data.evaluation_set import Sample
from fvq_jax.data.folder import FolderSource
from fvq_jax.evals import reconstruction
from fvq_jax.evals.networks import Networks
from fvq_jax.models.frozen.inception import CLASSES
from fvq_jax.runtime.errors import DataError, InputError
from tests.helpers.hanging_source import HangingSource
from tests.helpers.pictures import damage

SIZE, SHADES = 16, 20
NO_NETWORKS = Networks(None, {}, {})


class Greys:
    """Pictures of one grey each, twenty of a shade after twenty of another, as folders of classes list them."""

    def __init__(self, count=20 * SHADES):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        shade = index // 20 % SHADES
        return {"image": np.full((SIZE, SIZE, 3), 10 * shade, np.uint8), "label": np.int32(shade)}

    def name(self, index):
        return str(index)

    def fingerprint(self):
        return f"{self.count} greys"


def shades(images):
    return images[:, 0, 0, 0].astype(np.int32) // 10


def as_they_are(crops, labels):
    """Reconstructs without loss; the code is the shade, everywhere in a picture."""
    codes = np.broadcast_to(shades(crops)[:, None, None], (len(crops), 8, 8))
    zeros = np.zeros(len(crops), np.float32)
    return reconstruction.Reconstructed(crops / np.float32(127.5) - 1, codes, zeros, zeros)


LEVELS = np.zeros((8, 8), int)


def collect(source, reconstruct=as_they_are, networks=NO_NETWORKS, batch_size=64, **options):
    options = {"level_of": LEVELS, **options}
    return reconstruction.collect(
        reconstruct, source, networks, codebook_size=SHADES + 4, size=SIZE, batch_size=batch_size, **options
    )


def test_crops_of_few_pictures_count_as_few_pictures(tmp_path):
    """Ten pictures of 40 may be unreadable, however many crops are cut from them."""
    for number in range(40):
        Image.fromarray(np.full((20, 20, 3), 10 * (number % SHADES), np.uint8)).save(tmp_path / f"{number}.png")
    crops = RandomCrops(FolderSource(tmp_path), 1600, SIZE)
    for number in range(10):
        damage(tmp_path / f"{number}.png")
    found = collect(crops)
    said = reconstruction.conditions(found, crops, data="greys", protocol="direct", size=SIZE)
    assert (said["images"], said["different_pictures"], said["skipped_files"]) == (1200, 30, 10)
    damage(tmp_path / "10.png")
    with pytest.raises(InputError, match="11 of 40 pictures are unreadable, and 10 may be"):
        collect(crops)


def test_inception_score_does_not_depend_on_the_order_of_the_classes():
    def sure(images):
        logits = 50 * np.eye(CLASSES, dtype=np.float32)[shades(images)]
        return {"2048": np.zeros((len(images), 2048), np.float32), "logits_unbiased": logits}

    score, spread = collect(Greys(), networks=Networks(sure, {}, {})).sums.inception_score.result()
    assert 12 < score <= SHADES  # two, if a split held only its own two classes
    assert spread < 2


def test_lpips_is_the_mean_over_the_pictures_alone():
    """The last batch is filled up with pictures that do not count."""

    def distance(a, b):
        assert a.dtype == b.dtype == np.uint8
        return a[:, 0, 0, 0] / np.float32(255) + (a != b).any(axis=(1, 2, 3))

    found = collect(Greys(), networks=Networks(None, {"lpips_vgg": distance}, {}), batch_size=300)
    assert reconstruction.summarise(found.sums, 1, SHADES + 4)["lpips_vgg"] == pytest.approx(95 / 255, rel=1e-6)
    assert [example.scores["lpips_vgg"] for example in found.examples.best] == [0] * 6
    assert found.examples.ranked_by == "lpips_vgg"


def test_when_each_code_came_up_first():
    found, sample = collect(Greys()), Sample(Greys(), 20 * SHADES)
    seen = [int(sample[position]["label"]) for position in range(len(sample))]
    assert found.first_use.tolist() == [seen.index(shade) for shade in range(SHADES)] + [reconstruction.NEVER] * 4
    assert found.count == len(seen)
    np.testing.assert_array_equal(found.sums.code_counts, [[20 * 64] * SHADES + [0] * 4])


def test_levels_are_counted_apart_and_the_quantization_error_is_a_mean_over_pictures():
    def reconstruct(crops, labels):
        zeros, shade = np.zeros((len(crops), 5), int), shades(crops)
        codes = np.where(np.arange(5) < 3, shade[:, None], zeros + SHADES)  # two codes of an image never change
        return reconstruction.Reconstructed(as_they_are(crops, labels).images, codes, shade / 2.0, shade + 1.0)

    found = collect(Greys(), reconstruct, level_of=np.array([0, 0, 0, 1, 1]))
    counts = found.sums.code_counts
    np.testing.assert_array_equal(counts, [[20 * 3] * SHADES + [0] * 4, [0] * SHADES + [20 * SHADES * 2] + [0] * 3])
    metrics = reconstruction.summarise(found.sums, SIZE**2, SHADES + 4, levels=("level_1", "level_2"))
    mean = (SHADES - 1) / 2
    assert metrics["quantization_error"] == pytest.approx(mean / 2)
    assert metrics["relative_quantization_error"] == pytest.approx(mean / 2 / (mean + 1))
    assert metrics["usage"] == pytest.approx((SHADES + 1) / (SHADES + 4))
    assert metrics["usage/level_1"] == pytest.approx(SHADES / (SHADES + 4))
    assert metrics["usage/level_2"] == pytest.approx(1 / (SHADES + 4))
    assert (metrics["perplexity/level_2"], metrics["usage_most/level_2"]) == (1, 1)
    assert metrics["bits_per_pixel"] == pytest.approx(5 * np.log2(SHADES + 4) / SIZE**2)


def test_usage_is_also_counted_by_position():
    sums = collect(Greys()).sums
    assert "positions/dead" not in reconstruction.summarise(sums, 1, SHADES + 4)
    assert "positions/dead" not in reconstruction.summarise(sums, 1, SHADES + 4, positions=np.zeros(SHADES + 4, int))
    metrics = reconstruction.summarise(sums, 1, SHADES + 4, positions=np.arange(SHADES + 4) // 3)
    assert (metrics["positions/usage_min"], metrics["positions/dead"]) == (0, 1)
    metrics = reconstruction.summarise(sums, 1, SHADES + 4, positions=np.arange(SHADES + 4) // 8)
    assert (metrics["positions/usage_min"], metrics["positions/dead"]) == (0.5, 0)


def test_a_picture_without_a_number_does_not_score_as_black():
    def reconstruct(crops, labels):
        found = as_they_are(crops, labels)
        found.images[0, 3, 4, 1] = np.nan
        return found

    found = collect(Greys(11), reconstruct, batch_size=16)
    assert found.sums.broken == 1
    assert np.isnan(reconstruction.summarise(found.sums, 2, SHADES + 4)["psnr"])
    assert found.examples.worst[0].position == 0
    assert found.examples.best[0].scores["psnr"] == pytest.approx(120)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_pictures():
    peaks = []
    for count in (32, 128, 640):  # in small batches: how many are read ahead is a matter of time
        tracemalloc.start()
        collect(Greys(count), batch_size=8)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 512 * 768 / 2, peaks  # the crops alone are 512 x 768 bytes


def test_pictures_that_stop_coming_end_the_pass_in_time():
    hanging = HangingSource(Greys(), Sample(Greys(), 20 * SHADES).index(70))  # after the first batch
    try:
        with pytest.raises(DataError, match=r"no batch for (0|2)\.5 s"):  # the longer for the first, on a busy machine
            collect(hanging, timeout=0.5)
    finally:
        hanging.release()
