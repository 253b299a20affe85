import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.ops.split_matmul import multiply, split


def product_error(precision):
    """Largest error of a jitted product over the largest value, against float64."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(n, 64)), jnp.float32) for n in (50, 70))
    product = jax.jit(lambda a, b: multiply(split(a, precision), split(b, precision)))(a, b)
    assert product.dtype == jnp.float32
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
    return np.abs(product - exact).max() / np.abs(exact).max()


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("highest", 0, 5e-7), ("bf16_3x", 5e-7, 3e-5), ("bf16", 5e-4, 2e-2)]
)
def test_each_precision_has_the_error_it_states(precision, least, most):
    assert least <= product_error(precision) <= most


def test_two_parts_are_bfloat16_and_keep_16_bits():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(40, 3)), jnp.float32)
    high, low = jax.jit(lambda x: split(x, "bf16_3x"))(x)
    assert high.dtype == low.dtype == jnp.bfloat16
    error = np.abs(high.astype(jnp.float32) + low.astype(jnp.float32) - x) / np.abs(x)
    assert error.max() < 2.0**-15


def test_an_unknown_precision_is_refused():
    with pytest.raises(KeyError, match="float8"):
        split(jnp.zeros((1, 1)), "float8")
