import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvq_jax.ops.nearest import l2_normalize, nearest_code, scan_blocks

search = jax.jit(nearest_code, static_argnames=("block_size", "l2_normalize"))


def distances(z, codebook):
    """Squared distances [n, k] in float64, from differences: no cancellation."""
    z, codebook = np.asarray(z, np.float64), np.asarray(codebook, np.float64)
    return np.square(z[:, None] - codebook[None]).sum(axis=-1)


def assert_nearest(codes, z, codebook):
    """Equal to brute force, but for latents whose two best distances differ by float32 rounding."""
    d = distances(z, codebook)
    assert codes.dtype == jnp.int32
    assert codes.shape == (len(z),)
    z, codebook = np.asarray(z, np.float64), np.asarray(codebook, np.float64)
    tolerance = 2e-6 * (np.square(z).sum(1) + np.square(codebook).sum(1).max())
    best_two = np.sort(d, axis=1)[:, :2]
    clear = best_two[:, -1] - best_two[:, 0] >= tolerance
    if d.shape[1] == 1:
        clear[:] = True
    np.testing.assert_array_equal(np.asarray(codes)[clear], d.argmin(axis=1)[clear])
    chosen = d[np.arange(len(d)), codes]
    assert np.all(chosen - d.min(axis=1) < tolerance)


def random_problem(n, k, d, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, d)), jnp.float32), jnp.asarray(rng.normal(size=(k, d)), jnp.float32)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    n=st.integers(1, 40), k=st.integers(1, 60), d=st.integers(4, 64), block=st.integers(1, 70), seed=st.integers(0, 99)
)
def test_equals_brute_force(n, k, d, block, seed):
    z, codebook = random_problem(n, k, d, seed)
    assert_nearest(search(z, codebook, block_size=block), z, codebook)


@pytest.mark.parametrize("block", [1, 7, 53, 54, 1000, None])
def test_block_size_does_not_change_the_codes(block):
    z, codebook = random_problem(200, 53, 16)
    codes = search(z, codebook, block_size=block)
    assert_nearest(codes, z, codebook)
    np.testing.assert_array_equal(codes, search(z, codebook, block_size=5))


def test_a_codebook_larger_than_the_default_block():
    z, codebook = random_problem(30, 2500, 8)
    assert_nearest(search(z, codebook), z, codebook)


@pytest.mark.parametrize("block", [1, 4, 7, 64])
def test_ties_go_to_the_lowest_index(block):
    z, distinct = random_problem(50, 8, 6)
    codebook = jnp.tile(distinct, (4, 1))  # code i is repeated as i + 8, i + 16, i + 24
    assert_nearest(search(z, codebook, block_size=block), z, distinct)
    same = np.zeros((13, 6), np.float32)  # as at initialisation behind a bridge
    assert not np.any(search(z, same, block_size=block))


def test_codes_crowded_far_from_the_origin_need_the_shift():
    """Distances of 1e-2 beside norms of 100: without the mean subtracted float32 has no digits left."""
    rng = np.random.default_rng(0)
    codebook = (100 + 1e-2 * rng.normal(size=(300, 16))).astype(np.float32)
    z = (codebook[rng.integers(0, 300, 400)] + 2e-3 * rng.normal(size=(400, 16))).astype(np.float32)
    expected = distances(z, codebook).argmin(axis=1)
    assert np.mean(search(z, codebook) == expected) > 0.995
    without = jax.jit(scan_blocks)(z, codebook, jnp.zeros(16))[1]
    assert np.mean(without == expected) < 0.5


def test_bfloat16_inputs_are_searched_in_float32():
    z, codebook = (jnp.asarray(x, jnp.bfloat16) for x in random_problem(100, 64, 32))
    codes = search(z, codebook)
    np.testing.assert_array_equal(codes, distances(z.astype(jnp.float32), codebook.astype(jnp.float32)).argmin(axis=1))


def test_products_ask_for_highest_precision():
    z, codebook = random_problem(4, 40, 8)
    jaxpr = str(jax.make_jaxpr(functools.partial(nearest_code, block_size=16))(z, codebook))
    assert jaxpr.count("dot_general") == 2  # the first block, and the loop over the rest
    assert jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 2


def test_l2_normalize_compares_directions():
    z, codebook = random_problem(100, 40, 5)
    codebook *= jnp.geomspace(0.1, 10, 40)[:, None]
    codes = search(z, codebook, l2_normalize=True)
    unit_z, unit_codes = (np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True) for x in (z, codebook))
    np.testing.assert_array_equal(codes, (unit_z @ unit_codes.T).argmax(axis=1))
    assert np.any(codes != search(z, codebook))


def test_l2_normalize_gives_unit_length_and_survives_zero():
    x = jnp.asarray(random_problem(5, 1, 7)[0] * 50)
    np.testing.assert_allclose(np.linalg.norm(l2_normalize(x), axis=-1), 1, rtol=1e-6)
    value, gradient = jax.value_and_grad(lambda x: l2_normalize(x).sum())(jnp.zeros((2, 4)))
    assert value == 0
    assert np.all(np.isfinite(gradient))


def test_no_gradient_passes():
    z, codebook = random_problem(6, 20, 4)

    def loss(z, codebook):
        codes = nearest_code(z, codebook, block_size=8, l2_normalize=True)
        return jnp.sum(jnp.sqrt(codes.astype(jnp.float32) + 1))

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1)))(z, codebook):
        assert not np.any(gradient)


def test_vmap():
    problems = [random_problem(9, 20, 4, seed) for seed in range(3)]
    z, codebook = (jnp.stack(x) for x in zip(*problems, strict=True))
    batched = jax.jit(jax.vmap(functools.partial(nearest_code, block_size=8)))(z, codebook)
    for row, (z, codebook) in zip(batched, problems, strict=True):
        np.testing.assert_array_equal(row, search(z, codebook, block_size=8))


@pytest.mark.parametrize("block", [0, -3])
def test_block_sizes_below_one_are_refused(block):
    z, codebook = random_problem(2, 3, 4)
    with pytest.raises(ValueError, match=f"block_size must be at least 1, not {block}"):
        nearest_code(z, codebook, block_size=block)


def test_nothing_of_tokens_times_codes_is_ever_built():
    n, k, block = 1031, 2053, 64
    z, codebook = random_problem(n, k, 4)
    compiled = search.lower(z, codebook, block_size=block).compile()
    text = compiled.as_text()
    padded = -(-k // block) * block
    assert f"[{n},{block}]" in text
    assert not any(f"[{a},{b}]" in text for size in (k, padded) for a, b in ((n, size), (size, n)))
    assert compiled.memory_analysis().temp_size_in_bytes < n * k * 4 / 4
