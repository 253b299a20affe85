import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from fvq_jax.ops.index_gradient import with_index_gradient
from fvq_jax.ops.sharded_codebook import ROWS, TOKENS
from tests.helpers.compiled_program import arrays
from tests.helpers.slow_cases import MESHES
from tests.helpers.tiny_generator import mesh_of


@functools.cache
def problem(n=48, k=40, d=6, seed=0, shift=0.0):
    """Chosen codes, latents, codes, and what the vectors are multiplied by."""
    rng = np.random.default_rng(seed)
    chosen, z, codebook, slope = (rng.normal(size=shape) for shape in ((n, d), (n, d), (k, d), (n, d)))
    return tuple(jnp.asarray(x, jnp.float32) for x in (chosen, z, codebook + shift, slope))


def oracle(chosen, z, codebook, slope):
    """Gradients to all three: those of softmax(z.e) @ sg(e), with all probabilities at once, float64."""
    z, codebook, slope = (np.asarray(x, np.float64) for x in (z, codebook, slope))
    logits = z @ codebook.T
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    to_p = slope @ codebook.T
    to_logits = p * (to_p - (p * to_p).sum(axis=1, keepdims=True))
    return slope, to_logits @ codebook, to_logits.T @ z


@functools.partial(jax.jit, static_argnames=("mesh", "block_size"))
def computed(chosen, z, codebook, slope, **options):
    def loss(*given):
        vectors = with_index_gradient(*given, **options)
        return jnp.sum(vectors * slope), vectors

    gradients, vectors = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(chosen, z, codebook)
    return vectors, gradients


def assert_close(gradients, expected, tolerance=2e-6):
    for actual, wanted in zip(gradients, expected, strict=True):
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(actual, wanted, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("block_size", [1, 7, 40, 512])
def test_value_stays_and_gradients_equal_the_formula(block_size):
    given = problem()
    vectors, gradients = computed(*given, block_size=block_size)
    np.testing.assert_array_equal(vectors, given[0])
    assert_close(gradients, oracle(*given))
    assert np.all(np.abs(gradients[2]).max(axis=1) > 0)  # every code


@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_gives_the_same(sizes):
    mesh, given = mesh_of(*sizes), problem()
    layouts = tuple(NamedSharding(mesh, spec) for spec in (TOKENS, TOKENS, ROWS, TOKENS))
    vectors, gradients = computed(*jax.device_put(given, layouts), mesh=mesh, block_size=4)
    np.testing.assert_array_equal(vectors, given[0])
    assert_close(gradients, oracle(*given))
    for gradient, layout in zip(gradients, layouts, strict=False):
        assert gradient.sharding.is_equivalent_to(layout, 2)


def test_digits_survive_far_from_the_origin():
    given = problem(shift=100.0)
    assert_close(computed(*given, block_size=8)[1], oracle(*given), tolerance=2e-4)


def test_logits_beyond_the_range_of_exponentials():
    chosen, z, codebook, slope = problem()
    given = chosen, 200 * z, codebook, slope
    _, gradients = computed(*given, block_size=8)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)
    wanted = oracle(*given)
    np.testing.assert_allclose(gradients[1], wanted[1], atol=1e-3 * np.abs(wanted[1]).max() + 1e-4)


def dense(chosen, z, codebook, *, mesh=None, block_size=None):
    """As it is usually written, with all logits at once."""
    p = jax.nn.softmax(z @ codebook.T, axis=1)
    soft = p @ jax.lax.stop_gradient(codebook)
    return chosen + soft - jax.lax.stop_gradient(soft)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 4)])
def test_no_array_has_all_tokens_and_codes(sizes):
    n, k, d, block = 8 * 37, 8 * 53, 3, 16
    mesh = mesh_of(*sizes)

    def abstract(length, spec):
        return jax.ShapeDtypeStruct((length, d), jnp.float32, sharding=NamedSharding(mesh, spec))

    given = abstract(n, TOKENS), abstract(n, TOKENS), abstract(k, ROWS), abstract(n, TOKENS)

    def largest(function):
        def loss(chosen, z, codebook, slope):
            return jnp.sum(slope * function(chosen, z, codebook, mesh=mesh, block_size=block))

        text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*given).compile().as_text()
        return max(math.prod(dims) for _, dims in arrays(text))

    mine = n // sizes[0], k // sizes[1]
    allowed = max(mine[0] * (block + d), (mine[1] + block) * (d + 1))
    assert largest(with_index_gradient) <= allowed < n * k / mesh.size / 2 <= largest(dense)


def test_products_are_asked_for_at_the_highest_precision():
    """Logits and their mean code; once more logits, their gradient, and what passes to latents and codes."""
    text = computed.lower(*problem(), block_size=8).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 6
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
