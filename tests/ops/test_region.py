import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fvq_jax.ops.code_tokens import code_sums
from fvq_jax.ops.region import region_loss, region_targets
from tests.helpers.compiled_program import arrays, size
from tests.helpers.slow_cases import MESHES
from tests.helpers.tiny_generator import mesh_of

N, K, D = 60, 32, 3


@functools.cache
def case():
    """A table, and latents near a few of its codes only."""
    rng = np.random.default_rng(2)
    table = rng.normal(size=(K, D)).astype(np.float32)
    near = rng.choice([1, 1, 1, 4, 4, 9, 17, 30], N)
    z = (table[near] + 0.05 * rng.normal(size=(N, D))).astype(np.float32)
    codes = np.argmin(np.linalg.norm(z[:, None] - table[None], axis=2), axis=1)
    codes[0], z[0] = 5, table[5]  # chosen once: it has a target, and is no source
    unseen = np.setdiff1d(np.arange(K), [*codes, 7, 8])  # 7 and 8 were chosen some steps ago
    return table, z, codes.astype(np.int32), np.isin(np.arange(K), unseen)


def oracle():
    """Targets {code: vector}, from the words of the paper; float64."""
    table, z, codes, unseen = case()
    table, z = table.astype(np.float64), z.astype(np.float64)
    counts = np.bincount(codes, minlength=K)
    mean = {code: z[codes == code].mean(axis=0) for code in set(codes)}
    sources = [code for code in mean if counts[code] > 1]
    candidates, total, given = np.flatnonzero(unseen), sum(counts[code] for code in sources), {}
    for source in sources:
        quota = math.ceil(counts[source] * len(candidates) / total)
        distance = np.linalg.norm(table[candidates] - table[source], axis=1)
        for taker in candidates[np.argsort(distance)[:quota]]:
            given.setdefault(int(taker), []).append(mean[source])
    return {int(code): target for code, target in mean.items()} | {
        taker: np.mean(targets, axis=0) for taker, targets in given.items()
    }


@functools.cache
def found(sizes=None, block_size=2):
    table, z, codes, unseen = case()
    mesh = None if sizes is None else mesh_of(*sizes)

    @jax.jit
    def run(table, z, codes, unseen):
        sums = code_sums(z, codes, K, mesh)
        return region_targets(table, *sums, unseen, N, mesh, block_size)

    return run(table, z, codes, unseen)


@pytest.mark.parametrize("sizes", [None, *MESHES])
def test_chosen_codes_have_the_mean_of_their_latents_and_unseen_ones_that_of_sources_near_them(sizes):
    targets, has_target = found(sizes)
    expected = oracle()
    assert len(expected) > 15
    np.testing.assert_array_equal(np.flatnonzero(has_target), sorted(expected))
    for code, target in expected.items():
        np.testing.assert_allclose(targets[code], target, rtol=1e-5, atol=1e-6)
    assert not has_target[7]
    assert not has_target[8]


def test_the_size_of_blocks_changes_nothing():
    for one, other in zip(found(), found(block_size=64), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_without_unseen_codes_only_chosen_ones_have_targets():
    table, z, codes, _ = case()
    _, has_target = region_targets(
        jnp.asarray(table), *code_sums(jnp.asarray(z), jnp.asarray(codes), K), jnp.zeros(K, bool), N
    )
    np.testing.assert_array_equal(np.flatnonzero(has_target), sorted(set(codes)))


def test_codes_that_are_all_equal_get_the_mean_of_all_latents():
    """As with a bridge that starts at 0, where code 0 is chosen for all."""
    z = jnp.asarray(case()[1])
    counts, sums = code_sums(z, jnp.zeros(N, jnp.int32), K)
    targets, has_target = region_targets(jnp.zeros((K, D)), counts, sums, counts == 0, N)
    assert np.all(has_target)
    np.testing.assert_allclose(targets, np.broadcast_to(z.mean(axis=0), (K, D)), atol=1e-6)


def test_the_loss_is_a_mean_over_codes_and_pulls_those_with_a_target_only():
    table, targets = jnp.asarray(case()[0]), found()[0]
    has_target = found()[1]
    value, gradient = jax.value_and_grad(region_loss)(table, targets, has_target)
    own = np.asarray(has_target)
    np.testing.assert_allclose(value, np.square(table - targets)[own].sum(axis=1).mean(), rtol=1e-5)
    np.testing.assert_allclose(gradient, 2 * (table - targets) * own[:, None] / own.sum(), rtol=1e-5, atol=1e-6)
    assert region_loss(table, targets, jnp.zeros(K, bool)) == 0


def test_no_array_has_tokens_times_codes():
    big, tokens = 4096, 1024
    arguments = jnp.zeros((big, D)), jnp.zeros(big), jnp.zeros((big, D)), jnp.ones(big, bool)
    run = jax.jit(lambda *given: region_targets(*given, tokens, block_size=8))
    sizes = {dims for _, dims in arrays(run.lower(*arguments).compile().as_text())}
    assert size(8, big) in sizes
    assert max(map(math.prod, sizes)) == 8 * big
