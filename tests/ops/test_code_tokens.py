import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.ops.code_tokens import code_sums, random_tokens, smallest_of_code
from tests.helpers.compiled_program import collectives
from tests.helpers.slow_cases import MESHES
from tests.helpers.tiny_generator import mesh_of

N, K, D = 45, 16, 3  # eight devices do not divide the tokens
RNG = np.random.default_rng(0)
Z = jnp.asarray(RNG.normal(size=(N, D)), jnp.float32)
CODES = jnp.asarray(RNG.integers(0, K - 2, N), jnp.int32)
meshes = pytest.mark.parametrize("sizes", [None, *MESHES])


def of(sizes):
    return None if sizes is None else mesh_of(*sizes)


@meshes
def test_every_code_has_the_number_and_the_sum_of_its_tokens(sizes):
    counts, sums = jax.jit(lambda z, codes: code_sums(z, codes, K, of(sizes)))(Z, CODES)
    np.testing.assert_array_equal(counts, np.bincount(CODES, minlength=K))
    expected = [np.float64(Z)[code == CODES].sum(axis=0) for code in range(K)]
    np.testing.assert_allclose(sums, expected, atol=1e-5)
    assert counts.dtype == sums.dtype == jnp.float32


@meshes
def test_every_token_finds_the_smallest_value_among_those_with_its_code(sizes):
    values = Z[:, 0]
    found = jax.jit(lambda values, codes: smallest_of_code(values, codes, K, of(sizes)))(values, CODES)
    np.testing.assert_array_equal(found, [values[code == CODES].min() for code in CODES])


@meshes
def test_random_tokens_are_different_ones_and_the_same_on_every_mesh(sizes):
    draw = jax.jit(lambda z, key: random_tokens(z, key, K, of(sizes)))
    found = np.asarray(draw(Z, jax.random.key(3)))
    np.testing.assert_array_equal(found, random_tokens(Z, jax.random.key(3), K))
    places = [np.flatnonzero(np.all(row == np.asarray(Z), axis=1)).item() for row in found]
    assert len(set(places)) == K
    assert np.any(found != np.asarray(draw(Z, jax.random.key(4))))


@meshes
def test_codes_past_the_end_go_on_with_other_tokens(sizes):
    """Six tokens for the last three and the first three of 16 codes."""
    found = np.asarray(random_tokens(Z[:6], jax.random.key(0), K, of(sizes), start=jnp.int32(K - 3)))
    assert len(np.unique(np.roll(found, 3, axis=0)[:6], axis=0)) == 6


def test_with_too_few_tokens_all_are_drawn_equally_often():
    found = np.asarray(random_tokens(Z[:5], jax.random.key(0), K))
    times = [np.sum(np.all(found == row, axis=1)) for row in np.asarray(Z[:5])]
    assert sorted(times) == [3, 3, 3, 3, 4]


def test_rows_never_leave_their_device():
    """What is sent is one token of d channels or one row's share of it, never all rows."""
    mesh = mesh_of(2, 4)
    run = jax.jit(lambda z, codes: (code_sums(z, codes, 4096, mesh), smallest_of_code(z[:, 0], codes, 4096, mesh)))
    found = collectives(run.lower(jnp.zeros((64, D)), jnp.zeros(64, jnp.int32)).compile().as_text())
    assert max(int(np.prod(dims)) for _, _, dims in found) == 4096 // 4 * D
    assert {kind for kind, _, dims in found if np.prod(dims) >= 4096 // 4} == {"all-reduce"}
