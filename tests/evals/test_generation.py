import dataclasses

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from fvq_jax.evals import generation
from fvq_jax.evals.frechet import frechet_distance
from fvq_jax.evals.generation import Reference, collect, compare, not_computed, protocol, score
from fvq_jax.evals.precision_recall import precision_recall
from fvq_jax.models.frozen.inception import CLASSES
from fvq_jax.runtime.errors import InputError
from tests.helpers.two_hosts import on_two_hosts

POOLED, SPATIAL, BLOCK = 20, 12, 16


@pytest.fixture(autouse=True)
def few_features(monkeypatch):
    """Stand-ins of few features, and blocks of few pictures, for the arithmetic around InceptionV3."""
    for name, value in {"POOLED_FEATURES": POOLED, "SPATIAL_FEATURES": SPATIAL, "SCORE_BLOCK": BLOCK}.items():
        monkeypatch.setattr(generation, name, value)


def inception(images):
    rng = np.random.default_rng(0)
    flat = images.reshape(len(images), -1).astype(np.float64) / 255
    sizes = {str(POOLED): POOLED, "spatial": SPATIAL, "logits_unbiased": CLASSES}
    return {name: (flat @ rng.normal(size=(flat.shape[1], size))).astype(np.float32) for name, size in sizes.items()}


def pictures(n, seed, low=0):
    return np.random.default_rng(seed).integers(low, 256, (n, 4, 4, 3), dtype=np.uint8)


def in_batches(images, size):
    return [images[start : start + size] for start in range(0, len(images), size)]


def found(images, size=8, **options):
    return collect(in_batches(images, size), inception, images=len(images), batch_size=size, **options)


@pytest.fixture(scope="module")
def images():
    return pictures(45, 0), pictures(39, 1, low=60)


def test_scores_are_those_of_their_definitions(images):
    real, samples = images
    scores = compare(found(samples), Reference.of(found(real)))
    a, b = inception(real), inception(samples)
    key = str(POOLED)
    assert scores["fid"] == pytest.approx(frechet_distance(a[key], b[key]), rel=1e-6)
    assert scores["sfid"] == pytest.approx(frechet_distance(a["spatial"], b["spatial"]), rel=1e-6)
    assert (scores["precision"], scores["recall"]) == precision_recall(a[key], b[key])
    assert 0 < scores["precision"] < 1
    blocks = []
    for start in range(0, 39, BLOCK):  # in the order of the file; the last block is smaller
        logits = b["logits_unbiased"][start : start + BLOCK].astype(np.float64)
        p, log_p = softmax(logits, axis=1), log_softmax(logits, axis=1)
        blocks.append(np.exp(np.mean(np.sum(p * (log_p - np.log(p.mean(axis=0))), axis=1))))
    expected = pytest.approx((np.mean(blocks), np.std(blocks)))
    assert (scores["inception_score"], scores["inception_score_std"]) == expected


@pytest.mark.parametrize("size", [1, 5, 64])
def test_a_stream_gives_what_the_whole_gives(size, images):
    real, samples = images
    reference = Reference.of(found(real))
    whole = compare(found(samples, 39), reference)
    assert compare(found(samples, size), reference) == pytest.approx(whole, rel=1e-9)
    batches = iter(in_batches(samples, size))
    assert score(batches, reference, inception, images=39, batch_size=size) == pytest.approx(whole, rel=1e-9)


