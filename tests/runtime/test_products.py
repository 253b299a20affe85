"""Counted flops, against formulas and against XLA's own count on a CPU."""

import jax
import jax.numpy as jnp
import pytest

from fvq_jax.ops.nearest import nearest_code
from fvq_jax.runtime.products import product_flops


def count(function, *shapes):
    return product_flops(jax.jit(function).trace(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).jaxpr)


def test_products_loops_and_conditions():
    assert count(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert count(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (2, 3, 5), (2, 7, 5)) == 2 * 2 * 3 * 5 * 7
    assert count(lambda a: jax.lax.scan(lambda x, _: (x @ a, None), a, length=4)[0], (3, 3)) == 4 * 2 * 27
    assert count(lambda a: jax.lax.cond(a[0, 0] > 0, lambda: a @ a, lambda: a @ a @ a), (3, 3)) == 2 * 2 * 27


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    assert count(convolve, (2, 8, 8, 4), (3, 3, 4 // groups, 6)) == 2 * (2 * 8 * 8 * 6) * (9 * 4 // groups)


def test_gradients_agree_with_xla():
    def loss(x, kernel, matrix):
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sum(x @ matrix)

    shapes = (4, 16, 16, 32), (3, 3, 32, 32), (32, 32)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    by_xla = jax.jit(gradient).lower(*arrays).compile().cost_analysis()["flops"]
    assert count(gradient, *shapes) == pytest.approx(by_xla, rel=0.3)  # XLA leaves out the padding of the gradients


def test_a_search_counts_whole_whatever_computes_it():
    n, k, d = 64, 4096, 16
    assert count(nearest_code, (n, d), (k, d)) == pytest.approx(2 * n * k * (d + 1), rel=1e-6)
