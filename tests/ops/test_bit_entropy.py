import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from fvq_jax.ops.bit_entropy import bitwise_entropy_loss, joint_entropy_loss, mean_code_probabilities
from fvq_jax.ops.sharded_codebook import TOKENS
from tests.helpers.compiled_program import arrays
from tests.helpers.slow_cases import MESHES
from tests.helpers.tiny_generator import mesh_of


def logits_of(n=48, bits=5, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=(n, bits))).astype(np.float32)


def probabilities(logits):
    """Of all codes for all tokens, float64; bit i counts 2^i."""
    x = np.asarray(logits, np.float64)
    bits = np.arange(2 ** x.shape[1])[:, None] >> np.arange(x.shape[1]) & 1
    signed = np.where(bits, -1.0, 1.0)[None] * x[:, None]
    return np.exp(-np.logaddexp(0, signed).sum(axis=-1))


def entropy(p):
    return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)


def oracle(logits):
    """The joint loss, float64."""
    p = probabilities(logits)
    return entropy(p).mean() - entropy(p.mean(axis=0))


def slopes(loss, logits, step=1e-4):
    """The gradient of a float64 function by central differences."""
    logits, found = np.asarray(logits, np.float64), np.zeros(logits.shape)
    for at in np.ndindex(logits.shape):
        moved = np.zeros(logits.shape)
        moved[at] = step
        found[at] = (loss(logits + moved) - loss(logits - moved)) / (2 * step)
    return found


@pytest.mark.parametrize(("bits", "block_size"), [(1, 4096), (2, 5), (5, 1), (5, 7), (6, 48)])
def test_mean_probabilities_of_all_codes(bits, block_size):
    logits = logits_of(bits=bits)
    found = mean_code_probabilities(jnp.asarray(logits), block_size=block_size)
    assert found.shape == (2**bits,)
    np.testing.assert_allclose(found, probabilities(logits).mean(axis=0), rtol=2e-6)


@pytest.mark.parametrize("scale", [0.01, 3.0, 500.0])
def test_joint_loss_equals_the_formula(scale):
    logits = logits_of(scale=scale)
    np.testing.assert_allclose(joint_entropy_loss(jnp.asarray(logits)), oracle(logits), rtol=1e-5, atol=1e-6)


def test_gradient_of_the_joint_loss():
    logits = logits_of(n=12, bits=4)
    wanted = slopes(oracle, logits)
    assert np.abs(wanted).max() > 1e-3
    gradient = jax.grad(functools.partial(joint_entropy_loss, block_size=5))(jnp.asarray(logits))
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)


def test_gradients_are_finite_where_bits_are_sure():
    logits = jnp.asarray(logits_of(n=6, bits=8, scale=1e4)).at[0].set(0.0)
    for loss in (joint_entropy_loss, bitwise_entropy_loss):
        assert np.all(np.isfinite(jax.grad(loss)(logits)))


def test_bitwise_loss_and_its_gradient_equal_the_formula():
    def formula(logits):
        return sum(oracle(logits[:, [i]]) for i in range(logits.shape[1]))

    logits = logits_of(n=12, bits=4)
    value, gradient = jax.value_and_grad(bitwise_entropy_loss)(jnp.asarray(logits))
    np.testing.assert_allclose(value, formula(logits), rtol=1e-5)
    np.testing.assert_allclose(gradient, slopes(formula, logits), atol=1e-6)
    assert abs(value - oracle(logits)) > 5e-3


@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_gives_the_same(sizes):
    """The mean is over all tokens before its logarithm is taken."""
    logits, mesh = logits_of(), mesh_of(*sizes)
    placed = jax.device_put(logits, NamedSharding(mesh, TOKENS))
    run = jax.jit(jax.value_and_grad(functools.partial(joint_entropy_loss, mesh=mesh, block_size=5)))
    value, gradient = run(placed)
    expected, wanted = jax.jit(jax.value_and_grad(joint_entropy_loss))(jnp.asarray(logits))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, wanted, atol=1e-5 * np.abs(wanted).max())


def dense_loss(logits, mesh=None, block_size=None):
    """The loss with the probabilities of all codes for all tokens at once."""
    bits = np.arange(2 ** logits.shape[1])[:, None] >> np.arange(logits.shape[1]) & 1
    log_p = jax.nn.log_sigmoid(np.where(bits, 1.0, -1.0)[None] * logits[:, None]).sum(axis=-1)
    p = jnp.exp(log_p)
    return -jnp.mean(jnp.sum(p * log_p, axis=1)) + jnp.sum(p.mean(axis=0) * jnp.log(p.mean(axis=0)))


@pytest.mark.parametrize("sizes", [(1, 1), (2, 4)])
def test_no_array_has_all_tokens_and_codes(sizes):
    n, bits, mesh = 8 * 37, 10, mesh_of(*sizes)
    given = jax.ShapeDtypeStruct((n, bits), jnp.float32, sharding=NamedSharding(mesh, TOKENS))

    def found(loss):
        run = jax.jit(jax.value_and_grad(functools.partial(loss, mesh=mesh, block_size=16)))
        return max(np.prod(dims, dtype=int) for _, dims in arrays(run.lower(given).compile().as_text()))

    mine = n // mesh.size
    assert found(dense_loss) >= mine * 2**bits
    # Of all codes; of all tokens; of the tokens of a block and half of the bits.
    assert found(joint_entropy_loss) <= max(2**bits, mine * bits + 16 * bits, 16 * 2 ** (bits // 2)) < mine * 2**bits


def test_18_bits_of_which_nothing_is_known_are_as_uncertain_as_their_mean():
    """And of tokens that are sure of one of two codes, only the mean is uncertain, by log 2."""
    run = jax.jit(joint_entropy_loss)
    assert abs(run(jnp.zeros((64, 18)))) < 5e-5
    sure = jnp.stack([jnp.full(18, 200.0), jnp.full(18, -200.0)])
    np.testing.assert_allclose(run(jnp.tile(sure, (32, 1))), -np.log(2), rtol=1e-6)


def test_products_are_asked_for_at_the_highest_precision():
    text = jax.jit(jax.grad(joint_entropy_loss)).lower(jnp.asarray(logits_of())).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
