import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fvq_jax.ops import nearest_cpu
from fvq_jax.ops.nearest import IMPLEMENTATIONS, PASSES, nearest_code, uncounted_share
from fvq_jax.ops.nearest import search as scores_and_codes

OPTIONS = ("block_size", "l2_normalize", "inner_product", "precision", "implementation")
search = jax.jit(nearest_code, static_argnames=OPTIONS)
# On the CPU that this runs on: a program of its own, the scan, and a tree.
every = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


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


@every
@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    n=st.integers(1, 40), k=st.integers(1, 60), d=st.integers(4, 64), block=st.integers(1, 70), seed=st.integers(0, 99)
)
def test_equals_brute_force(implementation, n, k, d, block, seed):
    z, codebook = random_problem(n, k, d, seed)
    assert_nearest(search(z, codebook, block_size=block, implementation=implementation), z, codebook)


@every
@pytest.mark.parametrize("block", [1, 7, 53, 54, 1000, None])
def test_block_size_does_not_change_the_codes(block, implementation):
    z, codebook = random_problem(200, 53, 16)
    codes = search(z, codebook, block_size=block, implementation=implementation)
    assert_nearest(codes, z, codebook)
    np.testing.assert_array_equal(codes, search(z, codebook, block_size=5))


@every
def test_a_codebook_larger_than_the_default_block(implementation):
    z, codebook = random_problem(30, 2500, 8)
    assert_nearest(search(z, codebook, implementation=implementation), z, codebook)


