import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from fvq_jax.models.layers import AttentionBlock
from fvq_jax.models.quantizers import make_quantizer
from fvq_jax.models.quantizers.bridge import make_bridge
from fvq_jax.ops import attention as module
from fvq_jax.ops.attention import attention
from fvq_jax.runtime.products import product_flops
from tests.helpers.chips import ACCELERATORS
from tests.helpers.compiled_program import operations
from tests.helpers.golden_case import relative_error


@functools.cache
def arrays(b, n, h, c, dtype=jnp.float32, largest=4):
    """Queries, keys, values, and weights of the result."""
    rng = np.random.default_rng(n)
    return tuple(jnp.asarray(scale * rng.standard_normal((b, n, h, c)), dtype) for scale in (largest, 2, 1, 1))


def oracle(q, k, v, weights):
    """The result and the gradients of its weighted sum, in float64."""
    q, k, v, weights = (np.moveaxis(np.float64(x), 1, 2) for x in (q, k, v, weights))
    scale = q.shape[-1] ** -0.5
    scores = scale * q @ np.swapaxes(k, 2, 3)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    of_p = weights @ np.swapaxes(v, 2, 3)
    of_scores = scale * p * (of_p - (of_p * p).sum(-1, keepdims=True))
    found = p @ v, of_scores @ k, np.swapaxes(of_scores, 2, 3) @ q, np.swapaxes(p, 2, 3) @ weights
    return [np.moveaxis(x, 1, 2) for x in found]


def result_and_gradients(q, k, v, weights, **options):
    def weighted(q, k, v):
        found = attention(q, k, v, **options)
        return jnp.sum(found * weights), found

    (_, found), gradients = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return found, *gradients


def largest_array(program):
    shapes = re.findall(r"<((?:\d+x)*\d+)x(?:f32|bf16)>", program)
    return max(math.prod(map(int, shape.split("x"))) for shape in shapes)


@pytest.mark.parametrize("shape", [(1, 192, 4, 8), (2, 200, 1, 16), (3, 129, 2, 4), (1, 128, 4, 8), (2, 5, 1, 4)])
def test_it_is_that_of_float64_and_so_are_its_gradients(shape):
    case = arrays(*shape)
    for found, expected in zip(result_and_gradients(*case), oracle(*case), strict=True):
        assert relative_error(found, expected) < 1e-5
    for found, expected in zip(result_and_gradients(*case, divided=True), oracle(*case), strict=True):
        assert relative_error(found, expected) < 1e-5


def test_scores_beyond_what_exp_can_take_do_no_harm():
    case = arrays(2, 200, 1, 16, largest=64)
    for found, expected in zip(result_and_gradients(*case), oracle(*case), strict=True):
        assert relative_error(found, expected) < 1e-3


def test_equal_keys_with_huge_scores_have_equal_weights():
    q, _, v, weights = arrays(1, 192, 1, 8)
    found = result_and_gradients(1e4 * q, jnp.ones_like(v), v, weights)
    np.testing.assert_allclose(found[0], np.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-5)
    expected = np.broadcast_to(weights.mean(1, keepdims=True), v.shape)
    np.testing.assert_allclose(found[3], expected, atol=1e-5)


def test_bfloat16_is_summed_in_float32():
    case = arrays(1, 320, 2, 8, jnp.bfloat16)
    for found, expected in zip(result_and_gradients(*case), oracle(*case), strict=True):
        assert found.dtype == jnp.bfloat16
        assert relative_error(found.astype(jnp.float32), expected) < 5e-3


def test_it_can_be_differentiated_twice():
    q, k, v, weights = arrays(1, 130, 1, 4)

    def penalty(q, divided):
        gradient = jax.grad(lambda q: jnp.sum(attention(q / 8, k / 16, v, divided=divided) * weights))(q)
        return jnp.sum(gradient**2)

    found, expected = (jax.jit(jax.grad(penalty), static_argnums=1)(q, divided) for divided in (False, True))
    assert relative_error(found, expected) < 1e-4


def lowered(n, platform, **options):
    q, k, v, weights = (jax.ShapeDtypeStruct((1, n, 1, 32), jnp.float32) for _ in range(4))
    gradient = jax.jit(lambda *case: result_and_gradients(*case, **options))
    return gradient.trace(q, k, v, weights).lower(lowering_platforms=(platform,)).as_text()


