import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.ops.split_matmul import join, multiply, multiply_parts, split


def of_parts(a, b, precision):
    return multiply(split(a, precision), split(b, precision))


def of_joined(a, b, precision):
    left, right = join(a, precision, "left"), join(b, precision, "right")
    assert left.dtype == right.dtype == jnp.bfloat16
    return multiply_parts(left, right)


def product_error(product, precision):
    """Largest error of a jitted product over the largest value, against float64."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(n, 64)), jnp.float32) for n in (50, 70))
    product = jax.jit(product, static_argnums=2)(a, b, precision)
    assert product.dtype == jnp.float32
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64).T
    return np.abs(product - exact).max() / np.abs(exact).max()


@pytest.mark.parametrize("product", [of_parts, of_joined])
@pytest.mark.parametrize(
    ("precision", "least", "most"), [("highest", 0, 1e-6), ("bf16_3x", 5e-7, 3e-5), ("bf16", 5e-4, 2e-2)]
)
def test_each_precision_has_the_error_it_states(product, precision, least, most):
    assert least <= product_error(product, precision) <= most


def test_two_parts_are_bfloat16_and_keep_16_bits():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(40, 3)), jnp.float32)
    high, low = jax.jit(lambda x: split(x, "bf16_3x"))(x)
    assert high.dtype == low.dtype == jnp.bfloat16
    error = np.abs(high.astype(jnp.float32) + low.astype(jnp.float32) - x) / np.abs(x)
    assert error.max() < 2.0**-15


def test_an_unknown_precision_is_refused():
    with pytest.raises(KeyError, match="float8"):
        split(jnp.zeros((1, 1)), "float8")
