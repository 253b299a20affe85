"""The search by a k-d tree, beside brute force in float64; what all programs have in common is in test_nearest.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import KDTree

from fvq_jax.ops.nearest import PASSES, nearest_code, uncounted_share
from fvq_jax.ops.nearest_tree import CodeTree
from fvq_jax.ops.sharded_codebook import sharded_nearest_code

by_tree = functools.partial(nearest_code, implementation="tree")
search = jax.jit(by_tree, static_argnames=("l2_normalize", "inner_product", "precision"))


def brute_force(z, codebook):
    """The nearest row; of equal ones the first."""
    z, codebook = np.asarray(z, np.float64), np.asarray(codebook, np.float64)
    return np.square(z[:, None] - codebook[None]).sum(-1).argmin(axis=1)


def random_problem(n, k, d, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(k, d)).astype(np.float32)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    n=st.integers(1, 30), distinct=st.integers(1, 90), more=st.integers(0, 90), d=st.integers(1, 9), seed=st.integers(0)
)
def test_of_equal_rows_the_first_is_found(n, distinct, more, d, seed):
    z, rows = random_problem(n, distinct, d, seed % 1000)
    table = rows[np.random.default_rng(seed % 1001).integers(0, distinct, distinct + more)]
    np.testing.assert_array_equal(CodeTree(table).nearest(z), brute_force(z, table))


def test_the_two_zeros_are_equal():
    table = np.array([[1, 0.0], [1, -0.0], [-0.0, 0], [0, 0]], np.float32)
    np.testing.assert_array_equal(CodeTree(table).nearest(np.array([[1, 0], [0, 0]], np.float32)), [0, 2])


def test_what_is_not_finite_is_far_away():
    z, table = random_problem(20, 50, 3)
    table[[0, 7, 9]] = [[np.nan] * 3, [np.inf, 0, 0], [0, -np.inf, 0]]
    rest = np.setdiff1d(np.arange(50), [0, 7, 9])
    np.testing.assert_array_equal(CodeTree(table).nearest(z), rest[brute_force(z, table[rest])])
    z[3] = np.nan
    assert 0 <= CodeTree(table).nearest(z)[3] < 50
    everywhere = np.full((5, 3), np.nan, np.float32)
    assert np.all(CodeTree(everywhere).nearest(z) < 5)


def test_a_process_with_few_cores_starts_as_many_threads(monkeypatch):
    z, table = random_problem(4, 9, 3)
    asked, query = [], KDTree.query
    monkeypatch.setattr(KDTree, "query", lambda tree, z, workers: asked.append(workers) or query(tree, z))
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {1, 5, 7}, raising=False)
    np.testing.assert_array_equal(CodeTree(table).nearest(z), brute_force(z, table))
    assert asked == [3]


@pytest.mark.parametrize("precision", PASSES)
def test_it_is_exact_at_every_precision_and_when_codes_crowd_far_from_the_origin(precision):
    z, codebook = random_problem(300, 500, 4)
    z, codebook = 100 + 1e-2 * z, 100 + 1e-2 * codebook
    assert np.mean(search(z, codebook, precision=precision) == brute_force(z, codebook)) > 0.999


def test_it_is_asked_for_the_table_that_is_given():
    z, first = random_problem(100, 40, 4)
    for table in (first, first[::-1], first, first + 0.3):
        np.testing.assert_array_equal(search(z, table), brute_force(z, table))


def test_directions():
    z, codebook = random_problem(100, 40, 5)
    codebook *= np.geomspace(0.1, 10, 40)[:, None].astype(np.float32)
    codebook[3] = 0
    codebook[17] = 0
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (z, codebook)]
    np.testing.assert_array_equal(search(z, codebook, l2_normalize=True), brute_force(*unit))


def test_inner_products_are_refused():
    with pytest.raises(ValueError, match="a tree finds the nearest code, not the largest inner product"):
        search(*random_problem(2, 3, 4), inner_product=True)


def test_bfloat16_is_searched_in_float32():
    z, codebook = (jnp.asarray(x, jnp.bfloat16) for x in random_problem(100, 64, 6))
    np.testing.assert_array_equal(search(z, codebook), brute_force(*(x.astype(jnp.float32) for x in (z, codebook))))


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 8)])
def test_on_a_mesh(shape):
    """Every device has a tree of its own rows; equal rows on several devices go to the first."""
    mesh = jax.make_mesh(shape, ("data", "codebook"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    z, codebook = random_problem(64, 80, 4)
    codebook[40:] = codebook[:40]
    on_mesh = functools.partial(sharded_nearest_code, mesh=mesh, implementation="tree")
    np.testing.assert_array_equal(jax.jit(on_mesh)(z, codebook), brute_force(z, codebook))

    @jax.checkpoint
    def loss(z, codebook):
        return jnp.sum(codebook[on_mesh(z, codebook)] * z)

    gradient = jax.jit(jax.grad(loss))(z, codebook)
    np.testing.assert_allclose(gradient, codebook[brute_force(z, codebook)])


def test_vmap_and_no_gradient():
    problems = [random_problem(9, 20, 4, seed) for seed in range(3)]
    z, codebook = (jnp.stack(x) for x in zip(*problems, strict=True))
    expected = [brute_force(*problem) for problem in problems]
    np.testing.assert_array_equal(jax.jit(jax.vmap(by_tree))(z, codebook), expected)

    def loss(z, codebook):
        return jnp.sum(codebook[by_tree(z, codebook)] * z)

    gradient = jax.jit(jax.grad(loss))(*problems[0])
    np.testing.assert_allclose(gradient, problems[0][1][expected[0]])


def test_only_a_cpu_has_the_tree():
    def lowered(implementation, platform):
        traced = jax.jit(functools.partial(nearest_code, implementation=implementation)).trace(
            *random_problem(100, 300, 8)
        )
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "python_cpu_callback" in lowered("tree", "cpu")
    assert "python_cpu_callback" not in lowered("auto", "cpu")
    for platform in ("tpu", "cuda", "rocm"):
        assert lowered("tree", platform) == lowered("auto", platform)


def test_it_makes_no_products_that_count():
    assert uncounted_share(500, 8192, 8, "highest", "tree", "cpu") == 0
    for platform in ("tpu", "gpu"):
        assert uncounted_share(500, 8192, 8, "highest", "tree", platform) == 1