@pytest.mark.parametrize(("tokens", "again"), [(8, 1), (30, 1000), (60, 100), (61, 200), (1000, 1)])
def test_a_cpu_searches_tokens_in_parts(tokens, again, monkeypatch):
    """Parts that divide the 60 tokens and parts that do not, for the search and for the blocks that are read again."""
    z, codebook = random_problem(60, 90, 6)
    expected = search(z, codebook, block_size=16)
    monkeypatch.setattr(nearest_cpu, "TOKENS", tokens)
    monkeypatch.setattr(nearest_cpu, "READ_AGAIN", again)
    parts = jax.jit(functools.partial(nearest_code, block_size=16))
    np.testing.assert_array_equal(parts(z, codebook), expected)
    text = parts.lower(z, codebook).compile().as_text()
    scored = {int(n) for n in re.findall(r"f32\[(\d+),16\]", text)}
    assert max(scored) == min(tokens, 60)
    read = {int(n) for n in re.findall(r"f32\[(\d+),16,[67]\]", text)}
    assert max(read, default=1) == max(1, min(again // (16 * 6), 60))


@pytest.mark.parametrize(
    ("n", "k", "d", "precision", "implementation"),
    [
        (100, 16, 8, "highest", "auto"),
        (500, 8192, 32, "highest", "auto"),
        (5000, 4096, 32, "highest", "auto"),
        (9000, 3000, 64, "highest", "auto"),
        (500, 3000, 65, "highest", "auto"),
        (500, 8192, 32, "highest", "xla"),
        (500, 8192, 32, "bf16_rescored", "auto"),
    ],
)
def test_the_flops_that_are_not_counted(n, k, d, precision, implementation):
    """XLA counts minima too, and what is read again: together at most 1.5 times these products."""
    z, codebook = (jax.ShapeDtypeStruct((m, d), jnp.float32) for m in (n, k))
    options = {"precision": precision, "implementation": implementation}
    counted = search.lower(z, codebook, **options).compile().cost_analysis()["flops"]
    products = 2 * n * k * d * (1 - uncounted_share(n, k, d, precision, implementation, "cpu"))
    assert products <= counted <= 2.5 * products


@every
@pytest.mark.parametrize(("d", "block"), [(6, 1), (6, 4), (6, 7), (6, 64), (64, 27), (64, None), (300, 16)])
def test_ties_go_to_the_lowest_index(d, block, implementation):
    find = functools.partial(search, block_size=block, implementation=implementation)
    z, distinct = random_problem(50, 8, d)
    codebook = jnp.tile(distinct, (4, 1))  # code i is repeated as i + 8, i + 16, i + 24
    assert_nearest(find(z, codebook), z, distinct)
    same = np.zeros((13, d), np.float32)  # as at initialisation behind a bridge
    assert not np.any(find(z, same))


def test_codes_crowded_far_from_the_origin_need_the_shift():
    """Distances of 1e-2 beside norms of 100: without the mean subtracted float32 has no digits left."""
    rng = np.random.default_rng(0)
    codebook = (100 + 1e-2 * rng.normal(size=(300, 16))).astype(np.float32)
    z = (codebook[rng.integers(0, 300, 400)] + 2e-3 * rng.normal(size=(400, 16))).astype(np.float32)
    expected = distances(z, codebook).argmin(axis=1)
    assert np.mean(search(z, codebook) == expected) > 0.995
    without = jax.jit(scores_and_codes)(z, codebook, jnp.zeros(16))[1]
    assert np.mean(without == expected) < 0.5


def test_bfloat16_inputs_are_searched_in_float32():
    z, codebook = (jnp.asarray(x, jnp.bfloat16) for x in random_problem(100, 64, 32))
    codes = search(z, codebook)
    np.testing.assert_array_equal(codes, distances(z.astype(jnp.float32), codebook.astype(jnp.float32)).argmin(axis=1))


def test_products_ask_for_highest_precision():
    z, codebook = random_problem(4, 40, 8)
    scan = functools.partial(nearest_code, block_size=16, implementation="xla")
    jaxpr = str(jax.make_jaxpr(scan)(z, codebook))
    assert jaxpr.count("dot_general") == 2  # the first block, and the loop over the rest
    assert jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 2
    program = (
        jax.jit(functools.partial(nearest_code, block_size=16)).trace(z, codebook).lower(lowering_platforms=("cpu",))
    )
    text = program.as_text()
    assert text.count("stablehlo.dot_general") == 3  # and the block that is read again
    assert text.count("precision = [HIGHEST, HIGHEST]") == 3


def test_l2_normalize_compares_directions():
    z, codebook = random_problem(100, 40, 5)
    codebook *= jnp.geomspace(0.1, 10, 40)[:, None]
    codes = search(z, codebook, l2_normalize=True)
    unit_z, unit_codes = (np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True) for x in (z, codebook))
    np.testing.assert_array_equal(codes, (unit_z @ unit_codes.T).argmax(axis=1))
    assert np.any(codes != search(z, codebook))


def test_a_cpu_scans_codes_of_many_dimensions():
    def lowered(d, implementation):
        find = jax.jit(functools.partial(nearest_code, block_size=16, implementation=implementation))
        return find.trace(*random_problem(4, 40, d)).lower(lowering_platforms=("cpu",)).as_text()

    most = nearest_cpu.MOST_DIMENSIONS
    assert lowered(most, "auto").count("stablehlo.dot_general") == 3
    assert lowered(most + 1, "auto").count("stablehlo.dot_general") == 2


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


@every
def test_a_latent_that_is_no_number_gets_a_code_all_the_same(implementation):
    z, codebook = random_problem(20, 90, 6)
    broken = z.at[7].set(np.nan)
    codes = search(broken, codebook, implementation=implementation)
    assert 0 <= codes[7] < 90
    np.testing.assert_array_equal(np.delete(codes, 7), np.delete(search(z, codebook), 7))
    assert np.all(search(z, codebook * np.nan, implementation=implementation) < 90)


@every
def test_no_latents_have_no_codes(implementation):
    z, codebook = random_problem(0, 90, 6)
    codes = search(z, codebook, implementation=implementation)
    assert (codes.shape, codes.dtype) == ((0,), jnp.int32)


@pytest.mark.parametrize("block", [0, -3])
def test_block_sizes_below_one_are_refused(block):
    z, codebook = random_problem(2, 3, 4)
    with pytest.raises(ValueError, match=f"block_size must be at least 1, not {block}"):
        nearest_code(z, codebook, block_size=block)


@pytest.mark.parametrize("l2_normalize", [False, True])
@pytest.mark.parametrize("precision", PASSES)
def test_temporaries_stay_below_64_mib_for_a_large_codebook(precision, l2_normalize):
    """8,192 tokens, 262,144 codes: the distance matrix would be 8 GiB, a copy of the codebook 256 MiB."""
    z, codebook = (jax.ShapeDtypeStruct((n, 256), jnp.float32) for n in (8192, 262144))
    compiled = search.lower(z, codebook, precision=precision, l2_normalize=l2_normalize).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 64 * 2**20


def test_nothing_of_tokens_times_codes_is_ever_built():
    n, k, block = 1031, 2053, 64
    z, codebook = random_problem(n, k, 4)
    compiled = search.lower(z, codebook, block_size=block).compile()
    text = compiled.as_text()
    assert f"[{n},{block}" in text
    assert not any(f"[{a},{b}]" in text for a, b in ((n, k), (k, n)))
    assert compiled.memory_analysis().temp_size_in_bytes < n * k * 4 / 4


@pytest.mark.parametrize(
    ("precision", "least", "most"),
    [("highest", 1.0, 1.0), ("bf16_3x", 0.999, 1.0), ("bf16_rescored", 0.999, 1.0), ("bf16", 0.9, 0.999)],
)
def test_precision_decides_how_often_the_nearest_code_is_found(precision, least, most):
    z, codebook = random_problem(1500, 1200, 32)
    codes = search(z, codebook, precision=precision)
    expected = search(z, codebook)
    assert least <= np.mean(codes == expected) <= most
    # A code that is not the nearest is nearly so.
    d = distances(z[:100], codebook)
    chosen, best = d[np.arange(100), codes[:100]], d.min(axis=1)
    assert np.all(chosen <= best * 1.03 + 1e-9)


@pytest.mark.parametrize("precision", ["bf16_3x", "bf16", "bf16_rescored"])
def test_every_precision_is_shifted_by_the_mean_code(precision):
    z, codebook = random_problem(300, 200, 16)
    far = search(z + 50, codebook + 50, precision=precision)
    assert np.mean(far == search(z, codebook, precision=precision)) > 0.98


@pytest.mark.parametrize("precision", PASSES)
def test_equal_codes_give_the_first_at_every_precision(precision):
    z, distinct = random_problem(40, 5, 6)
    codes = search(z, jnp.tile(distinct, (300, 1)), precision=precision, block_size=256)
    assert codes.max() < 5
    assert not np.any(search(z, jnp.zeros((700, 6)), precision=precision))


@pytest.mark.parametrize("d", [4, 5, 1024])
def test_few_and_many_dimensions(d):
    z, codebook = random_problem(64, 700, d)
    assert_nearest(search(z, codebook), z, codebook)


def test_under_shard_map_each_device_searches_its_own_tokens():
    z, codebook = random_problem(64, 40, 6)
    mesh = jax.make_mesh((8,), ("tokens",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (jax.P("tokens"), jax.P())
    for checked in (True, False):
        local = jax.shard_map(nearest_code, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=checked)
        np.testing.assert_array_equal(jax.jit(local)(z, codebook), search(z, codebook))


@pytest.mark.parametrize("option", [{"precision": "float8"}, {"implementation": "cuda"}])
def test_unknown_options_are_refused(option):
    (name, value), (z, codebook) = *option.items(), random_problem(2, 3, 4)
    with pytest.raises(ValueError, match=f"unknown {name} '{value}': use one of "):
        nearest_code(z, codebook, **option)


@pytest.mark.parametrize(("platform", "call"), [("tpu", "tpu_custom_call"), ("cuda", "xla.gpu.triton")])
def test_the_platform_chooses_the_kernel_unless_told_otherwise(platform, call):
    z, codebook = random_problem(100, 300, 8)

    def lowered(implementation, platform):
        traced = jax.jit(functools.partial(nearest_code, implementation=implementation)).trace(z, codebook)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert call in lowered("auto", platform)
    assert call not in lowered("xla", platform)
    assert call not in lowered("auto", "cpu")
    # The scan has a single block here; a CPU has a first one, a loop over the rest, and one that is read again.
    for implementation, platform, products in (("auto", "cpu", 3), ("xla", "cpu", 1), ("auto", "rocm", 1)):
        assert lowered(implementation, platform).count("stablehlo.dot_general") == products


@pytest.mark.parametrize("precision", ["highest", "bf16_3x", "bf16_rescored"])
def test_finds_the_largest_inner_product(precision):
    z, codebook = random_problem(200, 700, 16)
    codebook = 3 + codebook * jnp.geomspace(0.5, 2, 700)[:, None]
    products = np.asarray(z, np.float64) @ np.asarray(codebook, np.float64).T
    codes = search(z, codebook, inner_product=True, precision=precision)
    np.testing.assert_array_equal(codes, products.argmax(axis=1))
    assert np.mean(codes == search(z, codebook)) < 0.9
    rough = search(z, codebook, inner_product=True, precision="bf16")
    assert 0.5 < np.mean(codes == rough) < 1


def test_the_largest_product_of_directions_is_that_of_the_nearest_direction():
    z, codebook = random_problem(100, 60, 8)
    codebook *= jnp.geomspace(0.5, 2, 60)[:, None]
    codes = search(z, codebook, inner_product=True, l2_normalize=True)
    np.testing.assert_array_equal(codes, search(z, codebook, l2_normalize=True))
    assert np.any(codes != search(z, codebook, inner_product=True))


def test_of_equal_products_the_lowest_code_is_found():
    z, distinct = random_problem(30, 4, 8)
    codes = search(z, jnp.tile(distinct, (5, 1)), inner_product=True, block_size=6)
    np.testing.assert_array_equal(codes, np.argmax(z @ distinct.T, axis=1))


def test_scores_of_products_are_products():
    z, codebook = random_problem(20, 12, 8)
    center = jnp.ones(8)
    score, index = scores_and_codes(z, codebook, center, inner_product=True)
    products = np.asarray(z, np.float64) @ np.asarray(codebook - center[None], np.float64).T
    np.testing.assert_allclose(score, -products.max(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(index, products.argmax(axis=1))
