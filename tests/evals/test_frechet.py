import jax
import numpy as np
import pytest
from scipy import linalg

from fvq_jax.evals.frechet import FeatureStatistics, biased, frechet_distance
from fvq_jax.runtime.errors import InputError
from tests.helpers.golden_case import GOLDEN


def moments(features):
    return features.mean(axis=0), np.cov(features, rowvar=False)


def features(n, d, seed):
    """Correlated, with a spectrum that falls as Inception's does."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) / np.arange(1, d + 1) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def by_matrix_square_root(a, b):
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    return np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)


def test_golden_distance():
    with np.load(GOLDEN / "frechet.npz") as case:
        a, b, expected = case["input.features_a"], case["input.features_b"], case["output.frechet_distance"]
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("d", [3, 64])
def test_agrees_with_the_matrix_square_root(d):
    a, b = features(700, d, 0), features(500, d, 1)
    expected = by_matrix_square_root(moments(a), moments(b))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(moments(a), b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(list(moments(a)), moments(b)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [2, 10, 64])
def test_few_samples(n):
    """Singular covariances. Adding eps to them, as is usual for the matrix square root, changes this by per cents."""
    a, b = features(n, 64, 0), features(n + 3, 64, 1)
    gram = (a - a.mean(axis=0)) @ (b - b.mean(axis=0)).T / np.sqrt((n - 1) * (n + 2))
    traces = sum(np.trace(np.cov(x, rowvar=False)) for x in (a, b))
    expected = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2) + traces - 2 * np.linalg.norm(gram, "nuc")
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9 * traces)
    assert frechet_distance(moments(a), moments(a)) == pytest.approx(0, abs=1e-6 * traces)


@pytest.mark.slow
def test_as_many_dimensions_as_inception_has():
    """Two dense covariances of 2,048 dimensions, which one rotation splits into blocks whose roots take little time."""
    d, block, rng = 2048, 128, np.random.default_rng(0)
    axis = rng.normal(size=d)
    axis /= np.linalg.norm(axis)

    def rotated(blocks):
        whole = linalg.block_diag(*blocks)
        whole = whole - 2 * np.outer(axis, axis @ whole)
        return whole - 2 * np.outer(whole @ axis, axis)

    blocks = [[np.cov(features(200, block, 10 * part + side), rowvar=False) for part in range(16)] for side in (0, 1)]
    means = rng.normal(size=(2, d))
    roots = sum(np.trace(linalg.sqrtm(a @ b).real) for a, b in zip(*blocks, strict=True))
    traces = sum(np.trace(part) for side in blocks for part in side)
    expected = np.sum((means[0] - means[1]) ** 2) + traces - 2 * roots
    (first, second) = map(rotated, blocks)
    assert np.count_nonzero(first) > 0.99 * d * d
    assert frechet_distance((means[0], first), (means[1], second)) == pytest.approx(expected, rel=1e-3)


def test_few_pictures_in_as_many_dimensions():
    """The trace of the root of C_a C_b is that of the root of a matrix of one row for each picture."""
    a, b = (features(n, 2048, seed) for n, seed in ((150, 0), (120, 1)))
    wide_a, wide_b = ((x - x.mean(axis=0)) / np.sqrt(len(x) - 1) for x in (a, b))
    root = linalg.sqrtm(wide_b @ wide_a.T @ wide_a @ wide_b.T).real
    traces = np.sum(np.square(wide_a)) + np.sum(np.square(wide_b))
    expected = np.sum((a.mean(axis=0) - b.mean(axis=0)) ** 2) + traces - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-3)


def test_closed_form_of_diagonal_covariances():
    a, b = (np.zeros(3), np.diag([4.0, 1.0, 0.0])), (np.array([0.0, 2.0, 0.0]), np.diag([1.0, 9.0, 25.0]))
    assert frechet_distance(a, b) == pytest.approx(4 + (2 - 1) ** 2 + (1 - 3) ** 2 + 5**2)
    assert frechet_distance(b, a) == frechet_distance(a, b)
    constant = (np.zeros(3), np.zeros((3, 3)))
    assert frechet_distance(constant, constant) == 0


def test_streamed_statistics_are_those_of_the_whole():
    whole = features(50, 6, 0).astype(np.float32)
    first, second = FeatureStatistics.empty(6), FeatureStatistics.empty(6)
    first.add(whole[:7])
    first.add(whole[7:20])
    second.add(whole[20:])
    mean, covariance = jax.tree.map(np.add, first, second).moments()
    np.testing.assert_allclose(mean, whole.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(whole.astype(np.float64), rowvar=False), rtol=1e-10, atol=1e-12)
    assert frechet_distance((mean, covariance), whole) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros(4), r"array \[n, d\] with n at least 2, .* not of shape \[4\]"),
        (np.zeros((1, 4)), r"not of shape \[1, 4\]"),
        (np.full((2, 4), np.nan), "must be finite"),
        ((np.zeros(4), np.zeros((4, 3))), r"a mean of 4 dimensions does not fit a covariance of shape \(4, 3\)"),
        ((np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]])), "must be symmetric"),
        (np.zeros((5, 3)), "features of 3 and of 4 dimensions"),
    ],
)
def test_what_is_no_set_of_features_is_refused(bad, message):
    with pytest.raises(InputError, match=message):
        frechet_distance(bad, np.zeros((5, 4)))


def test_statistics_refuse_what_would_spoil_them():
    statistics = FeatureStatistics.empty(2)
    with pytest.raises(InputError, match="not finite"):
        statistics.add(np.array([[0.0, np.inf]]))
    statistics.add(np.zeros((1, 2)))
    with pytest.raises(InputError, match="at least 2 feature vectors, not 1"):
        statistics.moments()


def test_a_distance_of_few_pictures_is_named_as_biased():
    assert biased(["rfid", "psnr", "fid"], 10_000) == {}
    assert biased(["rfid", "psnr"], 9_999) == {"rfid": "upwards: 9,999 pictures are fewer than 10,000"}
