import numpy as np
import pytest
from PIL import Image, ImageFilter

from fvq_jax.data.crops import RandomCrops
from fvq_jax.data.photos import PhotoSource
from fvq_jax.evals.class_accuracy import ClassJudge
from fvq_jax.runtime.errors import InputError


def crops(source, count):
    records = [source[index] for index in range(count)]
    return np.stack([record["image"] for record in records]), np.array([record["label"] for record in records])


@pytest.fixture(scope="module")
def held_out():
    return crops(PhotoSource(32, "eval", 400), 400)


@pytest.fixture(scope="module")
def judge():
    return ClassJudge.fit(*crops(RandomCrops(PhotoSource(32, "train"), 1000, 32), 1000))


def degraded(images, change):
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in images])


def test_photographs_are_told_apart_by_regions_that_were_not_learned(judge, held_out):
    assert judge.accuracy(*held_out) > 0.9


def test_what_a_tokenizer_takes_away_hardly_matters(judge, held_out):
    images, labels = held_out
    blurred = degraded(images, lambda image: image.filter(ImageFilter.GaussianBlur(1)))
    assert judge.accuracy(blurred, labels) > 0.88
    noise = np.random.default_rng(0).normal(0, 4, images.shape)
    noisy = np.clip(blurred + noise, 0, 255).astype(np.uint8)
    assert judge.accuracy(noisy, labels) > 0.8


def test_accuracy_counts_the_class_asked_for(judge, held_out):
    images, labels = held_out
    chosen = judge.classify(images)
    assert judge.accuracy(images, chosen) == 1
    assert judge.accuracy(images, (chosen + 1) % 10) == 0
    half = np.where(np.arange(400) % 2, chosen, (chosen + 1) % 10)
    assert judge.accuracy(images, half) == 0.5
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    assert judge.accuracy(noise, labels) < 0.2


def test_the_same_pictures_give_the_same_judge(held_out):
    images, labels = held_out
    first, second = (ClassJudge.fit(images[:200], labels[:200]) for _ in range(2))
    np.testing.assert_array_equal(first.classify(images[200:]), second.classify(images[200:]))


def test_sides_need_not_be_multiples_of_a_block():
    rng = np.random.default_rng(0)
    bright = np.arange(20) % 2
    images = (rng.integers(0, 100, (20, 11, 19, 3)) + 100 * bright[:, None, None, None]).astype(np.uint8)
    assert ClassJudge.fit(images, bright + 5).accuracy(images, bright + 5) == 1


def test_bad_input_is_refused(judge):
    images = np.zeros((4, 32, 32, 3), np.uint8)
    with pytest.raises(InputError, match="4 pictures with 3 labels"):
        ClassJudge.fit(images, np.arange(3))
    with pytest.raises(InputError, match="at least two classes"):
        ClassJudge.fit(images, np.zeros(4, int))
    with pytest.raises(InputError, match="at least 8 x 8 pixels"):
        ClassJudge.fit(images[:, :4], np.arange(4))
    with pytest.raises(InputError, match=r"shape \[16, 16, 3\]: the judge learned \[32, 32, 3\]"):
        judge.accuracy(images[:, :16, :16], np.arange(4))
    with pytest.raises(InputError, match="0 pictures with 0 labels"):
        judge.accuracy(images[:0], np.arange(0))
