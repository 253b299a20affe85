import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.ops.quantize import codebook_loss, commitment_loss, entropy_loss, straight_through


def pair(seed=0):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32) for _ in range(2))


def test_straight_through_has_the_value_of_the_code_and_the_gradient_of_the_latent():
    z, z_q = pair()
    weights = jnp.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_allclose(straight_through(z, z_q), z_q, rtol=1e-6, atol=1e-6)
    to_z, to_code = jax.grad(lambda z, z_q: jnp.sum(weights * straight_through(z, z_q)), argnums=(0, 1))(z, z_q)
    np.testing.assert_array_equal(to_z, weights)
    assert not np.any(to_code)


@pytest.mark.parametrize(("loss", "reached"), [(commitment_loss, 0), (codebook_loss, 1)])
def test_each_loss_is_the_mean_square_and_reaches_one_side_only(loss, reached):
    z, z_q = pair()
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(z, z_q)
    difference = np.asarray(z, np.float64) - np.asarray(z_q)
    np.testing.assert_allclose(value, np.mean(difference**2), rtol=1e-6)
    sign = 1 if reached == 0 else -1
    np.testing.assert_allclose(gradients[reached], sign * 2 * difference / 24, rtol=1e-5)
    assert not np.any(gradients[1 - reached])


def entropy_oracle(z, codebook, temperature, normalize):
    """Eq. 4 of arXiv 2310.05737 in numpy, float64, with all probabilities at once."""
    z, codebook = np.asarray(z, np.float64), np.asarray(codebook, np.float64)
    if normalize:
        z, codebook = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (z, codebook))
    logits = -np.square(z[:, None] - codebook[None]).sum(-1) / temperature
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    mean_p = p.mean(axis=0)
    return -(p * log_p).sum(axis=1).mean() + (mean_p * np.log(mean_p + 1e-5)).sum()


def dense_entropy(z, codebook, temperature):
    log_p = jax.nn.log_softmax(-jnp.sum(jnp.square(z[:, None] - codebook[None]), axis=-1) / temperature, axis=1)
    p = jnp.exp(log_p)
    mean_p = p.mean(axis=0)
    return -jnp.mean(jnp.sum(p * log_p, axis=1)) + jnp.sum(mean_p * jnp.log(mean_p + 1e-5))


@functools.cache
def tokens_and_codes():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(37, 6)), jnp.float32), jnp.asarray(rng.normal(size=(23, 6)), jnp.float32)


@pytest.mark.parametrize("block_size", [1, 8, 37, 512])
@pytest.mark.parametrize("normalize", [False, True])
def test_entropy_equals_the_formula_for_any_block_size(block_size, normalize):
    z, codebook = tokens_and_codes()
    value = entropy_loss(z, codebook, temperature=0.7, normalize=normalize, block_size=block_size)
    np.testing.assert_allclose(value, entropy_oracle(z, codebook, 0.7, normalize), rtol=2e-5)


@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_entropy_follows_the_temperature(temperature):
    z, codebook = tokens_and_codes()
    value = entropy_loss(z, codebook, temperature=temperature, block_size=16)
    np.testing.assert_allclose(value, entropy_oracle(z, codebook, temperature, False), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("block_size", [8, 37])
def test_entropy_gradients_equal_the_dense_formula(block_size):
    z, codebook = tokens_and_codes()
    blocked = functools.partial(entropy_loss, temperature=0.7, block_size=block_size)
    blocked = jax.jit(jax.grad(blocked, argnums=(0, 1)))(z, codebook)
    dense = jax.jit(jax.grad(dense_entropy, argnums=(0, 1)))(z, codebook, 0.7)
    for actual, expected in zip(blocked, dense, strict=True):
        assert np.abs(expected).max() > 1e-4
        np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-3)


def test_entropy_is_lowest_for_sure_tokens_on_different_codes():
    codebook = 10 * jnp.eye(8)
    spread = entropy_loss(codebook, codebook, temperature=0.1)
    collapsed = entropy_loss(jnp.tile(codebook[:1], (8, 1)), codebook, temperature=0.1)
    undecided = entropy_loss(jnp.zeros((8, 8)), codebook, temperature=0.1)
    np.testing.assert_allclose(spread, -np.log(8), rtol=1e-3)
    np.testing.assert_allclose(collapsed, 0, atol=1e-4)
    np.testing.assert_allclose(undecided, 0, atol=1e-3)


def test_entropy_keeps_no_tokens_times_codes_for_the_backward_pass():
    n, k, block = 1031, 519, 8
    z, codebook = jnp.zeros((n, 4)), jnp.zeros((k, 4))
    gradient = jax.jit(jax.grad(lambda z: entropy_loss(z, codebook, temperature=1.0, block_size=block)))
    compiled = gradient.lower(z).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < n * k * 4 / 4
