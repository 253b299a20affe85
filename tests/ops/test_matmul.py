import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from fvq_jax.ops.matmul import matmul, matmul_precision
from tests.helpers.chips import ACCELERATORS
from tests.helpers.compiled_program import operations
from tests.helpers.golden_case import relative_error


def arrays(shape, features, dtype):
    """Input, kernel (float32), and weights of the result."""
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal(shape), rng.standard_normal((*shape[:-1], features))
    kernel = rng.standard_normal((shape[-1], features))
    return jnp.asarray(x, dtype), jnp.asarray(kernel, jnp.float32), jnp.asarray(weights, dtype)


def weighted(x, kernel, weights):
    return jnp.sum(matmul(x, kernel) * weights, dtype=jnp.float32)


gradients = jax.jit(jax.grad(weighted, argnums=(0, 1)))


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (2, 1, 3, 7), (1, 4)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_product_and_gradients(shape, dtype, tolerance):
    x, kernel, weights = arrays(shape, 9, dtype)
    # The kernel is rounded to the dtype of x before it is multiplied.
    exact = [np.asarray(y.astype(dtype).astype(jnp.float32), np.float64) for y in (x, kernel, weights)]
    product = exact[0] @ exact[1]
    to_x = exact[2] @ exact[1].T
    to_kernel = np.einsum("nc,nf->cf", exact[0].reshape(-1, shape[-1]), exact[2].reshape(-1, 9))

    found = matmul(x, kernel), *gradients(x, kernel, weights)
    assert [y.dtype for y in found] == [dtype, dtype, jnp.float32]
    for y, expected in zip(found, (product, to_x, to_kernel), strict=True):
        assert y.shape == expected.shape
        assert relative_error(y.astype(jnp.float32), expected) < tolerance


def by_differentiation(x, kernel, weights):
    """The gradients that JAX makes of the product itself."""
    product = functools.partial(jnp.matmul, precision="highest")
    return jax.grad(lambda x, kernel: jnp.sum(product(x, kernel) * weights), argnums=(0, 1))(x, kernel)


def test_a_cpu_transposes_rows_in_memory():
    """A product that reads them as they are sums over the first axis of both."""
    case = arrays((48, 32), 40, jnp.float32)
    found, control = (jax.jit(run).lower(*case).compile().as_text() for run in (gradients, by_differentiation))
    over_first = r"lhs_contracting_dims=\{0\}, rhs_contracting_dims=\{0\}"
    assert re.search(over_first, control)
    assert not re.search(over_first, found)


@pytest.mark.parametrize("devices", ACCELERATORS)
def test_the_program_of_an_accelerator_does_not_change(devices):
    sharding = SingleDeviceSharding(devices()[0])
    case = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in ((256, 128), (128, 384), (256, 384))
    ]
    found, expected = (operations(jax.jit(run).lower(*case).compile()) for run in (gradients, by_differentiation))
    assert found == expected


def test_the_backward_pass_does_not_multiply_again():
    """Where products are kept, as between the layers of a generator, a gradient takes two products and no more."""
    x, kernel, weights = arrays((6, 5), 9, jnp.float32)
    layer = jax.checkpoint(
        lambda x, kernel: jnp.sin(matmul(jnp.sin(x), kernel)),
        policy=lambda primitive, *_, **__: primitive.name == "dot_general",
    )
    found = jax.make_jaxpr(jax.grad(lambda x, kernel: jnp.sum(layer(x, kernel) * weights), argnums=(0, 1)))
    assert str(found(x, kernel)).count("dot_general[") == 3


def test_precision():
    assert matmul_precision("float32") == "highest"
    assert matmul_precision(jnp.bfloat16) is None
