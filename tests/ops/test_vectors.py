import jax
import jax.numpy as jnp
import numpy as np

from fvq_jax.ops.vectors import l2_normalize


def test_unit_length_in_the_same_direction():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)), jnp.float32)
    expected = np.asarray(x, np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(l2_normalize(50 * x), expected, rtol=1e-6)


def test_zero_stays_zero_with_a_finite_gradient():
    value, gradient = jax.value_and_grad(lambda x: l2_normalize(x).sum())(jnp.zeros((2, 4)))
    assert value == 0
    assert np.all(np.isfinite(gradient))
