import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from fvq_jax.ops.entropy import entropy_loss
from fvq_jax.ops.sharded_codebook import ROWS, TOKENS


def entropy_oracle(z, codebook, temperature, inner_product=False):
    """Eq. 4 of arXiv 2310.05737 in numpy, float64, with all probabilities at once."""
    z, codebook = np.asarray(z, np.float64), np.asarray(codebook, np.float64)
    distances = np.square(z[:, None] - codebook[None]).sum(-1)
    logits = (z @ codebook.T if inner_product else -distances) / temperature
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    mean_p = p.mean(axis=0)
    return -(p * log_p).sum(axis=1).mean() + (mean_p * np.log(mean_p + 1e-5)).sum()


def dense_entropy(z, codebook, temperature, inner_product=False):
    distances = jnp.sum(jnp.square(z[:, None] - codebook[None]), axis=-1)
    log_p = jax.nn.log_softmax((z @ codebook.T if inner_product else -distances) / temperature, axis=1)
    p = jnp.exp(log_p)
    mean_p = p.mean(axis=0)
    return -jnp.mean(jnp.sum(p * log_p, axis=1)) + jnp.sum(mean_p * jnp.log(mean_p + 1e-5))


@functools.cache
def tokens_and_codes():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(37, 6)), jnp.float32), jnp.asarray(rng.normal(size=(23, 6)), jnp.float32)


@pytest.mark.parametrize("block_size", [1, 8, 23, 512])
def test_equals_the_formula_for_any_block_size(block_size):
    z, codebook = tokens_and_codes()
    value = entropy_loss(z, codebook, temperature=0.7, block_size=block_size)
    np.testing.assert_allclose(value, entropy_oracle(z, codebook, 0.7), rtol=2e-5)


@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_follows_the_temperature(temperature):
    z, codebook = tokens_and_codes()
    value = entropy_loss(z, codebook, temperature=temperature, block_size=16)
    np.testing.assert_allclose(value, entropy_oracle(z, codebook, temperature), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("block_size", [8, 23])
def test_gradients_equal_the_dense_formula(block_size):
    z, codebook = tokens_and_codes()
    blocked = functools.partial(entropy_loss, temperature=0.7, block_size=block_size)
    blocked = jax.jit(jax.grad(blocked, argnums=(0, 1)))(z, codebook)
    dense = jax.jit(jax.grad(dense_entropy, argnums=(0, 1)))(z, codebook, 0.7)
    for actual, expected in zip(blocked, dense, strict=True):
        assert np.abs(expected).max() > 1e-4
        np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-3)


def test_is_lowest_for_sure_tokens_on_different_codes():
    codebook = 10 * jnp.eye(8)
    spread = entropy_loss(codebook, codebook, temperature=0.1)
    collapsed = entropy_loss(jnp.tile(codebook[:1], (8, 1)), codebook, temperature=0.1)
    undecided = entropy_loss(jnp.zeros((8, 8)), codebook, temperature=0.1)
    np.testing.assert_allclose(spread, -np.log(8), rtol=1e-3)
    np.testing.assert_allclose(collapsed, 0, atol=1e-4)
    np.testing.assert_allclose(undecided, 0, atol=1e-3)


def test_keeps_no_tokens_times_codes_for_the_backward_pass():
    n, k, block = 1031, 519, 8
    z, codebook = jnp.zeros((n, 4)), jnp.zeros((k, 4))
    gradient = jax.jit(jax.grad(lambda z: entropy_loss(z, codebook, temperature=1.0, block_size=block)))
    compiled = gradient.lower(z).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < n * k * 4 / 4


@pytest.mark.parametrize(
    ("sizes", "inner_product", "tolerance"),
    # The products of tokens off the origin are large, so their logits have fewer digits after the point.
    [((2, 4), False, 1e-5), ((8, 1), False, 1e-5), ((1, 8), False, 1e-5), ((2, 4), True, 5e-5)],
)
def test_a_mesh_gives_the_value_and_gradients_of_one_device(sizes, inner_product, tolerance):
    rng = np.random.default_rng(2)
    z = jnp.asarray(5 + rng.normal(size=(48, 6)), jnp.float32)
    codebook = jnp.asarray(5 + rng.normal(size=(40, 6)), jnp.float32)  # off the origin, 5 to 40 rows on a device
    mesh = jax.make_mesh(sizes, ("data", "codebook"), axis_types=(AxisType.Auto,) * 2)

    def loss(z, codebook, mesh=None):
        options = {"temperature": 0.7, "inner_product": inner_product}
        return 3 * entropy_loss(z, codebook, mesh=mesh, block_size=4, **options)

    placed = jax.device_put(z, NamedSharding(mesh, TOKENS)), jax.device_put(codebook, NamedSharding(mesh, ROWS))
    compiled = jax.jit(jax.value_and_grad(functools.partial(loss, mesh=mesh), argnums=(0, 1)))
    value, gradients = compiled(*placed)
    expected, expected_gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(z, codebook)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=tolerance * np.abs(wanted).max())


def test_digits_survive_far_from_the_origin():
    z, codebook = (x + 100 for x in tokens_and_codes())
    value = entropy_loss(z, codebook, temperature=0.7, block_size=8)
    np.testing.assert_allclose(value, entropy_oracle(z, codebook, 0.7), rtol=2e-5)


@pytest.mark.parametrize("block_size", [8, 512])
def test_with_products_value_and_gradients_equal_the_formula(block_size):
    z, codebook = tokens_and_codes()
    codebook += 2
    options = {"temperature": 0.7, "inner_product": True}
    run = jax.value_and_grad(functools.partial(entropy_loss, block_size=block_size, **options), argnums=(0, 1))
    value, gradients = jax.jit(run)(z, codebook)
    np.testing.assert_allclose(value, entropy_oracle(z, codebook, **options), rtol=2e-5)
    assert abs(value - entropy_oracle(z, codebook, 0.7)) > 0.1
    dense = jax.jit(jax.grad(functools.partial(dense_entropy, **options), argnums=(0, 1)))(z, codebook)
    for actual, expected in zip(gradients, dense, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-3)
