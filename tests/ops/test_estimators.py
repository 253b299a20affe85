import jax
import jax.numpy as jnp
import numpy as np

from fvq_jax.ops.estimators import straight_through


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
