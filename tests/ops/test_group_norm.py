import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.ops.group_norm import group_norm
from tests.helpers.golden_case import relative_error

EPSILON = 1e-6


def arrays(shape, offset=0.0, dtype=jnp.float32):
    """Input, scale, bias, and weights of the result."""
    rng = np.random.default_rng(sum(shape))
    c = shape[-1]
    x, weights = offset + 3 * rng.standard_normal(shape), rng.standard_normal(shape)
    scale, bias = rng.uniform(0.5, 2, c), rng.standard_normal(c)
    return (jnp.asarray(x, dtype), *(jnp.asarray(y, jnp.float32) for y in (scale, bias)), jnp.asarray(weights, dtype))


def formula(x, scale, bias, groups, swish):
    """In numpy and without a conjugate, so that it may be differentiated along the imaginary axis."""
    grouped = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    away = grouped - grouped.mean((1, 3), keepdims=True)
    normal = away / np.sqrt((away**2).mean((1, 3), keepdims=True) + EPSILON)
    y = normal.reshape(x.shape) * scale + bias
    return y / (1 + np.exp(-y)) if swish else y


def oracle(x, scale, bias, weights, groups, swish):
    """The result and the gradients of its weighted sum, in float64: an imaginary step loses no digit."""
    inputs = [np.asarray(y.astype(jnp.float32), np.complex128) for y in (x, scale, bias)]
    weights = np.asarray(weights.astype(jnp.float32), np.float64)

    def gradient(which):
        result = np.empty(inputs[which].shape)
        for index in np.ndindex(result.shape):
            moved = [y.copy() for y in inputs]
            moved[which][index] += 1e-30j
            result[index] = np.sum(weights * formula(*moved, groups, swish).imag) / 1e-30
        return result

    return formula(*inputs, groups, swish).real, *(gradient(which) for which in range(3))


def result_and_gradients(function, x, scale, bias, weights):
    def weighted(x, scale, bias):
        y = function(x, scale, bias)
        return jnp.sum(y.astype(jnp.float32) * weights), y

    (_, y), gradients = jax.jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True))(x, scale, bias)
    return y, *gradients


@pytest.mark.parametrize("swish", [False, True])
@pytest.mark.parametrize(("shape", "groups"), [((2, 3, 2, 8), 4), ((1, 4, 3, 6), 6), ((3, 1, 2, 4), 1)])
def test_it_is_that_of_float64_and_so_are_its_gradients(shape, groups, swish):
    case = arrays(shape)
    found = result_and_gradients(lambda *y: group_norm(*y, groups, EPSILON, swish), *case)
    for one, expected in zip(found, oracle(*case, groups, swish), strict=True):
        assert relative_error(one, expected) < 2e-6


def test_an_offset_of_a_hundred_spreads_does_no_harm():
    case = arrays((2, 3, 2, 8), offset=300)
    found = result_and_gradients(lambda *y: group_norm(*y, 4, EPSILON, True), *case)
    for one, expected in zip(found, oracle(*case, 4, True), strict=True):
        assert relative_error(one, expected) < 1e-4


def test_a_group_without_spread_gives_the_bias_and_finite_gradients():
    x, scale, bias, weights = arrays((1, 2, 2, 8))
    y, *gradients = result_and_gradients(
        lambda *y: group_norm(*y, 4, EPSILON, False), jnp.full_like(x, 7), scale, bias, weights
    )
    np.testing.assert_allclose(y, np.broadcast_to(bias, y.shape), rtol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("swish", [False, True])
def test_bfloat16_is_rounded_once(swish):
    """Everything between input and output is float32, so they differ from float64 by the rounding of the last step."""
    case = arrays((2, 3, 2, 8), dtype=jnp.bfloat16)
    y, *gradients = result_and_gradients(lambda *y: group_norm(*y, 4, EPSILON, swish), *case)
    assert y.dtype == gradients[0].dtype == jnp.bfloat16
    assert gradients[1].dtype == gradients[2].dtype == jnp.float32
    expected = oracle(*case, 4, swish)
    np.testing.assert_allclose(y.astype(jnp.float32), expected[0], rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(gradients[0].astype(jnp.float32), expected[1], rtol=2**-8, atol=1e-5)
    for one, other in zip(gradients[1:], expected[2:], strict=True):
        assert relative_error(one, other) < 1e-5


def test_of_the_arrays_as_large_as_the_input_only_the_input_is_kept():
    x, scale, bias, _ = arrays((2, 16, 16, 8))

    def large(function):
        _, backward = jax.vjp(function, x, scale, bias)
        return sum(leaf.size >= x.size for leaf in jax.tree.leaves(backward))

    def automatic(x, scale, bias):
        return nn.swish(nn.GroupNorm(4, epsilon=EPSILON).apply({"params": {"scale": scale, "bias": bias}}, x))

    closed = functools.partial(group_norm, groups=4, epsilon=EPSILON, swish=True)
    assert large(closed) == 1
    assert large(automatic) > 1
