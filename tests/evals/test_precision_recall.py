import numpy as np
import pytest

from fvq_jax.evals.precision_recall import pairs, precision_recall
from fvq_jax.runtime.errors import InputError


def features(n, seed, d=24, shift=0.0):
    rng = np.random.default_rng(seed)
    return (np.abs(rng.normal(size=(n, d))) + shift).astype(np.float32)


def by_brute_force(reference, samples, squared_distances, k=3):
    """Precision and recall from whole matrices of squared distances."""

    def radii(x):
        return np.sort(squared_distances(x, x), axis=1)[:, k]  # the first is the distance of a picture to itself

    between = squared_distances(reference, samples)
    in_real_ball = between <= radii(reference)[:, None]
    in_sample_ball = between <= radii(samples)[None]
    return in_real_ball.any(axis=0).mean(), in_sample_ball.any(axis=1).mean()


def exactly(u, v):
    return np.square(u[:, None].astype(np.float64) - v[None]).sum(axis=2)


def in_float16(u, v):
    """Each term rounded to float16; sums over dimensions are rounded once."""
    u, v = u.astype(np.float16), v.astype(np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        norms = [np.square(x).astype(np.float32).sum(axis=1).astype(np.float16) for x in (u, v)]
        products = (u.astype(np.float32) @ v.astype(np.float32).T).astype(np.float16)
        return np.maximum(norms[0][:, None] - np.float16(2) * products + norms[1][None], np.float16(0))


@pytest.mark.parametrize("block", [None, 50])
@pytest.mark.parametrize("counts", [(120, 90), (37, 130)])
def test_float32_distances_agree_with_brute_force(counts, block):
    reference, samples = features(counts[0], 0), features(counts[1], 1, shift=0.15)
    found = precision_recall(reference, samples, block=block)
    assert found == pytest.approx(by_brute_force(reference, samples, exactly), abs=1e-12)
    assert 0.1 < min(found) < max(found) < 1


@pytest.mark.parametrize("block", [None, 64])
def test_adm_distances_are_those_of_float16(block):
    """So far from the origin that float16 blurs neighbours: another result than that of exact distances."""
    reference, samples = features(150, 0, shift=2), features(110, 1, shift=2.1)
    found = precision_recall(reference, samples, distances="adm", block=block)
    assert found == pytest.approx(by_brute_force(reference, samples, in_float16), abs=1e-12)
    assert found != precision_recall(reference, samples, distances="float32", block=block)


def test_adm_takes_float32_for_blocks_that_float16_cannot_hold():
    reference, samples = 100 * features(80, 0), 100 * features(70, 1)
    assert not np.isfinite(in_float16(reference, samples)).all()
    found = precision_recall(reference, samples, distances="adm")
    assert found == precision_recall(reference, samples, distances="float32")

    def mixed(u, v):
        """Blocks of 40: the first of the reference is small enough for float16."""
        result = np.empty((len(u), len(v)), np.float32)
        for i in range(0, len(u), 40):
            for j in range(0, len(v), 40):
                part = in_float16(u[i : i + 40], v[j : j + 40])
                whole = part if np.isfinite(part).all() else exactly(u[i : i + 40], v[j : j + 40])
                result[i : i + 40, j : j + 40] = whole
        return result

    reference[:40] /= 100
    samples[:40] /= 100
    found = precision_recall(reference, samples, distances="adm", block=40)
    assert found == pytest.approx(by_brute_force(reference, samples, mixed), abs=1e-12)


def test_precision_and_recall_are_not_confused():
    """All samples lie amid one of two clusters of real pictures."""
    rng = np.random.default_rng(0)
    near, far = rng.normal(size=(60, 4)), rng.normal(size=(60, 4)) + 100
    samples = (0.5 * rng.normal(size=(50, 4))).astype(np.float32)
    precision, recall = precision_recall(np.concatenate([near, far]).astype(np.float32), samples)
    assert precision > 0.9
    assert recall < 0.5


def test_identical_sets_score_1_and_distant_ones_0():
    same = features(30, 0)
    assert precision_recall(same, same) == (1, 1)
    assert precision_recall(same, same + 50) == (0, 0)


def test_more_neighbours_mean_larger_balls():
    reference, samples = features(60, 0), features(60, 1, shift=0.3)
    three, ten = (precision_recall(reference, samples, neighbours=k) for k in (3, 10))
    assert ten[0] > three[0]
    assert ten[1] > three[1]
    assert ten == pytest.approx(by_brute_force(reference, samples, exactly, k=10))


def test_progress_counts_every_pair():
    seen = []
    precision_recall(features(30, 0), features(20, 1), block=16, progress=seen.append)
    assert sum(seen) == pairs(30, 20) == 900 + 400 + 600


@pytest.mark.parametrize(
    ("reference", "samples", "options", "message"),
    [
        (features(9, 0), features(3, 1), {}, r"at least 4 samples \(a picture and its 3 nearest neighbours\), not 3"),
        (features(2, 0), features(9, 1), {}, "at least 4 reference pictures .*, not 2"),
        (features(9, 0), features(9, 1, d=5), {}, "features of 24 and of 5 dimensions cannot be compared"),
        (features(9, 0), features(9, 1) * np.float32(np.nan), {}, "features of the samples are not finite"),
        (features(9, 0), features(9, 1), {"distances": "f16"}, "unknown distances 'f16': use one of float32, adm"),
    ],
)
def test_what_cannot_be_compared_is_refused(reference, samples, options, message):
    with pytest.raises(InputError, match=message):
        precision_recall(reference, samples, **options)
