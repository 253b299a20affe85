import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.ops.vq_losses import codebook_loss, commitment_loss


def pair(seed=0):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32) for _ in range(2))


@pytest.mark.parametrize(("loss", "reached"), [(commitment_loss, 0), (codebook_loss, 1)])
def test_each_loss_is_the_mean_square_and_reaches_one_side_only(loss, reached):
    z, z_q = pair()
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(z, z_q)
    difference = np.asarray(z, np.float64) - np.asarray(z_q)
    np.testing.assert_allclose(value, np.mean(difference**2), rtol=1e-6)
    sign = 1 if reached == 0 else -1
    np.testing.assert_allclose(gradients[reached], sign * 2 * difference / 24, rtol=1e-5)
    assert not np.any(gradients[1 - reached])
