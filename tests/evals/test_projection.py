import jax
import numpy as np

from fvq_jax.evals.projection import principal_plane

principal_plane = jax.jit(principal_plane)


def test_it_is_the_plane_of_the_singular_value_decomposition():
    rng = np.random.default_rng(0)
    codes = (rng.normal(size=(300, 6)) * [1, 5, 0.3, 2, 0.1, 0.7] + 40).astype(np.float32)
    points, share = principal_plane(codes)
    centred = codes.astype(np.float64) - codes.astype(np.float64).mean(axis=0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(share, (singular**2 / np.sum(singular**2))[:2], rtol=1e-4)
    axes = axes[:2] * np.sign(axes[[0, 1], np.abs(axes[:2]).argmax(axis=1)])[:, None]
    np.testing.assert_allclose(points, centred @ axes.T, atol=1e-3)
    again, _ = principal_plane(codes)
    np.testing.assert_array_equal(points, again)


def test_codes_of_one_dimension_and_codes_that_are_all_the_same():
    points, share = principal_plane(np.arange(5, dtype=np.float32)[:, None])
    np.testing.assert_allclose(points, np.stack([np.arange(5) - 2, np.zeros(5)], axis=1), atol=1e-6)
    np.testing.assert_allclose(share, [1, 0], atol=1e-6)
    for found in principal_plane(np.ones((4, 3), np.float32)):
        np.testing.assert_array_equal(found, 0)