def test_the_order_of_samples_matters_to_the_inception_score_alone(images):
    """Pictures that lie class by class in their file: every block holds one class."""
    real, _ = images
    reference = Reference.of(found(real))
    dark, bright = pictures(BLOCK, 2) // 8, 255 - pictures(BLOCK, 3) // 8
    ordered = compare(found(np.concatenate([dark, bright])), reference)
    mixed = np.concatenate([dark[: BLOCK // 2], bright[: BLOCK // 2], dark[BLOCK // 2 :], bright[BLOCK // 2 :]])
    mixed = compare(found(mixed), reference)
    assert mixed.pop("inception_score") > 1.5 * ordered.pop("inception_score")
    del mixed["inception_score_std"], ordered["inception_score_std"]
    assert mixed == pytest.approx(ordered, rel=1e-9)


def test_distances_are_handed_on(images):
    real, samples = images
    reference = Reference.of(found(real))
    with pytest.raises(InputError, match="unknown distances 'f16'"):
        compare(found(samples), reference, distances="f16")
    with pytest.raises(InputError, match="unknown distances 'f16'"):
        score(in_batches(samples, 8), reference, inception, images=39, batch_size=8, distances="f16")


def test_a_reference_of_statistics_gives_fewer_scores(images):
    real, samples = images
    whole = Reference.of(found(real))
    assert whole.images == 45
    assert not_computed(whole) == {}
    statistics = dataclasses.replace(whole, features=None)
    assert statistics.images is None
    assert set(not_computed(statistics)) == {"precision", "recall"}
    everything, fewer = compare(found(samples), whole), compare(found(samples), statistics)
    assert fewer == {name: everything[name] for name in everything if name not in ("precision", "recall")}
    scores = score(in_batches(samples, 8), statistics, inception, images=39, batch_size=8)
    assert scores == fewer
    bare = dataclasses.replace(statistics, spatial=None)
    assert "sfid" in not_computed(bare)
    assert "sfid" not in compare(found(samples), bare)


def test_features_are_kept_only_if_asked_for(images):
    assert found(images[0], keep_features=False).features is None
    np.testing.assert_array_equal(found(images[0]).features, inception(images[0])[str(POOLED)])


def test_few_pictures_are_compared_by_their_features(images):
    """Fewer pictures than dimensions: the distance is the same, without their singular covariances."""
    real, samples = images[0][:12], images[1][:15]
    few, reference = found(samples), Reference.of(found(real))
    assert few.gaussian() is few.features
    assert reference.pooled is reference.features
    by_moments = Reference.of(found(real, keep_features=False))
    expected = compare(found(samples, keep_features=False), by_moments)["fid"]
    assert compare(few, reference)["fid"] == pytest.approx(expected, rel=1e-5)


def test_progress_counts_pictures(images):
    seen = []
    found(images[0], progress=seen.append)
    assert seen == [8] * 5 + [5]


def test_two_hosts_find_what_one_finds(images, monkeypatch):
    """Each host takes every second batch; the second has one fewer, and its last is not full."""
    real, samples = images
    reference = Reference.of(found(real))
    alone = found(samples, 6)

    def of_host(index):
        share = in_batches(samples, 6)[index::2]
        together = collect(share, inception, images=39, batch_size=6)
        return together, compare(together, reference)

    for together, scores in on_two_hosts(monkeypatch, of_host):
        assert together.images == 39
        np.testing.assert_array_equal(together.features, alone.features)
        assert scores == pytest.approx(compare(alone, reference), rel=1e-9)


def test_too_few_samples_or_none_are_refused(images):
    reference = Reference.of(found(images[0]))
    with pytest.raises(InputError, match="there are no pictures to score"):
        found(images[0][:0])
    with pytest.raises(InputError, match=r"need at least 4 samples .*, not 3"):
        compare(found(images[1][:3]), reference)
    with pytest.raises(InputError, match=r"at least 4 reference pictures .*, not 2"):
        compare(found(images[1]), Reference.of(found(images[0][:2])))
    with pytest.raises(InputError, match="at least 2 feature vectors"):
        Reference.of(found(images[0][:1]))


def test_the_protocol_names_distances_and_pixels():
    stored, truncated = protocol("float32", "stored"), protocol("adm", "truncate")
    assert stored["protocol"] == "adm, float32 distances, uint8 stored"
    assert "pixels as stored" in stored["protocol_means"]
    assert "converted to 8 bits (truncate)" in truncated["protocol_means"]
    assert "distances in float16" in truncated["protocol_means"]
