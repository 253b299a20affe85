import jax
import jax.numpy as jnp
import numpy as np

from fvq_jax.ops.code_tokens import smallest_of_code
from fvq_jax.ops.estimators import dynamic, rotation, straight_through


def pair(seed=0):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32) for _ in range(2))


def test_straight_through_has_the_value_of_the_code_and_the_gradient_of_the_latent():
    z, z_q = pair()
    weights = jnp.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(straight_through(z, z_q), z_q)
    to_z, to_code = jax.grad(lambda z, z_q: jnp.sum(weights * straight_through(z, z_q)), argnums=(0, 1))(z, z_q)
    np.testing.assert_array_equal(to_z, weights)
    assert not np.any(to_code)


def turn(z, q):
    """arXiv 2410.06424, Eq. 4, in float64: the matrix that takes z to q."""
    e, o = z / np.linalg.norm(z), q / np.linalg.norm(q)
    w = (e + o) / np.linalg.norm(e + o)
    matrix = np.eye(len(z)) - 2 * np.outer(w, w) + 2 * np.outer(o, e)
    return np.linalg.norm(q) / np.linalg.norm(z) * matrix


def gradient(z, z_q, weights):
    return jax.grad(lambda z, z_q: jnp.sum(weights * rotation(z, z_q)), argnums=(0, 1))(z, z_q)


def test_rotation_has_the_value_of_the_code_and_turns_the_gradient_with_it():
    z, z_q = pair()
    weights = jnp.arange(1.0, 25.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(rotation(z, z_q), z_q)
    to_z, to_code = gradient(z, z_q, weights)
    assert not np.any(to_code)
    for at in np.ndindex(2, 3):
        matrix = turn(np.float64(z[at]), np.float64(z_q[at]))
        np.testing.assert_allclose(matrix @ np.float64(z[at]), z_q[at], rtol=1e-6)
        np.testing.assert_allclose(to_z[at], matrix.T @ np.float64(weights[at]), rtol=1e-4, atol=1e-4)


def test_rotation_is_finite_where_nothing_can_be_turned():
    z = jnp.array([[0.0, 0.0], [1.0, 2.0], [1.0, 2.0], [3.0, 4.0], [1e-8, 0.0]])
    z_q = jnp.array([[1.0, 1.0], [-1.0, -2.0], [0.0, 0.0], [3.0, 4.0], [1.0, 1.0]])
    to_z, _ = gradient(z, z_q, jnp.full((5, 2), 5.0))
    np.testing.assert_array_equal(rotation(z, z_q), z_q)
    assert np.all(np.isfinite(to_z))
    np.testing.assert_array_equal(to_z[jnp.array([0, 4])], np.full((2, 2), 5))  # straight through
    np.testing.assert_allclose(to_z[3], [5, 5], rtol=1e-6)  # no turn


def test_dynamic_passes_the_whole_gradient_to_the_nearest_latent_of_a_code_and_less_to_others():
    table = np.array([[0.0, 0.0], [10.0, 0.0], [20.0, 0.0]], np.float32)
    codes = np.array([0, 0, 1, 1, 2])
    off = np.array([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0], [0.0, 3.0], [1.0, 1.0]], np.float32)
    z, chosen = jnp.asarray(table[codes] + off), jnp.asarray(table[codes])
    weights = jnp.arange(1.0, 11.0).reshape(5, 2)

    def passed(z, z_q):
        return dynamic(z, z_q, lambda values: smallest_of_code(values, jnp.asarray(codes), 3))

    np.testing.assert_array_equal(passed(z, chosen), chosen)
    to_z, to_code = jax.grad(lambda z, q: jnp.sum(weights * passed(z, q)), argnums=(0, 1))(z, chosen)
    assert not np.any(to_code)
    # Squared distances 1, 4; 0, 9; 2. The one at its code is the nearest of code 1, so that the other gets nothing.
    np.testing.assert_allclose(to_z, np.array([1, 0.25, 1, 0, 1])[:, None] * weights, rtol=1e-6)
