import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.ops.causal_attention import BLOCKS, QUERIES, causal_attention, scored_pairs
from fvq_jax.runtime.products import product_flops
from tests.helpers.golden_case import relative_error

LENGTHS = (1, 9, QUERIES, QUERIES + 1, 2 * QUERIES + 37)  # one block, or several, the last of them full or not


def arrays(length, dtype=jnp.float32):
    rng = np.random.default_rng(length)
    return [jnp.asarray(s * rng.standard_normal((2, length, 3, 8)), dtype) for s in (3, 3, 1)]


def oracle(q, k, v):
    """In float64, all scores at once."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bqhc,bkhc->bhqk", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhqk,bkhc->bqhc", weights / weights.sum(axis=-1, keepdims=True), v)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-7)])
def test_it_equals_the_formula(length, dtype, tolerance):
    """In bfloat16 weights and result are rounded, each by at most 2^-8, but scores and softmax are not."""
    q, k, v = arrays(length, dtype)
    actual = causal_attention(q, k, v)
    assert actual.dtype == dtype
    error = np.abs(np.asarray(actual, np.float64) - oracle(q, k, v))
    assert error.max() < tolerance * np.abs(np.asarray(v, np.float64)).max()


@pytest.mark.parametrize("length", LENGTHS)
def test_its_gradients_are_those_of_the_formula(length):
    """Along a random direction, by a difference of the formula in float64."""
    inputs, rng = arrays(length), np.random.default_rng(0)
    weights, *direction = (rng.standard_normal(inputs[0].shape) for _ in range(4))
    gradients = jax.grad(
        lambda *x: jnp.sum(causal_attention(*x) * jnp.asarray(weights, jnp.float32)), argnums=(0, 1, 2)
    )
    actual = sum(np.vdot(np.asarray(x, np.float64), y) for x, y in zip(gradients(*inputs), direction, strict=True))

    def moved(step):
        return oracle(*(np.asarray(x, np.float64) + step * y for x, y in zip(inputs, direction, strict=True)))

    expected = np.vdot(weights, moved(1e-6) - moved(-1e-6)) / 2e-6
    assert relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize("length", LENGTHS)
def test_scored_pairs_are_what_is_computed(length):
    b, h, c = 2, 3, 8
    flops = product_flops(jax.make_jaxpr(causal_attention)(*arrays(length)))
    assert flops == 2 * b * h * c * 2 * scored_pairs(length)  # scores, and the weighted sums of values


def test_nearly_half_of_the_scores_of_a_long_sequence_are_spared():
    assert scored_pairs(QUERIES) == QUERIES**2
    assert scored_pairs(2 * QUERIES) == 0.75 * (2 * QUERIES) ** 2
    assert scored_pairs(32 * QUERIES) == (1 + 1 / BLOCKS) / 2 * (32 * QUERIES) ** 2


@pytest.mark.parametrize("length", [1, 8 * QUERIES, 8 * QUERIES + 1, 64 * QUERIES - 3])
def test_there_are_few_blocks(length):
    """Each has a product for the scores and one for the values."""
    shape = jax.ShapeDtypeStruct((1, length, 1, 2), jnp.float32)
    assert str(jax.make_jaxpr(causal_attention)(shape, shape, shape)).count("dot_general[") <= 2 * BLOCKS