def test_a_cpu_never_has_all_scores():
    case = arrays(1, 1024, 1, 8)
    small, large = (
        jax.jit(lambda *case, d=divided: result_and_gradients(*case, divided=d)).lower(*case).compile()
        for divided in (False, True)
    )
    all_scores = 4 * 1024**2
    assert small.memory_analysis().temp_size_in_bytes < all_scores / 4
    assert large.memory_analysis().temp_size_in_bytes > all_scores
    assert "stablehlo.while" not in lowered(2 * module.QUERIES, "cpu")
    assert "stablehlo.while" not in lowered(1024, "tpu")


@pytest.mark.parametrize(("side", "blocks"), [(64, False), (65, True), (128, True)])
def test_no_accelerator_has_all_scores_of_many_positions(side, blocks):
    """Up to 64 x 64 positions the program is the one that there always was."""
    program = lowered(side**2, "tpu")
    assert (largest_array(program) < side**4) == blocks
    assert ("stablehlo.while" in program) == blocks


@pytest.mark.parametrize("limit", [16 * 5, 1])  # blocks of five queries, which do not divide 16, and of one
def test_the_blocks_of_an_accelerator_give_the_same(limit):
    case = arrays(2, 16, 2, 8)
    for found, expected in zip(result_and_gradients(*case, limit=limit), oracle(*case), strict=True):
        assert relative_error(found, expected) < 1e-5


def test_a_bridge_has_all_scores_on_an_accelerator():
    bridge, codes = make_bridge("XS/1-d1", "1d", jnp.float32), jax.ShapeDtypeStruct((65**2, 4), jnp.float32)
    params = jax.eval_shape(bridge.init, jax.random.key(0), codes)
    traced = jax.jit(bridge.apply).trace(params, codes)
    for platform, blocks in (("cpu", True), ("tpu", False), ("cuda", False)):
        assert ("stablehlo.while" in traced.lower(lowering_platforms=(platform,)).as_text()) == blocks


def test_all_products_are_counted_as_an_accelerator_computes_them():
    q, k, v, weights = (jax.ShapeDtypeStruct((1, 1024, 1, 32), jnp.float32) for _ in range(4))
    counts = [
        product_flops(jax.jit(lambda *case, d=d: result_and_gradients(*case, divided=d)).trace(q, k, v, weights).jaxpr)
        for d in (False, True)
    ]
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("devices", ACCELERATORS)
def test_the_program_of_an_accelerator_does_not_change(devices):
    sharding = SingleDeviceSharding(devices()[0])
    case = [jax.ShapeDtypeStruct((1, 192, 2, 8), jnp.float32, sharding=sharding)] * 4
    found, expected = (
        operations(jax.jit(lambda *case, d=divided: result_and_gradients(*case, divided=d)).lower(*case).compile())
        for divided in (False, True)
    )
    assert found == expected


def test_a_divided_batch_gives_the_same():
    case = arrays(8, 130, 1, 4)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    divided = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in case]
    program = jax.jit(result_and_gradients).lower(*divided).compile()
    assert not re.search(r" (all|collective|reduce-scatter)[\w-]*\(", program.as_text())
    for found, expected in zip(program(*divided), oracle(*case), strict=True):
        assert relative_error(found, expected) < 1e-5


def test_images_and_bridges_use_it():
    block, x = AttentionBlock(), jnp.zeros((1, 12, 12, 32))
    params = jax.eval_shape(block.init, jax.random.key(0), x)
    assert "stablehlo.while" in jax.jit(block.apply).lower(params, x).as_text()
    settings = {"name": "vector", "codebook_size": 1024, "code_dim": 4, "bridge": "XS/2-d1"}
    for axis, in_blocks in ((1, True), (4, False)):
        mesh = jax.make_mesh((1, axis), ("data", "codebook"), (AxisType.Auto,) * 2, devices=jax.devices()[:axis])
        quantizer = make_quantizer(settings, mesh=mesh)
        params = jax.eval_shape(quantizer.init, jax.random.key(0), jnp.zeros((4, 2, 2, 4)))
        table = jax.jit(functools.partial(quantizer.apply, method="table"))
        assert ("stablehlo.while" in table.lower(params).as_text()) == in_blocks
