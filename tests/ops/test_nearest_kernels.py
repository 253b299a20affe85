"""The kernels interpreted on a CPU against the XLA scan, and compiled for chips that are not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from fvq_jax.ops import nearest, nearest_gpu, nearest_tpu, nearest_xla
from tests.helpers.chips import gpu_devices, needs_cuda, needs_libtpu, tpu_devices
from tests.helpers.slow_cases import slow

KERNELS = pytest.mark.parametrize("kernel", [nearest_tpu, nearest_gpu])
PRECISIONS = ["highest", "bf16_3x", "bf16"]


def problem(n, k, d, dtype=jnp.float32, normalize=False, seed=0):
    """What every implementation takes: (query, codebook, center, bias)."""
    rng = np.random.default_rng(seed)
    z, codebook = (jnp.asarray(3 + rng.normal(size=(m, d)), dtype) for m in (n, k))
    center = nearest.mean_code(codebook, normalize)
    codes = codebook.astype(jnp.float32)
    codes = codes / jnp.linalg.norm(codes, axis=1, keepdims=True) if normalize else codes
    query = -2 * (z.astype(jnp.float32) - center[None])
    return query, codebook, center, jnp.sum(jnp.square(codes - center[None]), axis=1)


def best(candidates):
    score, index = candidates
    low = np.min(score, axis=1)
    return low, np.where(score == low[:, None], index, np.iinfo(np.int32).max).min(axis=1)


def interpreted(kernel, *arrays, normalize=False, precision="highest", classes=1):
    more = {"classes": classes} if kernel is nearest_gpu else {}  # the TPU's always has 128
    return kernel.candidates(*arrays, normalize=normalize, precision=precision, interpret=True, **more)


def scanned(*arrays, normalize=False, precision="highest"):
    options = {"normalize": normalize, "precision": precision, "classes": 1, "block_size": 64}
    return nearest_xla.candidates(*arrays, **options)


@KERNELS
@pytest.mark.parametrize("precision", PRECISIONS)
def test_scores_and_codes_equal_those_of_the_scan(kernel, precision):
    """Sizes that fill no tile: 130 tokens, 700 codes, 20 dimensions."""
    arrays = problem(130, 700, 20)
    score, code = best(interpreted(kernel, *arrays, precision=precision))
    expected_score, expected = best(scanned(*arrays, precision=precision))
    np.testing.assert_allclose(score, expected_score, atol=1e-5 * np.abs(expected_score).max())
    assert np.mean(code == expected) > 0.98  # scores are summed in another order


@KERNELS
@pytest.mark.parametrize(("dtype", "normalize"), [(jnp.bfloat16, False), (jnp.float32, True)])
def test_bfloat16_and_normalized_codes(kernel, dtype, normalize):
    arrays = problem(70, 300, 8, dtype, normalize)
    np.testing.assert_array_equal(
        best(interpreted(kernel, *arrays, normalize=normalize))[1], best(scanned(*arrays, normalize=normalize))[1]
    )


@KERNELS
def test_equal_codes_give_the_lowest_index(kernel):
    query, codebook, center, bias = problem(20, 5, 4)
    codebook, bias = jnp.tile(codebook, (260, 1)), jnp.tile(bias, 260)
    assert best(interpreted(kernel, query, codebook, center, bias))[1].max() < 5
    zero = jnp.zeros((600, 4))
    assert not np.any(best(interpreted(kernel, query, zero, jnp.zeros(4), zero[:, 0]))[1])


@KERNELS
@pytest.mark.parametrize("d", [1024, *slow(4)])
def test_few_and_many_dimensions(kernel, d):
    arrays = problem(10, 270, d)
    np.testing.assert_array_equal(best(interpreted(kernel, *arrays))[1], best(scanned(*arrays))[1])


@KERNELS
def test_candidates_are_the_best_of_disjoint_sets_that_cover_all_codes(kernel):
    query, codebook, center, bias = problem(6, 300, 8)
    score, index = interpreted(kernel, query, codebook, center, bias, classes=128)
    all_scores = bias[None] + query @ (codebook - center[None]).T
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(all_scores), np.asarray(index), axis=1)[np.isfinite(score)],
        np.asarray(score)[np.isfinite(score)],
        rtol=1e-4,
        atol=1e-4,
    )
    for row in index:
        finite = np.asarray(row)[np.isfinite(score[0])]
        assert len(np.unique(finite)) == len(finite) >= 128


@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e:2x2", *slow("v5p:2x2x1", "v6e:2x2")])
@pytest.mark.parametrize("precision", nearest.PASSES)
def test_compiles_for_tpu(chip, precision):
    """Interpret mode also runs kernels that Mosaic refuses."""
    compile_for(tpu_devices(chip), 8192, 262144, 256, precision=precision, most_mib=64)


@needs_libtpu
@pytest.mark.parametrize(
    ("n", "k", "d", "dtype", "l2_normalize"),
    [
        (100, 300, 4, jnp.float32, False),
        (1000, 5000, 8, jnp.float32, True),
        (65, 1000, 40, jnp.bfloat16, True),
        (4096, 16384, 1024, jnp.float32, False),
    ],
)
def test_compiles_for_tpu_at_any_size(n, k, d, dtype, l2_normalize):
    for precision in ("highest", "bf16_3x"):
        compile_for(tpu_devices("v5e:2x2"), n, k, d, dtype, precision=precision, l2_normalize=l2_normalize)


@needs_cuda
@pytest.mark.parametrize("precision", nearest.PASSES)
def test_compiles_for_gpu(precision):
    """The parts of the codebook are the only large temporary."""
    parts_mib = 262144 * 256 * 2 * nearest.PASSES[precision] / 2**20
    for n, k, d in ((8192, 262144, 256), (65, 1000, 40)):
        compile_for(gpu_devices(), n, k, d, precision=precision, most_mib=64 + parts_mib)


def compile_for(devices, n, k, d, dtype=jnp.float32, most_mib=64, **options):
    where = SingleDeviceSharding(devices[0])
    z, codebook = (jax.ShapeDtypeStruct((m, d), dtype, sharding=where) for m in (n, k))
    search = jax.jit(functools.partial(nearest.nearest_code, **options), out_shardings=where)
    compiled = search.lower(z, codebook).compile()
    assert ("tpu_custom_call" if devices[0].platform == "tpu" else "triton") in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes <= most_mib * 2**20
