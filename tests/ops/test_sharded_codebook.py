import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from fvq_jax.ops.nearest import nearest_code
from fvq_jax.ops.sharded_codebook import ROWS, TOKENS, sharded_lookup, sharded_nearest_code

MESHES = [(1, 1), (2, 4), (8, 1), (1, 8)]


@functools.cache
def mesh_of(data, codebook):
    devices = jax.devices()[: data * codebook]
    return jax.make_mesh((data, codebook), ("data", "codebook"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def placed(mesh, z, codebook):
    return jax.device_put(z, NamedSharding(mesh, TOKENS)), jax.device_put(codebook, NamedSharding(mesh, ROWS))


def random_problem(n=96, k=64, d=12, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(n, d)), jnp.float32), jnp.asarray(rng.normal(size=(k, d)), jnp.float32)


@functools.cache
def sharded_search(mesh, normalize=False):
    return jax.jit(functools.partial(sharded_nearest_code, mesh=mesh, block_size=5, l2_normalize=normalize))


search = jax.jit(nearest_code, static_argnames="l2_normalize")


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("normalize", [False, True])
def test_codes_equal_those_of_one_device(sizes, normalize):
    z, codebook = random_problem()
    codebook *= jnp.geomspace(0.5, 2, 64)[:, None]
    mesh = mesh_of(*sizes)
    codes = sharded_search(mesh, normalize)(*placed(mesh, z, codebook))
    assert codes.dtype == jnp.int32
    assert codes.sharding.is_equivalent_to(NamedSharding(mesh, TOKENS), 1)
    np.testing.assert_array_equal(codes, search(z, codebook, l2_normalize=normalize))
    assert len(np.unique(codes)) > 16


@pytest.mark.parametrize("sizes", MESHES[1:])
def test_largest_products_equal_those_of_one_device(sizes):
    z, codebook = random_problem()
    mesh = mesh_of(*sizes)
    find = jax.jit(functools.partial(sharded_nearest_code, mesh=mesh, block_size=5, inner_product=True))
    codes = find(*placed(mesh, z, 3 + codebook))
    np.testing.assert_array_equal(codes, nearest_code(z, 3 + codebook, inner_product=True))
    assert len(np.unique(codes)) > 16


@pytest.mark.parametrize("precision", ["bf16_3x", "bf16_rescored"])
def test_scores_of_other_precisions_can_be_compared_between_shards(precision):
    z, codebook = random_problem(k=640)
    mesh = mesh_of(2, 4)
    find = jax.jit(functools.partial(sharded_nearest_code, mesh=mesh, precision=precision))
    np.testing.assert_array_equal(find(*placed(mesh, z, codebook)), search(z, codebook))


@pytest.mark.parametrize("sizes", MESHES)
def test_ties_between_shards_go_to_the_lowest_index(sizes):
    z, distinct = random_problem(k=4)
    codebook = jnp.tile(distinct, (16, 1))  # the same four codes in every shard
    mesh = mesh_of(*sizes)
    codes = sharded_search(mesh)(*placed(mesh, z, codebook))
    np.testing.assert_array_equal(codes, search(z, distinct))
    assert set(np.unique(codes)) == {0, 1, 2, 3}


def test_scores_are_taken_around_one_common_center():
    """Codes 1e-2 apart at 100 from the origin: float32 needs the shift, and all shards the same one."""
    rng = np.random.default_rng(1)
    codebook = (100 + 1e-2 * rng.normal(size=(64, 12))).astype(np.float32)
    z = (np.tile(codebook, (4, 1)) + 2e-3 * rng.normal(size=(256, 12))).astype(np.float32)
    mesh = mesh_of(1, 8)
    codes = sharded_search(mesh)(*placed(mesh, z, codebook))
    expected = np.square(z[:, None].astype(np.float64) - codebook[None]).sum(-1).argmin(1)
    assert np.mean(codes == expected) > 0.995


@pytest.mark.parametrize("sizes", MESHES)
def test_look_up_and_its_gradient_equal_indexing(sizes):
    _, codebook = random_problem()
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 64, 96).astype(np.int32)
    codes[:40] = 63  # many tokens on one row, from several devices
    # Whole numbers, so that sums are exact in whatever order devices add them.
    weights = rng.integers(-8, 9, (96, 12)).astype(np.float32)
    mesh = mesh_of(*sizes)

    @jax.jit
    def sharded(codes, codebook):
        def loss(codebook):
            rows = sharded_lookup(codes, codebook, mesh)
            return jnp.sum(rows * weights), rows

        return jax.grad(loss, has_aux=True)(codebook)

    gradient, rows = sharded(*placed(mesh, codes, codebook))
    np.testing.assert_array_equal(rows, codebook[codes])
    dense = np.zeros(codebook.shape, np.float32)
    np.add.at(dense, codes, weights)
    np.testing.assert_array_equal(gradient, dense)
    assert rows.sharding.is_equivalent_to(NamedSharding(mesh, TOKENS), 2)


@pytest.mark.parametrize("sizes", [(2, 4), (1, 8)])
def test_rows_never_leave_their_device(sizes):
    """In the compiled program, gradient included, no array has all rows, and none is tokens x codes."""
    n, k, d = 8 * 13, 8 * 37, 11
    mesh = mesh_of(*sizes)
    z, codebook = placed(mesh, *random_problem(n, k, d))

    @jax.jit
    def loss_gradient(z, codebook):
        codes = sharded_nearest_code(z, codebook, mesh, block_size=10)
        return jax.grad(lambda table: jnp.sum(jnp.square(z - sharded_lookup(codes, table, mesh))))(codebook)

    compiled = loss_gradient.lower(z, codebook).compile()
    shapes = set(re.findall(r"\w+\[([\d,]+)\]", compiled.as_text()))
    local_rows = k // sizes[1]
    assert f"{local_rows},{d}" in shapes  # the pattern finds what is there
    assert not [s for s in shapes if str(k) in s.split(",")]
    group = n // sizes[0]
    assert not [s for s in shapes if {str(group), str(local_rows)} <= set(s.split(","))]
    assert compiled.output_shardings.is_equivalent_to(NamedSharding(mesh, ROWS), 2)


def test_no_gradient_passes_the_search():
    z, codebook = random_problem(16, 8, 4)
    mesh = mesh_of(2, 4)

    def loss(z, codebook):
        return jnp.sum(sharded_nearest_code(z, codebook, mesh).astype(jnp.float32))

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1)))(*placed(mesh, z, codebook)):
        assert not np.any(gradient)
